"""The comparison of samplers: its numbers are evaluate's, its costs are counted, and it goes on where it stopped."""

import json

import pytest

from latentdiff.evaluation.compare_samplers import comparison_markdown

BASE = ("--num-images", 15, "--guidance", 2, "--out", "table")


@pytest.fixture
def compared(run, model, stripe_folder, feature_folder):
    def call(*options):
        run("compare", model, "--data", stripe_folder, "--features", feature_folder, *BASE, *options)

    return call


def test_a_cell_is_what_evaluate_measures_and_counts_every_evaluation(
    compared, run, here, model, stripe_folder, feature_folder
):
    compared("--samplers", "scheduler", "euler", "heun", "--steps", 3)
    table = json.loads((here / "table" / "comparison.json").read_text())
    # Guidance doubles each evaluation; Heun takes two a step but for the last, which is Euler's.
    assert [cell["evaluations"] for cell in table["cells"]] == [6, 6, 10]
    assert all(cell["seconds"] > 0 for cell in table["cells"])
    options = ("--data", stripe_folder, "--features", feature_folder, "--cas-seeds", 0, "--num-images", 15, "--steps", 3)
    report = json.loads(run("evaluate", model, *options, "--guidance", 2, "--sampler", "euler"))["metrics"]
    cell = table["cells"][1]
    assert cell["frechet"] == pytest.approx(report["frechet[stripes-net]"]["value"], rel=1e-6)
    assert cell["label_accuracy"] is None and "label_accuracy[stripes-net]" not in report  # that network has other classes
    assert table["floor"] == pytest.approx(report["frechet[stripes-net]"]["floor"], rel=1e-6)
    assert (here / "table" / "comparison.md").read_text() == comparison_markdown(table)


def test_an_interrupted_comparison_goes_on_and_another_protocol_is_refused(
    compared, refused, here, model, stripe_folder, feature_folder
):
    compared("--samplers", "euler", "--steps", 2)
    path = here / "table" / "comparison.json"
    first = json.loads(path.read_text())["cells"]
    compared("--samplers", "euler", "--steps", 2, 3)
    cells = json.loads(path.read_text())["cells"]
    assert cells[0] == first[0] and [cell["steps"] for cell in cells] == [2, 3]
    ask = ("compare", model, "--data", stripe_folder, "--features", feature_folder, *BASE, "--samplers", "euler", "--steps", 2)
    assert "--guidance-interval: (0.8, 0.2) is not (low, high)" in refused(*ask, "--guidance-interval", 0.8, 0.2)
    assert "made with another guidance_interval" in refused(*ask, "--guidance-interval", 0.2, 0.8)
    assert "made with another seed" in refused(*ask, "--seed", 1)
    assert "--samplers eular: unknown; valid: scheduler, " in refused(*ask[:-4], "--samplers", "eular")
    path.write_text("{}")
    assert "not a comparison" in refused(*ask)


def test_outside_the_interval_guidance_is_neither_used_nor_paid_for(compared, here):
    compared("--samplers", "euler", "--steps", 4)
    compared("--samplers", "euler", "--steps", 4, "--guidance-interval", 0.0, 0.1, "--out", "narrow")
    whole, narrow = (json.loads((here / f / "comparison.json").read_text())["cells"][0] for f in ("table", "narrow"))
    assert (whole["evaluations"], narrow["evaluations"]) == (8, 4) and whole["frechet"] != narrow["frechet"]
