"""train.precision: auto is measured once where a run starts, says what it chose, and is kept."""

import json
import re
from pathlib import Path

import pytest
import torch
from tiny_runs import autoencoder_tree, change, diffusion_tree, write_yaml
from tiny_shapes import judge_tree, write_shapes

from latentdiff.checkpoints import read_meta
from latentdiff.cli.info import info
from latentdiff.config import LoopConfig, load_config, parse_config
from latentdiff.errors import UserError
from latentdiff.training import precision, state, train, train_autoencoder
from latentdiff.training.precision import OneProcess, choose_precision
from latentdiff.training.run_folder import write_config

CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("timings", "chosen"),
    [
        ({"float32": 1 / 112, "bfloat16": 1 / 32}, "float32"),  # a CPU without bfloat16 instructions
        ({"float32": 1 / 32, "bfloat16": 1 / 112}, "bfloat16"),  # one with them
        ({"float32": 1.0, "bfloat16": 1.0}, "float32"),
        ({"float32": 1.049, "bfloat16": 1.0}, "float32"),  # as good as tied
        ({"float32": 1.051, "bfloat16": 1.0}, "bfloat16"),
        ({"bfloat16": 1.0, "float32": 1.04}, "float32"),  # whatever the order
        ({"float32": 3.0, "bfloat16": 2.0, "float16": 1.0}, "float16"),
        ({"float32": 1.04, "bfloat16": 2.0, "float16": 1.0}, "float32"),
        ({"bfloat16": 1.0, "float16": 2.0}, "bfloat16"),
    ],
)
def test_the_faster_precision_is_chosen_and_float32_where_they_are_tied(timings, chosen):
    assert choose_precision(timings) == chosen
    assert min(timings.values()) / timings[chosen] >= 0.95


@pytest.fixture
def clock(monkeypatch):
    """clock(seconds a sample by precision, seconds a step besides) -> (a trial, its steps); time passes in steps alone."""
    now = [0.0]
    monkeypatch.setattr("latentdiff.training.precision.time.perf_counter", lambda: now[0])

    def make(costs: dict[str, float], fixed: float = 0.0):
        steps: list[tuple[str, int]] = []

        def step(name: str, batch: int) -> None:
            # The first step of each kind warms up: it takes long, and says nothing
            now[0] += costs[name] * batch + fixed + (0.1 if (name, batch) not in steps else 0.0)
            steps.append((name, batch))

        return lambda alone: step, steps

    return make


def test_a_small_batch_decides_where_the_difference_is_clear(clock):
    trial, steps = clock({"float32": 1 / 112, "bfloat16": 1 / 32})
    chosen, words = precision.measure(trial, CPU, 64)
    assert chosen == "float32" and words == "float32 (auto: measured 112 img/s against 32 in bfloat16)"
    assert steps == [("float32", 8), ("bfloat16", 8)] * 4  # the first two warm up, then in turns
    trial, steps = clock({"float32": 1 / 32, "bfloat16": 1 / 112})
    assert precision.measure(trial, CPU, 4)[0] == "bfloat16" and {batch for _, batch in steps} == {4}


def test_the_whole_batch_decides_where_it_is_close(clock):
    """What a step costs whatever the batch hides the difference in a small one, which alone would be a tie."""
    trial, steps = clock({"float32": 0.0100, "bfloat16": 0.0090}, fixed=0.2)
    chosen, words = precision.measure(trial, CPU, 64)
    assert chosen == "bfloat16" and {batch for _, batch in steps} == {8, 64}
    assert words == "bfloat16 (auto: measured 82.5 img/s against 76.2 in float32)"


def test_slow_steps_are_not_timed_for_long(clock):
    trial, steps = clock({"float32": 1.0, "bfloat16": 1.2})
    assert precision.measure(trial, CPU, 64)[0] == "float32"
    assert steps == [("float32", 8), ("bfloat16", 8)] * 2


def test_what_cannot_be_measured_is_said():
    def trial(alone):
        raise torch.OutOfMemoryError("no memory for that")

    assert precision.measure(trial, CPU, 8) == ("float32", "float32 (auto: not measured, the network alone fills the memory)")

    def wrong(alone):
        raise RuntimeError("shapes")

    with pytest.raises(RuntimeError, match="shapes"):
        precision.measure(wrong, CPU, 8)


