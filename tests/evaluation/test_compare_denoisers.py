"""The agreement of denoisers: exact ones of every process give one answer at one log-SNR, and the error of it is known."""

import json
import shutil

import pytest
import torch
from exact import Mixture, exact, mixture

from latentdiff.checkpoints import META, load
from latentdiff.evaluation.compare_denoisers import agreement, agreement_markdown, estimate_x0
from latentdiff.models.codec import LatentCodec
from latentdiff.schedules import make_schedule

PROCESSES = ("vp", "subvp", "ve", "cosine", "flow", "edm")


def test_exact_denoisers_of_every_process_agree_at_a_log_snr():
    truth, generator = mixture((2, 2, 3)), torch.Generator().manual_seed(0)
    x0, _ = truth.draw(50, generator)
    noise = torch.randn(x0.shape, generator=generator, dtype=torch.float64)
    for log_snr in (-5.0, 0.0, 5.0):
        answers = [estimate_x0(exact(make_schedule(name), truth), x0, noise, log_snr) for name in PROCESSES]
        assert all(float((answer - answers[0]).abs().max()) < 1e-6 for answer in answers[1:])
        off = estimate_x0(exact(make_schedule("vp"), truth), x0, noise, log_snr + 0.1)
        assert float((off - answers[0]).abs().max()) > 1e-2  # so a level that is a little off would be seen


def test_its_error_is_the_least_possible_one():
    one, zero = torch.ones(1, dtype=torch.float64), torch.zeros((1, 16), dtype=torch.float64)
    x0 = torch.randn((4000, 16), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for log_snr in (-2.0, 1.0):
        result = estimate_x0(exact(make_schedule("flow"), Mixture(one, zero, one)), x0, noise, log_snr)
        least = 1 / (1 + torch.tensor(log_snr).exp())  # var(x0 | x_t) of N(0, 1)
        assert float((result - x0).square().mean()) == pytest.approx(float(least), rel=0.02)
    assert estimate_x0(exact(make_schedule("flow"), Mixture(one, zero, one)), x0, noise, 40.0) is None


def test_the_command_measures_models_on_one_autoencoder(run, refused, model, here, stripe_folder):
    other = shutil.copytree(model, here / "other")
    pipeline = load(other)
    pipeline.unet.conv_out.weight.data.mul_(0.5)
    for part in ("unet", "vae"):
        (other / part / "hashes.json").unlink()  # of other weights than are written now
    pipeline.unet.save_pretrained(other / "unet")
    ask = ("agreement", model, other, "--data", stripe_folder, "--num-images", 8)
    table = run(*ask, "--log-snrs", 0, 2, 99).splitlines()
    rows = [[cell.strip() for cell in line.split("|")[2:-1]] for line in table if line.startswith(("| /", f"| {model}"))]
    assert [row[2] for row in rows] == ["–"] * 4  # 99 is beyond the schedule
    errors, distances = [[[float(v) for v in cell.split(" ± ")] for cell in row[:2]] for row in rows[:2]], rows[2:]
    assert all(0 < value < 2 and 0 < error < value for row in errors for value, error in row)
    assert distances[0][:2] == ["0.0000 ± 0.0000"] * 2 and float(distances[1][0].split()[0]) > 0.01
    first = agreement([model], str(stripe_folder), 8, [0.0], batch_size=3)
    assert first["models"][0]["errors"][0][0] == pytest.approx(errors[0][0][0], abs=1e-4)  # whatever the batch
    assert json.loads(json.dumps(first)) == first and "images 8" in agreement_markdown(first)
    pipeline.vae.decoder.conv_out.weight.data.mul_(0.5)
    pipeline.vae.save_pretrained(other / "vae")
    assert "has another autoencoder than" in refused(*ask)
    assert "--num-images 999" in refused("agreement", model, "--data", stripe_folder, "--num-images", 999)
    shutil.rmtree(other / "vae")
    shutil.copytree(model / "vae", other / "vae")
    meta = json.loads((other / META).read_text())
    meta["config"]["data"]["held_out"] = 0.5
    (other / META).write_text(json.dumps(meta))
    assert "has another preprocessing and held-out share than" in refused(*ask)


def test_the_latents_are_draws_unless_the_model_was_trained_on_means(model, stripe_folder, tmp_path, monkeypatch):
    """With a posterior as wide as the prior, draws are other latents and means are what they were."""
    on_means = shutil.copytree(model, tmp_path / "means")
    meta = json.loads((on_means / META).read_text())
    meta["config"]["cache"]["use_mean"] = True
    (on_means / META).write_text(json.dumps(meta))

    def ask(name) -> tuple[float, str]:
        result = agreement([name], str(stripe_folder), 8, [0.0])
        return result["models"][0]["errors"][0][0], result["protocol"]["latents"]

    before, moments = {name: ask(name) for name in (model, on_means)}, LatentCodec.moments
    assert [kind for _, kind in before.values()] == ["posterior draws", "posterior means"]
    assert before[model][0] == ask(model)[0]
    monkeypatch.setattr(LatentCodec, "moments", lambda self, x: (moments(self, x)[0], torch.ones_like(moments(self, x)[1])))
    assert ask(on_means) == before[on_means] and ask(model)[0] > 1.2 * before[model][0]
