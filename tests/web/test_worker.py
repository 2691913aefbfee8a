"""The process that computes, and the import of gradio without its stubs."""

import os
import subprocess
import sys
import time
from contextlib import closing
from functools import partial

import asked
import psutil
import pytest

from latentdiff.errors import UserError
from latentdiff.web.jobs.job import Update
from latentdiff.web.work import Work
from latentdiff.web.worker import Failed, Request, Worker


@pytest.fixture(scope="module")
def worker():
    """A process without models."""
    with closing(Worker(asked.nothing)) as process:
        yield process


def updates(request) -> list[Update]:
    """All updates of a request."""
    got = [request.next()]
    while not got[-1].done:
        got.append(request.next())
    return got


def test_requests_run_in_the_main_thread_of_a_process_without_gradio(worker):
    """Each thread that computes has a team of torch's threads, and with a second team all of them are slower."""
    places = {worker.call(asked.where) for _ in range(3)}
    ((process, is_main_thread, has_gradio),) = places
    assert process != os.getpid() and is_main_thread and not has_gradio


def test_requests_run_one_after_the_other_and_each_gets_its_own_updates(worker, tmp_path):
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    first = worker.start(partial(asked.wait_for, begun=begun, go_on=go_on))
    second = worker.start(partial(asked.steps, count=3))
    until(begun.exists)
    assert second._answers.empty()
    go_on.touch()
    assert [update.result for update in updates(first)] == ["finished"]
    *before, last = updates(second)
    assert [(update.step, update.steps, update.shown) for update in before] == [(k + 1, 3, f"picture {k}") for k in range(3)]
    assert last.result == b"x" * 3_000_000


def test_a_stopped_request_is_waited_for_and_a_later_one_is_not():
    class Waiting:  # a worker whose requests never end by themselves
        def start(self, function):
            return Request(lambda: None)

    work = Work(Waiting())
    first, second = work.run("visitor", asked.where), work.run("visitor", asked.where)
    next(first)
    assert work.cancel("visitor") == 1 and not work.wait("visitor", 0.1)
    next(second)  # asked for after the stop
    assert not work.wait("visitor", 0.1)
    first.close()
    assert work.running == 1 and work.wait("visitor", 0.1)
    assert work.wait("another", 0.1) and work.wait(None, 0.1)
    second.close()


def test_what_libraries_print_is_not_among_the_answers(capfd):
    with closing(Worker(asked.nothing)) as worker:
        assert worker.call(partial(asked.steps, count=1)) == b"x" * 3_000_000
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "a library prints this\n")


def test_a_request_that_waits_can_be_cancelled_too(worker, tmp_path):
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    first, second = (worker.start(partial(asked.wait_for, begun=begun, go_on=go_on)) for _ in range(2))
    third = worker.start(asked.where)  # which never asks whether it is cancelled
    until(begun.exists)
    second.cancel()
    third.cancel()
    first.cancel()
    first.cancel()
    assert updates(first)[-1].stopped and updates(second)[-1].stopped and updates(third)[-1].stopped
    first.cancel()  # it has ended: nothing happens
    begun.unlink()
    go_on.touch()
    assert worker.call(partial(asked.wait_for, begun=begun, go_on=go_on)) == "finished"


def test_an_error_reaches_the_caller_and_the_process_goes_on(capfd):
    with closing(Worker(asked.nothing)) as worker:
        process, *_ = worker.call(asked.where)
        for request, error in ((asked.fail, Failed), (asked.exhaust, MemoryError), (asked.unsendable, Failed)):
            with pytest.raises(error):
                worker.call(request)
        assert capfd.readouterr().err.count("RuntimeError: secret of the server") == 1
        assert worker.call(asked.where)[0] == process


def test_a_process_that_is_killed_is_started_again(worker, tmp_path):
    """What the system does where memory is short. Those that ran or waited are told so in one line."""
    begun, go_on = tmp_path / "begun", tmp_path / "go on"
    held_up = worker.start(partial(asked.wait_for, begun=begun, go_on=go_on, then=asked.be_killed))
    waiting = worker.start(asked.where)
    go_on.touch()
    for request in (held_up, waiting):
        with pytest.raises(UserError, match=r"ended \(SIGKILL, often for want of memory\); ask again, it starts anew$"):
            updates(request)
        request.cancel()  # while there is no process
    assert worker.call(partial(asked.steps, count=1)) == b"x" * 3_000_000


def test_a_setup_that_fails_is_what_each_request_fails_of():
    worker = Worker(asked.refuse)
    for _ in range(2):
        with pytest.raises(UserError, match="^model: damaged$"):
            worker.call(asked.where)
    worker.close()
    with pytest.raises(UserError, match="the server is ending"):
        until(lambda: worker._process is None)
        worker.start(asked.where)


def test_the_process_ends_with_the_server(tmp_path):
    """Also where the server is killed, and while a request runs."""
    program = f"""
import sys, time
sys.path.insert(0, {os.path.dirname(asked.__file__)!r})
from functools import partial
from pathlib import Path
import asked
from latentdiff.web.worker import Worker
worker = Worker(asked.nothing)
print(worker.call(asked.where)[0], flush=True)
worker.start(partial(asked.wait_for, begun=Path({str(tmp_path / "begun")!r}), go_on=Path("never")))
time.sleep(60)
"""
    server = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    process = psutil.Process(int(server.stdout.readline()))
    until((tmp_path / "begun").exists)
    server.kill()
    server.wait()
    assert psutil.wait_procs([process], timeout=10)[1] == []


def until(holds):
    """Wait until a condition holds, at most ten seconds."""
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def printed(program: str) -> list[str]:
    """The words that a program prints in a new process, where gradio is not imported yet."""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    return run.stdout.split()


STUBS = """
import sys
from latentdiff.web.stubs import without_stubs
before = list(sys.meta_path)
with without_stubs():
    import gradio
from gradio import component_meta
print(component_meta.create_or_modify_pyi.__module__, sys.meta_path == before, gradio.Textbox(label="Name").label)
"""


def test_gradio_is_imported_without_its_stubs():
    assert printed(STUBS) == ["latentdiff.web.stubs", "True", "Name"]


SERVED = """
import pathlib, sys, tempfile
from latentdiff.utils.shipped import shipped_weights
from latentdiff.web import serve
from latentdiff.web.limits import Limits
with tempfile.TemporaryDirectory() as folder:
    models = {"fashion-mnist": shipped_weights("fashion-mnist")}
    site = serve.start(serve.make_context(models, None, Limits(), None), "127.0.0.1", 0, pathlib.Path(folder))
    from gradio import component_meta
    print(component_meta.create_or_modify_pyi.__module__, site.page._queue.sleep_when_free, "torch" in sys.modules)
    site.close()
"""


def test_a_server_writes_no_stubs_and_looks_for_requests_seldom():
    """gradio's own pause between two looks is a thousandth of a second."""
    writer, pause, has_torch = printed(SERVED)
    assert writer == "latentdiff.web.stubs" and 0.01 <= float(pause) <= 0.05
    assert has_torch == "False"  # which the other process imports meanwhile