def test_steps_are_taken_in_the_precision_that_they_are_timed_in(stripe_folder, tmp_path):
    config = parse_config(autoencoder_tree(stripe_folder, tmp_path / "run"))
    vae, kinds = train_autoencoder.make_autoencoder(config), []
    for parameter in vae.parameters():
        parameter.requires_grad_(True)
    before = {key: value.clone() for key, value in vae.state_dict().items()}
    vae.decoder.conv_in.register_forward_hook(lambda *call: kinds.append(call[-1].dtype))
    step = train_autoencoder.trial_steps(config, vae, (1, 16, 16), OneProcess(CPU))
    for name in ("float32", "bfloat16", "float32"):
        step(name, 3)
    assert kinds == [torch.float32, torch.bfloat16, torch.float32]
    assert all(torch.equal(value, before[key]) for key, value in vae.state_dict().items())  # a copy was trained


@pytest.mark.parametrize("asked", ["float32", "bfloat16"])
def test_what_is_asked_for_is_not_measured(monkeypatch, stripe_folder, tmp_path, capsys, asked):
    monkeypatch.setattr(precision, "measure", None)
    train(parse_config(autoencoder_tree(stripe_folder, tmp_path / "run", train__steps=1, train__precision=asked)))
    assert f"precision {asked}, global batch" in capsys.readouterr().err


@pytest.fixture
def chooses(monkeypatch):
    """chooses(name): have every measurement come out so, steps and all; returns the list of those that were made."""
    made = []

    def choose(name: str) -> list[str]:
        monkeypatch.setattr(precision, "choose_precision", lambda timings: made.append(sorted(timings)) or name)
        return made

    return choose


@pytest.mark.parametrize("stage", ["autoencoder", "diffusion"])
def test_a_run_keeps_what_was_chosen_and_says_it(stage, chooses, stripe_folder, autoencoder_run, tmp_path, capsys):
    output, auto = tmp_path / "run", {"train__precision": "auto"}

    def config(folder: Path = output, **changes):
        if stage == "autoencoder":
            return parse_config(autoencoder_tree(stripe_folder, folder, **auto | changes))
        return parse_config(diffusion_tree(stripe_folder, folder, autoencoder_run, **auto | changes))

    made = chooses("bfloat16")
    train(config(train__steps=2))
    said = capsys.readouterr().err
    assert re.search(r"precision bfloat16 \(auto: measured [\d.e+]+ img/s against [\d.e+]+ in float32\), global batch", said)
    assert len(made) == 1 and json.loads((output / "run.json").read_text())["train"]["precision"] == "bfloat16"
    assert state.load_state(output)[1]["precision"] == "bfloat16"
    chooses("float32")  # as another machine would
    with pytest.raises(UserError, match="train.precision differs from the config given"):
        train(config(train__steps=4, train__precision="float32"), resume=True)
    train(config(train__steps=4), resume=True)
    assert f"precision bfloat16 (auto: kept from {output / 'run.json'})" in capsys.readouterr().err
    assert len(made) == 1 and state.load_state(output)[1]["precision"] == "bfloat16"
    if stage == "diffusion":
        assert read_meta(output / "model")["config"]["train"]["precision"] == "bfloat16"
    # The same as a run that was told so, resumed or not
    told = tmp_path / "told"
    train(config(told, train__precision="bfloat16", train__steps=4))
    first, second = (state.load_state(folder)[0] for folder in (output, told))
    for part in first:
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items()), part


def test_measuring_leaves_no_trace_in_the_run(chooses, stripe_folder, autoencoder_run, feature_folder, tmp_path):
    """The critic is initialised after the measurement, from the global generator: it has to be the same one."""
    chooses("float32")
    critic = {"loss__adversarial": 0.5, "loss__discriminator_channels": 4, "loss__discriminator_layers": 1, "train__steps": 2}
    for name in ("auto", "float32"):
        tree = autoencoder_tree(stripe_folder, tmp_path / f"first-{name}", **critic, train__precision=name)
        train(parse_config(tree))
        tree = diffusion_tree(stripe_folder, tmp_path / f"second-{name}", autoencoder_run, train__precision=name)
        train(parse_config(change(tree, {"train__steps": 2, "model__config__dropout": 0.1})))
    for stage in ("first", "second"):
        auto, told = (state.load_state(tmp_path / f"{stage}-{name}")[0] for name in ("auto", "float32"))
        for part in told:
            assert all(torch.equal(value, auto[part][key]) for key, value in told[part].items()), (stage, part)


