"""Images from where the user keeps them, in an order fixed by the seed, and their latents cached on disk."""
