"""Stage 2 sharded over processes (FSDP2): the steps, the states and the pipeline of one process that holds it all."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from processes import carry_out, job
from safetensors.torch import load_file
from test_processes import EACH_STEP, SMOOTH, assert_equal_runs, at, lines
from tiny_runs import autoencoder_config, autoencoder_tree, diffusion_tree, write_yaml
from tiny_text import text_tree, write_bert, write_captioned

from latentdiff import checkpoints
from latentdiff.config import LoopConfig, parse_config
from latentdiff.objective import Uncertainty
from latentdiff.training import distributed, state, train
from latentdiff.training.accelerator import start_accelerator

pytestmark = pytest.mark.slow  # one fixture of many runs, most in several processes

# As accelerate's launcher sets them; the last is its default, by which some processes might get no text encoder
SHARDED = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
STEPS = 8


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    """(captioned data, a first stage trained on them)."""
    root = tmp_path_factory.mktemp("sharded")
    data = write_captioned(root / "data")
    return data, train(autoencoder_config(data, root / "autoencoder", train__steps=30))


@pytest.fixture(scope="module")
def runs(stage1, tmp_path_factory) -> Path:
    """Folder of all the runs of this file, carried out in one go; see `jobs_of`."""
    root = tmp_path_factory.mktemp("runs")
    jobs = jobs_of(root, *stage1)
    for name, result in zip(jobs, carry_out(list(jobs.values())), strict=True):
        world, wanted = jobs[name]["world"], 75 if name == "stopped" else 0
        assert result["codes"] == [wanted] * world, f"{name}: {result['stderr']}"
        assert f"latentdiff train: {world} process(es), device cpu" in result["stderr"]
        assert ("the network sharded over them" in result["stderr"]) == bool(jobs[name]["environment"])
    return root


def jobs_of(root: Path, data: Path, autoencoder: Path) -> dict[str, dict]:
    """The same run by one process and sharded over two; stopped by a signal and resumed; by two, one and three in turn.

    Its network has dropout and a learned weighting and is checkpointed. Then, by one and by two, a run whose text encoder
    is trained along, in pieces of a batch, and one with a frozen encoder in bfloat16.
    """

    def of(name, world, tree=diffusion_tree, shards=True, steps=STEPS, resume=False, more=None, **changes):
        changes = {**SMOOTH, **cache, **changes, "train__steps": steps, "train__log_every": 2, "train__keep": 100}
        config = write_yaml(root / f"{len(list(root.glob('*.yaml')))}.yaml", tree(data, root / name, autoencoder, **changes))
        kept = {"weigh": str(root / name), "environment": SHARDED if shards else {}}
        return job(config, world, resume, **kept, **(more or {}))

    cache = {"cache__folder": str(root / "latents"), "data__flips": True}
    weighted = {
        "train__batch_size": 6,
        "train__gradient_checkpointing": True,
        "weighting": "uncertainty",
        "model__config__dropout": 0.1,
    }
    each = weighted | EACH_STEP
    text = {"condition__text__layers": 2}
    # A tokenizer numbers its tokens anew each time it is learnt: both go on from one and the same start
    train(parse_config(text_tree(data, root / "text", autoencoder, **SMOOTH, **cache, **text, train__steps=1)))
    for name in ("text-one", "text-two"):
        shutil.copytree(root / "text", root / name)
    bert = str(write_bert(root / "bert", "across blank down stripes a picture of"))
    frozen = {"tree": text_tree, "condition__text": {"encoder": bert}, "train__precision": "bfloat16", "steps": 2}
    stop = {"kill_after": 0.05, "once": str(root / "broken" / "state" / "step-3"), "signal": "SIGTERM"}
    return {
        "one": of("one", 1, shards=False, **each),
        "two": of("two", 2, **weighted),
        "stopped": of("broken", 2, more=stop, **each),
        "resumed": of("broken", 2, resume=True, **weighted),
        "mixed-4": of("mixed", 2, steps=4, **weighted),
        "mixed-6": of("mixed", 1, shards=False, steps=6, resume=True, **weighted),
        "mixed-8": of("mixed", 3, resume=True, **weighted),
        "text-one": of("text-one", 1, text_tree, shards=False, resume=True, steps=5, **text),
        "text-two": of("text-two", 2, text_tree, resume=True, steps=5, train__micro_batch=3, **text),
        "frozen-one": of("frozen-one", 1, shards=False, **frozen),
        "frozen-two": of("frozen-two", 2, **frozen),
    }


def assert_same_state(first: Path, second: Path, step: int, tolerance: float) -> None:
    """The same tensors by name, shape and type, and weights, averages and learned weighting alike."""
    a, b = at(first, step), at(second, step)
    for states in (a, b):
        states.pop("averages", None)  # a row for each process
    shapes = [{(name, key, v.shape, v.dtype) for name, group in s.items() for key, v in group.items()} for s in (a, b)]
    assert shapes[0] == shapes[1]
    for part in {"model", "ema", "uncertainty"} & set(a):
        for key, value in a[part].items():
            assert float((b[part][key] - value).abs().max()) <= tolerance, f"{part} {key}"


def assert_same_gradient(first: Path, second: Path, step: int, share: float = 2e-5) -> None:
    """First moments, to a share of each one's largest: after one step they are the gradient, times 0.1."""
    a, b = at(first, step)["optimizer"], at(second, step)["optimizer"]
    for key, value in a.items():
        if key.endswith("exp_avg"):
            assert float((b[key] - value).abs().max()) <= share * float(value.abs().max()) + 1e-8, key


