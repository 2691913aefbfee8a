"""Which state is kept: noise loses, copies lose, the clock is kept, and something is always published."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import autoencoder_config, diffusion_config, write_stripes
from tiny_text import text_tree, write_captioned

from latentdiff.checkpoints import load, read_meta
from latentdiff.config import parse_config
from latentdiff.errors import UserError
from latentdiff.evaluation.sample_sets import without_padding
from latentdiff.fitting import choose
from latentdiff.training import state
from latentdiff.training.train_autoencoder import train_autoencoder
from latentdiff.training.train_diffusion import train_diffusion

PARTS = ("state", "snapshots", "latents", "run.json", "metrics.jsonl")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("choose") / "stripes", 60)


@pytest.fixture(scope="module")
def autoencoder(tmp_path_factory, data) -> Path:
    return train_autoencoder(autoencoder_config(data, tmp_path_factory.mktemp("stage1"), train__steps=2))


@pytest.fixture(scope="module")
def run(tmp_path_factory, data, autoencoder):
    """The config of a finished run of classes, with snapshots of steps 2, 4 and 6."""
    output = tmp_path_factory.mktemp("stage2") / "diffusion"
    config = diffusion_config(data, output, autoencoder, condition__type="class", train__snapshot_every=2)
    train_diffusion(config)
    return config


# The rule


def entry(step: int, distance: float | None, accuracy: float | None = None, copies: float | None = None) -> dict:
    values = {"label_accuracy": accuracy, "closer_to_training": copies}
    return {"step": step, "distance": distance, **{key: value for key, value in values.items() if value is not None}}


def kept(*table: dict, noise: float = 0.1, limit: float | None = 0.05) -> tuple[int, str]:
    return choose.decide(table, lambda step, other: noise, limit, 400)


def test_the_lowest_distance_is_kept():
    assert kept(entry(1, 9.0), entry(2, 3.0), entry(3, 5.0))[0] == 2


def test_equal_distances_go_to_the_later_one_and_before_that_to_the_higher_accuracy():
    assert kept(entry(1, 3.0), entry(2, 3.05), entry(3, 5.0))[0] == 2
    assert kept(entry(1, 3.0, 0.9), entry(2, 3.05, 0.5))[0] == 1
    assert kept(entry(1, 3.0, 0.8), entry(2, 3.05, 0.79))[0] == 2


def test_a_candidate_that_copies_is_not_kept():
    step, why = kept(entry(1, 3.0, 0.5, 0.01), entry(2, 1.0, 0.9, 0.4), entry(3, 4.0, 0.5, 0.02))
    assert (step, "2 of 3 within the limit" in why) == (1, True)


def test_of_those_that_all_copy_the_least_is_kept_and_that_is_said():
    step, why = kept(entry(1, 3.0, None, 0.3), entry(2, 1.0, None, 0.6))
    assert step == 1
    assert "all are above the limit" in why


def test_without_measurements_the_newest_is_kept():
    assert kept(entry(1, None), entry(2, None))[0] == 2
    assert kept(entry(1, 5.0), entry(2, None))[0] == 1


def test_the_limit_is_five_times_what_real_pictures_have():
    assert choose.memorisation_limit(1000) == pytest.approx(0.05)
    assert choose.memorisation_limit(24) == pytest.approx(0.2)


def test_candidates_are_thinned_evenly_and_the_last_stays():
    steps = list(range(10, 110, 10))
    assert choose.thinned(steps, 4) == [20, 50, 80, 100]
    assert choose.thinned(steps, 1) == [100]
    assert choose.thinned(steps, 99) == steps


def scale(guidance: float, distance: float, accuracy: float | None = None, copies: float = 0.0) -> dict:
    values = {} if accuracy is None else {"label_accuracy": accuracy}
    return {"guidance": guidance, "distance": distance, "closer_to_training": copies, **values}


@pytest.mark.parametrize(
    "table, best",
    [
        ([scale(1, 3.0, 0.2), scale(4, 9.0, 0.9), scale(2, 4.0, 0.6)], 4),  # only it shows the classes
        ([scale(1, 3.0, 0.85), scale(4, 9.0, 0.9), scale(2, 4.0, 0.9)], 1),  # all do
        ([scale(1, 3.95, 0.85), scale(4, 9.0, 0.9), scale(2, 4.0, 0.9)], 2),  # by noise only
        ([scale(1, 3.0, 0.1), scale(4, 9.0, 0.3), scale(2, 4.0, 0.29)], 2),
        ([scale(1, 3.0, 0.1), scale(4, 3.9, 0.3), scale(2, 4.0, 0.29)], 4),  # better in both
        ([scale(1, 3.0, 0.1), scale(4, 9.0, 0.5), scale(2, 4.0, 0.3)], 4),
        ([scale(1, 3.0), scale(4, 9.0), scale(2, 4.0)], 1),
        ([scale(1, 3.0, copies=0.5), scale(4, 9.0), scale(2, 4.0)], 2),
    ],
)
def test_guidance_is_as_strong_as_the_classes_need(table, best):
    assert choose.decide_guidance(table, lambda one, other: 0.1, 0.05, 400, 1.0) == best


def test_scales_that_are_tried(run):
    def tried(guidance: float, **options) -> list[float]:
        return choose.other_scales(
            run.model_copy(update={"sample": run.sample.model_copy(update={"guidance": guidance})}), **options
        )

    assert (tried(2.0), tried(2.0, stronger=True)) == ([1.33, 3.0], [3.0, 4.0])
    assert (tried(1.0), tried(5.0, stronger=True)) == ([1.5], [])
    without = run.model_copy(update={"condition": run.condition.model_copy(update={"type": "none"})})
    assert choose.other_scales(without) == []


# Planted candidates


@pytest.fixture
def planted(run, monkeypatch):
    """A function that plants what candidates draw: {step: "noise", "copies", or "others" like the held-out ones}."""
    steps = []
    load_averages = choose_publish().load_averages

    def remember(trainer, tensors, meta):
        steps.append(meta["step"])
        load_averages(trainer, tensors, meta)

    def plant(by_step: dict[int, str]) -> None:
        def draw(trainer, what, part):
            images, count = trainer.latents.images, part.stop - part.start
            generator = torch.Generator().manual_seed(part.start)
            kind = by_step[steps[-1]]
            if kind == "needs guidance":
                kind = "others" if (trainer.config.sample.guidance or 0) > 2 else "wrong class"
            if kind == "noise":
                return torch.rand(count, 1, 16, 16, generator=generator) * 2 - 1
            labels = torch.tensor(what.labels[part])
            train, held_out = (without_padding(each) for each in (images.train, images.held_out))
            if kind == "copies":
                return torch.stack(
                    [train.batch([int((train.labels == c).nonzero()[k % 3])])[0][0] for k, c in enumerate(labels)]
                )
            if kind == "wrong class":
                labels = (labels + 1) % 3
            moved = [held_out.batch([int((held_out.labels == c).nonzero()[k % 4])])[0][0] for k, c in enumerate(labels)]
            return (torch.stack(moved) + 0.2 * torch.randn(count, 1, 16, 16, generator=generator)).clamp(-1, 1)

        monkeypatch.setattr(choose, "draw", draw)

    monkeypatch.setattr(choose_publish(), "load_averages", remember)
    return plant


def choose_publish():
    from latentdiff.training import publish

    return publish


def test_a_snapshot_of_noise_loses(run, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MOST_IMAGES", 60)
    planted({2: "others", 4: "noise", 6: "noise"})
    choice = choose.choose_state(run, 20, tmp_path / "model", guidance=False)
    assert choice.step == read_meta(tmp_path / "model")["steps"] == 2
    weights = load_file(Path(run.output) / "snapshots" / "step-2" / "ema.safetensors")
    unet = load(tmp_path / "model").unet.state_dict()
    assert all(torch.equal(unet[name], value.half().float()) for name, value in weights.items())
    assert json.loads((Path(run.output) / choose.FILE).read_text()) == choice.as_json()
    table = {each["step"]: each for each in choice.candidates}
    assert table[2]["distance"] < table[4]["distance"]
    assert choice.real["label_accuracy"] > 0.9
    assert choice.images == 60
    assert str(choice.images) in choice.why


def test_a_candidate_of_copies_loses(run, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MOST_IMAGES", 60)
    planted({2: "others", 4: "copies", 6: "copies"})
    choice = choose.choose_state(run, 20, tmp_path / "model")
    table = {each["step"]: each for each in choice.candidates}
    assert table[4]["closer_to_training"] > choice.memorisation_limit > table[2]["closer_to_training"]
    assert choice.step == 2
    assert choice.guidance["scale"] == load(tmp_path / "model").config.default_guidance_scale == 1.5  # all scales are equal


def test_pictures_of_other_classes_have_a_low_accuracy(run, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MOST_IMAGES", 60)
    planted({2: "others", 4: "others", 6: "wrong class"})
    table = {each["step"]: each for each in choose.choose_state(run, 20, tmp_path / "model").candidates}
    assert table[4]["label_accuracy"] > 0.8
    assert table[6]["label_accuracy"] < 0.2


def test_other_guidance_is_kept_where_it_is_better(run, planted, tmp_path, monkeypatch):
    monkeypatch.setattr(choose, "MOST_IMAGES", 60)
    planted({2: "noise", 4: "noise", 6: "needs guidance"})
    choice = choose.choose_state(run, 20, tmp_path / "model")
    assert [each["guidance"] for each in choice.guidance["scales"]] == [1.5, 2.25, 3.38]
    assert choice.step == 6
    assert choice.guidance["scale"] == load(tmp_path / "model").config.default_guidance_scale == 2.25
    assert "Guidance 2.25" in choice.why
    assert choose.choose_state(run, 20, tmp_path / "model", guidance=False).guidance == {}
    assert load(tmp_path / "model").config.default_guidance_scale == 1.5


# Whole runs


def test_a_run_is_chosen_from_within_the_time_and_can_be_chosen_again(run, tmp_path):
    began = time.monotonic()
    choice = choose.choose_state(run, 5, tmp_path / "model")
    assert time.monotonic() - began < 7
    assert choice.candidates[-1]["step"] == 6
    assert all(each["held_out_loss"] > 0 for each in choice.candidates)
    assert choose.choose_state(run, 0.1, tmp_path / "model").step == 6  # there is no time to compare


def test_what_is_no_checkpoint_of_the_run_is_left_alone(run, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(UserError, match="not published by this run"):
        choose.choose_state(run, 1, tmp_path)


def test_three_pictures_without_classes_make_a_model(tmp_path, autoencoder):
    data = write_stripes(tmp_path / "data", 3)
    flat = tmp_path / "flat"
    flat.mkdir()
    for k, path in enumerate(data.rglob("*.png")):
        path.rename(flat / f"{k}.png")
    few = {"condition__type": "none", "train__batch_size": 1, "train__snapshot_every": 3}
    config = diffusion_config(flat, tmp_path / "run", autoencoder, **few)
    train_diffusion(config)
    choice = choose.choose_state(config, 2, tmp_path / "model")
    assert choice.memorisation_limit is None
    assert "too few" in choice.why
    assert load(tmp_path / "model")


@pytest.mark.parametrize("kind", ["text", "class+text"])
def test_models_of_text_draw_held_out_captions(tmp_path, autoencoder, kind, monkeypatch):
    monkeypatch.setattr(choose, "MOST_IMAGES", 12)
    captioned = write_captioned(tmp_path / "data", 24)
    changes = {"condition__type": kind, "train__snapshot_every": 3}
    config = parse_config(text_tree(captioned, tmp_path / "run", autoencoder, **changes))
    train_diffusion(config)
    choice = choose.choose_state(config, 30, tmp_path / "model")
    assert [each["step"] for each in choice.candidates] == [3, 6]
    assert all(("label_accuracy" in each) == (kind == "class+text") for each in choice.candidates)
    assert load(tmp_path / "model").text_encoder is not None


def test_damaged_snapshots_are_no_candidates_nor_those_just_before_the_last(run, monkeypatch):
    folder = Path(run.output) / "snapshots" / "step-2" / "ema.safetensors"
    whole = folder.read_bytes()
    folder.write_bytes(whole[:-4] + b"abcd")
    try:
        assert [*choose.whole_states(Path(run.output), 9)] == [4, 6]
    finally:
        folder.write_bytes(whole)
    assert [*choose.whole_states(Path(run.output), 9)] == [2, 4, 6]
    monkeypatch.setattr(choose, "LIKE_THE_LAST", 0.5)
    assert [*choose.whole_states(Path(run.output), 9)] == [2, 6]
    assert state.damage(folder.parent) is None
