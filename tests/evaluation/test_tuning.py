"""The search for a default: Pareto front, a choice that luck alone does not win, a table that goes on, a config rewritten."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from latentdiff.evaluation import tuning
from latentdiff.pipelines import latent_diffusion

DEFAULT = {"sampler": "scheduler", "steps": 20, "guidance": 1.5, "guidance_interval": None}
RULE = ("default_guidance_rule", "default_guidance_rescale", "default_guidance_options")
SPACE = tuning.SearchSpace(("scheduler", "heun"), guided=True)


def cell(evaluations: float, frechet: float, **setting) -> dict:
    return {**DEFAULT, "evaluations": evaluations, "frechet": frechet, "label_accuracy": None, **setting}


def landscape(setting: dict, seed: int) -> tuple[float, float, None]:
    """A distance that falls with steps and is least at guidance 2, heun being the better one, with noise of the seed."""
    evaluations = setting["steps"] * (2 if setting["sampler"] == "heun" else 1)
    noise = np.random.default_rng((seed, setting["steps"])).normal() * 0.002
    worse = 0.0 if setting["sampler"] == "heun" else 0.3
    return evaluations, 0.1 + worse + 1 / evaluations + 0.5 * (setting["guidance"] - 2.0) ** 2 + noise, None


def searched(budget: float, cells: list | None = None, seed: int = 0) -> list[dict]:
    cells = [] if cells is None else cells
    tuning.search(landscape, SPACE, DEFAULT, budget, seed, cells, lambda: None)
    return cells


def test_the_front_is_what_nothing_beats():
    cells = [cell(20, 0.5), cell(10, 0.7), cell(10, 0.6), cell(30, 0.5), cell(40, 0.4), cell(5, 0.9), cell(50, 0.45)]
    assert [(c["evaluations"], c["frechet"]) for c in tuning.pareto_front(cells)] == [(5, 0.9), (10, 0.6), (20, 0.5), (40, 0.4)]


def test_the_search_starts_at_the_default_keeps_to_its_budget_and_finds_the_better_region():
    cells = searched(600)
    assert {key: cells[0][key] for key in tuning.SETTING_KEYS} == DEFAULT
    spent = [c["evaluations"] for c in cells]
    assert sum(spent) >= 600 > sum(spent[:-1])
    best = min(cells, key=lambda c: c["frechet"])
    assert best["sampler"] == "heun" and abs(best["guidance"] - 2) < 0.3
    assert best["frechet"] < cells[0]["frechet"] - 0.2
    for c in cells:
        assert 3 <= c["steps"] <= 32 and 1 <= c["guidance"] <= 3
    assert cells == searched(600)  # a function of its seed


def test_an_interrupted_search_counts_what_is_there():
    first = searched(100)
    both = searched(300, cells=[dict(c) for c in first])
    assert both[: len(first)] == first
    spent = [c["evaluations"] for c in both]
    assert sum(spent) >= 300 > sum(spent[:-1])


def test_without_guidance_none_is_searched():
    space, settings = tuning.SearchSpace(("heun",), guided=False), []

    def measure(setting, seed):
        settings.append(setting)
        return float(setting["steps"]), 1 / setting["steps"], None

    tuning.search(measure, space, {**DEFAULT, "guidance": 1.0}, 80, 0, [], lambda: None)
    assert len(settings) > 3 and all(s["guidance"] == 1.0 and s["guidance_interval"] is None for s in settings)


def test_kinds_of_guidance_are_searched_and_shown():
    space, settings = tuning.SearchSpace(("heun",), guided=True, kinds=("cfg", "apg")), []

    def measure(setting, seed):
        settings.append(setting)
        return float(setting["steps"]), 1.0 if setting.get("guidance_kind") != "apg" else 0.5, None

    cells: list = []
    tuning.search(measure, space, {**DEFAULT, "sampler": "heun"}, 300, 0, cells, lambda: None)
    assert {setting.get("guidance_kind") for setting in settings[1:]} == {"cfg", "apg"}
    assert "guidance_kind" not in cells[0] and cells[1]["guidance_kind"] == settings[1]["guidance_kind"]
    assert tuning.setting_of(cells[1]) == settings[1]
    assert space.parameters(cells[1]) is not None and SPACE.parameters({**cells[1], "guidance_kind": "apg"}) is None
    table = {"cells": cells, "floor": 0.1, "confirmed": tuning.confirm(measure, cells, [1, 2], 40), "protocol": {}}
    table["chosen"] = tuning.setting_of(tuning.choose(table["confirmed"]))
    assert table["chosen"]["guidance_kind"] == "apg" and " apg |" in tuning.tuning_markdown(table)


def test_the_finalists_are_measured_again_and_dear_ones_left_out():
    cells = [cell(20, 0.5), cell(10, 0.45), cell(18, 0.4), cell(40, 0.1)]
    calls = []

    def measure(setting, seed):
        calls.append((setting["evaluations"], seed))
        return setting["evaluations"], setting["frechet"] + 0.01 * seed, None

    confirmed = tuning.confirm(measure, cells, [7, 8], most=20)
    assert [c["evaluations"] for c in confirmed] == [20, 18, 10]
    assert calls == [(20, 7), (20, 8), (18, 7), (18, 8), (10, 7), (10, 8)]
    assert confirmed[0]["mean"] == pytest.approx(0.575) and confirmed[0]["spread"] == pytest.approx(0.01 / 2**0.5)


@pytest.mark.parametrize(
    "challenger, evaluations, wins",
    [
        ([0.40, 0.41, 0.39], 20, True),  # better on every seed by far more than the differences vary
        ([0.49, 0.53, 0.46], 20, False),  # better on average by less than twice the error
        ([0.51, 0.52, 0.50], 20, False),
        ([0.505, 0.515, 0.495], 10, True),  # worse by 1 %, at half the cost
        ([0.60, 0.61, 0.59], 10, False),
    ],
)
def test_a_choice_must_be_better_than_chance(challenger, evaluations, wins):
    default = {**cell(20, 0), "frechet": [0.50, 0.51, 0.49], "mean": 0.5}
    other = {**cell(evaluations, 0), "frechet": challenger, "mean": sum(challenger) / 3}
    assert tuning.choose([default, other]) is (other if wins else default)


def test_the_command_writes_table_picture_and_default(run, refused, here, model, stripe_folder, feature_folder):
    from latentdiff.checkpoints import load

    ask = (
        "tune",
        model,
        "--data",
        stripe_folder,
        "--features",
        feature_folder,
        "--num-images",
        15,
        "--samplers",
        "scheduler",
        "euler",
        "--confirm-seeds",
        2,
    )
    before = load(model)
    text = run(*ask, "--budget", 60, "--max-evaluations", 60, "--write")
    table = json.loads((here / "tuning" / "tuning.json").read_text())
    assert (here / "tuning" / "tuning.md").read_text() == tuning.tuning_markdown(table) and tuning.tuning_markdown(
        table
    ) in text
    assert np.asarray(Image.open(here / "tuning" / "tuning.png")).std() > 5
    assert table["cells"][0]["steps"] == before.config.default_num_inference_steps
    after, chosen = load(model), table["chosen"]
    assert chosen["sampler"] == "scheduler"  # which the checkpoint has, so it keeps it
    assert tuning.current_default(after) == chosen
    assert after.config.class_names == before.config.class_names
    arguments = {
        "num_inference_steps": chosen["steps"],
        "guidance_scale": chosen["guidance"],
        "guidance_interval": chosen["guidance_interval"] or (0, 1),
    }
    calls = ((after, {}), (before, arguments))
    images = [pipe(class_labels=[0], output_type="np", generator=fresh(), **call).images for pipe, call in calls]
    assert np.array_equal(*images)
    stronger = chosen | {"guidance": 4.0, "guidance_interval": None}
    tuning.write_default(Path(model), {**stronger, "guidance_kind": "apg"})
    ruled = load(model)
    calls = (
        (ruled, {}),
        (before, tuning.call_of({**stronger, "guidance_kind": "apg"}, {})),
        (ruled, tuning.call_of(stronger, {"guidance_rule": "apg"})),
        (before, tuning.call_of(stronger, {})),
    )
    images = [pipe(class_labels=[0], output_type="np", generator=fresh(), **call).images for pipe, call in calls]
    assert np.array_equal(*images[:2]) and np.array_equal(*images[2:]) and not np.array_equal(*images[1:3])
    tuning.write_default(Path(model), chosen)
    assert "made with another images" in refused(*ask, "--num-images", 30)
    assert "--samplers eular: unknown" in refused(*ask[:8], "--samplers", "eular")
    assert "--guidance-kinds pag: unknown" in refused(*ask, "--guidance-kinds", "pag")
    assert "--write: autoguidance cannot become the default" in refused(*ask, "--guidance-kinds", "autoguidance", "--write")
    assert "has no weaker U-Net" in refused(*ask, "--guidance-kinds", "cfg", "autoguidance")


def test_the_rule_of_the_choice_becomes_the_default(tmp_path):
    index, pipeline = tmp_path / "model_index.json", tmp_path / "pipeline.py"
    installed = Path(latent_diffusion.__file__).read_text()
    first = {"_class_name": "LatentDiffusionPipeline", "null_class": 3}

    def written(kind, before):
        index.write_text(json.dumps(before))
        pipeline.write_text("old")
        setting = {**DEFAULT, "guidance_kind": kind} if kind else DEFAULT
        tuning.write_default(tmp_path, setting)
        after = json.loads(index.read_text())
        config = SimpleNamespace(**{"default_sampler": None, **after}, get=after.get)
        found = tuning.current_default(SimpleNamespace(config=config, scheduler=object()))
        assert found == (DEFAULT if kind in (None, "cfg") else setting)
        return {key: value for key, value in after.items() if key.startswith(RULE)}

    own = {"default_guidance_rule": "apg", "default_guidance_options": {"parallel": 0.3}}
    for before in (first, first | own, first | {"default_guidance_rescale": 0.7}):
        assert written(None, before) == written("cfg", before) == {} and pipeline.read_text() == "old"
        assert written("apg", before) == {"default_guidance_rule": "apg"} and pipeline.read_text() == installed
        assert written("cfg_zero", before) == {"default_guidance_rule": "cfg_zero"}
        assert written("rescale", before) == {"default_guidance_rescale": 0.7}
    assert written(tuning.OWN_KIND, first | own) == own


def fresh() -> torch.Generator:
    return torch.Generator().manual_seed(5)
