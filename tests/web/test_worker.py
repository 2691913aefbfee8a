"""The one thread that computes, and the import of gradio without its stubs."""

import subprocess
import sys
import threading

import pytest

from latentdiff.web.worker import Worker


def test_functions_run_one_after_the_other_in_one_thread():
    worker, order, first = Worker(), [], threading.Event()

    def slow():
        first.wait(10)
        order.append(("slow", threading.get_ident()))

    futures = [worker.start(slow), worker.start(lambda: order.append(("fast", threading.get_ident())))]
    assert order == []
    first.set()
    for future in futures:
        future.result(10)
    assert [name for name, _ in order] == ["slow", "fast"]
    assert len({thread for _, thread in order}) == 1 and order[0][1] != threading.get_ident()


def test_a_function_may_call_another_one():
    worker = Worker()
    inner = worker.start(lambda: worker.call(threading.get_ident)).result(10)
    assert inner == worker.call(threading.get_ident)


def test_an_error_reaches_the_caller_and_the_thread_goes_on():
    worker = Worker()
    with pytest.raises(SystemExit):
        worker.start(lambda: sys.exit(3)).result(10)
    assert worker.start(lambda: "still there").result(10) == "still there"


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
import pathlib, tempfile
from latentdiff.web import serve
from latentdiff.web.context import Limits
with tempfile.TemporaryDirectory() as folder:
    site = serve.start(serve.make_context({}, None, Limits()), "127.0.0.1", 0, pathlib.Path(folder))
    from gradio import component_meta
    print(component_meta.create_or_modify_pyi.__module__, site.page._queue.sleep_when_free)
    site.close()
"""


def test_a_server_writes_no_stubs_and_looks_for_requests_seldom():
    """gradio's own pause between two looks is a thousandth of a second."""
    writer, pause = printed(SERVED)
    assert writer == "latentdiff.web.stubs" and 0.01 <= float(pause) <= 0.05
