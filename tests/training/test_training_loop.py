"""The training loop's parts: dropout by sample, averages over processes, steps that are not finite, the compile check."""

import json
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tiny_runs import autoencoder_config, diffusion_config
from torch import nn

from latentdiff.errors import UserError
from latentdiff.training import state, train, trainer
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.accelerator import check_distribution
from latentdiff.training.compile import compile_checked
from latentdiff.training.dropout import replace_dropout, set_keys, uniform
from latentdiff.training.logging import Averages


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


# Dropout


def dropping(p=0.3):
    net = nn.Sequential(nn.Identity(), nn.Dropout(p), nn.Sequential(nn.Dropout(0.0), nn.Dropout(p)))
    return net.train(), replace_dropout(net)


def test_dropout_of_a_sample_is_the_same_in_any_batch():
    net, layers = dropping()
    assert len(layers) == 2 and type(net[2][0]) is nn.Dropout  # p = 0 stays
    x = torch.ones(6, 5, 40)
    set_keys(layers, 7, 3, torch.arange(6))
    whole = net(x)
    assert torch.equal(whole, net(x))  # computed again, as gradient checkpointing does
    set_keys(layers, 7, 3, torch.arange(6)[2:5])
    assert torch.equal(net(x[:3]), whole[2:5])
    for other in ((8, 3), (7, 4)):
        set_keys(layers, *other, torch.arange(6))
        assert not torch.equal(net(x), whole)
    assert len({tuple(row.flatten().tolist()) for row in whole}) == 6
    assert torch.equal(net.eval()(x), x)


def test_dropout_drops_its_share_and_keeps_the_mean():
    layers = dropping(0.3)[1]
    set_keys(layers, 0, 0, torch.arange(64))
    x = torch.ones(64, 4000)
    first, second = (layer(x) for layer in layers)
    for out in (first, second):
        assert float((out == 0).float().mean()) == pytest.approx(0.3, abs=0.004)
        assert float(out.mean()) == pytest.approx(1, abs=0.006)
    both = float(((first == 0) & (second == 0)).float().mean())
    assert both == pytest.approx(0.09, abs=0.003)  # the layers' masks are independent
    neighbours = float(((first[:, 1:] == 0) & (first[:, :-1] == 0)).float().mean())
    samples = float(((first[1:] == 0) & (first[:-1] == 0)).float().mean())
    assert neighbours == pytest.approx(0.09, abs=0.003) and samples == pytest.approx(0.09, abs=0.003)


def test_the_hash_is_splitmix64():
    # The first outputs of the reference generator for seed 0 are 0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4
    states = torch.tensor([0x9E3779B97F4A7C15 - 2**64, 2 * 0x9E3779B97F4A7C15 - 2**65 + 2**64])
    assert uniform(states).tolist() == [(0xE220A8397B1DCDAF >> 40) / 2**24, (0x6E789E6AA1B965F4 >> 40) / 2**24]


def test_dropout_says_when_it_was_given_no_keys():
    net, layers = dropping()
    with pytest.raises(ValueError, match="dropout of a batch of 2"):
        net(torch.ones(2, 3))


# Averages


ALONE = SimpleNamespace(num_processes=1, process_index=0, device="cpu")


def test_averages_weigh_by_samples_and_leave_out_what_had_none():
    averages = Averages()
    nothing = torch.tensor(float("nan"))
    averages.add({"loss": torch.tensor(1.0), "part": (torch.tensor(4.0), 3), "never": (nothing, 0)})
    averages.add({"loss": torch.tensor(2.0), "part": (torch.tensor(8.0), 1), "never": (nothing, 0)})
    assert averages.take(ALONE) == {"loss": 1.5, "part": 5.0}
    averages.add({"loss": torch.tensor(7.0)})
    assert averages.take(ALONE) == {"loss": 7.0}


def test_averages_go_on_from_a_state_on_as_many_processes_or_others():
    tensors = {"loss": torch.tensor([[6.0, 2.0], [2.0, 2.0]], dtype=torch.float64)}  # of two processes
    for rank, expected in ((0, 3.0), (1, 1.0)):
        averages = Averages()
        averages.restore(tensors, SimpleNamespace(num_processes=2, process_index=rank))
        assert averages.take(ALONE) == {"loss": expected}
    for rank, expected in ((0, {"loss": 2.0}), (1, {})):
        averages = Averages()
        averages.restore(tensors, SimpleNamespace(num_processes=3, process_index=rank))
        assert averages.take(ALONE) == expected


def test_nothing_is_not_gathered():
    def gather(values):
        assert values.numel(), "NCCL's gather cannot reshape an empty tensor"
        return torch.cat([values, values])

    two = SimpleNamespace(num_processes=2, process_index=0, device="cpu", gather=gather)
    averages = Averages()
    assert averages.state(two) == {} and averages.take(two) == {}
    averages.add({"loss": torch.tensor(3.0)})
    assert averages.state(two)["loss"].tolist() == [[3.0, 1.0]] * 2 and averages.take(two) == {"loss": 3.0}


