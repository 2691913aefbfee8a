"""Runs that end by the clock: train.minutes, and pictures and snapshots by minutes. The clock is a false one."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tiny_runs import autoencoder_config, diffusion_config, diffusion_tree, write_yaml

from latentdiff.config import LoopConfig, OptimizerConfig
from latentdiff.training import run_clock, state, train, trainer
from latentdiff.training import train_autoencoder as stage1
from latentdiff.training import train_diffusion as stage2
from latentdiff.training.optimizer import learning_rate
from latentdiff.training.run_clock import RunClock
from latentdiff.training.trainer import Trainer

WSD = {"optimizer__schedule": "wsd", "optimizer__decay_share": 0.5, "optimizer__warmup_steps": 0}


class FalseClock:
    """A clock that stands still, but for the seconds that steps, pictures and states are said to take."""

    def __init__(self, monkeypatch, step=1.0, encoding=0.0, pictures=0.0, save=0.0):
        self.now, self.step, self.steps = 1000.0, step, 0
        monkeypatch.setattr(run_clock, "now", lambda: self.now)
        for cls in (stage1.AutoencoderTrainer, stage2.DiffusionTrainer):
            self._slowed(monkeypatch, cls, "train_step", self.next_step)
        self._slowed(monkeypatch, stage2, "prepare_latents", lambda: encoding)
        self._slowed(monkeypatch, stage2.DiffusionTrainer, "draw_pictures", lambda: pictures)
        monkeypatch.setattr(trainer, "time", SimpleNamespace(monotonic=lambda: self.now))
        self._slowed(monkeypatch, Trainer, "save", lambda: save)

    def next_step(self):
        self.steps += 1
        return self.step(self.steps) if callable(self.step) else self.step

    def _slowed(self, monkeypatch, owner, name, seconds):
        real = getattr(owner, name)

        def slowed(*inputs, **keywords):
            result = real(*inputs, **keywords)
            self.now += seconds()
            return result

        monkeypatch.setattr(owner, name, slowed)


def rates(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["lr"] for line in lines if "lr" in line]


def steps_of(output: Path, what: str) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (output / what).glob("step-*"))


def test_a_run_ends_by_the_clock_with_its_decay(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    clock = FalseClock(monkeypatch, step=1.0, encoding=20.0)
    config = diffusion_config(
        stripe_folder, tmp_path / "run", autoencoder_run, train__steps=10**6, train__minutes=0.5, optimizer__lr=0.5, **WSD
    )
    train(config)
    # 30 seconds, of which 20 go by before the loop
    assert clock.now == 1030.0 and state.newest_step(tmp_path / "run") == 10
    assert rates(tmp_path / "run") == pytest.approx([0.5] * 6 + [0.4, 0.3, 0.2, 0.1])
    assert state.seconds_used(tmp_path / "run") == 30.0
    # What is done at the last step is done at this one
    assert steps_of(tmp_path / "run", "pictures") == [10] and (tmp_path / "run" / "model" / "model_index.json").is_file()


def test_a_machine_that_becomes_slower_ends_in_time(tmp_path, stripe_folder, monkeypatch):
    clock = FalseClock(monkeypatch, step=lambda number: 1.0 if number <= 20 else 4.0)
    train(autoencoder_config(stripe_folder, tmp_path / "run", train__steps=10**6, train__minutes=1.0, optimizer__lr=0.5, **WSD))
    assert 1056.0 <= clock.now <= 1060.0
    seen = rates(tmp_path / "run")
    assert seen[:20] == pytest.approx([0.5] * 20) and 0.0 < seen[-1] <= 0.5 * 2 * 8 / 60
    assert all(a >= b for a, b in zip(seen, seen[1:], strict=False))


def test_where_the_steps_end_first_the_decay_goes_by_them(tmp_path, stripe_folder, monkeypatch):
    clock = FalseClock(monkeypatch)
    changes = {"train__steps": 8, "optimizer__lr": 0.8, **WSD}
    train(autoencoder_config(stripe_folder, tmp_path / "clock", train__minutes=5.0, **changes))
    assert clock.now == 1008.0
    train(autoencoder_config(stripe_folder, tmp_path / "steps", **changes))
    assert rates(tmp_path / "clock") == rates(tmp_path / "steps") == pytest.approx([0.8] * 5 + [0.6, 0.4, 0.2])


def test_pictures_and_states_are_part_of_the_time(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    clock = FalseClock(monkeypatch, step=1.0, pictures=5.0, save=2.0)
    often = {f"train__{what}_minutes": 0.25 for what in ("picture", "snapshot", "save")}
    changes = {"train__steps": 10**6, "train__minutes": 1.0, **often}
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, **changes))
    # A picture and a state follow the last step, and each of the earlier ones delayed the next by 7 seconds
    assert 1055.0 <= clock.now <= 1060.0
    pictures, last = steps_of(tmp_path / "run", "pictures"), state.newest_step(tmp_path / "run")
    assert pictures == [16, 24, last] and last == 35
    assert steps_of(tmp_path / "run", "snapshots")[:2] == [16, 24]


def test_a_resumed_run_counts_what_it_has_used(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    output = tmp_path / "run"

    def config(minutes):
        changes = {"train__steps": 10**6, "train__save_minutes": 1e-9, "train__keep": 99, "train__minutes": minutes, **WSD}
        return diffusion_config(stripe_folder, output, autoencoder_run, optimizer__lr=1.0, **changes)

    class Killed(Exception):
        pass

    def die(number):
        if number == 11:
            raise Killed
        return 1.0

    clock = FalseClock(monkeypatch, step=die)
    with pytest.raises(Killed):
        train(config(1.0))
    assert state.seconds_used(output) == 10.0 and clock.now == 1010.0
    # With half of the time it goes on where its decay begins
    clock.now = 5000.0
    train(config(1 / 3), resume=True)
    assert clock.now == 5010.0 and state.newest_step(output) == 20 and state.seconds_used(output) == 20.0
    assert rates(output) == pytest.approx([1.0] * 11 + [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])


def test_a_run_whose_minutes_are_used_up_is_published_as_it_is(tmp_path, stripe_folder, autoencoder_run, monkeypatch, capsys):
    output = tmp_path / "run"
    changes = {"train__steps": 10**6, "train__minutes": 0.11}  # six steps of a second, and something is left over
    FalseClock(monkeypatch)
    train(diffusion_config(stripe_folder, output, autoencoder_run, **changes))
    made = (output / "model" / "model_index.json").stat().st_mtime_ns
    for minutes in (0.11, 0.05):
        train(diffusion_config(stripe_folder, output, autoencoder_run, **{**changes, "train__minutes": minutes}), resume=True)
        said = f"train.minutes: the run has used its {minutes:g} minutes and ends with the weights of step 6"
        assert said in capsys.readouterr().err
        assert state.newest_step(output) == 6 and (output / "model" / "model_index.json").stat().st_mtime_ns > made
    train(diffusion_config(stripe_folder, output, autoencoder_run, **{**changes, "train__minutes": 0.2}), resume=True)
    assert state.newest_step(output) == 12


def test_a_run_takes_one_step_at_least(tmp_path, stripe_folder, autoencoder_run, monkeypatch, capsys):
    FalseClock(monkeypatch, encoding=100.0)
    train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run, train__minutes=1.0))
    assert state.newest_step(tmp_path / "run") == 1
    assert "warning: train.minutes: 1 minutes were over before the first step" in capsys.readouterr().err


def test_the_rate_by_the_clock_and_by_steps():
    config = OptimizerConfig(lr=1.0, schedule="wsd", decay_share=0.25, warmup_steps=10)
    assert learning_rate(config, 50, 100, 0.9) == pytest.approx(0.4)  # the clock is ahead
    assert learning_rate(config, 95, 100, 0.5) == pytest.approx(0.2)  # the steps are
    assert learning_rate(config, 4, 10**6, 0.5) == 0.5 and learning_rate(config, 4, 10**6, 0.95) == pytest.approx(0.2)
    assert learning_rate(OptimizerConfig(lr=1.0, schedule="linear"), 60, 100, 0.5) == pytest.approx(0.4)
    for name, value in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        assert learning_rate(OptimizerConfig(lr=1.0, schedule=name), 0, 10**6, 0.5) == pytest.approx(value)


TWO_PROCESSES = """
import json, os, sys, traceback

