"""The tab Runs: what is read of a run, what is not, and that a browser sees a training go on."""

import base64
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny_runs import autoencoder_config, autoencoder_tree, diffusion_config, write_yaml

from latentdiff.errors import UserError
from latentdiff.fitting import page
from latentdiff.training import train
from latentdiff.utils import locks
from latentdiff.web import reading, runs

SECRET = "a word that stands outside"
SCRIPT = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory, stripe_folder) -> Path:
    """A training run of 12 steps with two pictures."""
    first, output = tmp_path_factory.mktemp("stage1") / "run", tmp_path_factory.mktemp("stage2") / "run"
    train(autoencoder_config(stripe_folder, first, train__steps=2))
    train(diffusion_config(stripe_folder, output, first, train__steps=12, train__picture_every=6))
    return output


@pytest.fixture
def root(tmp_path, small_run) -> Path:
    """A folder with that run."""
    shutil.copytree(small_run, tmp_path / "runs" / "stripes", ignore=shutil.ignore_patterns("state", "latents", "logs"))
    return tmp_path / "runs"


def write_fit(out: Path, **changes: object) -> None:
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "folder": str(out / SCRIPT.replace("/", "")),
        "hours": 0.5,
        "plan": {"seconds": {"look": 20}, "lines": [f"data: {out}/pictures, {SCRIPT}"], "facts": {}},
        "phases": {"look": "done", "autoencoder": "done", "diffusion": "running"},
        **changes,
    }
    (out / "fit.json").write_text(json.dumps(record))
    (out / "clock.json").write_text(json.dumps({"seconds": 600.0, "parts": 1, "hours": 0.5, "time": time.time()}))


def log(folder: Path, steps: range, name: str = "train/loss") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as lines:
        for step in steps:
            lines.write(json.dumps({"step": step, name: 1 / step}) + "\n")


def text_of(made: runs.Section) -> str:
    return "\n".join(made)


# Reading


def test_a_training_run_is_shown(root):
    made = runs.Runs(root).sections("stripes")
    assert "Finished." in made.head and "Step 12 of 12." in made.head and "loss of stage 2" in made.head
    assert made.pictures.count("data:image/") == 3 and "Step 6<" in made.pictures  # the newest, and two over time
    assert made.curves.count("<svg") == 1 and "held-out pictures" in made.curves
    assert "train/gradient_norm" in made.more_curves and "train/loss." not in made.more_curves


def test_a_fit_is_shown_and_its_stages_are_parts_of_it(root):
    write_fit(root / "fit")
    shutil.move(root / "stripes", root / "fit" / "diffusion")
    shown = runs.Runs(root, lambda text: text.replace(str(root), "the folder of runs"))
    assert shown.names() == ["fit"]
    made = shown.sections("fit")
    assert "10 min of 30 min used" in made.head and "Stage 2: train the diffusion model" in made.head
    assert "the folder of runs/fit/pictures" in made.details
    assert str(root) not in text_of(made) and SCRIPT not in text_of(made) and "&lt;script&gt;" in made.details


def test_the_folder_may_be_a_run_itself_and_an_unknown_name_is_refused(root):
    assert runs.Runs(root / "stripes").names() == ["stripes"]
    for name in ("..", "../runs/stripes", "/etc", "", None, 3, "stripes/../stripes"):
        with pytest.raises(UserError, match="there is none of this name"):
            runs.Runs(root).sections(name)


def test_only_a_lock_that_somebody_holds_means_that_a_run_is_running(root):
    run = root / "stripes"
    lock = run / locks.NAME

    def status() -> str:
        return runs.status_of(runs.open_run(root, run, str), {})

    assert status() == "finished"
    lock.write_text(f"process {os.getpid()} on {socket.gethostname()}\n")
    assert status() == "running"
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    lock.write_text(f"process {ended.pid} on {socket.gethostname()}\n")
    assert status() == "finished"
    lock.write_text("process 1 on another-host\n")
    assert status() == "running"
    shutil.rmtree(run / "model")
    lock.write_text("process x" * 10**6)
    os.utime(run / "metrics.jsonl", (1, 1))
    assert status() == "stopped"


