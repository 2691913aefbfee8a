"""`latentdiff serve`: the page in the browser for models of one's own."""

from __future__ import annotations

import errno
import os
import socket
import sys
import tempfile
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from latentdiff.errors import UserError
from latentdiff.utils import collection, hashes, progress_bars
from latentdiff.web.limits import Limits
from latentdiff.web.stubs import without_stubs
from latentdiff.web.worker import Worker

if TYPE_CHECKING:
    from latentdiff.web.context import Context

KNOWN_DEVICES = ("auto", "cpu")  # those that need no torch to be known
DEFAULT_MODEL = "weights/fashion-mnist"
BODY = 1_000_000  # bytes of a request beside an uploaded file
SCRATCH = "GRADIO_TEMP_DIR"
LOOK, PROGRESS = 0.02, 0.1  # seconds between two looks for a request, and for progress bars of gradio's own
NO_TELEMETRY = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}
# Each request asks matplotlib for its backend. Where none is set, the first one waits until all of pyplot is imported
NO_PYPLOT = {"MPLBACKEND": "agg"}


def serve(
    models: list[str] | None = None,
    runs: str | Path | None = None,
    data: str | None = None,
    port: int = 7860,
    host: str = "127.0.0.1",
    max_images: int = 64,
    max_steps: int = 250,
    max_pixels: int = 16_000_000,
    max_upload: int = 20,
    queue: int = 16,
    keep: int = 2,
    device: str = "auto",
) -> None:
    """Show models and runs on a page in the browser, until Ctrl-C.

    The page draws images, edits them, explores a model, and shows how training goes and what was measured. Requests wait in a
    queue and run one at a time, so that each image depends on its own settings alone. Nothing is sent anywhere else.

    Args:
        models: checkpoints: folders, or names of shipped ones. A folder of a fit or a run stands for the model in it, and its
            runs are shown; weights/fashion-mnist by default.
        runs: a folder of runs or fits to watch; by default the folder of a fit or run that is given as a model.
        data: the data set of the models: a folder, fashion-mnist, a Hub name, or a pattern of tables or shards. The tab Explore
            then finds the training images that are nearest to an image. Visitors see these images.
        port: of the address; 0 takes a free one.
        host: the address to listen at. The default is seen on this machine alone; 0.0.0.0 lets everyone in the network in.
        max_images: images of one request.
        max_steps: steps of one request.
        max_pixels: pixels of all images of one request, and of one uploaded picture.
        max_upload: megabytes of one uploaded file.
        queue: requests that may wait; further ones are refused.
        keep: models in memory at a time.
        device: auto, cpu, or torch's name of another device.

    Raises:
        UserError: a model or a folder that is not there, a limit below 1, a port that is in use, or gradio is not installed.
        Stopped, Interrupted: a signal ended the server, as it is meant to end.
    """
    from latentdiff.web.facts import find_models
    from latentdiff.web.jobs.models import open_models, ready

    # Refuse what can be refused before anything is loaded
    flags = {"--max-images": max_images, "--max-steps": max_steps, "--max-pixels": max_pixels, "--max-upload": max_upload}
    for flag, value in {**flags, "--queue": queue, "--keep": keep}.items():
        if value < 1:
            raise UserError(f"{flag} {value}: must be at least 1")
    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535; 0 takes a free one")
    if runs is not None and not Path(runs).is_dir():
        raise UserError(f"--runs {runs}: no such folder")
    limits = Limits(max_images, max_steps, max_pixels, max_upload * 1_000_000, queue)
    free_port(host, port)
    names = list(models or [DEFAULT_MODEL])
    folders, own_runs = find_models(names)
    with ExitStack() as stack:
        scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix="latentdiff-serve-", ignore_cleanup_errors=True))
        # The other process imports torch and diffusers, and loads the first model, while this one imports gradio
        worker = Worker(partial(open_models, names, keep, device, hashes.is_checked()))
        stack.callback(worker.close)
        stack.callback(set_scratch, os.environ.get(SCRATCH))
        with collection.paused():
            import_gradio(Path(scratch))
            if device not in KNOWN_DEVICES:
                worker.call(ready)
            context = make_context(folders, own_runs if runs is None else Path(runs), limits, worker, data)
            site = start(context, host, port, Path(scratch))
        stack.callback(site.close)
        progress_bars.print_line(f"latentdiff: {site.url} (Ctrl-C ends it)")
        worker.call(ready)  # a page can be opened meanwhile; a model that cannot be loaded ends the server
        if data is not None:
            from latentdiff.web.jobs.explore import check_data

            worker.call(partial(check_data, data=data))
        threading.Event().wait()


