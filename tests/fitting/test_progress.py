"""The one bar of a plan: its words, and that the bars of training and encoding become parts of it."""

import io
import re
import sys

import pytest
from tiny_runs import diffusion_config

from latentdiff.fitting.progress import PlanBar, duration
from latentdiff.training import train
from latentdiff.utils import progress_bars


@pytest.mark.parametrize(
    ("seconds", "words"), [(-3, "0 s"), (45, "45 s"), (125, "2 min 05 s"), (600, "10 min"), (7500, "2 h 05 min")]
)
def test_durations_are_short_words(seconds, words):
    assert duration(seconds) == words


def test_the_bar_says_time_left_and_what_runs(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("latentdiff.fitting.progress.time.monotonic", lambda: now[0])
    plan = PlanBar(3600, used=600, enabled=False)
    with plan:
        now[0] += 600
        assert plan.text() == "starting; 20 min of 60 min, 40 min left"
        run = progress_bars.bar(total=10**6, initial=100, unit="step")
        run.update(50)
        now[0] += 25
        run.set_postfix({"gradient_norm": "1.5", "loss": "0.41"}, refresh=False)
        assert plan.text().endswith("; step 150, 2 steps/s, loss 0.41, gradient_norm 1.5")

        # A bar within another one is shown in its place, and then the outer one again
        with progress_bars.bar(total=30, unit="image", desc="encoding", delay=0.5) as inner:
            inner.update(10)
            assert plan.text().endswith("; encoding, image 10 of 30")
        assert "step 150" in plan.text()
        progress_bars.bar(total=3, unit="image", disable=True)
        assert "step 150" in plan.text()
        run.close()
        assert plan.text().endswith("left")

        now[0] += 3600
        assert plan.text().endswith("20 min over")
    assert type(progress_bars.bar(total=1, disable=True)).__name__ == "tqdm"


def test_a_plan_may_get_its_length_later(monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    with PlanBar(None, used=20) as plan:
        plan.phase("looking")
        assert plan.text() == "looking; 20 s"
        assert not stderr.getvalue()  # a mistake that is found now is one line
        plan.phase("training", 3600)
        assert plan.text() == "training; 20 s of 60 min, 60 min left"
        assert "  1%|" in stderr.getvalue() and "training; 20 s of" in stderr.getvalue()


def test_a_run_within_a_plan_shows_one_bar(tmp_path, stripe_folder, autoencoder_run, monkeypatch):
    stderr = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stderr)
    seen = []
    with PlanBar(60) as plan:
        plan.phase("training the U-Net")
        monkeypatch.setattr(plan, "_ended", lambda part, ended=plan._ended: (seen.append(plan.text()), ended(part)))
        train(diffusion_config(stripe_folder, tmp_path / "run", autoencoder_run))
    assert any("encoding" in text for text in seen) and any("step 6" in text and "loss" in text for text in seen)
    # Lines stand above the bar, and not behind it
    assert not re.search(r"[^\r\n](latentdiff train|data /|warning:|pictures:)", stderr.getvalue())
    bars = [line for line in stderr.getvalue().replace("\n", "\r").split("\r") if "|" in line]
    assert bars and all("of 60 s" in line for line in bars)


def test_the_bar_survives_a_closed_terminal(monkeypatch):
    tried = []

    class Closed(io.StringIO):
        def write(self, text):
            tried.append(text)
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    with PlanBar(60) as plan:
        plan.phase("looking")
        plan.refresh()
        assert "looking" in plan.text()
    assert tried  # it was drawn, and the error of the closed terminal did not come up to here
