"""Honest numbers for generated images: features, streaming statistics, scores, and a report with its protocol."""

DEFAULT_FEATURES = "weights/fashion-mnist-features"  # the feature network that the commands measure with
