"""The ELBO doctor: what a bound is made of, which way its gradients flow, and the rules that say what ails a fit."""
