"""Requests that tests give to the process that computes, which imports them from here."""

import os
import signal
import sys
import threading
import time
from pathlib import Path


def wait_for(models, job, begun: Path, go_on: Path, then=None, **given):
    """Make the file `begun`, wait until the file `go_on` is there, and return "finished", or what `then` returns."""
    begun.touch()
    while not go_on.exists():
        job.check()
        time.sleep(0.01)
    return "finished" if then is None else then(models, job, **given)


def where(models, job):
    """The process and the thread that this runs in, and whether gradio is imported there."""
    return os.getpid(), threading.current_thread() is threading.main_thread(), "gradio" in sys.modules


def steps(models, job, count: int):
    """So many updates, and a result."""
    for k in range(count):
        job.step(k + 1, count, f"picture {k}")
    print("a library prints this")
    return b"x" * 3_000_000


def fail(models, job):
    """What no visitor may see."""
    raise RuntimeError("secret of the server")


def exhaust(models, job):
    """What Python raises where there is no memory."""
    raise MemoryError


def unsendable(models, job):
    """A result that pickle does not know."""
    return lambda: None


def be_killed(models, job):
    """What the system does where there is no memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def refuse():
    """A setup that fails."""
    from latentdiff.errors import UserError

    raise UserError("model: damaged")


def nothing():
    """A setup without models."""


def models_after(folders, go_on: Path):
    """A setup that waits until the file `go_on` is there."""
    from latentdiff.web.jobs.models import Models

    while not go_on.exists():
        time.sleep(0.01)
    return Models(folders)
