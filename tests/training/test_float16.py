"""Training in float16: the loss scale, overflows that cost no step, its state, and micro batches found by trying."""

import json

import pytest
import torch
from tiny_runs import autoencoder_config, diffusion_config

from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.training import micro_batch, state, train, train_diffusion, trainer
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.loss_scale import SMALLEST, LossScale

CPU = torch.device("cpu")
CRITIC = {
    "loss__adversarial": 0.5,
    "loss__adversarial_start": 2,
    "loss__discriminator_channels": 4,
    "loss__discriminator_layers": 1,
}


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


def assert_same(first, second, step: int) -> None:
    (a, meta_a), (b, meta_b) = state.load_state(first), state.load_state(second)
    assert meta_a["step"] == meta_b["step"] == step and set(a) == set(b)
    for name, group in a.items():
        for key, value in group.items():
            assert torch.equal(value, b[name][key]), f"{name} {key}"


def one_weight() -> tuple[torch.nn.Linear, torch.optim.SGD, LossScale]:
    network = torch.nn.Linear(1, 1, bias=False)
    return network, torch.optim.SGD(network.parameters(), lr=1.0), LossScale("float16", CPU)


def test_gradients_come_out_as_without_a_scale():
    network, optimizer, scale = one_weight()
    scale.scaled(network(torch.tensor([[3.0]])).sum()).backward()
    assert float(network.weight.grad) == 3.0 * scale.factor() == 3.0 * 2**16
    scale.unscale(optimizer)
    assert float(network.weight.grad) == 3.0


def test_an_overflow_halves_the_factor_until_nothing_is_gained():
    network, optimizer, scale = one_weight()
    factors = []
    worth = True
    while worth:
        network.weight.grad = torch.tensor([[float("inf")]])
        scale.scaled(torch.zeros(1, requires_grad=True).sum())
        scale.unscale(optimizer)
        factors.append(scale.factor())
        worth = scale.lowered()
    assert factors == [2.0**k for k in range(16, -1, -1)] and scale.factor() < SMALLEST


def test_other_precisions_have_no_factor():
    for precision in ("float32", "bfloat16", "auto"):
        scale, loss = LossScale(precision, CPU), torch.ones(())
        assert scale.scaled(loss) is loss and not scale.lowered() and scale.state() == scale.logged() == {}


def test_a_step_that_overflows_is_taken_again_and_none_is_lost(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    tries = []
    real = train_diffusion.DiffusionTrainer.train_step

    def counted(trainer, step, lr):
        if not tries:
            trainer.loss_scale.restore({"factor": torch.tensor(2.0**120, dtype=torch.float64), "growth": torch.tensor(0)})
        tries.append(step)
        return real(trainer, step, lr)

    monkeypatch.setattr(train_diffusion.DiffusionTrainer, "train_step", counted)
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=3, train__precision="float16"))
    assert tries.count(0) > 50 and tries.count(1) == tries.count(2) == 1
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    logged = [line for line in lines if "train/loss" in line]
    assert len(logged) == 3 and not any("train/skipped" in line for line in lines)
    assert not (tmp_path / "run" / "skipped.jsonl").exists()
    assert logged[0]["train/loss_scale"] < 2.0**70


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_float16_run_resumes_bit_for_bit_with_the_state_of_its_scaler(tmp_path, stripe_folder, autoencoder_run, stage):
    def config(output, steps):
        changes = {"train__steps": steps, "train__precision": "float16", "train__keep": 9}
        if stage == "autoencoder":
            return autoencoder_config(stripe_folder, output, **changes, **CRITIC)
        return diffusion_config(stripe_folder, output, autoencoder_run, **changes)

    train(config(tmp_path / "whole", 6))
    train(config(tmp_path / "half", 3))
    tensors, _ = state.load_state(tmp_path / "half")
    assert float(tensors["loss_scale"]["growth"]) == 3  # steps in a row that went well
    train(config(tmp_path / "half", 6), resume=True)
    assert_same(tmp_path / "whole", tmp_path / "half", 6)


def test_float16_learns_as_float32_does(tmp_path, stripe_folder, autoencoder_run, curves):
    """Losses differ by the rounding of products to 11 bits, half an ulp each: 5e-4, through some ten layers."""
    losses = {}
    for precision in ("float32", "float16"):
        output = tmp_path / precision
        train(diffusion_config(stripe_folder, output, autoencoder_run, train__steps=8, train__precision=precision))
        losses[precision] = torch.tensor(curves(output)["train/loss"])
    difference = (losses["float16"] - losses["float32"]).abs().max()
    assert 0 < difference < 0.02 * losses["float32"][0]