def test_a_run_that_starts_again_in_its_folder_keeps_its_precision(chooses, stripe_folder, tmp_path, capsys):
    tree = autoencoder_tree(stripe_folder, tmp_path / "run", train__precision="auto", train__steps=2)
    (tmp_path / "run").mkdir()
    config = parse_config(tree)
    write_config(tmp_path / "run", precision.named(config, "bfloat16"))  # of a run that saved no state
    made = chooses("float32")
    train(config)
    assert "precision bfloat16 (auto: kept from" in capsys.readouterr().err and made == []
    # Another run's record says nothing
    other = parse_config({**tree, "seed": 1, "output": str(tmp_path / "other")})
    (tmp_path / "other").mkdir()
    write_config(tmp_path / "other", precision.named(config, "bfloat16"))
    train(other)
    assert "precision float32 (auto: measured" in capsys.readouterr().err and len(made) == 1


def test_a_state_of_another_precision_than_the_record_is_refused(stripe_folder, tmp_path):
    config = parse_config(autoencoder_tree(stripe_folder, tmp_path / "run", train__steps=2))
    train(config)
    record = tmp_path / "run" / "run.json"
    record.write_text(record.read_text().replace('"float32"', '"bfloat16"'))
    with pytest.raises(UserError, match="was made with train.precision=float32"):
        train(precision.named(config, "auto"), resume=True)


def test_every_trainer_measures(stripe_folder, autoencoder_run, tmp_path, capsys):
    """Features, classifier and judge too, each a step of its own network."""
    data = {"source": str(stripe_folder), "size": [16, 16], "channels": 1, "held_out": 0.25}
    few = {"steps": 2, "batch_size": 8, "threads": 1}
    shapes = write_shapes(tmp_path / "shapes")
    judge = judge_tree(shapes, tmp_path / "j")
    judge["train"] = few
    trees = {
        "f": {
            "stage": "features",
            "output": str(tmp_path / "f"),
            "name": "tiny",
            "data": data,
            "train": few,
            "model": {"widths": [4, 4, 8]},
        },
        "c": {
            "stage": "classifier",
            "output": str(tmp_path / "c"),
            "autoencoder": str(autoencoder_run),
            "data": data,
            "train": few,
            "model": {"widths": [8, 8]},
        },
        "j": judge,
    }
    for name, tree in trees.items():
        train(parse_config(tree))
        said = capsys.readouterr().err
        (chosen,) = re.findall(r"precision (float32|bfloat16) \(auto: measured", said)
        assert json.loads((tmp_path / name / "run.json").read_text())["train"]["precision"] == chosen


def test_info_says_what_was_measured(chooses, stripe_folder, autoencoder_run, tmp_path):
    chooses("bfloat16")
    path = write_yaml(tmp_path / "a.yaml", autoencoder_tree(stripe_folder, tmp_path / "run", train__precision="auto"))
    facts = info(str(path))
    assert facts["precision"].startswith("bfloat16 (auto: measured ") and facts["step"]["precision"] == "bfloat16"
    assert facts["config"]["train"]["precision"] == "auto"
    path = write_yaml(tmp_path / "d.yaml", diffusion_tree(stripe_folder, tmp_path / "d", autoencoder_run))
    assert info(str(path))["precision"] == "float32"


def test_auto_is_the_default_everywhere():
    assert LoopConfig(steps=1).precision == "auto"
    configs = {path: load_config(path) for path in sorted((ROOT / "configs").rglob("*.yaml"))}
    for name in ("autoencoder-rvq.yaml", "autoencoder-codes.yaml"):
        levels = configs.pop(ROOT / "configs" / "fashion-mnist" / name)
        assert levels.train.precision == "float32"  # the last level is finer than bfloat16
    assert len(configs) > 15 and {config.train.precision for config in configs.values()} == {"auto"}
