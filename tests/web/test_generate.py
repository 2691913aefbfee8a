"""The tab Generate: the bytes of the command, cancel, the limits, one line for a mistake."""

import shlex
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import asked
import gradio as gr
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from served import FOLDERS, LIMITS
from tiny_models import tiny_unet, tiny_vae

import latentdiff
from latentdiff.checkpoints import save
from latentdiff.cli import main
from latentdiff.errors import UserError
from latentdiff.web.generate import as_command, as_python
from latentdiff.web.jobs.draw import Settings, call, draw
from latentdiff.web.jobs.job import Cancelled, Job
from latentdiff.web.jobs.models import Models
from latentdiff.web.jobs.trajectory import COLUMNS, Trajectory
from latentdiff.web.limits import Limits
from latentdiff.web.work import Work
from latentdiff.web.worker import Worker

FASHION = Settings("fashion-mnist", ["Sneaker", "Bag"], num_images=2, steps=3, seed=5)
EMOJI = Settings("emoji", prompt="a red apple\n a cat ", negative="blue", num_images=1, steps=2, guidance=3, seed=-1)
BY_SAMPLER = Settings("fashion-mnist", ["Bag"], num_images=3, steps=4, sampler="heun", guidance=1.5, low=0, high=1)


@pytest.fixture
def work(site) -> Work:
    return site.context.work


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("settings", [FASHION, EMOJI, BY_SAMPLER], ids=["classes", "prompts", "sampler"])
def test_the_files_are_those_of_the_command_and_of_the_python(models, tmp_path, monkeypatch, settings):
    drawn = draw(models, Job(), LIMITS, settings, tmp_path)
    assert all(file.parent == tmp_path / "images" for file in drawn.files)
    facts = models.facts(settings.model)
    expected = contents(tmp_path / "images")
    assert len(expected) == len(drawn.captions) == settings.num_images * len(call(facts, LIMITS, settings)["what"])
    monkeypatch.chdir(tmp_path.parent)
    root = Path(latentdiff.__file__).parent.parent
    for folder, run in (
        ("by-command", lambda: main(shlex.split(as_command(facts, drawn.arguments))[1:])),
        ("by-python", lambda: exec(as_python(facts, drawn.arguments), {})),
    ):
        (tmp_path / folder / "weights").mkdir(parents=True)
        monkeypatch.chdir(tmp_path / folder)
        (tmp_path / folder / "weights" / "emoji").symlink_to(root / "weights" / "emoji")
        run()
        assert contents(tmp_path / folder / "images") == expected


def test_a_model_that_is_given_a_picture_takes_an_upload(tmp_path, run):
    unet = tiny_unet(in_channels=8, num_class_embeds=None)
    rule = {"kind": "low_resolution", "factor": 2, "dropped": False}
    about = {"image_condition": rule, "image_size": [8, 8], "prediction": "epsilon"}
    save(tmp_path / "m", unet, tiny_vae(), DDIMScheduler(clip_sample=False), {}, **about)
    models, limits = Models({"enlarge": tmp_path / "m"}), Limits(upload=500)
    upload = tmp_path / "upload.png"
    Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4) * 16).save(upload)
    settings = Settings("enlarge", num_images=2, steps=2, condition=upload)
    drawn = draw(models, Job(), limits, settings, tmp_path / "drawn")
    line = as_command(models.facts("enlarge"), drawn.arguments)
    assert "--condition condition.png" in line and str(tmp_path) not in line
    words = [{"enlarge": str(tmp_path / "m"), "condition.png": str(upload)}.get(word, word) for word in shlex.split(line)]
    run(*words[1:])
    assert contents(Path("images")) == {file.name: file.read_bytes() for file in drawn.files}
    upload.write_bytes(b"no picture")
    with pytest.raises(UserError, match="^condition: cannot be read as a picture"):
        draw(models, Job(), limits, settings, tmp_path / "none")
    with pytest.raises(UserError, match="this model is given a picture"):
        draw(models, Job(), limits, replace(settings, condition=None), tmp_path / "none")


