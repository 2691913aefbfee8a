"""Labelled pictures that a tiny network tells apart in seconds: stripes across, stripes down, and blank, in noise."""

import numpy as np
import torch

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource
from latentdiff.data.transforms import Preprocess

CLASSES = ["across", "down", "blank"]


def stripe_pixels(n: int, seed: int = 0, size: int = 18) -> tuple[np.ndarray, torch.Tensor]:
    """uint8 [n, size, size, 1] and labels int64 [n], classes in turn, phase, contrast and noise random."""
    generator = np.random.default_rng(seed)
    labels = np.arange(n) % len(CLASSES)
    phase, contrast = generator.integers(0, 4, n), generator.uniform(40, 100, n)
    wave = np.where((np.arange(size)[None] + phase[:, None]) % 4 < 2, 1.0, -1.0) * contrast[:, None]  # [n, size]
    across = np.repeat(wave[:, :, None], size, axis=2)
    pattern = np.select([labels[:, None, None] == 0, labels[:, None, None] == 1], [across, across.transpose(0, 2, 1)], 0)
    pixels = 128 + pattern + generator.normal(0, 15, pattern.shape)
    return pixels.clip(0, 255).astype(np.uint8)[..., None], torch.from_numpy(labels)


def stripes(n: int, seed: int = 0, **preprocess) -> ImageDataset:
    """The same as a data set."""
    return ImageDataset(ArraySource("stripes", *stripe_pixels(n, seed), CLASSES), Preprocess(**preprocess))
