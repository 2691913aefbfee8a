import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from tiny_models import tiny_vae
from tiny_runs import diffusion_tree

from latentdiff.config import DataConfig, parse_config
from latentdiff.data.datasets import ImageDataset
from latentdiff.data.image_source import ArraySource
from latentdiff.data.transforms import Preprocess
from latentdiff.errors import UserError
from latentdiff.fitting import first_stage
from latentdiff.fitting.facts import Facts
from latentdiff.fitting.first_stage import Verdict, try_autoencoder
from latentdiff.fitting.machine import Machine, Timing
from latentdiff.fitting.plan import make_plan
from latentdiff.training.latents import prepare_latents

COLORS = {"red": (200, 20, 20), "green": (20, 200, 20), "grey": (90, 90, 90)}


def write_colors(root: Path, each: int = 3, size: int = 16, mode: str = "RGB") -> Path:
    """Plain images of three classes; each has its own brightness."""
    for name, color in COLORS.items():
        for i in range(each):
            file = root / name / f"{i}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (size, size), tuple(c + i for c in color)).convert(mode).save(file)
    return root


class AddingCodec:
    """Latents are the pixels themselves, 8x8 to a place, times `scale`. It returns them with an error by their colour.

    errors: what is added to every pixel (of 2, white - black) of red, green and grey images.
    """

    image_channels, factor, latent_channels = 3, 8, 192

    def __init__(self, errors: tuple[float, float, float], scale: float = 1.0, vae: torch.nn.Module | None = None):
        self.errors, self.scale, self.vae = errors, torch.tensor([scale]), vae or tiny_vae()

    def moments(self, x):
        z = torch.nn.functional.pixel_unshuffle(x, 8)
        return z, torch.zeros_like(z)

    def normalise(self, z):
        return z * self.scale

    def decode(self, z):
        x = torch.nn.functional.pixel_shuffle(z / self.scale, 8)
        for i, image in enumerate(x.mean((2, 3))):
            red, green, blue = image.tolist()
            x[i] += self.errors[0 if red > green else 1 if green > blue else 2]
        return x


def tried(monkeypatch, tmp_path, codec, where=None, **options) -> Verdict:
    monkeypatch.setattr(first_stage, "_open", lambda name, data, device: codec)
    return try_autoencoder(where, DataConfig(source=str(write_colors(tmp_path / "data"))), **options)


def decibels(error: float) -> float:
    return -20 * torch.tensor(error / 2).log10().item()


def test_a_good_autoencoder_that_is_named_is_used_as_it_is(monkeypatch, tmp_path):
    codec = AddingCodec((0.02, 0.04, 0.06))
    assert tried(monkeypatch, tmp_path, codec).decision == "decoder"  # of the one that ships, the decoder goes on
    verdict = tried(monkeypatch, tmp_path, codec, where="elsewhere")
    assert verdict.decision == "skip"
    assert verdict.images == 9
    expected = {"red": decibels(0.02), "green": decibels(0.04), "grey": decibels(0.06)}
    assert verdict.per_class == pytest.approx(expected, abs=0.01)
    assert verdict.psnr_db == pytest.approx(sum(expected.values()) / 3, abs=0.01)
    assert verdict.worst_classes == ()
    assert "reconstructs 9 of the images at 34.8 dB on average, the lowest class, grey, at 30.5 dB (26 dB" in verdict.reason
    assert "used as it is" in verdict.reason
    assert "\n" not in verdict.reason


def test_one_class_far_below_is_enough_to_go_on(monkeypatch, tmp_path):
    verdict = tried(monkeypatch, tmp_path, AddingCodec((0.02, 0.02, 0.3)))
    assert verdict.psnr_db > first_stage.SKIP_DB
    assert verdict.worst_classes == ("grey",)
    assert verdict.decision == "decoder"


