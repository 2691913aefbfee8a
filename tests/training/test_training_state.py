"""State on disk is whole or absent; the average and the learning rate are what their formulas say."""

import copy
import os

import pytest
import torch
from torch import nn

from latentdiff.config import OptimizerConfig
from latentdiff.errors import UserError
from latentdiff.training import state
from latentdiff.training.ema import Ema
from latentdiff.training.optimizer import clip_gradient, learning_rate, make_optimizer


def refusal(action) -> str:
    with pytest.raises(UserError) as error:
        action()
    assert "\n" not in str(error.value)
    return str(error.value)


def save(output, step, keep=2, **extra):
    tensors = {"model": {"w": torch.full((3,), float(step))}, **extra}
    return state.save_state(output, step, tensors, {"ema_updates": step}, keep)


def test_a_state_comes_back_as_it_was(tmp_path):
    tensors = {
        "model": {"w": torch.randn(4, 3), "half": torch.randn(2).half(), "counter": torch.tensor(3)},
        "strided": {"t": torch.arange(6.0).reshape(2, 3).t(), "shared": torch.ones(4)},
    }
    state.save_state(tmp_path, 12, tensors, {"ema_updates": 12, "note": "x"}, keep=1)
    loaded, meta = state.load_state(tmp_path)
    assert meta == {"step": 12, "ema_updates": 12, "note": "x"}
    assert {name: set(group) for name, group in loaded.items()} == {name: set(g) for name, g in tensors.items()}
    for name, group in tensors.items():
        for key, value in group.items():
            assert torch.equal(loaded[name][key], value) and loaded[name][key].dtype == value.dtype


def test_tensors_that_share_memory_are_saved(tmp_path):
    weight = torch.randn(3)
    save(tmp_path, 1, ema={"a": weight, "b": weight})
    assert torch.equal(state.load_state(tmp_path)[0]["ema"]["b"], weight)


def test_the_newest_is_loaded_and_older_ones_are_rotated_out(tmp_path):
    for step in (5, 10, 100):
        save(tmp_path, step, keep=2)
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-10", "step-100"]  # by number, not by name
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["step-10", "step-100"]
    assert state.load_state(tmp_path)[1]["step"] == 100


def test_saving_a_step_again_replaces_it(tmp_path):
    save(tmp_path, 5)
    save(tmp_path, 5, more={"x": torch.ones(1)})
    assert set(state.load_state(tmp_path)[0]) == {"model", "more"}


@pytest.mark.parametrize("failing", ["save_file", "os.replace"])
def test_a_save_that_fails_leaves_the_one_before(tmp_path, monkeypatch, failing):
    save(tmp_path, 5)

    def fail(*arguments, **keywords):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        if failing == "save_file":
            patch.setattr(state, "save_file", fail)
        else:
            patch.setattr(os, "replace", fail)
        said = refusal(lambda: save(tmp_path, 6))
        assert "step-6: the training state cannot be written (disk full)" in said and str(tmp_path / "state" / "step-5") in said
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-5"]
    assert state.load_state(tmp_path)[1]["step"] == 5
    save(tmp_path, 6)  # what the failure left behind is in no one's way
    assert sorted(p.name for p in (tmp_path / "state").iterdir()) == ["step-5", "step-6"]


