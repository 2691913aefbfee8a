"""Data: images from where the user keeps them, in an order that the seed fixes, and their latents cached on disk."""
