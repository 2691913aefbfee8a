"""`latentdiff fit`: a folder becomes a model; what stopped it goes on; what cannot be is refused in a line."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from PIL import Image
from tiny_runs import SMALL_VQ, autoencoder_tree, diffusion_tree, tree, write_stripes

import latentdiff
from latentdiff.checkpoints import load
from latentdiff.config import load_config
from latentdiff.errors import UserError
from latentdiff.evaluation.model_card import BEGIN
from latentdiff.fitting import finish
from latentdiff.fitting import fit as fitting
from latentdiff.utils import locks

# The networks of the tiny runs
AUTOENCODER = autoencoder_tree(Path(), Path())["model"]["config"]
UNET = diffusion_tree(Path(), Path(), Path())["model"]["config"]
TRAIN = {"steps": 6, "batch_size": 8, "precision": "float32", "threads": 1, "trackers": []}


def tiny(**changes) -> list[str]:
    """Overrides that make both stages a matter of seconds. changes: further ones, with __ for the dots."""
    values = {"data.size": [16, 16], "data.channels": 1, "data.workers": 0, "data.held_out": 0.25}
    values |= {"stage1.model.config": AUTOENCODER, "stage1.loss.adversarial": 0, "model.config": UNET}
    values |= {f"{stage}train.{key}": value for stage in ("", "stage1.") for key, value in TRAIN.items()}
    values |= {"sample.steps": 2, "sample.per_class": 1}
    values |= {key.replace("__", "."): value for key, value in changes.items()}
    return tiny_words(values)


def tiny_words(values: dict) -> list[str]:
    """The values as key=value words."""
    return [
        f"{key}={yaml.safe_dump(value, default_flow_style=True).removesuffix('...' + chr(10)).strip()}"
        for key, value in values.items()
    ]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    return write_stripes(tmp_path_factory.mktemp("fit") / "stripes", 48)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, pictures) -> Path:
    """The folder of a finished fit."""
    out = tmp_path_factory.mktemp("finished") / "fit"
    model = latentdiff.fit(pictures, hours=0.05, out=out, overrides=tiny())
    assert model == out / "model"
    return out


class Killed(BaseException):
    """Ends a fit as a kill does, in a test that runs it in this process."""


# The whole


def test_a_folder_becomes_a_model(finished):
    record = json.loads((finished / "fit.json").read_text())
    assert record["phases"] == {phase: "done" for phase in fitting.PHASES}
    assert load(finished / "model").class_names == ["across", "blank", "down"]
    assert Image.open(finished / "samples.png").width > 8 * 16
    for name in ("evaluation.json", "metrics.json", "index.html"):
        assert (finished / "report" / name).is_file()
    assert 0 < json.loads((finished / "clock.json").read_text())["seconds"] < 180
    assert locks.contents(finished) and not (finished / locks.NAME).exists()


def test_the_configs_are_ordinary_ones(finished):
    first, second = (load_config(finished / "configs" / f"{name}.yaml") for name in ("autoencoder", "diffusion"))
    assert (first.stage, second.stage) == ("autoencoder", "diffusion")
    assert second.train.steps == 6 and first.data == second.data


def test_three_lines_say_how_it_went(finished):
    how, what, better = finish.last_lines(finished / "model").splitlines()
    assert "real pictures" in how and "latentdiff generate --all-classes --model" in what
    assert what.endswith(f"latentdiff serve {finished}")
    assert "more pictures (48" in better and f"--out {finished} --resume --hours 0.1" in better


def test_a_folder_becomes_a_model_over_codes(pictures, tmp_path):
    network = {key: value for key, value in SMALL_VQ["model__config"].items() if key != "num_vq_embeddings"}
    small = {"stage1.model.config.num_vq_embeddings": 6} | {f"stage1.model.config.{k}": v for k, v in network.items()}
    words = [*tiny(latents="discrete", **{"sample.order": "confidence"}), *tiny_words(small)]
    model = latentdiff.fit(pictures, hours=0.05, out=tmp_path / "fit", overrides=words)
    pipe = load(model)
    assert pipe.num_codes == 6 and pipe.code_shape == (1, 8, 8) and pipe.config.default_sampler == "confidence"
    second = load_config(tmp_path / "fit" / "configs" / "diffusion.yaml")
    assert (second.stage, second.process, second.schedule) == ("discrete", "absorbing", "cosine")
    record = json.loads((tmp_path / "fit" / "fit.json").read_text())
    assert record["phases"] == {phase: "done" for phase in fitting.PHASES}
    assert "as latents=discrete needs" in record["plan"]["reasons"]["autoencoder"]
    assert (tmp_path / "fit" / "report" / "metrics.json").is_file()


def test_the_card_has_the_fit_and_the_evaluation(finished):
    text = (finished / "model" / "README.md").read_text()
    assert "latentdiff fit" in text and text.index(finish.BEGIN) < text.index(BEGIN)
    assert "| frechet" in text


def test_a_finished_fit_is_left_as_it_is(finished, pictures, capsys):
    before = {path: content for path, content in tree(finished).items() if path.name != "clock.json"}
    latentdiff.fit(pictures, out=finished, resume=True)
    assert "finished" in capsys.readouterr().err
    assert {path: content for path, content in tree(finished).items() if path.name != "clock.json"} == before


# Going on


def test_a_fit_that_was_stopped_goes_on(pictures, tmp_path, monkeypatch):
    """With nothing but the folder: hours and overrides come from fit.json, and the clock goes on."""

    def killed(self, seconds):
        raise Killed

    out = tmp_path / "fit"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(fitting._Fit, "report", killed)
        latentdiff.fit(pictures, hours=0.05, out=out, overrides=tiny())
    record = json.loads((out / "fit.json").read_text())
    assert record["phases"]["report"] == "running" and record["phases"]["choose"] == "done"
    used, first = json.loads((out / "clock.json").read_text())["seconds"], (out / "diffusion" / "run.json").stat().st_mtime_ns
    latentdiff.fit(pictures, out=out, resume=True)
    clock = json.loads((out / "clock.json").read_text())
    assert clock["seconds"] > used and clock["parts"] == 2
    assert (out / "model" / "README.md").is_file() and (out / "report" / "index.html").is_file()
    assert (out / "diffusion" / "run.json").stat().st_mtime_ns == first


@pytest.mark.slow
def test_a_killed_process_goes_on(pictures, tmp_path):
    out = tmp_path / "fit"
    command = [sys.executable, "-m", "latentdiff", "fit", str(pictures), "--hours", "0.05", "--out", str(out), *tiny()]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    until = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < until:
        if (out / "autoencoder" / "state").is_dir():
            process.kill()
        time.sleep(0.02)
    assert process.wait() == -signal.SIGKILL
    used = json.loads((out / "clock.json").read_text())["seconds"]
    latentdiff.fit(pictures, out=out, resume=True)
    assert json.loads((out / "clock.json").read_text())["seconds"] > used
    assert (out / "model" / "model_index.json").is_file()


@pytest.mark.slow
def test_two_processes_fit_together(pictures, tmp_path):
    """The first one looks, plans, chooses and reports; both train."""
    out, log = tmp_path / "fit", tmp_path / "log"
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    launch = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    words = ["-m", "latentdiff", "fit", str(pictures), "--hours", "0.05", "--out", str(out), *tiny()]
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, *words]
    with log.open("w") as stream:
        ended = subprocess.run(command, env=environment, stdout=stream, stderr=subprocess.STDOUT, timeout=300)
    text = log.read_text()
    assert ended.returncode == 0, text
    assert text.count("train: 2 process(es)") == 2 and text.count("See pictures: ") == 1
    assert json.loads((out / "fit.json").read_text())["phases"] == {phase: "done" for phase in fitting.PHASES}


def test_a_signal_names_the_command_that_goes_on(pictures, tmp_path, monkeypatch, capsys):
    from latentdiff.utils import signals

    def interrupted(self, name):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(fitting._Fit, "look", lambda self: interrupted(self, ""))
    with pytest.raises(SystemExit) as end:
        latentdiff.cli.main(["fit", str(pictures), "--hours", "0.05", "--out", str(tmp_path / "fit")])
    assert end.value.code == signals.INTERRUPTED
    (line,) = capsys.readouterr().err.splitlines()
    assert line.endswith(f"latentdiff fit {pictures} --hours 0.05 --out {tmp_path / 'fit'} --resume")


def test_more_hours_let_a_finished_fit_train_on(finished, pictures, tmp_path, capsys):
    out = tmp_path / "fit"
    shutil.copytree(finished, out)
    asked = {"folder": str(pictures.resolve()), "hours": 0.2, "overrides": [], "base": None, "lora": None}
    longer = fitting._Fit(out, asked, resume=True, age=0.0)
    assert "goes on with 0.2 hours (was 0.05)" in capsys.readouterr().err
    assert longer.unfinished() == ["diffusion", "choose", "report"]
    assert longer.config("diffusion").train.steps == 6  # as the overrides said
    longer.record["overrides"] = []
    assert longer.config("diffusion").train.steps == 24
    planned = longer.record["plan"]["seconds"]
    assert longer.needs()["report"] == pytest.approx(4 * planned["report"])


# Refusals


def test_a_dry_run_writes_nothing(pictures, run, here):
    assert "48" not in run("fit", pictures, "--dry-run", "--hours", "0.05", *tiny()).splitlines()[0][:2]
    assert list(here.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["--hours", "0.001"], "--hours 0.001: give at least"),
        (["--hours", "nan"], "--hours nan: give at least"),
        (["--lora", "4"], "--lora 4: give --base"),
        (["--dry-run", "--resume"], "--dry-run and --resume: give one"),
        (["train.stpes=3"], "train.stpes"),
        (["stage1.train.stpes=3"], "train.stpes"),
        (["data.sise=[16,16]"], "data.sise"),
    ],
)
def test_what_cannot_be_is_refused(arguments, part, pictures, refused):
    assert part in refused("fit", pictures, *arguments)


def test_a_folder_without_images_is_refused(tmp_path, refused):
    (tmp_path / "empty").mkdir()
    assert "empty" in refused("fit", tmp_path / "empty")
    assert "nowhere" in refused("fit", tmp_path / "nowhere")


def test_a_folder_that_holds_something_else_is_refused(pictures, tmp_path, refused):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("mine")
    assert "holds no fit" in refused("fit", pictures, "--out", tmp_path / "other")
    assert "holds no fit" in refused("fit", pictures, "--out", tmp_path / "other", "--resume")


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ([], "go on with --resume"),
        (["--resume", "--hours", "0.04"], "only more can be given"),
        (["--resume", "train.steps=7"], "the fit began with train.steps=6"),
        (["--resume", "sample.guidance=3"], "the fit began without sample.guidance"),
        (["--resume", "--base", "x"], "the fit began with None"),
    ],
)
def test_another_fit_in_the_folder_is_refused(more, part, pictures, finished, refused):
    assert part in refused("fit", pictures, "--out", finished, *more)


def test_a_fit_of_another_folder_is_refused(finished, tmp_path):
    with pytest.raises(UserError, match="is a fit of"):
        latentdiff.fit(write_stripes(tmp_path / "others", 6), out=finished, resume=True)


def test_a_damaged_record_is_refused(pictures, tmp_path, refused):
    (tmp_path / "fit").mkdir()
    (tmp_path / "fit" / "fit.json").write_text('{"version": 1, ')
    assert "damaged" in refused("fit", pictures, "--out", tmp_path / "fit", "--resume")


def test_one_fit_at_a_time(pictures, finished):
    with locks.locked(finished), pytest.raises(UserError, match="in use"):
        import threading

        problems: list[BaseException] = []

        def other():
            try:
                latentdiff.fit(pictures, out=finished, resume=True)
            except UserError as error:
                problems.append(error)

        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        raise problems[0]


@pytest.mark.parametrize(
    ("source", "name"), [("a/b/", "b"), ("fashion-mnist", "fashion-mnist"), ("x/s-{000..009}.tar", "x-s-000..009-.tar")]
)
def test_the_folder_has_the_name_of_the_data(source, name, here):
    (here / "a" / "b").mkdir(parents=True)
    assert fitting.default_name(source) == name


# The last lines, from the facts


def entries(**values) -> dict:
    """The result of an evaluation. values: (value, floor) by the beginning of a metric's name."""
    names = {"frechet": "frechet[net]", "accuracy": "label_accuracy[probe]", "psnr": "reconstruction_psnr"}
    names["copies"] = "closer_to_training_than_1%_of_held_out[features]"
    return {"images": 200, "values": {names[key]: {"value": a, "floor": b} for key, (a, b) in values.items()}}