import torch
from diffusers import UNet2DModel

from latentdiff.training import run_clock, train, train_diffusion
from processes import ended, free_port

torch.set_num_threads(1)
config, out = sys.argv[1:]
os.environ |= {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
children = []
for rank in range(2):
    children.append(os.fork())
    if children[-1] == 0:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        seen, step = [], train_diffusion.DiffusionTrainer.train_step
        run_clock.now = lambda: len(seen) * (0.5 + 2 * rank)  # for the second process each step takes five times as long
        train_diffusion.DiffusionTrainer.train_step = lambda self, n, lr: seen.append(lr) or step(self, n, lr)
        try:
            train(config)
            open(f"{out}-{rank}", "w").write(json.dumps(seen))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
sys.exit(sum(ended(children, together=True)))
"""


def test_processes_go_by_the_clock_of_the_first(tmp_path, stripe_folder, autoencoder_run):
    changes = {"train__steps": 10**6, "train__minutes": 0.1, "train__picture_minutes": 0.04, "optimizer__lr": 0.01, **WSD}
    tree = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **changes, train__trackers=[])
    config, out = write_yaml(tmp_path / "run.yaml", tree), tmp_path / "rates"
    paths = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-c", TWO_PROCESSES, str(config), str(out)]
    done = subprocess.run(command, env={**os.environ, **paths}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    first, second = (json.loads(Path(f"{out}-{rank}").read_text()) for rank in range(2))
    # Six seconds are twelve steps of the first process
    assert first == second == pytest.approx([0.01] * 7 + [0.01 * k / 6 for k in (5, 4, 3, 2, 1)])
    assert steps_of(tmp_path / "run", "pictures") == [6, 12] and state.newest_step(tmp_path / "run") == 12


def test_intervals_go_on_over_a_resume(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(run_clock, "now", lambda: now[0])
    train = LoopConfig(steps=10, snapshot_minutes=1.0)
    first = RunClock(train)
    first.enter_loop()
    now[0] = 70.0
    assert first.due(3).snapshot and not first.due(4).snapshot
    second = RunClock(train)
    second.restore(first.state(last=False))
    second.enter_loop()
    assert not second.due(3).snapshot
    now[0] = 121.0
    assert second.due(4).snapshot and not second.due(5).snapshot