def assert_same_lines(first: Path, second: Path, start: int = 0) -> None:
    for mine, theirs in zip(lines(first)[start:], lines(second)[start:], strict=True):
        assert mine.keys() == theirs.keys()
        assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def furthest(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor], part: str = "") -> float:
    return max(float((second[key] - value).abs().max()) for key, value in first.items() if key.startswith(part))


def held(root: Path, name: str, world: int) -> list[dict[str, int]]:
    return [json.loads((root / f"{name}-{rank}.json").read_text()) for rank in range(world)]


def test_shards_take_the_steps_of_one_process(runs):
    one = runs / "one"
    assert furthest(at(one, 1)["model"], at(one, STEPS)["model"]) > 3e-3  # by far more than the tolerance
    assert_same_gradient(one, runs / "broken", 1)
    assert_same_state(one, runs / "broken", 1, 1e-6)
    assert_same_state(one, runs / "two", STEPS, 1e-5)
    assert_same_lines(one, runs / "two")
    assert {"validation/loss_raw", "validation/loss_ema"} <= lines(one)[-1].keys()


def test_each_process_holds_its_share(runs):
    (whole,), shares = held(runs, "one", 1), held(runs, "two", 2)
    for name, count in whole.items():
        twice = Uncertainty.TERMS if name == "moments" else 0  # of the learned weighting, which both hold
        assert count > 10_000 and sum(share[name] for share in shares) == count + twice, name
        assert all(0.45 * count < share[name] < 0.55 * count for share in shares), name


def test_a_stopped_run_goes_on_as_if_nothing_had_happened(runs):
    saved = [int(path.name.removeprefix("step-")) for path in state.state_folders(runs / "broken")]
    assert 3 < saved[-2] < STEPS == saved[-1]
    assert_equal_runs(runs / "two", runs / "broken", STEPS)


def test_a_state_is_taken_up_by_other_numbers_of_processes(runs):
    # Of three processes the last holds nothing of the output's two rows
    assert_same_state(runs / "one", runs / "mixed", STEPS, 1e-5)
    assert_same_gradient(runs / "one", runs / "mixed", STEPS)
    assert_same_lines(runs / "one", runs / "mixed", -2)


