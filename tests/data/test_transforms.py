"""Preprocessing: the rules say exactly which pixels come out, and sizes that do not fit are refused."""

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.data.datasets import ImageDataset
from latentdiff.data.sources import ArraySource, ImageSource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.utils.images import to_uint8


def ramp(height: int, width: int, channels: int = 1) -> np.ndarray:
    return np.arange(height * width * channels, dtype=np.uint8).reshape(height, width, channels)


class Mixed(ImageSource):
    """Images of several sizes, in memory."""

    def __init__(self, *images: np.ndarray):
        super().__init__("mixed", images[0].shape[2], [], None, None, np.array([image.shape[:2] for image in images]))
        self.images = images

    def read(self, i: int) -> np.ndarray:
        return self.images[i]


def test_levels_survive_the_round_trip():
    image = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    tensor = Preprocess((16, 16))(image)
    assert tensor.shape == (1, 16, 16) and tensor.dtype == torch.float32
    assert tensor.min() == -1 and tensor.max() == 1
    assert np.array_equal(to_uint8(tensor[None])[0], image)
    assert to_uint8(torch.tensor([-2.0, 3.0]).view(1, 1, 1, 2)).flatten().tolist() == [0, 255]


def test_channels_last_to_first_and_rgb_order():
    image = ramp(2, 3, 3)
    assert np.array_equal(to_uint8(Preprocess((2, 3))(image)[None])[0], image)


@pytest.mark.parametrize("channels", [1, 3])
def test_memory_is_laid_out_plane_by_plane(channels):
    # Of one channel is_contiguous says nothing: a network takes strides of (hw, 1, w, 1) for channels-last throughout
    images = Preprocess((6, 5)).batch([ramp(6, 5, channels)] * 2, [False, True])
    assert images.stride() == (30 * channels, 30, 5, 1)


@pytest.mark.parametrize(
    "size, multiple, padded, content",
    [
        ((28, 28), 8, (32, 32), (2, 2, 28, 28)),
        ((5, 8), 4, (8, 8), (1, 0, 5, 8)),
        ((8, 8), 4, (8, 8), (0, 0, 8, 8)),
    ],
)
def test_padding_is_symmetric_and_known(size, multiple, padded, content):
    rule = Preprocess(size, 1, "pad", multiple)
    image = np.full((*size, 1), 255, np.uint8)
    tensor = rule(image)
    assert rule.padded_size == tensor.shape[1:] == padded and rule.content == content
    assert (rule.crop_content(tensor) == 1).all() and rule.crop_content(tensor).shape[1:] == size
    assert (tensor == 1).sum() == image.size and (tensor == -1).sum() == tensor.numel() - image.size


def test_pad_to_a_larger_size_keeps_the_images_own_as_content():
    white = ArraySource("x", np.full((2, 28, 28, 1), 255, np.uint8), None)
    dataset = ImageDataset(white, Preprocess((32, 32), 1, "pad"))
    assert dataset.preprocess.content == (2, 2, 28, 28) and dataset.batch([0])[0].shape == (1, 1, 32, 32)
    assert dataset.preprocess.crop_content(dataset.batch([0])[0]).min() == 1


def test_pad_modes_differ_as_numpy_says():
    image = ramp(3, 3)
    for mode, numpy_mode in (("edge", "edge"), ("reflect", "reflect")):
        tensor = Preprocess((3, 3), 1, "pad", 5, mode)(image)
        assert np.array_equal(to_uint8(tensor[None])[0, ..., 0], np.pad(image[..., 0], 1, mode=numpy_mode))


def test_flip_mirrors_the_content_and_not_the_border():
    rule = Preprocess((2, 3), 1, "pad", 4)  # an odd border: one pixel, on the right
    straight, mirrored = rule(ramp(2, 3)), rule(ramp(2, 3), flip=True)
    assert torch.equal(rule.crop_content(mirrored), rule.crop_content(straight).flip(-1))
    assert (mirrored[..., -1] == -1).all()


def test_crop_takes_the_middle_and_resize_all():
    image = np.zeros((10, 30, 1), np.uint8)
    image[:, 10:20] = 255  # white in the middle third
    assert (Preprocess((10, 10), 1, "crop")(image) == 1).all()
    stretched = Preprocess((10, 15), 1, "resize")(image)
    assert stretched.shape == (1, 10, 15) and stretched[0, 5, 0] == -1 and stretched[0, 5, 7] > 0.9


def test_crop_takes_images_whose_box_rounds_beyond_them():
    for size in ((29, 40), (58, 100), (40, 29)):
        assert Preprocess((28, 28), 1, "crop")(np.zeros((*size, 1), np.uint8)).shape == (1, 28, 28)