@pytest.mark.parametrize(("error", "decision", "named"), [(0.12, "decoder", "decoder"), (0.3, "train", "decoder")])
def test_a_poor_one_goes_on_or_is_replaced(monkeypatch, tmp_path, error, decision, named):
    codec = AddingCodec((error,) * 3)
    assert tried(monkeypatch, tmp_path, codec).decision == decision
    assert tried(monkeypatch, tmp_path, codec, where="elsewhere").decision == named


def test_one_that_stage_1_cannot_train_and_that_is_named_is_used_all_the_same(monkeypatch, tmp_path):
    codec = AddingCodec((0.3,) * 3, vae=torch.nn.Identity())
    verdict = tried(monkeypatch, tmp_path, codec, where="elsewhere")
    assert verdict.decision == "skip"
    assert "as it was asked for" in verdict.reason
    assert tried(monkeypatch, tmp_path, codec).decision == "train"


@pytest.mark.parametrize(("scale", "normaliser"), [(1.0, "measured"), (1.6, "stored")])
def test_a_normaliser_that_does_not_fit_is_measured(monkeypatch, tmp_path, scale, normaliser):
    verdict = tried(monkeypatch, tmp_path, AddingCodec((0.02,) * 3, scale))
    pixels = torch.tensor([(c + i) / 127.5 - 1 for color in COLORS.values() for c in color for i in range(3)])
    assert verdict.second_moment == pytest.approx(pixels.square().mean().item() * scale**2, rel=0.01)
    assert verdict.normaliser == normaliser


def test_the_sample_takes_the_classes_in_turn_and_keeps_to_its_limits(monkeypatch, tmp_path):
    labels = torch.tensor([0] * 50 + [1] * 4 + [2] * 2)
    source = ArraySource("a", np.zeros((56, 8, 8, 3), np.uint8), labels, list("abc"))
    data = ImageDataset(source, Preprocess())
    sample = first_stage._sample(data, 9)
    assert labels[sample].tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    assert len(set(sample.tolist())) == len(sample)
    assert first_stage._sample(data, 2).tolist() == [0, 54]
    data.labels = None
    assert sorted(first_stage._sample(data, 12).tolist()) == torch.linspace(0, 55, 12).long().tolist()
    assert tried(monkeypatch, tmp_path, AddingCodec((0.0,) * 3), limit_images=5).images == 5
    monkeypatch.setattr(first_stage, "BATCH_PIXELS", 16 * 16)
    assert tried(monkeypatch, tmp_path, AddingCodec((0.0,) * 3), limit_seconds=0.0).images == first_stage.LEAST_IMAGES


def test_time_decides_whether_the_decoder_goes_on(monkeypatch, tmp_path):
    verdict = dataclasses.replace(tried(monkeypatch, tmp_path, AddingCodec((0.12,) * 3)), seconds_per_image=0.01)
    assert verdict.decoder_seconds() == pytest.approx(14.4)
    assert verdict.within(15) == verdict
    assert verdict.within(14).decision == "skip"
    assert verdict.within(14).reason.endswith(
        "24.4 dB (26 dB are enough): it is used as it is, as there is no time to train its decoder"
    )
    assert Verdict.from_json(json.loads(json.dumps(verdict.as_json()))) == verdict


def test_what_does_not_fit_is_said_in_a_line(tmp_path, monkeypatch):
    tiny_vae(in_channels=3, out_channels=3).save_pretrained(tmp_path / "vae")
    grey = DataConfig(source=str(write_colors(tmp_path / "grey", mode="L")), channels=1)
    odd = DataConfig(source=str(write_colors(tmp_path / "odd", size=15)))
    for data, words in ((grey, "takes 3 channels, and data.channels is 1"), (odd, "15x15 is not a multiple of 2")):
        with pytest.raises(UserError, match=words):
            try_autoencoder(str(tmp_path / "vae"), data)
        with monkeypatch.context() as patch:  # the one that ships only turns out not to fit
            patch.setattr(first_stage, "AUTOENCODER", str(tmp_path / "vae"))
            verdict = try_autoencoder(None, data)
        assert verdict.decision == "train"
        assert words in verdict.reason
    for wrong in ("nowhere", str(tmp_path)):
        with pytest.raises(UserError, match=wrong):
            try_autoencoder(wrong, grey)
    padded = odd.model_copy(update={"framing": "pad"})
    assert try_autoencoder(str(tmp_path / "vae"), padded).factor == 2