TEN = {"plan": {"facts": {"classes": dict.fromkeys("abcdefghij", 50)}}}


@pytest.mark.parametrize(
    ("result", "words"),
    [
        (entries(frechet=(0.3, 0.1), accuracy=(0.8, 0.9)), ["Good: ", "in 80%", "in 90%", "0.3 (real", "200 pict"]),
        (entries(frechet=(0.3, 0.1), accuracy=(0.6, 0.9)), ["Fair: "]),
        (entries(frechet=(0.3, 0.1), accuracy=(0.3, 0.9)), ["Rough: "]),
        (entries(frechet=(0.9, 0.1), accuracy=(0.9, 0.9)), ["Fair: "]),
        (entries(frechet=(0.3, 0.1), psnr=(9.0, None)), ["Rough: "]),
        (entries(frechet=(0.9, 0.1), copies=(0.4, 0.01)), ["40% are about copies"]),
        ({"reason": "too few"}, ["was not measured: too few"]),
    ],
)
def test_the_first_line_says_how_good(result, words):
    line = finish.how_good(result, TEN)
    assert [word for word in words if word not in line] == []


def test_accuracy_counts_above_chance():
    two = {"plan": {"facts": {"classes": {"a": 5, "b": 5}}}}
    assert finish.how_good(entries(frechet=(0.1, 0.1), accuracy=(0.6, 0.9)), two).startswith("Rough")