def test_crop_scales_without_aliasing():
    board = (np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8)[..., None]  # a checkerboard's mean is grey
    small = Preprocess((8, 8), 1, "crop")(board)
    assert small[:, 1:-1, 1:-1].abs().max() < 0.02


def test_resize_is_pillows_lanczos():
    image = np.random.default_rng(0).integers(0, 255, (12, 9, 3), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((6, 8), Image.Resampling.LANCZOS))
    assert np.array_equal(to_uint8(Preprocess((8, 6), 3, "resize")(image)[None])[0], expected)


def test_channels_convert_by_the_stated_rule():
    grey = to_uint8(Preprocess((1, 1), 1)(np.array([[[200, 100, 50]]], np.uint8))[None]).item()
    assert grey == pytest.approx(0.299 * 200 + 0.587 * 100 + 0.114 * 50, abs=1)
    assert to_uint8(Preprocess((1, 1), 3)(np.array([[[9]]], np.uint8))[None]).flatten().tolist() == [9, 9, 9]


def test_misfits_are_refused_with_the_settings_that_would_do():
    square, wide = np.zeros((8, 8, 1), np.uint8), np.zeros((8, 12, 1), np.uint8)
    for call, said in [
        (
            lambda: Preprocess((28, 28), multiple_of=8),
            r"not a multiple of 8: set framing=pad, or size=\[24, 24\] or size=\[32, 32\]",
        ),
        (lambda: Preprocess().for_source(Mixed(square, wide)), r"2 sizes \(8x8 … 8x12\): set data.size=.* data.framing=crop"),
        (lambda: Preprocess((8, 8)).for_source(Mixed(square, wide)), "8x12 does not fit 8x8 with framing=exact"),
        (lambda: Preprocess((16, 16), framing="pad").for_source(Mixed(square, wide)), "8x12 does not fit 8x8 with"),
        (
            lambda: Preprocess((4, 4), framing="pad").for_source(Mixed(square)),
            "8x8 does not fit 4x4 with framing=pad.* set data.framing to one of crop .*, letterbox ",
        ),
        (lambda: Preprocess(multiple_of=5).for_source(Mixed(square)), "8x8 is not a multiple of 5"),
        (lambda: Preprocess(framing="cover"), "framing 'cover': valid are exact, resize, crop, pad, letterbox"),
        (lambda: Preprocess(pad_mode="grey"), "valid are constant, edge, reflect"),
        (lambda: Preprocess(channels=4), "channels=4"),
        (lambda: Preprocess((8,)), "height, width"),
        (lambda: Preprocess().content, "size is not set"),
    ]:
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\n" not in str(error.value)


def test_dataset_of_mixed_sizes_and_a_subset():
    levels = {(8, 8, 1): 0, (8, 12, 1): 255, (5, 5, 1): 51}
    source = Mixed(*(np.full(shape, level, np.uint8) for shape, level in levels.items()))
    dataset = ImageDataset(source, Preprocess((4, 4), framing="crop"), indices=[2, 1])
    images, labels = dataset.batch([0, 1])
    assert len(dataset) == 2 and labels is None and images.shape == (2, 1, 4, 4)
    assert images[0].unique().tolist() == pytest.approx([51 / 127.5 - 1]) and (images[1] == 1).all()


def test_dataset_flips_each_its_own():
    source = ArraySource("x", np.stack([ramp(4, 4)] * 3), torch.tensor([2, 0, 1]), ["a", "b", "c"])
    dataset = ImageDataset(source, Preprocess())
    images, labels = dataset.batch(torch.tensor([0, 2]), flips=torch.tensor([True, False]))
    assert torch.equal(images[0], images[1].flip(-1)) and labels.tolist() == [2, 1]
    assert torch.equal(dataset.batch([0])[0][0], images[1])
    assert dataset.labels.tolist() == [2, 0, 1] and ImageDataset(source, Preprocess(), [1]).labels.tolist() == [0]


def test_description_and_fingerprint_tell_what_changes_the_pixels():
    source = ArraySource("x", np.zeros((3, 8, 8, 1), np.uint8), None)
    padded = Preprocess(framing="pad", multiple_of=16)
    rules = [
        Preprocess(),
        padded,
        Preprocess(framing="pad", multiple_of=16, pad_mode="edge"),
        Preprocess((4, 4), framing="crop"),
        Preprocess((4, 4), framing="resize"),
        Preprocess(channels=3),
    ]
    described = [str(rule.for_source(source).describe()) for rule in rules]
    assert len(set(described)) == len(rules)
    assert str(Preprocess((8, 8), 1, multiple_of=4).for_source(source).describe()) == described[0]  # the same pixels
    parts = (None, [0, 1, 2], [0, 2, 1], [0])
    prints = {ImageDataset(source, Preprocess(), indices).fingerprint() for indices in parts}
    assert len(prints) == 3
