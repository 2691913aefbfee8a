"""A record's values in a card's front matter, a judge's protocol field by field, and what the page draws of a curve."""

import copy
import re
import shutil
from pathlib import Path

import pytest
import yaml
from tiny_runs import write_stripes

from latentdiff.errors import UserError
from latentdiff.evaluation.feature_statistics import read_batches
from latentdiff.evaluation.html_report import guidance_plots, recall_curve
from latentdiff.evaluation.model_card import with_model_index
from latentdiff.evaluation.records import EVALUATE_PROTOCOL, JUDGE_PROTOCOL, make_judge_record, write_record
from latentdiff.utils import processes

SHARES = {"pictures": 4, "top1": 0.5, "style": 0.75}
TABLE = {
    "protocol": {"model": "m", "seed": 0, "prompts": "<style> style, <name>", "judge": "abc", "strength_of_augmentation": 0.5},
    "scores": {
        group: {
            "generated": SHARES,
            "augmented real": SHARES | {"top1": 0.9},
            "shuffled prompts": SHARES | {"top1": 0.1},
        }
        for group in ("seen", "held-out")
    },
    "nearest_training_picture": {
        "generated, seen": {"pictures": 4, "pixels": 0.1, "embedding": 0.2},
        "real, held-out": {"pictures": 2, "pixels": 0.3, "embedding": 0.4},
    },
}


def judged() -> dict:
    return make_judge_record(copy.deepcopy(TABLE), "pairs", "net", {"weights_sha256": "w"}, {"judging": 1.0})


@pytest.mark.parametrize("field", JUDGE_PROTOCOL)
def test_another_protocol_of_a_judge_is_refused_and_the_field_named(run, refused, tmp_path, field):
    one, other = judged(), judged()
    a, b = write_record(one, tmp_path / "a").parent, write_record(other, tmp_path / "b").parent
    assert "top1[held-out] | 0.5000 | 0.5000 | 0.9000" in run("compare", a, b)
    other["protocol"][field] = [other["protocol"][field], 1]
    write_record(other, b)
    assert re.search(rf"compare: {field} is .* in {a} and .* in {b}: values of unlike protocols", refused("compare", a, b))


def test_a_judges_record_is_not_compared_with_another_kind(refused, tmp_path):
    other = judged() | {"kind": "evaluate", "protocol": dict.fromkeys(EVALUATE_PROTOCOL, 1)}
    a, b = write_record(judged(), tmp_path / "a").parent, write_record(other, tmp_path / "b").parent
    assert f"compare: {a} is of latentdiff judge, {b} of latentdiff evaluate" in refused("compare", a, b)


def test_records_from_before_prompts_are_of_models_that_read_none(run, refused, tmp_path):
    new, old = (
        judged() | {"kind": "evaluate", "protocol": dict.fromkeys(EVALUATE_PROTOCOL, 1) | {"prompts": {}}} for _ in range(2)
    )
    del old["protocol"]["prompts"]
    a, b = write_record(new, tmp_path / "a").parent, write_record(old, tmp_path / "b").parent
    assert "top1[seen]" in run("compare", a, b)
    new["protocol"]["prompts"] = {"captions_of": "held-out images"}
    write_record(new, a)
    assert 'compare: prompts.captions_of is "held-out images"' in refused("compare", a, b)


# front matter


def front(text: str) -> dict:
    return yaml.safe_load(text.split("---\n")[1])


def test_the_front_matter_holds_the_values_once_and_keeps_what_is_others():
    other_result = {
        "task": {"type": "x"},
        "dataset": {"name": "y", "type": "y"},
        "metrics": [{"type": "accuracy", "value": 0.5}],
    }
    before = {"license": "mit", "tags": ["a"], "model-index": [{"name": "mine", "results": [other_result]}]}
    text = f"---\n{yaml.safe_dump(before)}---\n# Card\n\n---\nrule above\n"
    record = judged()
    record["made"]["data"] = "some/where/emoji"
    once = with_model_index(text, record, Path("m/README.md"))
    assert once.endswith("---\n# Card\n\n---\nrule above\n")
    matter = front(once)
    assert matter["license"] == "mit" and matter["tags"] == ["a"] and matter["model-index"][0]["name"] == "mine"
    others, own_result = matter["model-index"][0]["results"]
    assert others == other_result and own_result["task"]["type"] == "text-to-image"
    assert own_result["dataset"] == {"name": "emoji", "type": "emoji"} and len(own_result["metrics"]) == len(record["values"])
    entry = next(each for each in own_result["metrics"] if each["name"] == "top1[seen]")
    assert entry["type"] == "top1" and entry["value"] == 0.5
    assert entry["args"] == {"images": 4, "floor": 0.9, "by": "latentdiff judge"}
    record["values"]["top1[seen]"]["value"] = 0.625
    again = with_model_index(once, record, Path("m/README.md"))
    assert again.count("top1[seen]") == 1 and "0.625" in again and front(again)["model-index"][0]["results"][0] == other_result
    assert with_model_index(again, record, Path("m/README.md")) == again


