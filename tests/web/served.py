"""The server of the tests: its models, its limits, and how it is started."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from latentdiff.web.jobs.models import Models
from latentdiff.web.limits import Limits
from latentdiff.web.serve import Site, make_context, start
from latentdiff.web.worker import Worker

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {name: ROOT / "weights" / name for name in ("fashion-mnist", "emoji")}
LIMITS = Limits(images=20, steps=120, pixels=20_000, upload=200_000, queue=30)


@contextmanager
def running_site(
    folders: dict[str, Path],
    runs: Path | None,
    limits: Limits,
    scratch: Path,
    setup: Callable[[], Models] | None = None,
) -> Iterator[Site]:
    """A server and its process that computes. setup: of the process."""
    worker = Worker(setup or partial(Models, folders))
    try:
        running = start(make_context(folders, runs, limits, worker), "127.0.0.1", 0, scratch)
        try:
            yield running
        finally:
            running.close()
    finally:
        worker.close()