# Steps that are not finite


def poison(monkeypatch, module, name, calls):
    """Make a function's result NaN at these calls, counted from 0."""
    real, count = getattr(module, name), iter(range(10**6))

    def sometimes(*arguments, **keywords):
        out = real(*arguments, **keywords)
        if torch.is_grad_enabled() and next(count) in calls:
            return out * float("nan") if torch.is_tensor(out) else {**out, "total": out["total"] * float("nan")}
        return out

    monkeypatch.setattr(module, name, sometimes)


def test_a_bad_step_is_skipped_counted_and_written_down(tmp_path, stripe_folder, autoencoder_run, monkeypatch, curves, capsys):
    poison(monkeypatch, stage2, "weighted_error", {2})
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run))
    saved, meta = state.load_state(tmp_path / "run")
    assert all(bool(v.isfinite().all()) for group in ("model", "ema", "optimizer") for v in saved[group].values())
    assert meta["skipped"] == 1 and meta["in_a_row"] == 0 and meta["ema_updates"] == 5
    assert {int(v) for k, v in saved["optimizer"].items() if k.endswith(".step")} == {5}
    (line,) = (json.loads(line) for line in (tmp_path / "run" / "skipped.jsonl").read_text().splitlines())
    assert line["step"] == 2 and len(line["samples"]) == 8 and max(line["samples"]) < 36
    logged = curves(tmp_path / "run")
    assert len(logged["train/loss"]) == 5 and logged["train/skipped"] == [1.0] * 4
    assert "step 2 is skipped" in capsys.readouterr().err


def test_a_bad_step_of_stage_1_is_skipped(tmp_path, stripe_folder, monkeypatch):
    poison(monkeypatch, stage1, "stage1_terms", {1, 3})
    train(autoencoder_config(stripe_folder, tmp_path / "run"))
    saved, meta = state.load_state(tmp_path / "run")
    assert meta["skipped"] == 2 and meta["ema_updates"] == 4
    assert all(bool(v.isfinite().all()) for v in saved["model"].values())
    assert stage1.train_autoencoder


def test_too_many_bad_steps_stop_the_run(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    poison(monkeypatch, stage2, "weighted_error", set(range(3, 100)))
    config = diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=30, train__bad_steps=2)
    said = refusal(lambda: train(config))
    assert "skipped.jsonl: 3 steps in a row had no finite loss or gradient" in said and "train.on_bad=rollback" in said


def rolling(stripe_folder, output, autoencoder_run, **changes):
    changes = {"train__bad_steps": 1, "train__on_bad": "rollback", "train__save_minutes": 1e-9, **changes}
    return diffusion_config(stripe_folder, output, autoencoder_run, **changes)


def test_a_roll_back_goes_on_at_half_the_rate(tmp_path, stripe_folder, autoencoder_run, monkeypatch, curves):
    poison(monkeypatch, stage2, "weighted_error", {4, 5})
    train(rolling(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=8))
    saved, meta = state.load_state(tmp_path / "run")
    assert meta["step"] == 8 and meta["rate"] == 0.5 and meta["skipped"] == 2
    logged = curves(tmp_path / "run")
    # Nothing is saved within a bad stretch, so the run goes back to before it
    assert logged["step"] == [*range(1, 9), 8] and logged["lr"] == [5e-3] * 4 + [2.5e-3] * 4
    assert all(bool(v.isfinite().all()) for v in saved["model"].values())


