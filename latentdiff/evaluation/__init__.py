"""Measure generated images, and compare checkpoints, samplers and denoisers."""

DEFAULT_FEATURES = "weights/fashion-mnist-features"  # the feature network that ships, for grey images
RGB_FEATURES = "weights/rgb-features"  # the one for colour


def default_features(channels: int) -> str:
    """The feature network that ships for images of so many channels."""
    from latentdiff.utils.shipped import shipped_folder

    folder = shipped_folder("weights")
    ships = folder is not None and (folder / RGB_FEATURES.removeprefix("weights/") / "model.safetensors").is_file()
    return RGB_FEATURES if channels == 3 and ships else DEFAULT_FEATURES