def test_time_left_comes_from_the_steps_that_were_seen():
    rate = runs.Rate()
    assert rate.look(10, 100.0) is None and rate.look(10, 101.0) is None
    assert rate.look(30, 110.0) == pytest.approx(2.0)
    assert rate.look(5, 111.0) is None  # a resumed run repeats steps
    record = {"train": {"steps": 100, "minutes": None}}
    shown = runs.run_time(record, 0.0, 40, 2.0, "running")
    assert shown == {"words": "Step 40 of 100, 2 steps/s, about 30 s left.", "share": 0.4}
    shown = runs.run_time({"train": {"steps": 9, "minutes": 2}}, time.time() - 60, 40, None, "running")
    assert shown["words"] == "Step 40, about 60 s of 2 min 00 s left." and shown["share"] == pytest.approx(0.5, abs=0.01)
    assert runs.run_time({"train": []}, 0.0, 1, None, "running") is None


def test_what_was_seen_is_not_sent_again(root):
    shown = runs.Runs(root)
    parts, now = runs.changed_parts(shown.sections("stripes"), {})
    assert None not in parts
    parts, again = runs.changed_parts(shown.sections("stripes"), now)
    assert parts == [None] * 5 and again == now
    log(root / "stripes", range(13, 20))
    time.sleep(runs.PERIOD / 2 + 0.1)
    parts, _ = runs.changed_parts(shown.sections("stripes"), now)
    assert [part is None for part in parts] == [False, True, False, True, True]


# Hostile folders


def test_links_pipes_and_devices_are_not_opened(tmp_path):
    root, outside = tmp_path / "root", tmp_path / "outside"
    (root / "in").mkdir(parents=True)
    outside.mkdir()
    (outside / "secret").write_text(SECRET)
    (root / "in" / "plain").write_text("plain")
    (root / "link").symlink_to(outside / "secret")
    (root / "folder").symlink_to(outside)
    (root / "self").symlink_to(root / "in")
    os.mkfifo(root / "pipe")
    with reading.open_inside(root, root / "in" / "plain") as file:
        assert file.read() == b"plain"
    refused = ["link", "folder/secret", "self/plain", "pipe", "in", "../outside/secret", "in/../../outside/secret", "a\0b", ""]
    for name in refused:
        with pytest.raises(OSError):
            reading.open_inside(root, root / name)
    with pytest.raises(OSError):
        reading.open_inside(root, outside / "secret")
    with pytest.raises(OSError):
        reading.open_inside(root, root / "in" / "plain", most=4)
    # The folder that the owner named may be a link
    (tmp_path / "named").symlink_to(root)
    assert reading.is_file(tmp_path / "named", tmp_path / "named" / "in" / "plain")


def test_nothing_outside_the_folder_is_shown(root, tmp_path):
    outside = tmp_path / "outside"
    write_fit(outside / "fit", folder=SECRET, plan={"lines": [SECRET], "seconds": {}})
    log(outside / "run", range(1, 50), SECRET)
    Image.effect_noise((300, 200), 50).save(outside / "picture.png")

    # A whole run, a record, metrics, a folder of pictures and a picture that are links
    (root / "linked").symlink_to(outside / "fit")
    run = root / "stripes"
    for name, target in (("metrics.jsonl", "run/metrics.jsonl"), ("pictures", "."), ("samples.png", "picture.png")):
        place = run / name
        shutil.rmtree(place) if place.is_dir() else place.unlink(missing_ok=True)
        place.symlink_to(outside / target)
    fit = root / "other"
    fit.mkdir()
    for name in ("fit.json", "clock.json"):
        (fit / name).symlink_to(outside / "fit" / name)
    write_fit(root / "third")
    (root / "third" / "samples.png").symlink_to(outside / "picture.png")
    (root / "third" / "diffusion").symlink_to(outside / "run")

    shown = runs.Runs(root)
    assert sorted(shown.names()) == ["stripes", "third"]
    for name in shown.names():
        made = text_of(shown.sections(name))
        assert SECRET not in made and "data:image" not in made and "<svg" not in made