def test_roll_backs_come_to_an_end(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    poison(monkeypatch, stage2, "weighted_error", set(range(4, 10000)))
    said = refusal(lambda: train(rolling(stripe_folder, tmp_path / "run", autoencoder_run, train__steps=50)))
    assert "after so many roll-backs" in said
    assert [p.name for p in state.state_folders(tmp_path / "run")][-1] == "step-4"


def test_a_roll_back_needs_a_state(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    poison(monkeypatch, stage2, "weighted_error", set(range(100)))
    said = refusal(lambda: train(rolling(stripe_folder, tmp_path / "run", autoencoder_run)))
    assert "before the first state was saved" in said


def test_a_bad_adversary_leaves_the_autoencoder_where_it_was(tmp_path, stripe_folder, monkeypatch):
    poison(monkeypatch, stage1, "discriminator_terms", set(range(100)))
    adversary = {"loss__adversarial": 0.5, "loss__discriminator_channels": 4, "loss__discriminator_layers": 1}
    train(autoencoder_config(stripe_folder, tmp_path / "run", **adversary, loss__adversarial_start=2))
    saved, meta = state.load_state(tmp_path / "run")
    assert meta["skipped"] == 4 and meta["ema_updates"] == 2
    assert {int(v) for k, v in saved["optimizer"].items() if k.endswith(".step")} == {2}
    assert not saved.get("discriminator_optimizer")


# Pieces, checkpointing, the best state


def test_ways_to_run_that_neither_copy_nor_shard_the_weights_are_refused():
    from accelerate import DistributedType

    for kind in ("NO", "MULTI_CPU", "MULTI_GPU", "FSDP"):
        check_distribution(DistributedType(kind).value)
    for kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        said = refusal(lambda kind=kind: check_distribution(kind.value))
        assert f"{kind.value} is not supported; launch with --multi_gpu" in said and "--use_fsdp --fsdp_version 2" in said


def test_pieces_cover_the_batch():
    assert trainer.micro_batches(7, 3) == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert trainer.micro_batches(4, None) == trainer.micro_batches(4, 9) == [slice(0, 4)]


def test_gradient_checkpointing_changes_nothing_but_memory(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    from torch.utils import checkpoint

    calls = []
    real = checkpoint.checkpoint
    monkeypatch.setattr(checkpoint, "checkpoint", lambda *a, **k: calls.append(1) or real(*a, **k))
    for name, on in (("off", False), ("on", True)):
        changes = {"train__gradient_checkpointing": on, "model__config__dropout": 0.2, "train__steps": 3}
        train(diffusion_config(stripe_folder, tmp_path / name, autoencoder_run, **changes))
        assert bool(calls) == on
    off, on = (state.load_state(tmp_path / name)[0]["model"] for name in ("off", "on"))
    assert all(torch.allclose(value, on[key], rtol=0, atol=1e-6) for key, value in off.items())


def test_the_best_state_is_kept(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    losses = iter([float("nan"), 1.0, float("nan"), 4.0])
    monkeypatch.setattr(stage2.DiffusionTrainer, "validate", lambda self: {"validation/loss_ema": next(losses)})
    monkeypatch.setattr(stage2.DiffusionTrainer, "draw_pictures", lambda self, done: None)
    changes = {"train__steps": 4, "train__picture_every": 1, "train__best": "validation/loss_ema", "train__keep": 1}
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    assert [p.name for p in state.state_folders(tmp_path / "run")] == ["step-2", "step-4"]
    assert state.best_step(tmp_path / "run") == 2 and state.load_state(tmp_path / "run")[1]["best"] == 1.0


# torch.compile


def planted(module: nn.Module) -> None:
    """A compiler that gives the right output and, like torch 2.13 of one autoencoder, no gradient to a parameter."""
    real = module.forward

    def forward(x):
        weight = module[0].weight
        weight.requires_grad_(False)
        out = real(x)
        weight.requires_grad_(True)
        return out

    module.forward = forward


def test_compile_is_refused_where_a_gradient_is_lost():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 4)
    said = refusal(lambda: compile_checked(net, [net], lambda: net(x).square().mean(), compiler=planted))
    assert "gradient of 0.weight" in said and "set train.compile=false" in said


def test_compile_is_refused_where_the_loss_moves_and_taken_where_all_agree():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2)), torch.randn(5, 4)

    def wrong(module):
        real = module.forward
        module.forward = lambda x: 1.1 * real(x)

    assert "the compiled network's loss is" in refusal(
        lambda: compile_checked(net, [net], lambda: net(x).square().mean(), compiler=wrong)
    )
    fine = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))
    used = []
    compile_checked(fine, [fine], lambda: fine(x).square().mean(), compiler=used.append)
    assert used == [fine] and all(p.grad is None for p in fine.parameters())


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_run_that_compiles_is_the_run_that_does_not(tmp_path, stripe_folder, autoencoder_run, monkeypatch, stage):
    # A backend of torch.compile that traces as the default one does, and generates no code
    module, compiled = (stage1 if stage == "autoencoder" else stage2), []

    def traced(part):
        compiled.append(type(part).__name__)
        part.compile(backend="aot_eager")

    monkeypatch.setattr(module, "compile_checked", partial(compile_checked, compiler=traced))
    for name, on in (("off", False), ("on", True)):
        changes = {"train__compile": on, "train__steps": 3}
        if stage == "autoencoder":
            train(autoencoder_config(stripe_folder, tmp_path / name, **changes))
        else:
            train(diffusion_config(stripe_folder, tmp_path / name, autoencoder_run, **changes))
    assert compiled == (["Encoder", "Decoder"] if stage == "autoencoder" else ["UNet2DModel"])
    off, on = (state.load_state(tmp_path / name)[0] for name in ("off", "on"))
    for part in ("model", "ema"):
        for key, value in off[part].items():
            assert torch.allclose(value, on[part][key], rtol=0, atol=1e-5), f"{part} {key}"


def test_an_adaptive_adversary_is_not_compiled(tmp_path, stripe_folder):
    config = autoencoder_config(stripe_folder, tmp_path / "run", train__compile=True, loss__adversarial=0.5)
    assert "set it or loss.adaptive to false" in refusal(lambda: train(config))
