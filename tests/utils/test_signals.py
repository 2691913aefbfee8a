"""How a command ends when it is asked to: at once, or after what it is doing is saved; which line it prints, which status."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from latentdiff.cli import app, info
from latentdiff.utils import processes, signals

NAMES = [("SIGINT", 130), ("SIGHUP", 75), ("SIGTERM", 75), ("SIGUSR1", 75)]


@pytest.fixture(autouse=True)
def handled():
    """Ctrl-C is ignored in background jobs, such as a test run may be."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def status(end) -> int:
    return signals.INTERRUPTED if isinstance(end, KeyboardInterrupt) else end.code


@pytest.mark.parametrize(("name", "code"), NAMES)
def test_a_signal_ends_a_job_at_once_and_handlers_come_back(name, code, capsys):
    number = getattr(signal, name)
    before = signal.getsignal(number)
    with pytest.raises((signals.Stopped, signals.Interrupted)) as end, signals.watched(lambda: "go on so"):
        signal.raise_signal(number)
        raise AssertionError("goes on")
    assert status(end.value) == code and signal.getsignal(number) == before
    shown = "Ctrl-C" if name == "SIGINT" else name
    assert capsys.readouterr().err == f"latentdiff: stopped by {shown}; go on so\n"


@pytest.mark.parametrize(("name", "code"), NAMES)
def test_a_signal_is_noted_where_work_is_to_be_saved(name, code, capsys):
    done = []
    with pytest.raises((signals.Stopped, signals.Interrupted)) as end, signals.watched(lambda: "A") as watch:
        with watch.deferred():
            assert not watch
            signal.raise_signal(getattr(signal, name))
            assert watch and watch.received == [getattr(signal, name)]
            done.append("saved")  # and the job does not call stop
        raise AssertionError("goes on")
    assert status(end.value) == code and done == ["saved"] and capsys.readouterr().err.count("\n") == 1


def test_frames_share_one_watch_and_the_inner_one_says_how_to_go_on(capsys):
    with pytest.raises(signals.Stopped), signals.watched(lambda: "outer") as outer:
        with signals.watched(lambda: "inner") as inner:
            assert inner is outer
        assert signal.getsignal(signal.SIGTERM) == outer.note
        with signals.watched(lambda: "inner"), signals.watched():
            signal.raise_signal(signal.SIGTERM)
    assert capsys.readouterr().err == "latentdiff: stopped by SIGTERM; inner\n"


def test_a_second_signal_ends_the_process_unless_it_is_a_copy_of_the_first(monkeypatch):
    sent = []
    monkeypatch.setattr(signals.os, "kill", lambda pid, number: sent.append(number))
    with pytest.raises(signals.Stopped), signals.watched() as watch, watch.deferred():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)  # by the launcher and by the scheduler, at once
        assert len(watch.received) == 2 and not sent
        watch._first -= 1.9
        signal.raise_signal(signal.SIGUSR1)
        assert not sent
        watch._first -= 0.2
        signal.raise_signal(signal.SIGUSR1)
        assert sent == [signal.SIGUSR1] and signal.getsignal(signal.SIGUSR1) == signal.SIG_DFL
    sent.clear()
    with pytest.raises(signals.Interrupted), signals.watched() as watch, watch.deferred():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # the terminal's and the launcher's
        assert not sent
        watch._first -= 0.6
        signal.raise_signal(signal.SIGINT)  # a person's second one
        assert sent == [signal.SIGINT]


def test_what_is_ignored_from_outside_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # nohup
    try:
        with signals.watched() as watch:
            signal.raise_signal(signal.SIGHUP)
            assert not watch and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_outside_the_main_thread_a_job_runs_as_it_is():
    ran = []

    def work():
        with signals.watched() as watch, watch.deferred():
            ran.append(signal.getsignal(signal.SIGTERM))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran == [before]


def test_the_command_that_goes_on_is_quoted_and_names_the_launcher(monkeypatch):
    assert signals.command(["--resume"], "train(config, resume=True)") == "train(config, resume=True)"
    monkeypatch.setattr(signals, "command_line", ["train", "my run.yaml", "data.source=a'b", "--resume"])
    assert signals.command(["--resume"]) == "latentdiff train 'my run.yaml' 'data.source=a'\"'\"'b' --resume"
    assert signals.command(without=["--resume"]).endswith("b'")
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert signals.command(["--resume"]).startswith("accelerate launch OPTIONS -m latentdiff train 'my run.yaml'")


COMMAND = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)
from latentdiff.cli import app, info as facts
def slow(what: str, overrides: list[str] = ()):
    print("ready", file=sys.stderr, flush=True)
    time.sleep(60)
facts.info = slow
app.main(["info", "x"])
"""


@pytest.mark.parametrize(("name", "code"), NAMES)
def test_any_command_ends_with_the_status_and_one_line(name, code):
    child = subprocess.Popen([sys.executable, "-c", COMMAND], stderr=subprocess.PIPE, text=True)
    assert child.stderr.readline() == "ready\n"
    time.sleep(0.1)
    child.send_signal(getattr(signal, name))
    assert child.wait(30) == code
    assert child.stderr.read() == f"latentdiff: stopped by {'Ctrl-C' if name == 'SIGINT' else name}\n"


def test_stderr_that_is_gone_stops_no_command(tmp_path, monkeypatch):
    read, write = os.pipe()
    os.close(read)
    lost = os.fdopen(write, "w", buffering=1)
    monkeypatch.setattr(sys, "stderr", lost)
    done = []

    def slow(what: str, overrides: list[str] = ()):
        print("progress", file=sys.stderr)
        sys.stderr.flush()
        done.append(sys.stderr.isatty())

    monkeypatch.setattr(info, "info", slow)
    app.main(["info", "x"])
    assert done == [False] and sys.stderr is lost


def test_stdout_that_was_read_enough_of_is_no_mistake():
    code = "from latentdiff.cli import app, info as facts\n"
    code += "def many(what: str, overrides: list[str] = ()):\n    return {str(k): k for k in range(10**5)}\n"
    code += "facts.info = many\napp.main(['info', 'x'])"
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "{\n"
    child.stdout.close()
    assert child.wait(30) == 0 and child.stderr.read() == ""
