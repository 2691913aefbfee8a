"""The live page of a fit: its verdicts, what it reads, and that it never disturbs the fit."""

import json
import math
import os
import re
import shutil
import time
from html.parser import HTMLParser

import pytest
from PIL import Image
from tiny_runs import diffusion_config

from latentdiff.errors import UserError
from latentdiff.fitting import page
from latentdiff.fitting.page import LivePage, Metrics, chart
from latentdiff.training import train

FALLING = [1 / (1 + k) for k in range(40)]
NOISE = [0.01 * (-1) ** k for k in range(40)]


# Verdicts


@pytest.mark.parametrize(
    ("verdict", "tone", "words"),
    [
        (page.autoencoder_verdict(29.0), "good", "The autoencoder reconstructs well: 29.0 dB on held-out pictures."),
        (page.autoencoder_verdict(33.0), "good", "very well"),
        (page.autoencoder_verdict(25.5), "fact", "fairly well"),
        (page.autoencoder_verdict(19.0), "look", "poorly"),
        (page.autoencoder_verdict(None), "look", "not finite"),
        (page.loss_verdict(FALLING), "good", "falling"),
        (page.loss_verdict(FALLING[::-1]), "look", "rising"),
        (page.loss_verdict([0.5 + n for n in NOISE]), "fact", "flat"),
        (page.loss_verdict([0.5] * 40), "fact", "flat"),
        (page.loss_verdict([*FALLING, math.nan]), "look", "not finite"),
        (page.loss_verdict([*FALLING[:20], math.nan, *FALLING[20:]]), "good", "falling"),
        (page.loss_verdict(FALLING, skipped=3), "look", "3 steps were skipped"),
        (page.loss_verdict([0.3] * 5), "fact", "too few"),
        (page.held_out_verdict([1, 2, 3], [0.5, 0.4, 0.3]), "good", "lowest"),
        (page.held_out_verdict([1, 2, 3], [0.5, 0.4, 0.5]), "fact", "lowest at step 2 and is 25% higher"),
        (page.change_verdict(0.01), "good", "change little"),
        (page.change_verdict(0.03), "fact", "still change."),
        (page.change_verdict(0.2), "fact", "a lot"),
        (page.copies_verdict(0.12, 0.01, 400), "fact", "in 12 of 100 cases (400 samples)."),
        (page.copies_verdict(0.4), "look", "in 40 of 100 cases"),
        (page.copies_verdict(0.02), "good", "as few as real"),
        (page.accuracy_verdict(0.8, 0.9), "good", "recognised well: in 80 of 100 samples; of real pictures in 90."),
        (page.accuracy_verdict(0.6, 0.9), "good", "for the most part"),
        (page.accuracy_verdict(0.3, 0.9), "look", "poorly"),
        (page.frechet_verdict(6.0, 2.0), "good", "close to"),
        (page.frechet_verdict(40.0, 2.0), "look", "20.0 times"),
    ],
)
def test_verdicts_say_in_words_what_numbers_mean(verdict, tone, words):
    assert verdict.tone == tone and words in verdict.text


def test_what_cannot_be_said_yet_is_left_out():
    assert page.held_out_verdict([1, 2], [0.5, 0.4]) is None
    assert page.change_verdict(None) is None and page.frechet_verdict(3.0, None) is None


# Reading metrics.jsonl


def log(path, steps, value=0.5):
    with path.open("a") as lines:
        for step in steps:
            lines.write(json.dumps({"step": step, "train/loss": value}) + "\n")


def test_only_what_is_new_is_read(tmp_path):
    path = tmp_path / "metrics.jsonl"
    metrics = Metrics(path).read()
    assert metrics.curves == {}
    log(path, range(1, 4))
    assert metrics.read().curves["train/loss"].points() == ([1, 2, 3], [0.5] * 3)

    # The beginning is damaged in place: who reads it again notices
    with path.open("r+b") as lines:
        lines.write(b"x" * 20)
    log(path, [4])
    with path.open("a") as lines:
        lines.write('{"step": 5, "train/lo')  # half written
    assert metrics.read().curves["train/loss"].points()[0] == [1, 2, 3, 4]
    with path.open("a") as lines:
        lines.write('ss": NaN}\nno json\n[1]\n{"train/loss": 1}\n')
    curve = metrics.read().curves["train/loss"]
    assert curve.points()[0] == [1, 2, 3, 4] and not curve.finite and metrics.step == 5

    # A resumed run writes the file anew, without the steps that it repeats
    new = tmp_path / "new"
    log(new, range(1, 20), 0.7)
    os.replace(new, path)
    assert metrics.read().curves["train/loss"].points() == (list(range(1, 20)), [pytest.approx(0.7)] * 19)