def test_a_damaged_state_is_named_and_the_one_before_taken(tmp_path, capsys):
    assert "no training state to resume from" in refusal(lambda: state.load_state(tmp_path))
    for step in (5, 6):
        save(tmp_path, step, more={"x": torch.arange(100.0)})
    newest = tmp_path / "state" / "step-6"
    whole = {path.name: path.read_bytes() for path in newest.iterdir()}
    flipped = bytearray(whole["more.safetensors"])
    flipped[-3] ^= 1  # safetensors itself sees nothing of this
    damages = [("model.safetensors", whole["model.safetensors"][:-4]), ("more.safetensors", bytes(flipped))]
    damages += [("state.json", text) for text in (b'{"step": 6', b"[]", b'{"step": 6, "files": 3}')]
    for name, content in damages:
        (newest / name).write_bytes(content)
        assert state.load_state(tmp_path)[1]["step"] == 5
        said = capsys.readouterr().err
        assert said.count("\n") == 1 and f"{newest}: damaged training state" in said
        assert (newest / name).read_bytes() == content
        (newest / name).write_bytes(whole[name])
    assert state.load_state(tmp_path)[1]["step"] == 6 and capsys.readouterr().err == ""
    (newest / "state.json").unlink()
    assert state.load_state(tmp_path)[1]["step"] == 5 and f"{newest}: damaged" in capsys.readouterr().err
    for step in (5, 6):
        (tmp_path / "state" / f"step-{step}" / "model.safetensors").unlink()
    assert f"{newest}: damaged training state" in refusal(lambda: state.load_state(tmp_path))


def test_a_damaged_state_is_never_deleted_nor_counted(tmp_path):
    for step in (5, 6):
        save(tmp_path, step)
    damaged = tmp_path / "state" / "step-6" / "model.safetensors"
    damaged.write_bytes(b"short")
    save(tmp_path, 7, keep=2)
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-5", "step-6", "step-7"]  # two whole ones are kept
    save(tmp_path, 6, keep=3)  # the run that went on from step 5 comes by again
    assert (tmp_path / "state" / "damaged-step-6-1" / "model.safetensors").read_bytes() == b"short"
    assert state.damage(tmp_path / "state" / "step-6") is None


def test_a_state_that_only_its_hash_betrays_costs_no_whole_one(tmp_path):
    for step in (80, 100):
        save(tmp_path, step, keep=2, more={"x": torch.arange(100.0)})
    damaged = tmp_path / "state" / "step-100" / "more.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-3] ^= 1
    damaged.write_bytes(bytes(content))
    assert state.load_state(tmp_path, warn=False)[1]["step"] == 80
    save(tmp_path, 90, keep=1)
    assert state.load_state(tmp_path, warn=False)[1]["step"] == 90 and damaged.read_bytes() == bytes(content)
    save(tmp_path, 110, keep=1)
    save(tmp_path, 120, keep=1)
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-100", "step-120"]  # the damaged one is never deleted


def test_the_best_state_outlives_the_rotation(tmp_path):
    for step in (1, 2, 3, 4, 5):
        state.save_state(tmp_path, step, {"model": {"w": torch.ones(1)}}, {}, keep=1, best=step == 2)
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-2", "step-5"] and state.best_step(tmp_path) == 2
    state.save_state(tmp_path, 6, {"model": {"w": torch.ones(1)}}, {}, keep=1, best=True)
    assert [p.name for p in state.state_folders(tmp_path)] == ["step-6"]


def test_weights_of_another_model_are_refused():
    net = nn.Linear(2, 2)
    assert "first differing key: weight" in refusal(lambda: state.load_into(net, {"bias": torch.zeros(2)}, "run"))
    assert "first differing key: extra" in refusal(
        lambda: state.load_into(net, {**net.state_dict(), "extra": torch.zeros(1)}, "run")
    )


def test_a_restored_optimizer_takes_the_same_next_step():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    config = OptimizerConfig(lr=1e-2, weight_decay=0.1, betas=(0.8, 0.95))
    optimizer = make_optimizer(net.parameters(), config)
    data = torch.randn(5, 8, 3)

    def step(module, opt, x):
        opt.zero_grad()
        module(x).square().mean().backward()
        opt.step()

    for x in data[:4]:
        step(net, optimizer, x)
    saved = {key: value.clone() for key, value in state.optimizer_tensors(optimizer).items()}
    other = copy.deepcopy(net)
    fresh = make_optimizer(other.parameters(), config)
    without = copy.deepcopy(net)
    state.restore_optimizer(fresh, saved)
    step(net, optimizer, data[4])
    step(other, fresh, data[4])
    step(without, make_optimizer(without.parameters(), config), data[4])
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert not torch.equal(net[0].weight, without[0].weight)
    assert all(torch.equal(v, state.optimizer_tensors(fresh)[k]) for k, v in state.optimizer_tensors(optimizer).items())