def test_a_distance_is_not_compared_with_that_of_a_few_real_images():
    """Where a class has few held-out images, `evaluate` has few real ones; the choice has all that are held out."""
    values = {"frechet[net]": {"value": 76.7, "floor": 45.0, "images": 160, "floor_images": 10}}
    kept = {"step": 9, "distance": 82.8}
    record = TEN | {"choice": {"step": 9, "images": 40, "candidates": [kept], "real": {"distance": 13.5, "images": 49}}}
    assert "Fréchet distance 82.8 (real pictures 13.5)" in finish.how_good({"images": 160, "values": values}, record)
    few = TEN | {"choice": record["choice"] | {"images": 8}}  # of 8 pictures a distance is large for no other reason
    assert "Fréchet distance 76.7;" in finish.how_good({"images": 160, "values": values}, few)
    values["frechet[net]"]["floor_images"] = 80
    assert "Fréchet distance 76.7 (real pictures 45)" in finish.how_good({"images": 160, "values": values}, record)


def test_a_busy_machine_is_named():
    """Where it did far fewer steps than planned, the last line says so first."""
    choice = {"step": 900, "candidates": [{"step": 900}], "images": 8}
    for steps, named in ((1000, False), (4000, True)):
        record = TEN | {"folder": "a", "hours": 0.1, "choice": choice}
        record["plan"] = record["plan"] | {"steps": {"diffusion": steps}}
        line = finish.what_helps(Path("runs/a"), None, record, {})
        assert ("less other work (900 of about 4000 steps were done)" in line) == named