def test_the_adversary_is_weighed_alike_in_pieces_and_at_any_scale(tmp_path, stripe_folder):
    """In float32 a factor of a power of two changes no bit; in pieces the sums are rounded in another order."""
    config = autoencoder_config(stripe_folder, tmp_path, **CRITIC, train__precision="float32")
    accelerator = start_accelerator(config.train)
    from latentdiff.training import train_autoencoder

    weights = {}
    for name, (micro, factor) in {"whole": (None, 1.0), "scaled": (None, 1024.0), "pieces": (2, 1024.0)}.items():
        torch.manual_seed(0)
        changed = config.model_copy(update={"train": config.train.model_copy(update={"micro_batch": micro})})
        vae = train_autoencoder.make_autoencoder(config)
        stage_1 = train_autoencoder.AutoencoderTrainer(changed, vae, None, accelerator)
        stage_1.loss_scale.factor = lambda factor=factor: factor
        x = torch.rand(8, 1, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
        values, good = stage_1.update(x, 3, 1e-3)
        assert good
        weights[name] = float(values["adaptive_weight"][0])
    assert weights["scaled"] == weights["whole"] and weights["pieces"] == pytest.approx(weights["whole"], rel=1e-4)


@pytest.mark.parametrize("stage", ["features", "classifier"])
def test_trainers_without_a_scale_refuse_float16(stage, stripe_folder):
    tree = {"stage": stage, "output": "x", "name": "n", "data": {"source": str(stripe_folder)}}
    tree |= {"train": {"steps": 1, "precision": "float16"}}
    if stage == "classifier":
        tree = {key: value for key, value in tree.items() if key != "name"} | {"autoencoder": "a"}
    with pytest.raises(UserError, match=r"train.precision: input should be 'auto', 'float32' or 'bfloat16'"):
        parse_config(tree)


# Micro batches


def fits(limit: int, tried: list[int]):
    def attempt(size: int) -> None:
        tried.append(size)
        if size > limit:
            raise torch.OutOfMemoryError("no memory for that")

    return attempt


@pytest.mark.parametrize(("limit", "found"), [(1, 1), (2, 2), (5, 4), (13, 13), (99, 13)])
def test_the_largest_that_fits_is_found(limit, found):
    tried: list[int] = []
    assert micro_batch.largest(13, fits(limit, tried)) == found
    sizes = [1, 2, 4, 7, 13]
    assert tried == sizes[: sizes.index(found) + 2]  # up to the first that did not fit


def test_nothing_fits_is_said_in_a_line_and_other_errors_come_through():
    with pytest.raises(UserError, match="train.micro_batch: not even one sample fits"):
        micro_batch.largest(8, fits(0, []))

    def wrong(size: int) -> None:
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="shapes differ"):
        micro_batch.largest(8, wrong)


def test_a_size_that_would_not_fit_is_never_tried():
    """A constant of 1,000 bytes and 100 a sample: steps of 1, 2, 4 take 1,100, 1,200, 1,400."""

    class Fake:
        device, size = CPU, 0

        def facts(self):
            return {"step_bytes": 1000 + 100 * self.size}

    memory, tried = Fake(), []

    def attempt(size):
        memory.size = size
        tried.append(size)

    # Beside the steps so far, 8 samples take 400 bytes more than 4 do, and 0.9 of what is there may be used
    room = micro_batch.MemoryForecast(memory, available=lambda device: 443 if memory.size == 4 else 10**6)
    assert micro_batch.largest(16, attempt, room) == 4 and tried == [1, 2, 4]
    memory, tried = Fake(), []
    room = micro_batch.MemoryForecast(memory, available=lambda device: 445 if memory.size == 4 else 10**6)
    assert micro_batch.largest(8, attempt, room) == 8


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_auto_is_the_run_of_any_other_micro_batch(tmp_path, stripe_folder, autoencoder_run, monkeypatch, capsys, stage):
    """Tried steps leave nothing behind: weights, moments and random state are the ones of a run with that number."""
    real = micro_batch.largest
    monkeypatch.setattr(micro_batch, "largest", lambda share, attempt, room: min(3, real(share, attempt, room)))

    def config(output, micro):
        changes = {"train__steps": 4, "train__micro_batch": micro}
        if stage == "autoencoder":
            return autoencoder_config(stripe_folder, output, **changes)
        return diffusion_config(stripe_folder, output, autoencoder_run, **changes)

    train(config(tmp_path / "auto", "auto"))
    assert "train.micro_batch: 3 of 8 samples at a time (auto)" in capsys.readouterr().err
    train(config(tmp_path / "three", 3))
    assert_same(tmp_path / "auto", tmp_path / "three", 4)
    assert trainer.micro_batches(8, 3) == [slice(0, 3), slice(3, 6), slice(6, 8)] and trainer.micro_batches(8, "auto") == [
        slice(0, 8)
    ]
