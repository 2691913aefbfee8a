"""The same run however it is run: by one process or several, whole batches or pieces, unbroken or killed and resumed."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from processes import carry_out, job
from tiny_runs import autoencoder_tree, diffusion_tree, write_yaml

from latentdiff.training import state

# Adam's first steps are signs, which amplify rounding: a large eps keeps the runs comparable
SMOOTH = {"optimizer__eps": 1e-3, "optimizer__lr": 3e-3}
EACH_STEP = {"train__save_minutes": 1e-9, "train__keep": 100, "train__log_every": 5}
# Without l1, whose gradient is a sign: where a pixel is met exactly, rounding alone decides it. A weight's rounding is at most
# lr / eps times its gradient's, summed over the steps; the adversary's gradients are some hundred times the autoencoder's
ADVERSARY = {
    "loss__adversarial": 0.5,
    "loss__adversarial_start": 0,
    "loss__discriminator_channels": 4,
    "loss__discriminator_layers": 1,
    "loss__discriminator_lr": 4e-5,
    "loss__l1": 0.0,
    "loss__l2": 1.0,
}
CODEBOOK = {
    "model": {
        "type": "VQModel",
        "config": {
            "block_out_channels": [8, 8],
            "layers_per_block": 1,
            "latent_channels": 3,
            "vq_embed_dim": 3,
            "norm_num_groups": 4,
            "num_vq_embeddings": 64,
            "mid_block_add_attention": False,
        },
    },
}
REVIVED = 7
# Running means of two levels of codes, from data, and revived
MEANS = {
    "model": {
        "type": "ResidualVQModel",
        "config": {**CODEBOOK["model"]["config"], "num_vq_embeddings": 16, "num_quantizers": 2},
    },
    "codebook": {"update": "ema", "decay": 0.9, "start": "data", "revive_every": REVIVED},
}
STEPS = 20


def trees(stage: str, data: Path, output: Path, autoencoder: Path, **changes):
    changes = {**SMOOTH, **EACH_STEP, "data__flips": True, **changes}
    if stage in ("autoencoder", "vq", "means"):
        return autoencoder_tree(data, output, **ADVERSARY, **{"vq": CODEBOOK, "means": MEANS}.get(stage, {}), **changes)
    if stage == "weighted":
        changes = {"weighting": "uncertainty", "train__gradient_checkpointing": True, **changes}
    changes = {"model__config__dropout": 0.1, "cache__folder": str(output.parent / "latents"), **changes}
    return diffusion_tree(data, output, autoencoder, **changes)


def config_of(stage, name, tmp_path, data, autoencoder, **changes):
    return write_yaml(tmp_path / f"{name}.yaml", trees(stage, data, tmp_path / name, autoencoder, **changes))


def at(folder: Path, step: int):
    """The state of one step."""
    from safetensors.torch import load_file

    return {path.stem: load_file(path) for path in (folder / "state" / f"step-{step}").glob("*.safetensors")}


def pixels(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path)).astype(float)


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(first: Path, second: Path, step: int) -> None:
    """Bit for bit: weights, averages, optimizers and what was logged."""
    a, b = at(first, step), at(second, step)
    assert {n: set(g) for n, g in a.items()} == {n: set(g) for n, g in b.items()}
    for name, group in a.items():
        for key, value in group.items():
            assert torch.equal(value, b[name][key]), f"{name} {key}"
    assert lines(first) == lines(second)


def steps_of_the_same_codes(first: Path, second: Path) -> int:
    """How many steps two runs chose the same codes.

    A vector midway between two codes goes to one or the other by rounding alone. From there on the runs rightly differ.
    """
    for step in range(1, STEPS + 1):
        if not torch.equal(at(first, step)["codes"]["counts"], at(second, step)["codes"]["counts"]):
            return step - 1
    return STEPS


@pytest.mark.parametrize(
    "stage",
    [
        "autoencoder",
        pytest.param("vq", marks=pytest.mark.slow),
        pytest.param("means", marks=pytest.mark.slow),
        "diffusion",
        pytest.param("weighted", marks=pytest.mark.slow),
    ],
)
def test_processes_and_pieces_take_the_steps_of_one(tmp_path, stripe_folder, autoencoder_run, stage):
    # Of the diffusion run the whole batch is 8; each of two processes has 4, each of four 2; pieces are of 3, 3 and 2
    ways = {"one": (1, {}), "pieces": (1, {"train__micro_batch": 3}), "two": (2, {"train__micro_batch": 2}), "four": (4, {})}
    if stage == "means":  # two processes that take pieces are enough to see
        ways = {name: ways[name] for name in ("one", "two")}
    jobs = []
    for name, (world, changes) in ways.items():
        config = config_of(stage, name, tmp_path, stripe_folder, autoencoder_run, train__steps=STEPS, **changes)
        jobs.append(job(config, world))
    for (name, (world, _)), result in zip(ways.items(), carry_out(jobs), strict=True):
        assert result["codes"] == [0] * world, result["stderr"]
        assert f"latentdiff train: {world} process(es), device cpu" in result["stderr"], name  # there really are so many
    one = {step: at(tmp_path / "one", step) for step in (1, STEPS)}
    moved = max(float((v - one[1]["model"][k]).abs().max()) for k, v in one[STEPS]["model"].items())
    assert moved > 3e-3  # by far more than the tolerance
    for name in [name for name in ways if name != "one"]:
        first, last = at(tmp_path / name, 1), at(tmp_path / name, STEPS)
        for part in [p for p in one[1] if p.endswith("optimizer")]:  # after one step exp_avg is the gradient, times 0.1 or 0.5
            for key, value in one[1][part].items():
                if key.endswith("exp_avg"):
                    scale = float(value.abs().max())
                    assert float((first[part][key] - value).abs().max()) <= 2e-5 * scale + 1e-8, f"{name} {part} {key}"
        until = STEPS
        if stage in ("vq", "means"):
            until = steps_of_the_same_codes(tmp_path / name, tmp_path / "one")
            assert until > REVIVED, name
            last = at(tmp_path / name, until)
        for part in [p for p in last if p in ("model", "ema", "discriminator", "uncertainty")]:
            for key, value in at(tmp_path / "one", until)[part].items():
                assert float((last[part][key] - value).abs().max()) <= 1e-5, f"{name} {part} {key}"
        for mine, theirs in zip(lines(tmp_path / name), lines(tmp_path / "one"), strict=True):
            if mine["step"] > until:
                break
            assert mine.keys() == theirs.keys()
            assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5), name
        if stage in ("diffusion", "weighted"):  # three rows, of which two processes draw two and one, and four one each
            first, second = (pixels(tmp_path / n / "pictures" / f"step-{STEPS:06d}.png") for n in (name, "one"))
            assert first.shape == second.shape and abs(first - second).max() <= 2 and second.std() > 1


@pytest.mark.parametrize(("stage", "world"), [("autoencoder", 1), ("diffusion", 2)])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path, stripe_folder, autoencoder_run, stage, world):
    changes = {"train__steps": 40}
    whole = config_of(stage, "whole", tmp_path, stripe_folder, autoencoder_run, **changes)
    broken = config_of(stage, "broken", tmp_path, stripe_folder, autoencoder_run, **changes)
    kill = {"kill_after": 0.1, "once": str(tmp_path / "broken" / "state" / "step-13")}
    jobs = [job(whole, world), job(broken, world, **kill), job(broken, world, resume=True)]
    unbroken, first, second = carry_out(jobs)
    assert unbroken["codes"] == [0] * world, unbroken["stderr"]
    assert first["codes"] == [-9] * world and second["codes"] == [0] * world, second["stderr"]
    assert_equal_runs(tmp_path / "whole", tmp_path / "broken", 40)


def test_a_run_goes_on_with_another_number_of_processes(tmp_path, stripe_folder, autoencoder_run):
    whole = config_of("diffusion", "whole", tmp_path, stripe_folder, autoencoder_run, train__steps=14)
    short = config_of("diffusion", "mixed", tmp_path, stripe_folder, autoencoder_run, train__steps=7)
    results = carry_out([job(whole), job(short, 2)])
    longer = config_of("diffusion", "mixed", tmp_path, stripe_folder, autoencoder_run, train__steps=14)
    results += carry_out([job(longer, 1, resume=True)])
    assert [code for result in results for code in result["codes"]] == [0] * 4
    a, b = at(tmp_path / "whole", 14), at(tmp_path / "mixed", 14)
    for part in ("model", "ema"):
        for key, value in a[part].items():
            assert float((b[part][key] - value).abs().max()) <= 1e-5, f"{part} {key}"


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGHUP", 75), ("SIGTERM", 75), ("SIGUSR1", 75)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(tmp_path, stripe_folder, autoencoder_run, name, code):
    config = config_of(
        "diffusion", "run", tmp_path, stripe_folder, autoencoder_run, train__steps=100000, train__save_minutes=60.0
    )
    once = str(tmp_path / "run" / "metrics.jsonl")
    (result,) = carry_out([job(config, kill_after=0.2, once=once, signal=name)])
    assert result["codes"] == [code], result["stderr"]
    (folder,) = state.state_folders(tmp_path / "run")
    step = int(folder.name.removeprefix("step-"))
    by = "Ctrl-C" if name == "SIGINT" else name
    line = f"latentdiff: stopped by {by}; the state of step {step} is saved; go on with: latentdiff train {config} --resume\n"
    assert 0 < step < 100000 and line in result["stderr"]
    assert state.load_state(tmp_path / "run")[1]["step"] == step
    assert lines(tmp_path / "run")[-1]["step"] <= step


def test_a_full_disk_is_one_line_and_the_state_before_stays(tmp_path, stripe_folder, autoencoder_run):
    changes = {"train__steps": 6}
    config = config_of("diffusion", "run", tmp_path, stripe_folder, autoencoder_run, **changes)
    (first,) = carry_out([job(config)])
    assert first["codes"] == [0], first["stderr"]
    before = state.load_state(tmp_path / "run")[0]
    largest = max(p.stat().st_size for p in (tmp_path / "run" / "state" / "step-6").iterdir())
    config = config_of("diffusion", "run", tmp_path, stripe_folder, autoencoder_run, train__steps=9)
    (full,) = carry_out([job(config, resume=True, limit=largest // 2)])
    assert full["codes"] == [2]
    (said,) = [line for line in full["stderr"].splitlines() if "training state cannot be written" in line]
    assert "step-7" in said and "the last one is" in said and "Traceback" not in full["stderr"]
    after = state.load_state(tmp_path / "run")[0]
    assert all(torch.equal(value, after["model"][key]) for key, value in before["model"].items())
    (again,) = carry_out([job(config, resume=True)])
    assert again["codes"] == [0] and state.load_state(tmp_path / "run")[1]["step"] == 9
