"""Honest numbers for generated images: features, streaming statistics, scores, and a report with its protocol."""