def test_a_long_curve_keeps_its_mean_and_few_points(monkeypatch):
    curve = page.Curve()
    for step in range(1, 4001):
        curve.add(step, float(step))
    steps, values = curve.points()
    assert len(values) <= page.MOST_POINTS and steps[-1] == 4000 and curve.newest == 4000
    assert all(a < b for a, b in zip(values, values[1:], strict=False))
    assert sum(values) / len(values) == pytest.approx(2000.5, rel=0.01)


def test_a_chart_stays_inside_its_frame():
    curve, flat = page.Curve(), page.Curve()
    for step, value in enumerate(FALLING, 1):
        curve.add(step, value)
        flat.add(step, 0.0)
    for each in (curve, flat):
        plot = chart({"training": each, "held out": None}, "loss")
        places = [tuple(map(float, point.split())) for point in plot["lines"][0]["path"][1:].split("L")]
        assert all(plot["left"] <= x <= plot["right"] and page.TOP <= y <= plot["bottom"] for x, y in places)
        assert all(page.TOP - 0.1 <= float(y) <= plot["bottom"] + 0.1 for y, _ in plot["y"])
        assert plot["x"]
    assert chart({"training": None}, "loss") is None


# The page of a fit


class Links(HTMLParser):
    """All links and pictures of a page, and its text."""

    def __init__(self, html):
        super().__init__()
        self.links, self.words = [], []
        self.feed(html)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.links += [value for name, value in attrs if name in ("src", "href") and not value.startswith("data:")]

    def handle_data(self, data):
        self.words.append(data)


HOSTILE = "<script>alert(1)</script>"


def write_record(out, **changes):
    record = {
        "version": 1,
        "folder": f"/pictures/{HOSTILE.replace('/', '')}",
        "hours": 0.5,
        "plan": {"seconds": {"look": 20, "diffusion": 900}, "lines": [f"3 classes, {HOSTILE}"], "facts": {}},
        "phases": {"look": "done", "autoencoder": "done", "diffusion": "running"},
        **changes,
    }
    (out / "fit.json").write_text(json.dumps(record))
    (out / "clock.json").write_text(json.dumps({"seconds": 1200.0, "parts": 2, "hours": 0.5, "time": time.time()}))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, stripe_folder, autoencoder_run):
    """A fit's folder with a stage-2 run, and a stage-1 run's report."""
    out = tmp_path_factory.mktemp("fit") / "out"
    train(diffusion_config(stripe_folder, out / "diffusion", autoencoder_run, train__picture_every=2))
    (out / "autoencoder").mkdir()
    for name in ("report.json", "report.png", "metrics.jsonl"):
        shutil.copy(autoencoder_run / name, out / "autoencoder")
    return out


@pytest.fixture
def out(tmp_path, trained):
    shutil.copytree(trained, tmp_path / "out")
    write_record(tmp_path / "out")
    return tmp_path / "out"


def read(out):
    return (out / "index.html").read_text(encoding="utf-8")


def test_a_running_fit_is_shown_from_its_files(out):
    with LivePage(out, period=0.05):
        for _ in range(200):
            if (out / "index.html").is_file():
                break
            time.sleep(0.05)
        html = read(out)
    shown = Links(html)
    assert 'http-equiv="refresh"' in html and "20 min of 30 min used, 10 min left" in shown.text and "in 2 parts" in shown.text
    assert "The autoencoder reconstructs poorly" in shown.text and "The loss of stage 2 " in shown.text
    assert "loss on held-out pictures" in shown.text and re.search(r"Pictures (change little|still change)", shown.text)
    assert html.count("<svg") == 2 and "--resume" in shown.text
    assert "<script" not in html and HOSTILE in shown.text
    assert {link for link in shown.links if "step-" in link} == {f"diffusion/pictures/step-{k:06d}.png" for k in (2, 4, 6)}
    assert all((out / link.partition("?")[0]).is_file() for link in shown.links) and "://" not in html
    assert "Step 6, 20 min" in shown.text and "could not be made" not in shown.text