def test_the_published_pipeline_is_that_of_one_process(runs):
    pipes = [checkpoints.load(runs / name / "model") for name in ("one", "two")]
    first, second = (pipe.unet.state_dict() for pipe in pipes)
    assert first.keys() == second.keys()
    for key, average in at(runs / "two", STEPS)["ema"].items():
        assert torch.equal(second[key], average.half().float()), key
        assert torch.allclose(first[key], second[key], rtol=2**-10, atol=1e-5), key  # halves: a unit in the last place
    drawn = [
        pipe(class_labels=[0, 1], num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
        for pipe in pipes
    ]
    assert float((drawn[0] - drawn[1]).abs().max()) < 2e-3 and float(drawn[0].std()) > 0.01


def test_a_text_encoder_trained_along_and_pieces_of_a_batch(runs):
    one, two = runs / "text-one", runs / "text-two"
    for part in ("unet.", "text_encoder."):
        assert furthest(at(runs / "text", 1)["model"], at(one, 5)["model"], part) > 1e-3, part
    assert_same_state(one, two, 5, 1e-5)
    assert_same_gradient(one, two, 5)
    assert_same_lines(one, two)
    (whole,), shares = held(runs, "text-one", 1), held(runs, "text-two", 2)
    assert all(0.45 < share["weights"] / whole["weights"] < 0.55 for share in shares)
    published, average = checkpoints.load(two / "model").text_encoder.state_dict(), at(two, 5)["ema"]
    assert published
    for key, value in published.items():
        assert torch.equal(value, average[f"text_encoder.{key}"].half().float()), key


def test_a_frozen_text_encoder_says_the_same(runs):
    files = sorted((runs / "frozen-one" / "captions").rglob("*.safetensors"))
    assert files
    for path in files:
        states = load_file(path)
        others = load_file(runs / "frozen-two" / path.relative_to(runs / "frozen-one"))
        assert all(torch.allclose(others[key].float(), value.float(), atol=1e-5) for key, value in states.items())


def test_bfloat16_is_taken_and_weights_stay_float32(runs):
    one, two = runs / "frozen-one", runs / "frozen-two"
    assert_same_gradient(one, two, 2, 0.2)  # bfloat16's rounding, in batches of 8 and of 4
    assert_same_state(one, two, 2, 1e-3)
    norms = [lines(run)[0]["train/gradient_norm"] for run in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=0.01)
    assert {value.dtype for value in at(two, 2)["model"].values()} == {torch.float32}
    for precision, dtype in (("bfloat16", torch.bfloat16), ("float32", torch.float32)):
        accelerator = start_accelerator(LoopConfig(steps=1, precision=precision, threads=1))
        assert distributed.Cast(torch.nn.Linear(2, 2), accelerator)(torch.ones(1, 2)).dtype == dtype


REFUSED = [
    ({"ACCELERATE_USE_FSDP": "true"}, "FSDP version 1 is not supported; add --fsdp_version 2"),
    ({**SHARDED, "FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params is not supported; leave it out"),
    ({**SHARDED, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, "set train.gradient_checkpointing=true instead"),
    ({"ACCELERATE_USE_DEEPSPEED": "true"}, "--use_deepspeed is not supported; launch with --multi_gpu, or, .*--use_fsdp"),
    ({**SHARDED, "ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "--use_parallelism_config is not supported"),
]


@pytest.mark.parametrize(("environment", "said"), REFUSED)
def test_other_ways_to_shard_are_refused_before_anything_is_written(stage1, tmp_path, monkeypatch, refused, environment, said):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    config = write_yaml(tmp_path / "c.yaml", diffusion_tree(stage1[0], tmp_path / "run", stage1[1]))
    assert re.search(said, refused("train", config))


def test_what_cannot_be_sharded_is_refused_before_anything_is_written(stage1, tmp_path, monkeypatch, refused):
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    data, autoencoder = stage1
    config = write_yaml(tmp_path / "c.yaml", diffusion_tree(data, tmp_path / "run", autoencoder, train__compile=True))
    assert "train.compile: a network sharded by accelerate launch --use_fsdp runs uncompiled" in refused("train", config)
    first = write_yaml(tmp_path / "a.yaml", autoencoder_tree(data, tmp_path / "run"))
    assert "--use_fsdp shards nothing but the training of stage 2; launch with --multi_gpu" in refused("train", first)


def test_a_launch_that_asks_for_nothing_passes_and_one_that_asks_loads_whole_text_encoders(monkeypatch):
    for name in (*SHARDED, *distributed.OTHERS):
        monkeypatch.delenv(name, raising=False)
    distributed.check_launch(shards=False)
    assert not distributed.fsdp_requested()
    for name, value in SHARDED.items():
        monkeypatch.setenv(name, value)
    distributed.check_launch(shards=True)
    assert distributed.fsdp_requested()
    from transformers.integrations.fsdp import is_fsdp_enabled

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert not is_fsdp_enabled()
