"""The tab Runs: curves, pictures, verdicts and the time left of the runs in a folder, also while they train.

The functions that read are apart from those that draw. They read what a run wrote, and never a file that lies elsewhere: see
`reading.open_inside`.
"""

from __future__ import annotations

import functools
import hashlib
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

from latentdiff.errors import UserError, printable
from latentdiff.fitting import page
from latentdiff.fitting.progress import duration
from latentdiff.utils import locks
from latentdiff.web import reading

if TYPE_CHECKING:
    from latentdiff.web.context import Context

FIT, RUN = "fit.json", "run.json"  # the record of a fit, and of one training run
PERIOD = 3.0  # seconds between two looks at a run
LIST_PERIOD = 5.0  # seconds between two looks at the list of runs
# How events that only read are given to gradio: they do not wait for those that compute
LOOKS: dict[str, Any] = {"concurrency_id": "looks", "concurrency_limit": 4}
MOST_RUNS = 200  # in the list
MOST_READ = 2**25  # bytes of a metrics.jsonl that are read at one look
MOST_JSON = 2**22  # bytes of a JSON file
MOST_CHARTS = 24  # of the other curves
KEPT_RUNS, KEPT_PICTURES = 8, 64  # in memory; pictures of each run
WIDEST = 640  # pixels of a picture as it is shown
STYLE = f"<style>{Path(__file__).with_suffix('.css').read_text(encoding='utf-8')}</style>"
QUIET = 30.0  # seconds without a new line after which a run without a lock is not running


class Section(NamedTuple):
    """The parts of the tab as HTML; each is sent to the browser when it has changed."""

    head: str
    pictures: str
    curves: str
    more_curves: str
    details: str


# Reading


class RunFiles(page.FitFiles):
    """The files of a fit or a run that is shown to strangers: read within limits, never through a link.

    Args:
        root: the folder of runs.
        out: the folder of the fit or run, in root.
        folders: see `FitFiles`.
        clean: takes paths of the server out of a text.
    """

    def __init__(self, root: Path, out: Path, folders: Mapping[str, Path] | None, clean: Callable[[str], str]):
        self.root, self.clean = root, clean
        self._shown: OrderedDict[Any, dict[str, Any]] = OrderedDict()  # the newest pictures
        super().__init__(out, folders)

    def open(self, path: Path) -> BinaryIO:
        """A file of the run; OSError for a link, for a file that is not regular, and for one that is too large."""
        return reading.open_inside(self.root, path, None if path.name == "metrics.jsonl" else reading.MOST_BYTES)

    def read_json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file, without paths of the server; {} where there is none that can be read."""
        found = page.read_json(path, lambda file: reading.open_inside(self.root, file, MOST_JSON))
        return reading.bounded(found, self.clean)

    def picture(self, path: Path, fresh: bool = False) -> dict[str, Any] | None:
        """A picture with its pixels as a data: address; None where there is none that can be decoded."""
        try:
            with self.open(path) as file:
                status = reading.status_of(file)
                key = (path, status.st_mtime_ns, status.st_size)
                if key not in self._shown:
                    link, width, height = reading.picture_link(file, WIDEST)
                    self._shown[key] = {"link": link, "width": width, "height": height, "small": width < 600}
        except OSError:
            return None
        self._shown.move_to_end(key)
        while len(self._shown) > KEPT_PICTURES:
            self._shown.popitem(last=False)
        return self._shown[key]

    def difference(self, first: Path, second: Path) -> float | None:
        """As in `FitFiles`; None for pictures that are too large."""
        for path in (first, second):
            with self.open(path) as file:
                reading.check_pixels(file)
        return super().difference(first, second)


def open_run(root: Path, out: Path, clean: Callable[[str], str]) -> RunFiles:
    """The files of a folder that holds fit.json or run.json."""
    files = RunFiles(root, out, None, clean)
    if not reading.is_file(root, out / FIT):
        stage = files.read_json(out / RUN).get("stage")
        folders = {"autoencoder" if stage == "autoencoder" else "diffusion": out}
        files = RunFiles(root, out, folders, clean)
    return files


def find_runs(root: Path) -> list[Path]:
    """The folders of fits and runs in a folder, or the folder itself; the newest first, at most MOST_RUNS.

    The stages of a fit are parts of it. Links are not followed.
    """
    found: list[tuple[float, Path]] = []
    below = reading.folders_below(root)
    entry = next(below, None)
    while entry is not None and len(found) < MOST_RUNS:
        folder, files = entry
        holds = FIT in files or RUN in files
        if holds:
            times = [_changed(folder / name) for name in (FIT, RUN, "clock.json", "metrics.jsonl") if name in files]
            found.append((max(times), folder))
        try:
            entry = below.send(holds)
        except StopIteration:
            entry = None
    return [folder for _, folder in sorted(found, key=lambda each: (-each[0], str(each[1])))]


def _changed(path: Path) -> float:
    """When a file was changed, in seconds since 1970; 0 where it is gone."""
    try:
        return path.lstat().st_mtime
    except OSError:
        return 0.0


def status_of(files: RunFiles, record: Mapping[str, Any]) -> str:
    """Whether a run is "running", "finished" or "stopped", by its lock, its record and what it has made."""
    try:
        with files.open(files.out / locks.NAME) as file:
            if locks.holder_runs(file.read(300).decode("utf-8", errors="replace")):
                return "running"
    except OSError:
        pass
    phases = record.get("phases")
    if isinstance(phases, Mapping) and phases:
        return "finished" if all(state in ("done", "skipped") for state in phases.values()) else "stopped"
    if any(reading.is_folder(files.root, files.out / name) for name in ("model", "autoencoder")):
        return "finished"
    newest = max(_changed(metrics.path) for metrics in files.stages.values())
    return "running" if time.time() - newest < QUIET else "stopped"


def run_time(record: Mapping[str, Any], started: float, step: int, rate: float | None, status: str) -> dict[str, Any] | None:
    """How far one training run is, in words, and the share for the bar; None where its record does not say how long it is.

    Args:
        record: of run.json.
        started: when the run, or its last part, began, in seconds since 1970.
        step: the newest step.
        rate: steps a second; None while that is not known.
        status: of `status_of`.
    """
    train = record.get("train")
    steps, minutes = (train.get(key) for key in ("steps", "minutes")) if isinstance(train, Mapping) else (None, None)
    if isinstance(minutes, int | float) and minutes > 0:
        used, total = time.time() - started, 60.0 * minutes
        words = f"Step {step}"
        if status == "running":
            words += f", about {duration(max(0.0, total - used))} of {duration(total)} left"
        return {"words": f"{words}.", "share": min(1.0, max(0.0, used / total)) if status == "running" else 1.0}
    if not isinstance(steps, int) or steps < 1:
        return None
    words = f"Step {step} of {steps}"
    if status == "running" and rate and step < steps:
        words += f", {rate:.3g} steps/s, about {duration((steps - step) / rate)} left"
    return {"words": f"{words}.", "share": min(1.0, max(0, step) / steps)}


class Rate:
    """Steps a second, from the steps that were seen at the last looks."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque(maxlen=20)

    def look(self, step: int, now: float) -> float | None:
        """The rate after another look; None while there was no progress. now: of a clock that never goes back, in seconds."""
        if self._seen and step < self._seen[-1][1]:
            self._seen.clear()
        if not self._seen or step > self._seen[-1][1]:
            self._seen.append((now, step))
        (first, start), (_, end) = self._seen[0], self._seen[-1]
        return (end - start) / (now - first) if end > start and now > first else None


