"""Moved and scaled copies of images: what they show, that they are always the same, and how data sets and caches hold them."""

import json

import numpy as np
import pytest
import torch
from test_latent_cache import PlainCodec, build, one_line

from latentdiff.data.copies import Copies, plain_sides
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import ArraySource
from latentdiff.data.latent_cache import identity
from latentdiff.data.shuffling import stream
from latentdiff.data.transforms import FRAMINGS, Preprocess
from latentdiff.errors import UserError

WHITE, INK = 255, 40
EIGHT = Copies(8, 0.2, 0.2)
SIZE = (32, 32)


def drawing(height: int = 40, width: int = 40, ground: int = WHITE) -> np.ndarray:
    """A dark block on a plain ground, nearer to the top left; uint8 [H, W, 3]."""
    image = np.full((height, width, 3), ground, dtype=np.uint8)
    image[4 : height // 2, 6 : width // 2] = INK
    return image


def photograph(height: int = 40, width: int = 60, seed: int = 0) -> np.ndarray:
    """Levels from 60 to 120 up to the edges, no two corners alike, so that white or black can only come from a fill."""
    across = np.linspace(60, 120, width)[None] * np.linspace(0.99, 0.5, height)[:, None] + 20
    noise = np.random.default_rng(seed).uniform(-3, 3, (height, width))
    return np.repeat((across + noise).clip(45, 125).astype(np.uint8)[..., None], 3, axis=-1)


def copies_of(image: np.ndarray, framing: str, copies: Copies = EIGHT, size=SIZE, background=(255, 255, 255)) -> torch.Tensor:
    """All copies of one image as levels 0 to 255, [copies, C, H, W]."""
    dataset = ImageDataset(
        ArraySource("one", image[None], None), Preprocess(size, 3, framing, background=background), copies=copies
    )
    return ((dataset.batch(torch.arange(len(dataset)))[0] + 1) * 127.5).round()


def toy(copies: Copies | None = None, n: int = 22) -> ImageDataset:
    images = np.random.default_rng(0).integers(0, 255, (n, 8, 8, 1), dtype=np.uint8)
    more = {} if copies is None else {"copies": copies}
    return ImageDataset(ArraySource("toy", images, torch.arange(n) % 3, ["a", "b", "c"]), Preprocess(), **more)


# what a copy shows


@pytest.mark.parametrize("framing", FRAMINGS)
def test_copy_0_is_the_image_and_the_others_differ(framing):
    image = photograph() if framing in ("crop", "resize", "letterbox") else photograph(32, 32)
    made, plain = copies_of(image, framing), copies_of(image, framing, Copies(1, 0.0, 0.0))
    assert torch.equal(made[0], plain[0]) and made.shape == (8, 3, *SIZE)
    assert len({copy.numpy().tobytes() for copy in made}) == 8


@pytest.mark.parametrize("copies", [EIGHT, Copies(8, 0.2, 0.0), Copies(8, 0.0, 0.2)])
@pytest.mark.parametrize("framing", ["crop", "resize", "exact", "pad"])
def test_a_photograph_gets_no_border(framing, copies):
    image = photograph(32, 32) if framing in ("exact", "pad") else photograph()
    made = copies_of(image, framing, copies)
    assert made.min() > 35 and made.max() < 135
    # Also with no room: then a strip is mirrored. By whole pixels two copies may be alike
    assert len({copy.numpy().tobytes() for copy in made}) >= 7


def test_a_photograph_in_a_letterbox_moves_between_the_bars_alone():
    made = copies_of(photograph(20, 40), "letterbox", background=(255, 0, 0))  # 16 of 32 rows
    red = made[:, 0]  # [8, 32, 32]; of the bars 255, of the photograph at most 125
    assert (red.amax(2) - red.amin(2)).max() < 85  # within a row: no bar at the left or the right
    rows = red.gt(140).float().mean(2)
    assert len({int(row.nonzero()[0]) for row in rows.lt(0.5)}) > 3
    assert (rows.lt(0.5).sum(1) >= 15).all()  # whole, and never narrower than the frame


@pytest.mark.parametrize("framing, ground", [("crop", WHITE), ("letterbox", WHITE), ("resize", 0), ("crop", 90)])
def test_a_drawing_is_never_cut_and_keeps_its_ground(framing, ground):
    image = drawing(ground=ground)
    made = copies_of(image, framing)
    edges = torch.cat([made[:, :, 0], made[:, :, -1], made[:, :, :, 0], made[:, :, :, -1]], 2)
    assert (edges - ground).abs().max() <= 0.12 * abs(INK - ground)  # Lanczos rings where a drawing comes near
    ink = (made[:, 0] - ground).abs() > abs(INK - ground) / 2
    area = ink.float().sum((1, 2)) / ink[0].sum()
    assert area.min() > 0.55 and area.max() < 1.6 and area.max() > 1.05 > 0.95 > area.min()
    corners = {(int(k.any(1).nonzero()[0]), int(k.any(0).nonzero()[0])) for k in ink}
    assert len(corners) > 4


def test_a_drawing_that_fills_the_frame_only_shrinks():
    image = drawing()
    image[0, 20], image[-1, 20], image[20, 0], image[20, -1] = 4 * [[INK] * 3]
    assert all(bool((copy[0] < 200).any(axis).sum() <= 32) for copy in copies_of(image, "crop") for axis in (0, 1))
    wide = copies_of(image, "crop", Copies(20, 0.5, 0.2))
    dots = [(copy[0, 0:1].lt(235).any(), copy[0, -1:].lt(235).any()) for copy in wide]
    whole = wide[:, 0].lt(235)
    spans = [
        (int(k.any(1).nonzero()[-1] - k.any(1).nonzero()[0]), int(k.any(0).nonzero()[-1] - k.any(0).nonzero()[0]))
        for k in whole
    ]
    assert len(dots) == 20 and all(tall >= 24 and across >= 24 for tall, across in spans)  # 32 / 1.2: all four dots are there


def test_whole_pixels_are_moved_where_nothing_is_scaled():
    image = drawing(32, 32)
    made = copies_of(image, "exact", Copies(8, 0.2, 0.0))
    assert set(made.unique().tolist()) == {float(INK), float(WHITE)}
    assert (made[:, 0].eq(INK).sum((1, 2)) == 12 * 10).all()


def test_one_resampling_from_the_pixels_of_the_file():
    """A copy that is 1.5 times larger shows detail that the image at its size has lost."""
    image = np.zeros((96, 96, 3), dtype=np.uint8)
    image[:, ::4], image[:, 1::4] = 200, 200  # stripes of period 4; at a third they are above Nyquist
    image[:, :2] = 60
    made = copies_of(image, "resize", Copies(30, 0.0, 0.5), size=(32, 32))
    contrast = made[:, 0].std((1, 2))
    assert contrast[0] < 20 and contrast.max() > 2 * contrast[0]


def test_sides_are_plain_where_the_ground_goes_on():
    assert plain_sides(drawing())[1].all()
    assert plain_sides(photograph())[0] is None
    bust = drawing()
    bust[20:, 4:] = INK  # down to the bottom and its right corner
    ground, sides = plain_sides(bust)
    assert ground is not None and sides.tolist() == [[True, False], [True, False]]
    vignette = photograph(40, 40) // 2 + 60
    vignette[:3, :3] = vignette[:3, -3:] = vignette[-3:, :3] = vignette[-3:, -3:] = 0
    assert plain_sides(vignette)[0] is None  # dark corners are no ground


# always the same ones


def test_copies_follow_from_image_and_copy_alone():
    whole, again = toy(EIGHT), toy(EIGHT)
    every = whole.batch(torch.arange(176))[0]
    for rows in ([175, 3, 3, 80], [9], [80, 9, 16, 0]):
        assert torch.equal(again.batch(rows)[0], every[rows])
    alike = ImageDataset(ArraySource("two", np.stack([drawing(), drawing()]), None), Preprocess(), copies=EIGHT)
    first, second = alike.batch(torch.arange(16))[0].split(8)
    assert not any(torch.equal(a, b) for a, b in zip(first[1:], second[1:], strict=True))  # each image is moved in its own way
    later = ImageDataset(whole.source, Preprocess(), torch.tensor([5, 7]), copies=EIGHT)  # other images in use
    assert torch.equal(later.batch(torch.arange(8, 16))[0], every[56:64])
    assert torch.equal(toy(Copies(3, 0.2, 0.2)).batch([8])[0], every[[18]])  # image 2, copy 2: however many there are
    assert torch.equal(whole.batch([11, 12], flips=True)[0], every[[11, 12]].flip(3))
    assert not torch.equal(toy(Copies(8, 0.2, 0.1)).batch([1])[0], every[[1]])


def test_labels_order_and_blocks_count_each_copy():
    plain, several = toy(), toy(Copies(3, 0.1, 0.0))
    assert len(several) == 66 and several.labels.tolist() == plain.labels.repeat_interleave(3).tolist()
    images, labels = several.batch([0, 4, 5, 65])
    assert labels.tolist() == [0, 1, 1, 0] and torch.equal(images[0], plain.batch([0])[0][0])
    assert several.fingerprint() == plain.fingerprint() and several.latents_fingerprint() == plain.latents_fingerprint()
    assert sorted(stream(66, 0, 0, 66).tolist()) == list(range(66))
    several.source.blocks = (10, 12)
    streamed = ImageDataset(several.source, Preprocess(), torch.arange(2, 22), copies=Copies(3, 0.1, 0.0))
    assert streamed.blocks == (24, 36)


def test_captions_are_those_of_the_image_that_is_read():
    dataset = toy(Copies(2, 0.1, 0.0), n=3)
    dataset.source.captions, dataset.source.files = [("a",), ("b",), ("c",)], ["0", "1", "2"]
    assert dataset.captions() == [("a",), ("a",), ("b",), ("b",), ("c",), ("c",)]
    assert dataset.captions({"0", "2"}) == [("b",)] * 6


def test_copies_that_would_all_be_alike_are_refused():
    with pytest.raises(UserError, match=r"^data.copies: all 4 would be the image itself; .*data.shift=0.05 .*data.copies=1$"):
        Copies(4, 0.0, 0.0)


# the latent cache


def test_the_cache_records_the_copies_and_refuses_others(tmp_path):
    codec, several = PlainCodec(), toy(Copies(3, 0.2, 0.1))
    cache = build(tmp_path / "three", codec, several, flips=True)
    assert len(cache) == 66 and codec.encoded == 132
    mean, _ = cache.moments([4, 4], torch.tensor([False, True]))
    for k, flip in enumerate((False, True)):
        assert torch.equal(mean[k], PlainCodec().moments(several.batch([4], flips=flip)[0])[0][0])
    assert cache.manifest["identity"]["copies"] == {"copies": 3, "shift": 0.2, "zoom": 0.1}
    build(tmp_path / "three", codec, toy(Copies(3, 0.2, 0.1)))
    assert codec.encoded == 132  # nothing anew
    for other in (None, Copies(3, 0.2, 0.2), Copies(3, 0.1, 0.1), Copies(2, 0.2, 0.1)):
        with pytest.raises(UserError, match="other .*data.copies, data.shift or data.zoom") as error:
            build(tmp_path / "three", codec, toy(other))
        one_line(error)
    build(tmp_path / "one", codec, toy())
    with pytest.raises(UserError, match="data.copies, data.shift or data.zoom .copies 1, now 3, shift 0.0, now 0.2"):
        build(tmp_path / "one", codec, several)


def test_without_copies_nothing_that_is_written_changes(tmp_path):
    cache = build(tmp_path, PlainCodec(), toy(Copies(1, 0.0, 0.0)))
    assert "copies" not in cache.manifest["identity"] and "copies" not in json.dumps(identity(PlainCodec(), toy()))
    assert len(cache) == 22