@pytest.mark.parametrize("matter", ["a: [", "- 1\n- 2", "model-index: 7"])
def test_front_matter_that_cannot_be_read_is_refused(matter):
    with pytest.raises(UserError, match="^m/README.md: its front matter cannot be read"):
        with_model_index(f"---\n{matter}\n---\n# Card\n", judged(), Path("m/README.md"))


def test_the_command_writes_front_matter_when_asked(run, here, capsys, model, feature_folder, tmp_path):
    data = write_stripes(tmp_path / "striped" / "train", 30).parent
    write_stripes(data / "test", 12, seed=1)
    shutil.copytree(model, "mine")
    ask = ("--data", data, "--features", feature_folder, "--cas-seeds", 0, "--num-images", 12, "--steps", 1)
    run("evaluate", "mine", *ask, "--out", "one")
    run("card", "mine", "--record", "one", "--metadata")
    text = Path("mine/README.md").read_text()
    (entry,) = front(text)["model-index"]
    assert entry["name"] == "mine" and entry["results"][0]["dataset"]["name"] == "striped"
    assert {"frechet[stripes-net]", "kid[stripes-net]"} <= {each["name"] for each in entry["results"][0]["metrics"]}
    assert text.count("<!-- evaluation -->") == 1 and capsys.readouterr().err == ""
    run("card", "mine", "--record", "one", "--metadata")
    assert Path("mine/README.md").read_text() == text
    run("card", "mine", "--record", "one")  # without the flag the front matter stays
    assert Path("mine/README.md").read_text() == text


# the page of a curve, and the bars


def curve(**floor) -> dict:
    points = [
        {"guidance": g, "frechet": f, "label_accuracy": None, "precision": p, "recall": r}
        for g, f, p, r in ((1.0, 2.0, 0.5, 1.0), (3.0, 1.0, 1.0, 0.25))
    ]
    real = {"frechet": 0.5, "label_accuracy": None, "precision": 0.9, "recall": 0.9} | floor
    return {"images": 9, "floor_images": 9, "points": points, "floor": real}


def test_precision_is_drawn_against_recall_along_the_scales():
    drawn = recall_curve(curve())
    places = [tuple(map(float, each)) for each in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', drawn)]
    assert places == [(345, 160), (120, 10), (315, 40)]  # two scales and the real images
    assert 'd="M345.0 160.0L120.0 10.0"' in drawn and ">1</text>" in drawn and ">3</text>" in drawn
    assert recall_curve(None) == "" and "green" in drawn


def test_too_few_held_out_images_leave_the_floor_out_of_the_plots():
    few = curve(precision=None, recall=None)
    assert recall_curve(few).count("<circle") == 2 and guidance_plots(few).count("<circle") == 2 * 3
    few["points"][0]["recall"] = None
    assert recall_curve(few) == ""


def test_reading_shows_its_progress_where_it_takes_a_while(capsys, monkeypatch):
    class Images:
        def __len__(self):
            return 5

        def batch(self, rows):
            clock[0] += wait
            return list(rows), None

    clock, wait = [0.0], 40.0  # seconds; in a file a line comes every 30
    monkeypatch.setattr("tqdm.std.time", lambda: clock[0])
    assert [rows for rows, _ in read_batches(Images(), 2)] == [[0, 1], [2, 3], [4]]
    assert capsys.readouterr().err == ""
    assert [rows for rows, _ in read_batches(Images(), 2, "looking", slice(1, 4))] == [[1, 2], [3]]
    progress = capsys.readouterr().err
    assert "looking: 100%" in progress and "3/3" in progress and "s/image" in progress
    wait = 0.01
    assert len(list(read_batches(Images(), 2, "looking"))) == 3 and capsys.readouterr().err == ""
    wait = 40.0
    monkeypatch.setattr(processes, "rank", lambda: 1)
    assert len(list(read_batches(Images(), 2, "looking"))) == 3 and capsys.readouterr().err == ""