def test_half_written_and_hostile_files_cost_only_their_part(root):
    fit = root / "fit"
    log(fit / "diffusion", range(1, 50))
    with (fit / "diffusion" / "metrics.jsonl").open("ab") as lines:
        lines.write(b'{"step": 1e400, "train/loss": 1}\n{"step": 3, "x": 1' + b"0" * 400 + b"}\n" + b"[" * 10**6 + b"\n")
        lines.write(b'{"step": 50, "a": 1e308}\n{"step": 51, "a": -1e308}\n' + b'{"step": 52, "train/lo')
    for record in (
        {"plan": 3, "phases": [], "choice": [], "hours": "x"},
        {"plan": {"lines": {"a": 1}, "facts": [], "seconds": 4}, "phases": {"diffusion": {}}, "choice": {"candidates": [3]}},
        {"plan": {"lines": ["x" * 10**6] * 3}, "lines": ["y" * 10**6], "folder": "\ud800\0/../\x1b[31m"},
        {"plan": {"lines": [[[[[]]]]]}, "hours": float("inf"), "choice": {"why": SCRIPT, "candidates": [{SCRIPT: SCRIPT}]}},
    ):
        write_fit(fit, **record)
        (fit / "clock.json").write_text('{"seconds": Infinity, "time": "now", "parts": 1e999}')
        (fit / "samples.png").write_bytes(b"\x89PNG\r\n\x1a\n half a picture")
        made = runs.Runs(root).sections("fit")
        assert "loss by step" in made.curves and "Stage 2" in text_of(made)
        assert "<script" not in text_of(made) and "\x1b" not in text_of(made) and len(text_of(made)) < 100_000
    for text in ("", "{", "[]", "null", '{"a": ' * 5000, "\xff"):
        (fit / "fit.json").write_text(text, encoding="latin-1")
        runs.Runs(root).sections("fit")


def test_reading_is_bounded(root, monkeypatch):
    # Many names, few curves
    log(root / "many", range(1, 3))
    (root / "many" / "run.json").write_text("{}")
    with (root / "many" / "metrics.jsonl").open("a") as lines:
        lines.write(json.dumps({"step": 3, **{f"name {k}": k for k in range(5000)}}) + "\n")
    files = runs.open_run(root, root / "many", str)
    files.read_metrics()
    assert len(files.stages["diffusion"].curves) == page.MOST_CURVES

    # A long file is read in parts
    log(root / "long", range(1, 4000))
    metrics = page.Metrics(root / "long" / "metrics.jsonl")
    monkeypatch.setattr(page, "CHUNK", 1000)
    seen = [metrics.read(1000).step for _ in range(3)]
    assert 0 < seen[0] < seen[1] < seen[2] < 200 and metrics.read().step == 3999

    # A picture of many pixels, a large file, and more folders than are looked into
    Image.new("1", (5000, 4000)).save(root / "long" / "large.png")
    assert files.picture(root / "long" / "large.png") is None
    Image.new("1", (50, 40)).save(root / "long" / "small.png")
    assert files.picture(root / "long" / "small.png")["width"] == 50
    monkeypatch.setattr(reading, "MOST_FOLDERS", 3)
    assert len(runs.find_runs(root)) <= 2


def test_a_picture_is_written_anew(root):
    info = PngInfo()
    info.add_text("note", SECRET)
    path = root / "stripes" / "noted.png"
    Image.new("RGB", (9, 9), "red").save(path, pnginfo=info)
    path.write_bytes(path.read_bytes() + SECRET.encode())
    with path.open("rb") as file:
        link, *size = reading.picture_link(file)
    assert size == [9, 9] and SECRET.encode() not in base64.b64decode(link.partition(",")[2])
    (root / "a.svg").write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    with (root / "a.svg").open("rb") as file, pytest.raises(OSError):
        reading.picture_link(file)


# In the browser


def test_a_training_is_watched_without_a_reload(visit, runs_folder, stripe_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "QUIET", 2.0)
    page, output = visit.page, runs_folder / "watched"
    page.set_default_timeout(60_000)
    changes = {"train__steps": 100_000, "train__picture_every": 25, "train__save_minutes": 10}
    config = write_yaml(tmp_path / "train.yaml", autoencoder_tree(stripe_folder, output, **changes))
    page.evaluate("window.stayed = true")
    page.get_by_role("tab", name="Runs").click()
    command = [sys.executable, "-m", "latentdiff", "train", str(config)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        page.get_by_role("heading", name="watched").wait_for()
        page.get_by_text("Running.").wait_for()
        curve = page.locator("path.line").first
        curve.wait_for()
        first = curve.get_attribute("d")
        caption = page.get_by_text(re.compile(r"its reconstruction after \d+ steps"))
        caption.wait_for()
        drawn = caption.inner_text()
        page.wait_for_function("d => document.querySelector('path.line').getAttribute('d') !== d", arg=first)
        page.wait_for_function("t => ![...document.querySelectorAll('figcaption')].some(f => f.innerText === t)", arg=drawn)
        picture = page.get_by_alt_text("held-out pictures and reconstructions")
        assert picture.evaluate("image => image.complete && image.naturalWidth > 0")
        head = page.locator(".run").first.inner_text()
        assert re.search(r"Step \d+ of 100000, [\d.e+]+ steps/s, about .* left", head)
    finally:
        process.terminate()
        process.wait()
    page.get_by_text("Stopped.").wait_for()
    assert page.evaluate("window.stayed")
