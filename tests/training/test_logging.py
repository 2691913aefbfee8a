"""What a run logs: metrics.jsonl, TensorBoard, and any other tracker of accelerate; scalars and pictures."""

import json
import shutil

import numpy as np
import pytest
from accelerate import tracking
from tiny_runs import autoencoder_config, diffusion_config

from latentdiff.config import TrainConfig
from latentdiff.errors import UserError
from latentdiff.training import train
from latentdiff.training.accelerator import start_accelerator
from latentdiff.training.logging import RunLogger

OFTEN = {"train__steps": 4, "train__picture_every": 2}


def events(output):
    """(scalars, pictures) in TensorBoard's files of a run, each {name: steps that TensorBoard shows}."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(output / "logs")).Reload()
    tags = accumulator.Tags()
    scalars = {name: [event.step for event in accumulator.Scalars(name)] for name in tags["scalars"]}
    return scalars, {name: [event.step for event in accumulator.Images(name)] for name in tags["images"]}


def test_tensorboard_has_the_scalars_of_metrics_jsonl_and_the_pictures(tmp_path, stripe_folder, autoencoder_run):
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **OFTEN))
    scalars, pictures = events(tmp_path / "run")
    steps: dict = {}
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        for name in line.keys() - {"step"}:
            steps.setdefault(name, []).append(line["step"])
    assert scalars == steps and scalars["train/loss"] == [1, 2, 3, 4] and scalars["validation/loss_ema"] == [2, 4]
    assert pictures == {"samples": [2, 4]}


def test_a_resumed_run_logs_each_step_once(tmp_path, stripe_folder):
    output = tmp_path / "run"
    often = {"train__save_minutes": 1e-9, "train__keep": 9, **OFTEN}
    train(autoencoder_config(stripe_folder, output, **often))
    for step in (3, 4):  # as if the run was killed after step 4 was logged, and its last state was of step 2
        shutil.rmtree(output / "state" / f"step-{step}")
    train(autoencoder_config(stripe_folder, output, **often), resume=True)
    scalars, pictures = events(output)
    assert scalars["train/total"] == [1, 2, 3, 4] and pictures == {"reconstructions": [2, 4]}


class Recorder(tracking.GeneralTracker):
    """A tracker of a user's own."""

    name = "recorder"
    requires_logging_directory = False
    made: list = []

    def __init__(self, project, **options):
        super().__init__()
        self.scalars, self.images, self.finished = [], [], 0
        self.made.append(self)

    @property
    def tracker(self):
        return self

    def log(self, values, step=None, **options):
        self.scalars.append((step, values))

    def log_images(self, values, step=None, **options):
        self.images.append((step, values))

    def finish(self):
        self.finished += 1


@pytest.fixture
def recorder(monkeypatch):
    monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, "recorder", Recorder)
    monkeypatch.setattr(Recorder, "made", [])
    return Recorder


def test_any_tracker_of_accelerate_gets_scalars_and_pictures(tmp_path, stripe_folder, recorder):
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__trackers=["recorder"], **OFTEN))
    (tracker,) = recorder.made
    assert [step for step, values in tracker.scalars if "train/total" in values] == [1, 2, 3, 4]
    assert [step for step, _ in tracker.images] == [2, 4] and tracker.finished == 1
    (picture,) = tracker.images[0][1]["reconstructions"]
    assert isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.shape[2] == 3
    assert not (tmp_path / "run" / "logs").exists()  # TensorBoard was not asked for


def test_a_tracker_without_pictures_gets_scalars_alone(tmp_path, stripe_folder, recorder, monkeypatch):
    monkeypatch.delattr(Recorder, "log_images")
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__trackers=["recorder"], **OFTEN))
    assert len(recorder.made[0].scalars) == 4


@pytest.mark.parametrize(("name", "problem"), [("wnadb", "wnadb is unknown"), ("comet_ml", "comet_ml is not installed")])
def test_trackers_that_are_not_there_are_refused(tmp_path, stripe_folder, name, problem):
    with pytest.raises(UserError) as error:
        train(autoencoder_config(stripe_folder, tmp_path / "run", train__trackers=["tensorboard", name]))
    assert str(error.value).startswith(f"train.trackers: {problem}; installed here: ") and "tensorboard" in str(error.value)
    assert "\n" not in str(error.value) and not (tmp_path / "run").exists()


def test_no_trackers_at_all(tmp_path, stripe_folder):
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__trackers=[], **OFTEN))
    assert not (tmp_path / "run" / "logs").exists() and (tmp_path / "run" / "metrics.jsonl").is_file()


def test_going_back_forgets_later_steps(tmp_path):
    with RunLogger(tmp_path, 4, 0, start_accelerator(TrainConfig(steps=4, batch_size=1))) as log:
        for step in (1, 2, 3):
            log.metrics(step, {"train/loss": float(step)})
        log.move_to(1)
        log.metrics(2, {"train/loss": 20.0})
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert events(tmp_path)[0] == {"train/loss": [1, 2]}
