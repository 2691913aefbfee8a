"""The stage-1 report: exact latent statistics, quality on the content alone, and lines that warn when they should."""

import json

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, VQModel
from PIL import Image
from torch import nn

from latentdiff.evaluation.image_quality import psnr, ssim
from latentdiff.models.codec import LatentCodec
from latentdiff.training.autoencoder_report import LatentStatistics, reconstruction_grid, stage1_report, write_report


class PixelCodec:
    """A codec whose latents are the pixels, decoded with an error where `error` is not zero."""

    def __init__(self, error=0.0, std=0.0, shift=0.0, scale=1.0, channels=1):
        self.error, self.std, self.shift, self.scale = error, std, shift, scale
        self.vae, self.device, self.latent_channels = nn.Identity(), torch.device("cpu"), channels

    def moments(self, images):
        return images, torch.full_like(images, self.std)

    def normalise(self, z):
        return (z - self.shift) * self.scale

    def decode(self, z):
        return z / self.scale + self.shift + self.error


def warnings(report):
    return [line for line in report["lines"] if line.startswith("warn: ")]


def images(n=12, channels=1, side=16):
    return torch.rand(n, channels, side, side, generator=torch.Generator().manual_seed(0)) * 1.6 - 0.8


def test_statistics_are_exact_for_any_batching_and_far_from_zero():
    z = torch.randn(50, 3, 4, 5, dtype=torch.float64) * torch.tensor([1.0, 0.1, 3.0])[:, None, None] + 1e6
    whole = z.numpy().transpose(1, 0, 2, 3).reshape(3, -1)
    for sizes in ([50], [1] * 50, [7, 30, 13]):
        statistics = LatentStatistics(3)
        for part in z.split(sizes):
            statistics.update(part)
        assert statistics.count == 1000
        np.testing.assert_allclose(statistics.mean.numpy(), whole.mean(1), rtol=1e-14)
        np.testing.assert_allclose(statistics.std.numpy(), whole.std(1), rtol=1e-8)


def test_statistics_of_two_processes_merge():
    z, std = torch.randn(20, 2, 3, 3), torch.rand(20, 2, 3, 3)
    whole, first, second = LatentStatistics(2), LatentStatistics(2), LatentStatistics(2)
    whole.update(z, std)
    first.update(z[:3], std[:3])
    second.update(z[3:], std[3:])
    first.merge(LatentStatistics.from_state(second.state()))
    first.merge(LatentStatistics(2))  # a process that saw nothing
    assert torch.allclose(first.state(), whole.state(), rtol=1e-12)


def test_statistics_are_those_of_drawn_latents():
    mean = torch.randn(4000, 2, 4, 4) * torch.tensor([1.0, 0.2])[:, None, None]
    std = torch.rand(4000, 2, 4, 4) * torch.tensor([0.1, 2.0])[:, None, None]
    statistics = LatentStatistics(2)
    statistics.update(mean, std)
    drawn = mean + std * torch.randn_like(mean)
    assert torch.allclose(statistics.std.float(), drawn.std((0, 2, 3)), rtol=0.02)
    assert torch.allclose(statistics.signal_variance.float(), mean.var((0, 2, 3)), rtol=1e-3)


def test_statistics_refuse_to_speak_of_nothing_or_of_other_channels():
    with pytest.raises(ValueError, match="no latents"):
        _ = LatentStatistics(2).mean
    with pytest.raises(ValueError, match="3 channels for statistics of 2"):
        LatentStatistics(2).update(torch.zeros(1, 3, 2, 2))


def test_psnr_and_ssim_against_torchmetrics():
    from torchmetrics.functional.image import peak_signal_noise_ratio
    from torchmetrics.image import StructuralSimilarityIndexMeasure

    a = images(3)
    b = (a + 0.2 * torch.randn_like(a)).clamp(-1, 1)
    for i in range(3):
        exact = peak_signal_noise_ratio((b[i] + 1) / 2, (a[i] + 1) / 2, data_range=1.0)
        assert psnr(b, a)[i].item() == pytest.approx(exact.item(), abs=1e-4)
    metric = StructuralSimilarityIndexMeasure(data_range=1.0)
    assert ssim(b, a).mean().item() == pytest.approx(metric((b + 1) / 2, (a + 1) / 2).item(), abs=1e-5)
    assert torch.allclose(ssim(a, a), torch.ones(3))


def test_report_measures_the_content_and_not_the_padding():
    x = images()
    wrong = torch.zeros(1, 1, 16, 16)
    wrong[..., :2, :] = 0.2  # all of the error is in the top two rows, a mean squared error of 0.01 on 0..1 there
    report, _ = stage1_report(PixelCodec(wrong), [(x, None)])
    assert report["psnr_db"] == pytest.approx(-10 * np.log10(0.01 * 2 / 16), abs=1e-3)
    inside, picture = stage1_report(PixelCodec(wrong), [(x, None)], content=(2, 1, 14, 12))
    assert inside["psnr_db"] == 100.0 and inside["ssim"] == pytest.approx(1.0)
    assert inside["content_box"] == (2, 1, 14, 12) and picture.width / picture.height > 8 * 12 / (4 * 14) * 0.8


