"""The ELBO doctor: what the bound of a fit is made of, which way its gradients flow, and what ails it."""
