"""The one thread that computes, and the import of gradio without its stubs."""

import subprocess
import sys
import threading

import pytest

from latentdiff.web.worker import Worker


def test_functions_run_one_after_the_other_in_one_thread():
    worker, seen, first = Worker(), [], threading.Event()

    def slow():
        first.wait(10)
        seen.append(("slow", threading.get_ident()))

    futures = [worker.start(slow), worker.start(lambda: seen.append(("fast", threading.get_ident())))]
    assert seen == []
    first.set()
    for future in futures:
        future.result(10)
    assert [name for name, _ in seen] == ["slow", "fast"]
    assert len({thread for _, thread in seen}) == 1 and seen[0][1] != threading.get_ident()


def test_a_function_may_call_another_one():
    worker = Worker()
    assert worker.call(lambda: worker.call(threading.get_ident)) == worker.call(threading.get_ident)


def test_an_error_reaches_the_caller_and_the_thread_goes_on():
    worker = Worker()
    with pytest.raises(SystemExit):
        worker.start(lambda: sys.exit(3)).result(10)
    assert worker.start(lambda: "still there").result(10) == "still there"


STUBS = """
import sys
from latentdiff.web.stubs import _Finder, without_stubs
written = []
with without_stubs():
    import gradio
from gradio import component_meta
component_meta.Path.write_text = lambda path, *_: written.append(path)
class Mine(gradio.Textbox):
    pass
assert component_meta.create_or_modify_pyi.__module__ == "latentdiff.web.stubs"
assert gradio.Textbox().label is None and written == []
assert not any(isinstance(finder, _Finder) for finder in sys.meta_path)
"""


def test_gradio_is_imported_without_its_stubs():
    subprocess.run([sys.executable, "-c", STUBS], check=True, timeout=120)


SERVED = """
from latentdiff.web import serve, stubs
import gradio_client, tempfile, pathlib
from latentdiff.web.context import Limits
context = serve.make_context({}, None, Limits())
with tempfile.TemporaryDirectory() as folder:
    site = serve.start(context, "127.0.0.1", 0, pathlib.Path(folder))
    from gradio import component_meta
    assert component_meta.create_or_modify_pyi is stubs._nothing
    # gradio's own is a thousandth of a second, which keeps a core busy
    assert site.page._queue.sleep_when_free == serve.LOOK >= 0.01
    site.close()
"""


def test_a_server_writes_no_stubs_and_looks_for_requests_seldom():
    subprocess.run([sys.executable, "-c", SERVED], check=True, timeout=120)