# Limits and mistakes: one line each


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"num_images": 11}, "number of images 22: must be from 1 to 20, the server's --max-images"),
        ({"num_images": 0}, "number of images 0: must be from 1 to 20, the server's --max-images"),
        ({"num_images": 1.5}, "number of images: give a whole number"),
        ({"steps": 121}, "steps 121: must be from 1 to 120, the server's --max-steps"),
        ({"steps": float("nan")}, "steps: give a whole number"),
        ({"seed": "x"}, "seed: give a whole number"),
        ({"classes": ["Hat"]}, "unknown class 'Hat'; the classes are: 0 T-shirt"),
        ({"classes": []}, "nothing is named to draw"),
        ({"prompt": "a hat"}, "prompt: this model reads none; choose classes"),
        ({"model": "../weights/emoji"}, "model '../weights/emoji': unknown; valid: fashion-mnist, emoji"),
        ({"sampler": "best"}, "sampler best: valid: "),
        ({"guidance": float("inf")}, "guidance: give a number"),
        ({"low": 2}, "guidance"),
        ({"negative": "blue"}, "negative"),
    ],
)
def test_a_mistake_is_one_line(models, work, tmp_path, changes, line):
    settings = Settings(**{**FASHION.__dict__, **changes})
    with pytest.raises(UserError) as error:
        draw(models, Job(), LIMITS, settings, tmp_path)
    said = work.line(error.value)
    assert said.startswith(line) and "\n" not in said
    assert list(tmp_path.iterdir()) == []


def test_images_of_emoji_reach_the_limit_of_pixels(models, tmp_path):
    with pytest.raises(UserError, match="number of images 5: they have 20,480 pixels together; at most 20,000 are allowed"):
        draw(models, Job(), LIMITS, Settings("emoji", prompt="a cat", num_images=5, steps=1), tmp_path)


def test_words_with_dashes_are_no_flags(models):
    facts = models.facts("emoji")
    arguments = call(facts, LIMITS, Settings("emoji", prompt="a cat\n--model x", num_images=1))
    assert as_command(facts, arguments).endswith("-- '--model x'")


# Cancel


def test_a_stopped_request_ends_at_its_next_step(models, tmp_path, monkeypatch):
    monkeypatch.setattr("latentdiff.web.jobs.draw.BETWEEN", 0)  # every step is shown
    steps = []

    class Stopping(Job):
        def step(self, step, steps_, shown=None):
            steps.append(step)
            if step == 3:
                self.cancel()
            super().step(step, steps_, shown)

    with pytest.raises(Cancelled):
        draw(models, Stopping(), LIMITS, Settings("fashion-mnist", ["Bag"], num_images=1, steps=50), tmp_path)
    assert steps == [1, 2, 3] and list(tmp_path.rglob("*.png")) == []


def test_a_stopped_request_evaluates_no_network(models, tmp_path):
    job = Job()
    with models.use("fashion-mnist", job) as pipeline:
        job.cancel()
        with pytest.raises(Cancelled):
            pipeline(class_labels=["Bag"], num_inference_steps=2)
    with models.use("fashion-mnist") as pipeline:  # the next request is not stopped by it
        pipeline(class_labels=["Bag"], num_inference_steps=1)


def test_a_visitor_stops_only_own_requests(work, tmp_path):
    """One request runs and two wait. Stopping one that waits, and then the one that runs, leaves the third."""
    begun, go_on, results = tmp_path / "begun", tmp_path / "go on", {}

    def visit(name):
        results[name] = list(work.run(name, partial(asked.wait_for, begun=begun, go_on=go_on)))[-1]

    threads = [threading.Thread(target=visit, args=(name,)) for name in ("one", "two", "three")]
    for thread, running in zip(threads, (1, 2, 3), strict=True):
        thread.start()
        until(begun.exists)
        until(lambda expected=running: work.running == expected)
    assert work.cancel("four") == 0 and work.cancel("two") == 1 and results == {}
    assert work.cancel("one") == 1
    threads[0].join(10)
    threads[1].join(10)
    assert results["one"].stopped and results["two"].stopped and "three" not in results
    go_on.touch()
    threads[2].join(10)
    assert results["three"].result == "finished" and work.running == 0