def facts(files: RunFiles, rate: Rate, title: str) -> dict[str, Any]:
    """Everything that the tab shows of a fit or a run. What cannot be read is left out, and named under "problems"."""
    is_fit = len(files.folders) > 1
    record = files.read_json(files.out / (FIT if is_fit else RUN))
    status = status_of(files, record)
    shown = files.facts(record if is_fit else {"phases": {}, "plan": {}}, status, most=MOST_READ)
    step = max(metrics.step for metrics in files.stages.values())
    if not is_fit:
        shown["time"] = run_time(record, _changed(files.out / RUN), step, rate.look(step, time.monotonic()), status)
        shown["phases"] = []
    shown["title"] = title
    shown["problems"] = [files.clean(problem) for problem in shown["problems"]]
    shown["more_charts"] = more_charts(files)
    return shown


def more_charts(files: page.FitFiles) -> list[dict[str, Any]]:
    """Charts of the curves that are not among those of `FitFiles.charts`, at most MOST_CHARTS."""
    charts: list[dict[str, Any]] = []
    for stage, metrics in files.stages.items():
        for name, curve in sorted(metrics.curves.items()):
            if name in page.CHARTED or len(charts) >= MOST_CHARTS:
                continue
            try:
                made = page.chart({"value": curve}, printable(name[:80]) + (f", {stage}" if len(files.folders) > 1 else ""))
            except (ValueError, ArithmeticError):  # values that no axis holds
                continue
            if made is not None:
                charts.append(made)
    return charts