def test_the_choice_says_how_good_where_the_evaluation_had_less_time():
    kept = {"step": 5, "label_accuracy": 0.7, "distance": 3.0, "closer_to_training": 0.5}
    real = {"label_accuracy": 0.72, "distance": 1.0, "images": 90}
    choice = {"step": 5, "candidates": [kept], "real": real, "images": 300, "memorisation_limit": 0.1}
    for result in ({"reason": "no time"}, entries(frechet=(0.9, 0.1))):
        line = finish.how_good(result, TEN | {"choice": choice})
        assert line.startswith("Good: the right class is seen in 70%") and "50% are about copies" in line
        assert line.endswith("over 300 pictures")


@pytest.mark.parametrize(
    ("result", "facts", "steps", "words", "absent"),
    [
        (entries(psnr=(19.0, None)), {"images": 5000}, [5, 9], ["better autoencoder", "19 dB", "more time"], "more pictures"),
        (entries(psnr=(30.0, None)), {"images": 5000}, [9, 5], ["hardly with more time", "5 of 9"], "--hours"),
        (entries(), {"images": 80, "classes": {"a": 40, "b": 40}}, [5, 9], ["80 in 2 classes is few", "--hours 1"], "autoenc"),
        (entries(copies=(0.4, 0.01)), {"images": 5000}, [5, 9], ["more pictures"], "autoencoder"),
    ],
)
def test_the_third_line_says_what_helps(result, facts, steps, words, absent, tmp_path):
    choice = {"step": steps[-1], "candidates": [{"step": step} for step in steps]}
    record = {"folder": "x", "hours": 0.5, "plan": {"facts": facts}, "choice": choice}
    line = finish.what_helps(tmp_path, None, record, result)
    assert [word for word in words if word not in line] == [] and absent not in line