def test_the_average_follows_its_formula():
    net = nn.BatchNorm1d(2)  # has a parameter, a floating buffer and a counter
    ema = Ema(net, decay=0.9, power=0.75)
    expected = net.weight.detach().clone().double()
    for k in range(1, 40):
        with torch.no_grad():
            net.weight += torch.tensor([1.0, -2.0])
            net.running_mean.fill_(float(k))
            net.num_batches_tracked.fill_(k)
        decay = min(0.9, 1 - (1 + k) ** -0.75)
        expected = decay * expected + (1 - decay) * net.weight.detach().double()
        ema.update(net)
    torch.testing.assert_close(ema.state()["weight"].double(), expected, rtol=1e-5, atol=0)
    assert ema.updates == 39 and int(ema.state()["num_batches_tracked"]) == 39
    assert 0 < float(ema.state()["running_mean"][0]) < 39
    other = nn.BatchNorm1d(2)
    ema.copy_to(other)
    assert torch.equal(other.weight, ema.state()["weight"])
    assert ema.decay_at(1) == pytest.approx(1 - 2**-0.75) and ema.decay_at(10**6) == 0.9


def test_the_average_of_a_frozen_weight_is_the_weight_to_the_bit():
    net = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    net[0].requires_grad_(False).weight.fill_(-0.0)
    ema = Ema(net, decay=0.9, power=0.75)
    with torch.no_grad():
        net[1].weight += 1.0
    before = ema.average["1.weight"].clone()
    ema.update(net)
    assert ema.average["0.weight"].signbit().all() and not torch.equal(ema.average["1.weight"], before)


def test_a_restored_average_goes_on_the_same():
    nets = [nn.Linear(2, 2) for _ in range(3)]
    first = Ema(nets[0], 0.99, 0.75)
    first.update(nets[1])
    second = Ema(nets[2], 0.99, 0.75)
    second.restore({k: v.clone() for k, v in first.state().items()}, first.updates)
    first.update(nets[2])
    second.update(nets[2])
    assert torch.equal(first.state()["weight"], second.state()["weight"])


def test_the_learning_rate_is_a_function_of_the_step():
    config = OptimizerConfig(lr=0.1, warmup_steps=4, schedule="cosine", final_share=0.2)
    rates = [learning_rate(config, step, 104) for step in range(104)]
    assert rates[:5] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    assert rates[54] == pytest.approx(0.1 * (0.2 + 0.8 * 0.5)) and min(rates[4:]) > 0.02
    assert all(a >= b for a, b in zip(rates[4:], rates[5:], strict=False))
    linear = OptimizerConfig(lr=0.1, schedule="linear")
    assert [learning_rate(linear, s, 4) for s in range(4)] == pytest.approx([0.1, 0.075, 0.05, 0.025])
    assert learning_rate(OptimizerConfig(lr=0.1), 7, 8) == 0.1


def test_a_run_that_is_lengthened_before_its_decay_had_the_longer_runs_rates():
    config = OptimizerConfig(lr=0.1, warmup_steps=2, schedule="wsd", decay_share=0.25, final_share=0.5)
    rates = [learning_rate(config, step, 16) for step in range(16)]
    assert rates == pytest.approx([0.05] + [0.1] * 12 + [0.0875, 0.075, 0.0625])
    assert [learning_rate(config, step, 8) for step in range(6)] == rates[:6]


def test_clipping_limits_the_step_and_reports_the_norm_before():
    net = nn.Linear(1, 1, bias=False)
    net.weight.grad = torch.tensor([[-3.0]])
    assert clip_gradient(net, None) == 3.0 and float(net.weight.grad) == -3.0
    assert clip_gradient(net, 1.0) == 3.0 and float(net.weight.grad) == pytest.approx(-1.0, rel=1e-4)
