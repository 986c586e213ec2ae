"""The Pyro programs."""