def test_a_finished_fit_shows_choice_and_evaluation_and_stays_still(out):
    (out / "report").mkdir()
    (out / "report" / "index.html").write_text("the report")
    values = {
        "frechet[features]": {"value": 9.0, "floor": 3.0, "images": 400},
        "label_accuracy": {"value": 0.8, "floor": 0.9, "images": 400},
        page.NEAR_COPIES: {"value": 0.12, "floor": 0.01, "images": 400, "floor_images": 12},
        "kid": {"value": None},
    }
    (out / "report" / "metrics.json").write_text(json.dumps({"values": values}))
    Image.new("RGB", (30, 20)).save(out / "samples.png")
    names = ("step", "distance", "label_accuracy", "closer_to_training")
    candidates = [dict(zip(names, row, strict=True)) for row in ((2, 12.0, None, None), (4, 9.0, None, 0.12))]
    lines = ["Good: as real ones", "See pictures: latentdiff generate --all-classes", "Better with: more time"]
    phases = dict.fromkeys(page.PHASES, "done")
    choice = {"step": 4, "why": "closest", "candidates": candidates, "real": {"distance": 3.0}, "images": 64}
    write_record(out, choice=choice, phases=phases, lines=lines)
    live = LivePage(out)
    assert live.write("finished")
    html, shown = read(out), Links(read(out))
    assert "refresh" not in html and "Finished." in shown.text
    assert all(line in shown.text for line in lines)
    assert "in 12 of 100 cases (400 samples)" in shown.text and "recognised well" in shown.text and "3.0 times" in shown.text
    assert re.search(r'class="kept"><td>kept</td><td class="n">4</td>', html) and "9.0000" in shown.text
    assert "about copies" in shown.text and "right class" not in shown.text  # nothing says anything of classes
    assert re.search(r"<td>real</td>.*3", html) and "is of held-out pictures" in shown.text
    assert "report/index.html" in shown.links and any(link.startswith("samples.png?") for link in shown.links)
    assert "still change" not in shown.text


def test_the_choice_says_how_much_is_copied_before_the_evaluation_does(out):
    choice = {"step": 4, "why": "nearest", "candidates": [{"step": 4, "closer_to_training": 0.3}], "images": 64}
    (out / "diffusion" / "choice.json").write_text(json.dumps(choice))
    LivePage(out).write()
    shown = Links(read(out))
    assert "in 30 of 100 cases (64 samples)" in shown.text and "nearest" in shown.text


def test_a_pretrained_autoencoder_is_judged_too(out):
    shutil.rmtree(out / "autoencoder")
    (out / "page").mkdir()
    tried = {"decision": "skip", "psnr_db": 29.0, "worst_classes": ["flags (22.0 dB)"]}
    write_record(out, plan={"lines": [], "seconds": {}, "first_stage": tried})
    Image.new("RGB", (30, 20)).save(out / page.RECONSTRUCTIONS)
    LivePage(out).write()
    text = Links(read(out)).text
    assert "its reconstruction by the autoencoder." in text
    assert "reconstructs well: 29.0 dB on these pictures, which it never saw." in text and "flags (22.0 dB)" in text


def test_nothing_is_written_while_nothing_changes(out):
    live = LivePage(out)
    assert live.write() and not live.write()
    log(out / "diffusion" / "metrics.jsonl", [7])
    assert live.write() and not live.write()


def test_the_page_is_whole_after_a_kill_and_a_resume(out):
    LivePage(out).write()
    before = page.read_json(out / page.TIMES)
    assert set(before) == {f"step-{k:06d}.png" for k in (2, 4, 6)}

    # Hours later the fit goes on: the clock stood still meanwhile, and old pictures keep their times
    for path in (out / "diffusion" / "pictures").iterdir():
        os.utime(path, (time.time() - 9e4, time.time() - 9e4))
    (out / "index.html").unlink()
    assert LivePage(out).write()
    assert page.read_json(out / page.TIMES) == before and "Step 2, 20 min" in Links(read(out)).text


def test_no_page_before_there_is_a_plan(tmp_path):
    with LivePage(tmp_path, period=0.01):
        pass
    assert not any(tmp_path.iterdir())
    (tmp_path / "fit.json").write_text("{}")
    assert not LivePage(tmp_path).write("stopped")
    with LivePage(tmp_path / "other", enabled=False):
        pass
    assert not (tmp_path / "other").exists()


def test_damaged_files_cost_only_their_part(out):
    (out / "clock.json").write_text('{"seconds": "soon", "time": []}')
    (out / "diffusion" / "pictures" / "step-000006.png").write_bytes(b"no picture")
    (out / "autoencoder" / "report.json").write_bytes(b"\xff\xfe")
    (out / "autoencoder" / "metrics.jsonl").write_bytes(b"\x00\xff\n" * 50)
    record = json.loads((out / "fit.json").read_text())
    (out / "fit.json").write_text(json.dumps({**record, "choice": {"candidates": 3}}))
    LivePage(out).write()
    shown = Links(read(out))
    assert "Stage 2, the diffusion model: loss by step" in shown.text and "could not be made" in shown.text


def test_an_error_of_the_page_never_reaches_the_fit(out, capsys, monkeypatch):
    def fails(facts):
        raise RuntimeError("no template")

    monkeypatch.setattr(page, "render", fails)
    with LivePage(out, period=0.01):
        time.sleep(0.1)
    assert capsys.readouterr().err.count("warning:") == 1


def test_an_error_of_the_fit_is_named_and_goes_on(out):
    with pytest.raises(UserError, match="no images"), LivePage(out):
        raise UserError("/pictures: no images")
    shown = Links(read(out))
    assert "Stopped." in shown.text and "/pictures: no images" in shown.text and "--resume" in shown.text
    assert 'http-equiv="refresh"' not in read(out)