def test_report_does_not_depend_on_the_batching():
    x = images()
    whole, _ = stage1_report(PixelCodec(0.1), [x])
    parts, _ = stage1_report(PixelCodec(0.1), x.split(5))
    assert parts["images"] == 12
    for key in ("psnr_db", "psnr_db_pooled", "psnr_db_worst", "ssim"):
        assert parts[key] == pytest.approx(whole[key], rel=1e-6)
    assert parts["latents"]["std"] == pytest.approx(whole["latents"]["std"], rel=1e-12)


def test_a_good_first_stage_passes_every_line():
    x = images()
    report, _ = stage1_report(PixelCodec(0.01, std=0.01, shift=x.mean().item(), scale=1 / x.std().item()), [x])
    assert warnings(report) == [] and len(report["lines"]) >= 6
    kept = {"std": 0.01, "shift": x.mean().item(), "scale": 1.5 / x.std().item()}
    (line,) = warnings(stage1_report(PixelCodec(0.01, **kept), [x])[0])
    assert "root mean square of 1.5" in line
    assert warnings(stage1_report(PixelCodec(0.01, **kept), [x], keeps_normaliser=True)[0]) == []


@pytest.mark.parametrize(
    ("codec", "words"),
    [
        (PixelCodec(0.5, scale=2.16), "PSNR"),
        (PixelCodec(torch.eye(2).repeat(8, 8) - 0.5, scale=2.16), "SSIM"),
        (PixelCodec(std=0.5, scale=1.5), "posterior noise"),
        (PixelCodec(scale=0.18215), "root mean square"),
        (PixelCodec(shift=5.0, scale=2.16), "largest normalised latent"),
        (PixelCodec(error=float("nan"), scale=2.16), "PSNR not finite"),
    ],
)
def test_each_fault_is_warned_of(codec, words):
    report, picture = stage1_report(codec, [images()])
    assert any(words in line for line in warnings(report)), report["lines"]
    json.dumps(report, allow_nan=False)


def test_dead_channels_are_named():
    x = images(channels=3)
    x[:, 1] = 0.3  # says nothing about the image
    report, _ = stage1_report(PixelCodec(std=0.05, channels=3), [x])
    assert report["latents"]["dead_channels"] == [1]
    assert report["latents"]["posterior_variance_share"][1] == pytest.approx(1.0)
    assert any("carry nothing: 1;" in line for line in warnings(report))


def test_report_of_diffusers_autoencoders():
    torch.manual_seed(0)
    tiny = dict(in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=3)
    tiny["mid_block_add_attention"] = False
    x = images(6)
    codec = LatentCodec(AutoencoderKL(**tiny))
    report, _ = stage1_report(codec, x.split(4))
    mean, std = codec.moments(x)
    drawn = (mean.double().var((0, 2, 3), correction=0) + std.double().square().mean((0, 2, 3))).sqrt()
    assert report["latents"]["std"] == pytest.approx(drawn.tolist(), rel=1e-6)
    assert report["latents"]["normalised_std"] == pytest.approx((drawn * 0.18215).tolist(), rel=1e-5)
    assert report["psnr_db"] == pytest.approx(psnr(codec.reconstruct(x).clamp(-1, 1), x).mean().item(), abs=1e-4)
    assert "codes" not in report

    report, _ = stage1_report(LatentCodec(VQModel(**tiny, num_vq_embeddings=16)), [x])
    codes = report["codes"]
    assert codes["codes"] == 16 and codes["dead"] == 16 - round(codes["used"] * 16) and codes["perplexity"] >= 1


def test_no_images_is_an_error():
    with pytest.raises(ValueError, match="at least one"):
        stage1_report(PixelCodec(), [])


def test_grid_puts_each_input_above_its_reconstruction():
    real, fake = -torch.ones(3, 1, 8, 8), torch.zeros(3, 1, 8, 8)
    grid = np.asarray(reconstruction_grid(real, fake, columns=2))
    assert grid.ndim == 2 and set(np.unique(grid)) == {0, 128, 255}
    column = grid[:, 10]  # through the first image of either row: 64 rows black, then 64 grey, twice
    runs = [(v, len(part)) for part in np.split(column, np.flatnonzero(np.diff(column)) + 1) if (v := part[0]) != 255]
    assert runs == [(0, 64), (128, 64)] * 2
    colour = reconstruction_grid(torch.zeros(2, 3, 80, 70), torch.zeros(2, 3, 80, 70))
    assert colour.mode == "RGB" and colour.width == 2 * 70 + 3 * 2
    assert reconstruction_grid(torch.zeros(1, 5, 8, 8), torch.zeros(1, 5, 8, 8)).mode == "L"


def test_report_is_written_whole_or_not_at_all(tmp_path):
    report, picture = stage1_report(PixelCodec(0.1), [images()])
    write_report(tmp_path / "new", report, picture)
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.json", "report.png"]
    assert json.loads((tmp_path / "new" / "report.json").read_text())["psnr_db"] == report["psnr_db"]
    assert Image.open(tmp_path / "new" / "report.png").size == picture.size
    with pytest.raises(ValueError):
        write_report(tmp_path / "other", {"psnr_db": float("nan")}, picture)
    assert not (tmp_path / "other").exists()
