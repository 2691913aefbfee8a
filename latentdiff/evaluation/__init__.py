"""Measure generated images, and compare checkpoints, samplers and denoisers."""

DEFAULT_FEATURES = "weights/fashion-mnist-features"  # the feature network that ships