class Runs:
    """The runs in a folder, for all visitors: each is read once for all of them, and only when it has changed.

    Args:
        root: the folder.
        clean: takes paths of the server out of a text.
    """

    def __init__(self, root: Path, clean: Callable[[str], str] = str):
        self.root, self.clean = root, clean
        self._guard = threading.Lock()
        self._names: dict[str, Path] = {}
        self._listed = -LIST_PERIOD
        self._open: OrderedDict[Path, _OpenRun] = OrderedDict()

    def names(self) -> list[str]:
        """What the runs are called, the newest first."""
        with self._guard:
            if time.monotonic() - self._listed >= LIST_PERIOD:
                self._names = {reading.shown_name(self.root, folder): folder for folder in find_runs(self.root)}
                self._listed = time.monotonic()
            return list(self._names)

    def sections(self, name: str) -> Section:
        """The parts of the tab for a run. UserError for an unknown one."""
        if name not in self.names():
            raise UserError(f"run {str(name)[:60]!r}: there is none of this name")
        with self._guard:
            folder = self._names[name]
            run = self._open.pop(folder, None) or _OpenRun(open_run(self.root, folder, self.clean))
            self._open[folder] = run
            while len(self._open) > KEPT_RUNS:
                self._open.popitem(last=False)
        return run.sections(name)


class _OpenRun:
    """A run that somebody looks at, with what was read of it."""

    def __init__(self, files: RunFiles):
        self.files, self.rate = files, Rate()
        self._guard = threading.Lock()
        self._looked, self._seen, self._made = 0.0, None, Section("", "", "", "", "")
        self._running = True

    def sections(self, title: str) -> Section:
        with self._guard:
            now = time.monotonic()
            if self._seen is None or now - self._looked > PERIOD / 2:
                seen = [title, *self.files.changed()]
                if self._running or seen != self._seen:
                    shown = facts(self.files, self.rate, title)
                    self._made, self._running = draw(shown), shown["status"] == "running"
                self._looked, self._seen = now, seen
            return self._made


# Drawing


@functools.cache
def _template() -> Any:
    return page.environment(Path(__file__).parent).get_template("runs.jinja").module


def draw(shown: Mapping[str, Any]) -> Section:
    """The parts of the tab as HTML. shown: what `facts` gave."""
    template = _template()
    return Section(*(str(getattr(template, name)(shown)) for name in Section._fields))


def changed_parts(made: Section, before: Mapping[str, str]) -> tuple[list[str | None], dict[str, str]]:
    """(each part, None where the visitor has it; what the visitor has now).

    before: {part: digest of what the visitor has}.
    """
    now = {name: hashlib.sha256(text.encode()).hexdigest() for name, text in made._asdict().items()}
    return [None if before.get(name) == now[name] else text for name, text in made._asdict().items()], now


def build(context: Context) -> None:
    """Fill the tab."""
    import gradio as gr
    from gradio.context import get_render_context

    if context.runs is None:
        gr.Markdown("No folder of runs is shown. Start the server with `latentdiff serve --runs DIR`.")
        return
    runs = Runs(context.runs, context.work.without_paths)
    gr.HTML(STYLE)
    choice = gr.Dropdown(runs.names(), label="Run", info="The newest first. The page follows a run while it trains.")
    head, pictures, curves = gr.HTML(label="How it goes"), gr.HTML(label="Pictures"), gr.HTML(label="Curves")
    with gr.Accordion("More curves", open=False):
        more_curves = gr.HTML(label="More curves")
    with gr.Accordion("Plan, choice and measurements", open=False):
        details = gr.HTML(label="Details")
    seen = gr.State({})
    timer = gr.Timer(PERIOD, active=False)

    def look(name: str | None, before: dict[str, str]) -> Any:
        """The list of runs, and the parts of the chosen run that have changed."""
        try:
            names = runs.names()
            # The list alone: the visitor may have chosen another run meanwhile
            listed = gr.Dropdown(choices=names)
            if name not in names:
                name = names[0] if names else None
                listed = gr.Dropdown(choices=names, value=name)
            parts: list[Any] = ["<p>There is no run in the folder yet.</p>", "", "", "", ""]
            now: dict[str, str] = {}
            if name is not None:
                parts, now = changed_parts(runs.sections(name), before)
        except Exception as error:
            raise context.work.error(error) from None
        return [listed, *(gr.skip() if part is None else part for part in parts), now]

    places = [choice, head, pictures, curves, more_curves, details, seen]
    settings: dict[str, Any] = dict(
        fn=look, inputs=[choice, seen], outputs=places, show_progress="hidden", api_visibility="private", **LOOKS
    )
    timer.tick(**settings)
    choice.input(**settings)
    tab = get_render_context()
    assert isinstance(tab, gr.Tab)
    tab.select(lambda: gr.Timer(active=True), outputs=timer, show_progress="hidden", api_visibility="private", **LOOKS)
    tab.select(**settings)
