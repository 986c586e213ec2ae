"""What is wrong with a fit: figures of its ELBO, its latent space and its course, and the rules that judge them."""