def make_context(
    folders: dict[str, Path],
    runs: Path | None,
    limits: Limits,
    worker: Worker,
    data: str | None = None,
) -> Context:
    """The settings of a server.

    Args:
        folders: {name on the page: folder of a checkpoint}.
        runs: a folder of runs to show.
        limits: of a request.
        worker: the process that computes; it has the same models.
        data: the data set of the models.
    """
    from latentdiff.web.context import Context
    from latentdiff.web.models import OfferedModels
    from latentdiff.web.work import Work, names_of

    shown = [(runs, "the folder of runs"), (Path(data) if data else None, "the data set")]
    return Context(OfferedModels(folders, worker), runs, limits, Work(worker, names_of(folders, shown)), data)


@dataclass(frozen=True)
class Site:
    """A running server.

    Attributes:
        url: its address.
        page: the `gradio.Blocks`.
        context: its settings.
        scratch_before: what GRADIO_TEMP_DIR was before it started.
    """

    url: str
    page: Any
    context: Context
    scratch_before: str | None

    def close(self) -> None:
        """End the server. A server of this process that started before it goes on with its own folder."""
        self.page.close(verbose=False)
        set_scratch(self.scratch_before)


def start(context: Context, host: str, port: int, scratch: Path) -> Site:
    """Start the server, in threads of this process.

    Args:
        context: its settings.
        host, port: the address; port 0 is a free one.
        scratch: a folder for results and uploads, which are removed from it after an hour.

    Raises:
        UserError: gradio is not installed, or the address cannot be listened at.
    """
    port = free_port(host, port)
    scratch_before = os.environ.get(SCRATCH)
    import_gradio(scratch)
    from starlette.middleware import Middleware

    from latentdiff.web.body import BodyLimit
    from latentdiff.web.gate import STORED, Gate, fetch_nothing
    from latentdiff.web.page import CSS, build_page, theme

    page = build_page(context)
    # Without api_open what computes cannot be called past the queue
    page.queue(max_size=context.limits.queue, default_concurrency_limit=None, api_open=False)
    # gradio would look for requests a thousand times a second, as long as the server runs: a twelfth of a core
    page._queue.sleep_when_free, page._queue.progress_update_sleep_when_free = LOOK, PROGRESS
    fetch_nothing()
    gates = [
        Middleware(Gate, scratch=scratch, most=STORED * context.limits.upload),
        Middleware(BodyLimit, most=context.limits.upload + BODY),
    ]
    _, url, _ = page.launch(
        server_name=host,
        server_port=port,
        share=False,
        inbrowser=False,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,  # of errors that are not our own lines: they may name a path of this machine
        footer_links=["settings", "api"],
        run_history=False,
        max_file_size=context.limits.upload,
        app_kwargs={"middleware": gates},
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css=CSS,
    )
    return Site(url, page, context, scratch_before)


def import_gradio(scratch: Path) -> None:
    """Import gradio as a server needs it. scratch: as of `start`. UserError where it is not installed."""
    # gradio reads these where it is imported, where the page is made, and with each file
    os.environ.update(NO_TELEMETRY | {key: os.environ.get(key, value) for key, value in NO_PYPLOT.items()})
    scratch_before = os.environ.get(SCRATCH)
    set_scratch(str(scratch))
    try:
        with without_stubs():
            import gradio  # noqa: F401
    except ImportError:
        set_scratch(scratch_before)
        raise UserError('serve: needs gradio; install it with pip install "latentdiff[web]"') from None


def set_scratch(folder: str | None) -> None:
    """Say where gradio keeps results and uploads; None for its own place."""
    if folder is None:
        os.environ.pop(SCRATCH, None)
    else:
        os.environ[SCRATCH] = folder


def free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. UserError where it cannot be listened at."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family) as probe:
            if sys.platform != "win32":  # a port that a server has just left is free; on Windows this would share it
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            return probe.getsockname()[1]
    except OSError as error:
        reason = error.strerror or str(error)
        is_address = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
        other = "--host, such as 127.0.0.1" if is_address else "--port"
        raise UserError(f"--host {host} --port {port}: cannot be listened at ({reason}); give another {other}") from None
