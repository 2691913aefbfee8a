"""The clock of a fit: it counts all parts, and shares what is left among the phases."""

import json
import time

import pytest

from latentdiff.errors import UserError
from latentdiff.fitting import budget
from latentdiff.fitting.budget import Budget, check_hours, in_words

ORDER = ["look", "autoencoder", "diffusion", "choose", "report"]
NEEDS = {"look": 30.0, "autoencoder": 250.0, "diffusion": 600.0, "choose": 60.0, "report": 60.0}


class Clock:
    """Seconds that a test moves by hand."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_the_clock_goes_on_over_parts(tmp_path):
    clock = Clock()
    for part in range(3):
        with Budget(tmp_path, 1.0, age=2.0, clock=clock) as first:
            assert first.used == pytest.approx(2.0 + 12.0 * part)
            clock.now += 10.0
        content = json.loads((tmp_path / budget.FILE).read_text())
        assert content["seconds"] == pytest.approx(12.0 * (part + 1)) and content["parts"] == part + 1
        clock.now += 1000.0  # between the parts
    assert Budget(tmp_path, 1.0, clock=clock).left == pytest.approx(3600 - 36.0)


def test_a_clock_without_hours_is_valid_json(tmp_path):
    with Budget(tmp_path, float("inf")):
        pass
    assert json.loads((tmp_path / budget.FILE).read_text(), parse_constant=pytest.fail)["hours"] is None


def test_a_thread_refreshes_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "REFRESH", 0.02)
    clock = Clock()
    with Budget(tmp_path, 1.0, clock=clock):
        clock.now += 50.0
        until = time.monotonic() + 5
        while budget.read_clock(tmp_path)[0] < 50 and time.monotonic() < until:
            time.sleep(0.01)
        assert budget.read_clock(tmp_path)[0] == 50.0  # what a killed process would leave


@pytest.mark.parametrize("slow", [1.0, 2.0, 5.0])
def test_phases_end_in_time_whatever_they_cost(slow, tmp_path):
    """Training ends by its share. What has no clock of its own takes `slow` times as long as planned, measuring included."""
    clock = Clock()
    kept = Budget(tmp_path, sum(NEEDS.values()) / 3600, write=False, clock=clock)
    trained = {}
    for k, phase in enumerate(ORDER):
        seconds = kept.share(phase, NEEDS, ORDER[k:])
        if phase == "look":
            clock.now += NEEDS[phase] * slow
        else:
            trained[phase] = seconds
            clock.now += seconds + 2.0 * slow  # it ends at the first step after its time
    assert kept.used <= kept.hours * 3600 * 1.1
    assert trained["diffusion"] > 0.5 * NEEDS["diffusion"] and trained["report"] > 20


def test_where_most_is_gone_every_phase_gets_its_part(tmp_path):
    clock = Clock()
    kept = Budget(tmp_path, 1000 / 3600, age=900.0, write=False, clock=clock)
    assert kept.share("diffusion", NEEDS, ORDER[2:]) == pytest.approx(100 * 600 / 720)
    clock.now += 500
    assert kept.share("report", NEEDS, ORDER[4:]) == budget.LEAST_SHARE


@pytest.mark.parametrize("text", ["", "[]", '{"seconds": "x"}', '{"seconds": NaN, "parts": 2}', "null"])
def test_a_clock_that_cannot_be_read_is_none(text, tmp_path):
    (tmp_path / budget.FILE).write_text(text)
    assert budget.read_clock(tmp_path)[0] == 0.0


def test_the_age_of_a_process_is_its_time_since_it_was_started():
    assert 0 < budget.process_age() < 24 * 3600


@pytest.mark.parametrize("hours", [0.0, -1.0, budget.LEAST_HOURS / 2, float("inf"), float("nan")])
def test_hours_that_are_none_are_refused(hours):
    with pytest.raises(UserError, match="--hours"):
        check_hours(hours)


def test_durations_in_words():
    assert [in_words(s) for s in (-3, 40, 720, 12600)] == ["0 s", "40 s", "12 min", "3.5 h"]
