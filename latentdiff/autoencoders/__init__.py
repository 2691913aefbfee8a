"""Stage 1: build and load autoencoders, their training losses, latent statistics and reports."""