@pytest.fixture(scope="module")
def stable_folder(tmp_path_factory) -> Path:
    """A folder in Stable Diffusion's layout with a tiny autoencoder in it: factor 8, 4 channels, scaling factor 0.18215."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        vae = tiny_vae(
            in_channels=3,
            out_channels=3,
            block_out_channels=(8,) * 4,
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            scaling_factor=0.18215,
        )
    folder = tmp_path_factory.mktemp("stable")
    vae.save_pretrained(folder / "vae")
    return folder


def test_an_autoencoder_of_stable_diffusion_serves_pictures_of_256_pixels(tmp_path, stable_folder):
    folder, data = str(stable_folder), write_colors(tmp_path / "data", each=1, size=300)
    verdict = try_autoencoder(folder, DataConfig(source=str(data), size=(256, 256), framing="crop"))
    assert (verdict.factor, verdict.latent_channels) == (8, 4)
    assert verdict.normaliser == "measured"  # its weights are random, so its factor of 0.18215 does not fit
    assert verdict.decision == "decoder"
    facts = Facts(
        str(data), 300, smallest=[300, 300], median=[300, 300], largest=[300, 300], classes=dict.fromkeys(COLORS, 100)
    )
    machine = Machine("cpu", "a processor", 2, 2, 8 << 30, False)
    plan = make_plan(
        facts,
        machine,
        0.5,
        verdict.within(0),
        ["data.size=[256,256]", f"autoencoder={folder}"],
        measure=lambda config, *_: Timing("float32", 0.1, config.train.batch_size),
        out=tmp_path / "out",
    )
    assert plan.autoencoder is None
    assert (plan.diffusion.autoencoder, plan.diffusion.normaliser) == (folder, "measured")
    assert plan.diffusion.data.size == (256, 256)


def test_its_normaliser_is_measured_on_the_folder_by_stage_2(tmp_path, stable_folder):
    tree = diffusion_tree(
        write_colors(tmp_path / "data"),
        tmp_path / "run",
        stable_folder,
        data__channels=3,
        data__size=[64, 64],
        data__framing="crop",
    )
    config = parse_config(tree | {"normaliser": "stored"})
    with pytest.raises(UserError, match="set normaliser=measured"):
        prepare_latents(config, Accelerator(cpu=True))
    latents = prepare_latents(config.model_copy(update={"normaliser": "measured"}), Accelerator(cpu=True))
    noise = torch.randn((len(latents.cache), *latents.cache.latent_shape), generator=torch.Generator().manual_seed(0))
    z = latents.normalised(torch.arange(len(noise)), noise, False)
    assert z.square().mean((0, 2, 3)).tolist() == pytest.approx([1.0] * 4, abs=0.1)


def test_a_slow_autoencoder_shows_fewer_reconstructions_or_none(tmp_path):
    tiny_vae(in_channels=3, out_channels=3).save_pretrained(tmp_path / "vae")
    data = write_colors(tmp_path / "data", each=12)
    tree = diffusion_tree(data, tmp_path / "run", tmp_path / "vae", data__channels=3)
    path, widths = tmp_path / "page" / "shown.png", []
    for seconds in (None, 0.001, 1000.0):
        shown = first_stage.show_reconstructions(parse_config(tree), path, seconds)
        assert shown == path.is_file() == (seconds != 1000.0)
        if shown:
            with Image.open(path) as image:
                widths.append(image.width)
            path.unlink()
    assert widths[1] == pytest.approx(2 * widths[0], rel=0.1)
    assert not first_stage.show_reconstructions(parse_config({**tree, "autoencoder": str(tmp_path / "none")}), path)