def until(holds):
    """Wait until a condition holds, at most ten seconds."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_errors_name_no_path_of_the_server(work, capfd):
    folder = FOLDERS["emoji"]
    for text, line in (
        (f"{folder / 'unet'}: missing", "emoji/unet: missing"),
        ("/etc/passwd: cannot be read (no such file)", "passwd: cannot be read (no such file)"),
        ("a prompt such as a/b and 1 / 2", "a prompt such as a/b and 1 / 2"),
        ("--sampler-options eta=0.5\nx\x1b[0m", "--sampler-options eta=0.5 x\\u001b[0m"),
    ):
        assert work.line(UserError(text)) == line
    assert capfd.readouterr().err == ""
    worker = Worker(asked.nothing)  # it prints where this test listens
    with pytest.raises(gr.Error) as error:
        list(Work(worker).run("one", asked.fail))
    assert error.value.message == "the server failed; its terminal says why"
    assert capfd.readouterr().err.count("RuntimeError: secret of the server") == 1
    with pytest.raises(gr.Error, match="there is not enough memory for this; ask for fewer images"):
        list(Work(worker).run("one", asked.exhaust))
    worker.close()


# The way from noise to images


def test_a_short_request_has_no_updates_and_its_picture_comes_with_the_result(models, tmp_path, monkeypatch):
    pictures = {}
    for name, between in (("short", 1000), ("long", 1e-6)):
        monkeypatch.setattr("latentdiff.web.jobs.draw.BETWEEN", between)
        updates = []

        class Noting(Job):
            def step(self, step, steps, shown=None, noted=updates):
                noted.append((step, steps, shown))

        drawn = draw(models, Noting(), LIMITS, Settings("fashion-mnist", ["Bag"], num_images=3, steps=4), tmp_path / name)
        pictures[name] = [*(shown for _, _, shown in updates if shown is not None), *filter(None, [drawn.picture])]
        assert [step for step, _, _ in updates] == ([] if name == "short" else [1, 2, 3])  # none shortly before the end
    assert len(pictures["short"]) == 1 and len(pictures["long"]) == 4
    assert pictures["short"][-1].tobytes() == pictures["long"][-1].tobytes()


@pytest.mark.parametrize(("sampler", "steps"), [(None, 10), ("euler", 2)])
def test_the_last_estimate_is_the_image(models, sampler, steps):
    """The last step of these two goes to the x0 estimate itself. Guidance is on there, so the estimate is guided."""
    with models.use("fashion-mnist") as pipeline, Trajectory(pipeline, 3.0).watching() as path:
        shown = []
        call = {"class_labels": ["Bag", 7], "guidance_scale": 3.0, "guidance_interval": (0, 1), "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(0)
        images = pipeline(
            **call,
            sampler=sampler,
            generator=generator,
            output_type="np",
            callback_on_step_end=lambda pipe, step, t, tensors: shown.append(path.add(step, pipe.num_timesteps, 2)),
        ).images
        columns = path.columns()
    assert sum(shown) == len(columns) == min(COLUMNS, steps)
    difference = [np.abs(column / 255 - images).max() for column in columns]
    assert difference[-1] < 0.02 and difference[0] > 0.1
    assert path.picture().size == (min(COLUMNS, steps) * (28 * 3 + 2), 2 * (28 * 3 + 2))


def test_watching_changes_nothing(models):
    with models.use("fashion-mnist") as pipeline:
        hooks = len(pipeline.unet._forward_hooks)
        with Trajectory(pipeline, 1.0).watching():
            pass
        assert len(pipeline.unet._forward_hooks) == hooks
