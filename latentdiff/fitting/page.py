"""The live page of a fit, <folder>/index.html: the plan, curves, pictures, and verdicts in words.

The page is made from the files of the fit alone, so it is complete again after a kill and a resume. It has no script and
needs no network. Its layout is in page.jinja, with parts.jinja. A page that cannot be made never stops the fit.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import math
import os
import shlex
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from latentdiff.errors import UserError, printable
from latentdiff.evaluation.tables import NONE, value_cells
from latentdiff.fitting.progress import duration
from latentdiff.utils import atomic

PAGE, TIMES = "index.html", Path("page") / "times.json"
RECONSTRUCTIONS = Path("page") / "reconstructions.png"  # of an autoencoder that was not trained
PERIOD = 15.0  # seconds between two writings
MOST_POINTS = 400  # of a curve that are kept; of more, neighbours are averaged
STRIP = 8  # grids of samples that are shown
CHUNK = 2**23  # bytes of metrics.jsonl that are read at a time
MOST_CURVES = 256  # of a metrics.jsonl
MOST_PICTURES = 20_000  # entries of a folder of pictures that are looked at
Open = Callable[[Path], BinaryIO]  # opens a file to read; OSError where there is none that may be read

STAGES = ("autoencoder", "diffusion")
ERRORS = ("train/l1", "train/l2", "train/total")  # of an autoencoder; the first that was logged is shown
LOSS, HELD_OUT_LOSS = "train/loss", "validation/loss_ema"  # of a diffusion model
CHARTED = (*ERRORS, LOSS, HELD_OUT_LOSS)
PHASES = {
    "look": "Look at the pictures and the machine, and plan",
    "autoencoder": "Stage 1: train the autoencoder",
    "diffusion": "Stage 2: train the diffusion model",
    "choose": "Choose the state that is kept",
    "report": "Measure the model",
}
NEAR_COPIES = "closer_to_training_than_1%_of_held_out[features]"
# Main rows of the evaluation: the beginning of a metric's name, and what it says
ROWS = {
    "frechet[": "Fréchet distance to the training pictures (lower is better)",
    "label_accuracy": "Samples that a classifier sees as their class (higher is better)",
    "probe_accuracy": "Samples that a classifier sees as their class (higher is better)",
    "precision[": "Samples that look like real pictures (precision, higher is better)",
    "recall[": "Kinds of real pictures that are drawn (recall, higher is better)",
    NEAR_COPIES: "Samples that are about copies of a training picture (lower is better)",
    "reconstruction_psnr": "Reconstructions: PSNR in dB (higher is better)",
}
# Of the candidates: names of their values, for people
COLUMNS = {
    "distance": "Fréchet distance",
    "label_accuracy": "right class",
    "closer_to_training": "about copies",
    "held_out_loss": "held-out loss",
}


# Verdicts: numbers in, words out


class Verdict(NamedTuple):
    """A sentence about the run, and how it sounds: "good", "look" (something to look at) or "fact"."""

    tone: str
    text: str


def autoencoder_verdict(psnr_db: float | None, source: str = "held-out pictures") -> Verdict:
    """How well an autoencoder reconstructs, by its PSNR in dB; None where that is not finite."""
    if psnr_db is None or not math.isfinite(psnr_db):
        return Verdict("look", "The autoencoder's reconstructions are not finite numbers.")
    number = f"{psnr_db:.1f} dB on {source}"
    if psnr_db >= 30:
        return Verdict("good", f"The autoencoder reconstructs very well: {number}.")
    if psnr_db >= 27:
        return Verdict("good", f"The autoencoder reconstructs well: {number}.")
    if psnr_db >= 25:
        return Verdict("fact", f"The autoencoder reconstructs fairly well: {number}. Fine detail is lost.")
    return Verdict("look", f"The autoencoder reconstructs poorly: {number}. All samples will look blurred.")


def loss_verdict(values: Sequence[float], name: str = "loss", skipped: int = 0) -> Verdict:
    """Whether a loss falls, by the newest quarter of its values and the quarter before, with their standard errors.

    Args:
        values: in order; those that are not finite count only if they are the newest.
        name: what it is called.
        skipped: steps of the run that were not finite.
    """
    name = f"The {name}"
    if values and not math.isfinite(values[-1]):
        return Verdict("look", f"{name} is not finite. A lower learning rate helps: optimizer.lr.")
    values = [value for value in values if math.isfinite(value)]
    quarter = len(values) // 4
    extra = f" {skipped} steps were skipped, because they were not finite." if skipped else ""
    if quarter < 2:
        return Verdict("look" if skipped else "fact", f"{name} has too few values yet to say where it goes.{extra}")
    (before, before_error), (now, now_error) = (_mean(part) for part in (values[-2 * quarter : -quarter], values[-quarter:]))
    change, error = now - before, math.hypot(before_error, now_error)
    scale = max(abs(before), abs(now), 1e-12)
    numbers = f"from {before:.3g} to {now:.3g} of late"
    if change < -2 * error and -change > 0.002 * scale:
        return Verdict("look" if skipped else "good", f"{name} is falling: {numbers}.{extra}")
    if change > 2 * error and change > 0.01 * scale:
        return Verdict("look", f"{name} is rising: {numbers}.{extra}")
    return Verdict("look" if skipped else "fact", f"{name} is flat now, near {now:.3g}.{extra}")


def _mean(values: Sequence[float]) -> tuple[float, float]:
    """(mean, its standard error)."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def held_out_verdict(steps: Sequence[int], losses: Sequence[float]) -> Verdict | None:
    """Whether the loss on held-out pictures has risen above its lowest value. None while there are under 3 values."""
    pairs = [(loss, step) for step, loss in zip(steps, losses, strict=True) if math.isfinite(loss)]
    if len(pairs) < 3:
        return None
    (lowest, at), newest = min(pairs), pairs[-1][0]
    if lowest <= 0 or newest <= 1.02 * lowest:
        return Verdict("good", f"The loss on held-out pictures is at its lowest, or near: {newest:.3g}.")
    return Verdict(
        "fact",
        f"The loss on held-out pictures was lowest at step {at} and is {newest / lowest - 1:.0%} higher now. Pictures often "
        "get better long after that, so the state is chosen by its pictures, not by this loss.",
    )


def change_verdict(difference: float | None) -> Verdict | None:
    """How much two grids of samples from the same noise differ. difference: mean of pixels from 0 to 1, or None."""
    if difference is None:
        return None
    if difference < 0.02:
        return Verdict("good", "Pictures change little now.")
    if difference < 0.05:
        return Verdict("fact", "Pictures still change.")
    return Verdict("fact", "Pictures still change a lot.")


def copies_verdict(share: float, real: float = 0.01, images: int | None = None) -> Verdict:
    """How many samples are about copies of training pictures.

    Args:
        share: of the samples that lie closer to a training picture than all but a few held-out pictures do.
        real: these few held-out pictures, as a share.
        images: how many samples it is of.
    """
    cases = f"{100 * share:.0f} of 100 cases" + (f" ({images} samples)" if images else "")
    if share <= max(3 * real, 0.03):
        return Verdict("good", f"Samples are about copies of training pictures in {cases}: as few as real pictures are.")
    tone = "look" if share > 0.2 else "fact"
    help_text = " More pictures, or a shorter training, would help." if tone == "look" else ""
    return Verdict(tone, f"Samples are about copies of training pictures in {cases}.{help_text}")


def accuracy_verdict(share: float, real: float | None) -> Verdict:
    """How many samples a classifier sees as the class they were drawn for, beside real held-out pictures."""
    beside = "" if not real else f"; of real pictures in {100 * real:.0f}"
    ratio = share / real if real else share
    word = "well" if ratio >= 0.85 else "for the most part" if ratio >= 0.6 else "poorly"
    text = f"Classes are recognised {word}: in {100 * share:.0f} of 100 samples{beside}."
    return Verdict("good" if ratio >= 0.6 else "look", text)


def frechet_verdict(distance: float, real: float | None) -> Verdict | None:
    """The Fréchet distance of samples, beside that of real held-out pictures."""
    if not real or real <= 0:
        return None
    ratio = distance / real
    word = "close to" if ratio <= 3 else "some way from" if ratio < 12 else "far from"
    text = f"As a whole, samples are {word} the training pictures: {ratio:.1f} times as far as real held-out ones."
    return Verdict("good" if ratio < 4 else "fact" if ratio < 12 else "look", text)


# Reading the files


@dataclass
class Curve:
    """The values of one metric over the steps, at most MOST_POINTS. Of more, neighbours are averaged.

    Attributes:
        steps, values: of the points; each is a mean over `stride` lines of the file.
        finite: whether the newest value is finite. Others are left out.
        newest: the newest finite value.
    """

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)
    finite: bool = True
    newest: float = math.nan
    stride: int = 1
    _step: int = 0
    _sum: float = 0.0
    _count: int = 0

    def add(self, step: int, value: float) -> None:
        self.finite = math.isfinite(value)
        if not self.finite:
            return
        self.newest, self._step = value, step
        self._sum += value
        self._count += 1
        if self._count < self.stride:
            return
        self.steps.append(step)
        self.values.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self.values) >= MOST_POINTS:
            self.steps = self.steps[1::2]
            self.values = [(a + b) / 2 for a, b in zip(self.values[::2], self.values[1::2], strict=True)]
            self.stride *= 2

    def points(self) -> tuple[list[int], list[float]]:
        """(steps, values) with what is not averaged in full yet."""
        if not self._count:
            return self.steps, self.values
        return [*self.steps, self._step], [*self.values, self._sum / self._count]


def open_file(path: Path) -> BinaryIO:
    """A file, open to read."""
    return path.open("rb")


class Metrics:
    """The curves of a metrics.jsonl. Each call of `read` reads only what is new, unless the file was written anew.

    Args:
        path: the file.
        opens: opens it.
    """

    def __init__(self, path: Path, opens: Open = open_file):
        self.path, self._open = path, opens
        self._forget()

    def _forget(self) -> None:
        self.curves: dict[str, Curve] = {}
        self.step, self._offset, self._file = 0, 0, -1

    def read(self, most: int | None = None) -> Metrics:
        """Read the lines that were added. A file that is missing has none.

        most: about how many bytes are read; the next call goes on there. None: no limit.
        """
        try:
            lines = self._open(self.path)
        except OSError:
            self._forget()
            return self
        with lines:
            status = os.fstat(lines.fileno())
            # A resumed run writes a new file without the steps that it repeats
            if status.st_ino != self._file or status.st_size < self._offset:
                self._forget()
                self._file = status.st_ino
            end = math.inf if most is None else self._offset + most
            lines.seek(self._offset)
            while self._offset < end and (chunk := lines.read(CHUNK)):
                chunk = chunk[: chunk.rfind(b"\n") + 1]  # a line may be half written
                if not chunk:
                    break
                self._offset += len(chunk)
                lines.seek(self._offset)
                for line in chunk.splitlines():
                    self._add(line)
        return self

    def _add(self, line: bytes) -> None:
        try:
            values = json.loads(line)
            step = int(values.pop("step"))
            numbers = {str(name): float(value) for name, value in values.items()}
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError):
            return
        self.step = max(self.step, step)
        for name, value in numbers.items():
            if name in self.curves or len(self.curves) < MOST_CURVES:
                self.curves.setdefault(name, Curve()).add(step, value)

    def first(self, *names: str) -> Curve | None:
        """The curve of the first of these names that was logged."""
        return next((self.curves[name] for name in names if name in self.curves), None)


def read_json(path: Path, opens: Open = open_file) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none that can be read. opens: opens the file."""
    try:
        with opens(path) as file:
            value = json.loads(file.read().decode("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def pictures(folder: Path) -> list[tuple[int, Path]]:
    """(step, file) of the pictures step-NUMBER.png in a folder, in order."""
    found = []
    with contextlib.suppress(OSError):
        for path in itertools.islice(folder.glob("step-*.png"), MOST_PICTURES):
            with contextlib.suppress(ValueError):
                found.append((int(path.stem.removeprefix("step-")), path))
    return sorted(found)


def spread(items: Sequence[Any], count: int = STRIP) -> list[Any]:
    """`count` of the items, evenly spread, with the first and the last; all where there are not more."""
    if len(items) <= count:
        return list(items)
    return [items[round(k * (len(items) - 1) / (count - 1))] for k in range(count)]


def difference(first: BinaryIO, second: BinaryIO) -> float | None:
    """Mean absolute difference of two pictures, pixels from 0 to 1; None where they are of different sizes."""
    from PIL import Image, ImageChops, ImageStat

    with Image.open(first) as a, Image.open(second) as b:
        if a.size != b.size:
            return None
        change = ImageStat.Stat(ImageChops.difference(a.convert("RGB"), b.convert("RGB")))
    return sum(change.mean) / len(change.mean) / 255


# Plots


WIDTH, HEIGHT, LEFT, TOP, RIGHT, BOTTOM = 360, 220, 46, 10, 8, 26  # of a plot and its margins


def chart(curves: Mapping[str, Curve | None], caption: str) -> dict[str, Any] | None:
    """Curves over the steps as what the macro `chart` draws. None where there is nothing to draw.

    The vertical axis is logarithmic where the values are positive and spread over more than a factor of 3.
    """
    series = {name: curve.points() for name, curve in curves.items() if curve is not None}
    series = {name: points for name, points in series.items() if len(points[0]) > 1}
    everything = [value for _, values in series.values() for value in values]
    if not everything:
        return None
    last = max(steps[-1] for steps, _ in series.values())
    low, high = min(everything), max(everything)
    logarithmic = low > 0 and high > 3 * low
    scale: Callable[[float], float] = math.log10 if logarithmic else float
    bottom, top = scale(low), scale(high)
    if top <= bottom:
        bottom, top = bottom - 0.5 * (abs(bottom) or 1), top + 0.5 * (abs(top) or 1)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(1, last)

    def y(value: float) -> float:
        return TOP + (HEIGHT - TOP - BOTTOM) * (top - scale(value)) / (top - bottom)

    lines = []
    for k, (name, points) in enumerate(series.items()):
        path = "L".join(f"{x(step):.1f} {y(value):.1f}" for step, value in zip(*points, strict=True))
        lines.append({"name": name, "path": f"M{path}", "number": k + 1, "newest": f"{points[1][-1]:.3g}"})
    marks = _log_marks(low, high) if logarithmic else _marks(low, high)
    return {
        "caption": caption,
        "lines": lines,
        "x": [(f"{x(step):.1f}", short_number(step)) for step in _marks(0, last, 4)],
        "y": [(f"{y(value):.1f}", short_number(value)) for value in marks],
        "width": WIDTH,
        "height": HEIGHT,
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "bottom": HEIGHT - BOTTOM,
    }


def _marks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from low to high."""
    if high <= low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [k * step for k in range(first, math.floor(high / step + 1e-9) + 1)]


def _log_marks(low: float, high: float) -> list[float]:
    """Numbers 1, 2 and 5 times powers of ten from low to high, or only powers where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for factors in ((1, 2, 5), (1, 3), (1,)):
        marks = [factor * 10.0**power for power in powers for factor in factors if low <= factor * 10.0**power <= high]
        if len(marks) <= 5:
            break
    return marks if len(marks) >= 2 else _marks(low, high)


def short_number(value: float) -> str:
    """A number for an axis: "12k", "0.05"."""
    return f"{value / 1000:g}k" if abs(value) >= 10_000 else f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"


# The page


class FitFiles:
    """What the files of a fit, or of one training run, say: everything that a page shows of them.

    A page that shows what strangers wrote overrides `open`, `read_json` and `picture`.

    Attributes:
        out: the folder.
        folders: {"autoencoder" or "diffusion": the folder of the run of that stage}.
        stages: the curves of these runs.

    Args:
        out: the folder of the fit.
        folders: by default those of a fit. A training run by itself has one: {its stage: out}.
        keeps_times: write page/times.json, so that a resumed fit knows when its old pictures were drawn.
        period: seconds between two looks at the files.
    """

    def __init__(
        self,
        out: str | Path,
        folders: Mapping[str, Path] | None = None,
        keeps_times: bool = False,
        period: float = PERIOD,
    ):
        self.out, self.period, self._keeps_times = Path(out), period, keeps_times
        self.folders = dict(folders or {name: self.out / name for name in STAGES})
        self.stages = {name: Metrics(self._stage(name) / "metrics.jsonl", self.open) for name in STAGES}
        self._changes: dict[tuple[Path, Path], float | None] = {}

    def _stage(self, name: str) -> Path:
        return self.folders.get(name, self.out / name)

    def open(self, path: Path) -> BinaryIO:
        """A file of the run, open to read; OSError where there is none."""
        return open_file(path)

    def read_json(self, path: Path) -> dict[str, Any]:
        """The object in a JSON file; {} where there is none that can be read."""
        return read_json(path, self.open)

    def read_metrics(self, most: int | None = None) -> None:
        """Read what was added to the curves. most: see `Metrics.read`."""
        for metrics in self.stages.values():
            metrics.read(most)

    def changed(self) -> list[Any]:
        """What is different when a file of the fit has changed."""
        places = [self.out / name for name in ("fit.json", "clock.json", "samples.png", "report/metrics.json", "model")]
        for folder in self.folders.values():
            places += [folder / name for name in ("metrics.jsonl", "pictures", "report.json")]
        seen: list[Any] = []
        for place in places:
            try:
                status = place.stat()
                seen.append((status.st_mtime_ns, status.st_size, status.st_ino))
            except OSError:
                seen.append(None)
        return seen

    def facts(
        self, record: Mapping[str, Any], status: str, error: BaseException | None = None, most: int | None = None
    ) -> dict[str, Any]:
        """Everything that the page shows. A part that cannot be made is left out, and named under "problems".

        Args:
            record: the content of fit.json.
            status: "running", "finished" or "stopped".
            error: what stopped the fit.
            most: bytes of a metrics.jsonl that are read now, see `Metrics.read`.
        """
        problems: list[str] = []

        def part(make: Callable[[], Any], default: Any) -> Any:
            try:
                return make()
            except Exception as problem:  # one damaged file must not take the others from the page
                reason = " ".join(str(problem).split()) or type(problem).__name__
                problems.append(printable(reason)[:160])
                return default

        part(lambda: self.read_metrics(most), None)
        clock = self.read_json(self.out / "clock.json")
        values = part(lambda: self.read_json(self.out / "report" / "metrics.json").get("values") or {}, {})
        samples = part(lambda: self.samples(clock), [])
        return {
            "title": f"A model of {Path(str(record.get('folder', self.out))).name}",
            "status": status,
            "refresh": math.ceil(self.period) + 5 if status == "running" else None,
            "stopped": part(lambda: self._stopped(record, error), []) if status == "stopped" else [],
            "written": time.strftime("%Y-%m-%d %H:%M:%S"),
            "time": part(lambda: plan_time(record, clock, status), None),
            "phases": part(lambda: plan_phases(record), []),
            "verdicts": part(lambda: self.verdicts(record, values), []),
            "samples": samples,
            "final": part(lambda: self.picture(self.out / "samples.png", fresh=True), None),
            "charts": [c for c in part(self.charts, []) if c],
            "reconstructions": part(self.reconstructions, None),
            "choice": part(lambda: choice_table(self._choice(record)), None),
            "rows": part(lambda: evaluation_rows(values), []),
            "report": (self.out / "report" / "index.html").is_file(),
            "lines": last_lines(record) if status == "finished" else [],
            "next": part(lambda: next_commands(self.out, record, status), []),
            "plan": [str(line) for line in part(lambda: record["plan"].get("lines") or [], [])],
            "problems": problems,
        }

    def _stopped(self, record: Mapping[str, Any], error: BaseException | None) -> list[str]:
        reason = printable(" ".join(str(error).split()))[:300] if isinstance(error, UserError) else ""
        return [reason] if reason else []

    def _choice(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """Which state is kept: as fit.json says it, else as the choice itself recorded it."""
        return record.get("choice") or self.read_json(self._stage("diffusion") / "choice.json")

    def _kept(self, record: Mapping[str, Any]) -> Mapping[str, Any]:
        """The values of the candidate that is kept; {} where there are none."""
        choice = self._choice(record)
        return next((each for each in choice.get("candidates") or [] if each.get("step") == choice.get("step")), {})

    # Pictures

    def pictures(self, stage: str) -> list[tuple[int, Path]]:
        """(step, file) of the pictures that a stage drew while it trained, in order."""
        return pictures(self.folders[stage] / "pictures") if stage in self.folders else []

    def picture(self, path: Path, fresh: bool = False) -> dict[str, Any] | None:
        """A picture as the page shows it, or None where there is none. fresh: a file of this name may be written again."""
        from PIL import Image

        try:
            with self.open(path) as file, Image.open(file) as image:
                width, height = image.size
        except OSError:
            return None
        link = path.relative_to(self.out).as_posix() + (f"?{path.stat().st_mtime_ns // 10**9}" if fresh else "")
        return {"link": link, "width": width, "height": height, "small": width < 600}

    def samples(self, clock: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The grids of samples that are shown, with step and time."""
        found = self.pictures("diffusion")
        times = self._times([path for _, path in found], clock)
        shown = []
        for step, path in spread(found):
            picture = self.picture(path)
            if picture is not None:
                when = times.get(path.name)
                shown.append({**picture, "step": step, "time": None if when is None else duration(when)})
        return shown

    def _times(self, paths: Sequence[Path], clock: Mapping[str, Any]) -> dict[str, float]:
        """{name: seconds of the plan} at which each picture was drawn; kept in page/times.json for a resumed fit."""
        file = self.out / TIMES
        times = {name: value for name, value in self.read_json(file).items() if isinstance(value, int | float)}
        names = {path.name for path in paths}
        known = {name: float(value) for name, value in times.items() if name in names}
        for path in paths:
            if path.name not in known and {"seconds", "time"} <= clock.keys():
                at = clock["seconds"] - (clock["time"] - path.stat().st_mtime)
                known[path.name] = round(min(max(0.0, at), clock["seconds"] + self.period), 1)
        if known != times and self._keeps_times:
            atomic.write_json(file, known)
        return known

    def reconstructions(self) -> dict[str, Any] | None:
        """The newest picture of stage 1: its report's, else the newest drawn while it trained, else the plan's."""
        report = self.picture(self._stage("autoencoder") / "report.png", fresh=True)
        if report is not None:
            return {**report, "words": "Held-out pictures, and below each its reconstruction by the trained autoencoder."}
        found = self.pictures("autoencoder")
        newest = self.picture(found[-1][1]) if found else None
        if newest is None:
            first = self.picture(self.out / RECONSTRUCTIONS, fresh=True)
            return first and {**first, "words": "Held-out pictures, and below each its reconstruction by the autoencoder."}
        return {**newest, "words": f"Held-out pictures, and below each its reconstruction after {found[-1][0]} steps."}

    def _change(self) -> float | None:
        """How much the two newest grids of samples differ; None where there are not two."""
        newest = [path for _, path in self.pictures("diffusion")[-2:]]
        if len(newest) < 2:
            return None
        pair = (newest[0], newest[1])
        if pair not in self._changes:
            self._changes = {pair: self.difference(*pair)}
        return self._changes[pair]

    def difference(self, first: Path, second: Path) -> float | None:
        """See the function `difference`, of two files."""
        with self.open(first) as a, self.open(second) as b:
            return difference(a, b)

    # Curves and verdicts

    def charts(self) -> list[dict[str, Any] | None]:
        first, second = self.stages["autoencoder"], self.stages["diffusion"]
        error = {"training pictures": first.first(*ERRORS)}
        losses = {"training pictures": second.first(LOSS), "held-out pictures": second.first(HELD_OUT_LOSS)}
        return [
            chart(losses, "Stage 2, the diffusion model: loss by step"),
            chart(error, "Stage 1, the autoencoder: error of the reconstructions by step"),
        ]

    def verdicts(self, record: Mapping[str, Any], values: Mapping[str, Any]) -> list[Verdict]:
        """The verdicts, the newest phase first."""
        found: list[Verdict | None] = []

        # What the evaluation says
        entries = {name: first_entry(values, name) for name in ("frechet[", "label_accuracy", "probe_accuracy", NEAR_COPIES)}
        accuracy = entries["label_accuracy"] or entries["probe_accuracy"]
        if accuracy:
            found.append(accuracy_verdict(accuracy["value"], accuracy.get("floor")))
        choice = self._choice(record)
        if (floor := comparable_floor(entries["frechet["] or {})) is not None:
            found.append(frechet_verdict(entries["frechet["]["value"], floor))
        elif pair := choice_distances(choice, self._kept(record), choice.get("images") or 0):
            found.append(frechet_verdict(*pair))
        if near := entries[NEAR_COPIES]:
            found.append(copies_verdict(near["value"], near.get("floor") or 0.01, near.get("images")))
        elif (share := self._kept(record).get("closer_to_training")) is not None:
            found.append(copies_verdict(share, images=self._choice(record).get("images")))

        # Stage 2
        second = self.stages["diffusion"]
        if second.curves:
            found.append(self._loss("diffusion", "loss of stage 2", LOSS))
            held_out = second.first(HELD_OUT_LOSS)
            if held_out is not None:
                found.append(held_out_verdict(*held_out.points()))
            if record["phases"].get("diffusion") != "done":
                found.append(change_verdict(self._change()))

        # Stage 1
        report = self.read_json(self._stage("autoencoder") / "report.json")
        if "psnr_db" in report:
            found.append(autoencoder_verdict(report["psnr_db"]))
        elif self.stages["autoencoder"].curves:
            found.append(self._loss("autoencoder", "error of stage 1", *ERRORS))
        elif "psnr_db" in (tried := first_stage(record)) and tried.get("decision") != "train":
            found.append(autoencoder_verdict(tried["psnr_db"], "these pictures, which it never saw"))
            if worst := tried.get("worst_classes"):
                found.append(Verdict("look", f"It reconstructs these classes worst: {', '.join(map(str, worst))}."))
        return [verdict for verdict in found if verdict is not None]

    def _loss(self, stage: str, name: str, *metrics: str) -> Verdict | None:
        curve = self.stages[stage].first(*metrics)
        if curve is None:
            return None
        skipped = self.stages[stage].first("train/skipped")
        values = curve.points()[1]
        return loss_verdict(
            values if curve.finite else [*values, math.nan], name, int(skipped.newest) if skipped and skipped.finite else 0
        )


class LivePage:
    """Writes <out>/index.html now and then while the block runs, and once at its end. A context manager.

    Nothing is written before the fit has a plan, so that a refused folder leaves no page. No error of the page reaches the
    fit: it is a line on the page, or once on stderr.

    Args:
        out: the folder of the fit.
        enabled: False does nothing, as on all processes but the first.
        period: seconds between two writings. Nothing is written while no file of the fit has changed.
    """

    def __init__(self, out: str | Path, enabled: bool = True, period: float = PERIOD):
        self.out, self.enabled, self.period = Path(out), enabled, period
        self.files = FitFiles(self.out, keeps_times=True, period=period)
        self._seen: Any = None  # the files at the last writing
        self._warned = False
        self._guard = threading.Lock()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._often, name="live page", daemon=True)

    def __enter__(self) -> LivePage:
        if self.enabled:
            self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self.enabled:
            self._stop.set()
            self._thread.join(timeout=10)
            self.write("finished" if error is None else "stopped", error)

    def _often(self) -> None:
        while True:
            self.write()
            if self._stop.wait(self.period):
                return

    def write(self, status: str = "running", error: BaseException | None = None) -> bool:
        """Write the page; returns whether it was written.

        Args:
            status: "running", "finished" or "stopped". Only a running page is left as it is where nothing has changed.
            error: what stopped the fit.
        """
        try:
            with self._guard:
                seen = self.files.changed()
                if status == "running" and seen == self._seen:
                    return False
                record = self.files.read_json(self.out / "fit.json")
                if not record.get("plan"):
                    return False
                html = render(self.files.facts(record, status, error))
                atomic.write_text(self.out / PAGE, html)
                self._seen = seen
                return True
        except Exception as problem:  # training is worth more than its page
            if not self._warned:
                self._warned = True
                reason = printable(" ".join(str(problem).split()) or type(problem).__name__)[:160]
                with contextlib.suppress(OSError, ValueError):
                    print(f"warning: {self.out / PAGE} cannot be written ({reason}); the fit goes on", file=sys.stderr)
            return False


def comparable_floor(entry: Mapping[str, Any]) -> float | None:
    """The value of real images beside a metric's, or None where it is of fewer than half as many images.

    A Fréchet distance of few images is large for no other reason. A floor of ten images would make any model look good.
    """
    images = entry.get("images") or 0
    return entry.get("floor") if 2 * entry.get("floor_images", images) >= images else None


def choice_distances(choice: Mapping[str, Any], kept: Mapping[str, Any], images: int) -> tuple[float, float] | None:
    """(the distance of the pictures that the choice of a state drew, that of real ones), to stand side by side.

    choice: its record. kept: the values that count. images: how many pictures they are of. None where one was not measured, or
    where fewer than half as many were drawn as there are real ones: their distance is large for no other reason.
    """
    real = choice.get("real") or {}
    if kept.get("distance") is None or real.get("distance") is None or 2 * images < (real.get("images") or 0):
        return None
    return kept["distance"], real["distance"]


def first_entry(values: Mapping[str, Any], name: str) -> dict[str, Any] | None:
    """The entry of an evaluation's values whose name begins so, and that has a value."""
    for key, entry in values.items():
        if key.startswith(name) and isinstance(entry, Mapping) and isinstance(entry.get("value"), int | float):
            return dict(entry)
    return None


def plan_time(record: Mapping[str, Any], clock: Mapping[str, Any], status: str) -> dict[str, Any] | None:
    """Time used and left in words, and the share for the bar. None where no clock was written yet."""
    if not isinstance(clock.get("seconds"), int | float) or not isinstance(record.get("hours"), int | float):
        return None
    used, total = float(clock["seconds"]), max(1.0, record["hours"] * 3600)
    left = max(0.0, total - used)
    words = f"{duration(used)} of {duration(total)} used"
    if status == "running":
        at = time.strftime("%H:%M", time.localtime(time.time() + left))
        words += f", {duration(left)} left. It will be done at about {at}" if left else ". It will be done soon"
    parts = clock.get("parts")
    if isinstance(parts, int) and parts > 1:
        words += f", in {parts} parts"
    return {"words": words + ".", "share": min(1.0, used / total)}


def plan_phases(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The phases with their state ("done", "running", "skipped", "to come") and planned time."""
    states, planned = record.get("phases") or {}, record["plan"].get("seconds") or {}
    phases = []
    for name, words in PHASES.items():
        state = states.get(name, "to come")
        seconds = planned.get(name)
        phases.append({"words": words, "state": state, "planned": duration(seconds) if seconds and state != "skipped" else ""})
    return phases


def choice_table(choice: Any) -> dict[str, Any] | None:
    """The candidates of a choice (see `choose.Choice`) as a table, and the reason. None where nothing was chosen yet."""
    if not isinstance(choice, Mapping) or not choice.get("why"):
        return None
    candidates = [each for each in choice.get("candidates") or [] if isinstance(each, Mapping)]
    names = list(dict.fromkeys(name for each in candidates for name in each))
    names = [name for name in names if any(each.get(name) is not None for each in candidates)]
    rows = [
        {
            "mark": "kept" if each.get("step") == choice.get("step") else "",
            "cells": [_cell(each.get(name)) for name in names],
        }
        for each in candidates
    ]
    why = str(choice["why"])
    if (real := choice.get("real")) and candidates:
        why += " The row \u201creal\u201d is of held-out pictures."
        rows.append({"mark": "real", "cells": [_cell(real.get(name)) for name in names]})
    return {"why": why, "columns": [COLUMNS.get(name, str(name).replace("_", " ")) for name in names], "rows": rows}


def _cell(value: Any) -> str:
    if value is None:
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return ", ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def evaluation_rows(values: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(what, samples, real pictures) of the main values of an evaluation."""
    rows = []
    for name, words in ROWS.items():
        if (entry := first_entry(values, name)) is not None:
            rows.append((words, *value_cells(entry)[:2]))
    return rows


def first_stage(record: Mapping[str, Any]) -> Mapping[str, Any]:
    """How the pretrained autoencoder did, as `first_stage.Verdict.as_json` gives it; {} where none was tried."""
    plan = record.get("plan") or {}
    tried = plan.get("first_stage") or (plan.get("facts") or {}).get("first_stage") or record.get("first_stage")
    return tried if isinstance(tried, Mapping) else {}


def last_lines(record: Mapping[str, Any]) -> list[str]:
    """The lines with which a finished fit ends: how good the model is, and what to type. [] where there are none."""
    lines = record.get("lines")
    return [str(line) for line in lines] if isinstance(lines, list) else []


def next_commands(out: Path, record: Mapping[str, Any], status: str) -> list[tuple[str, str]]:
    """(what for, what to type) now."""
    resume = f"latentdiff fit {shlex.quote(str(record.get('folder', 'FOLDER')))} --out {shlex.quote(str(out))} --resume"
    if status == "finished" and last_lines(record):
        return []  # they say it
    if status == "finished" and (out / "model").is_dir():
        hours = record.get("hours")
        more = f"{resume} --hours {2 * hours:.3g}" if isinstance(hours, int | float) else resume
        model = shlex.quote(str(out / "model"))
        classes = (record["plan"].get("facts") or {}).get("classes")
        draw = "latentdiff generate --all-classes" if classes else "latentdiff generate"
        return [("Draw pictures:", f"{draw} --model {model} --out samples.png"), ("Train for longer:", more)]
    if status == "stopped":
        return [("Go on where it stopped; the time used so far counts:", resume)]
    return [("Ctrl-C stops it, and nothing is lost. Go on later with:", resume)]


def environment(*folders: Path) -> Any:
    """The templates here and in `folders`. Every value is escaped, so that a hostile folder or class name stays text."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader([*folders, Path(__file__).parent])
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


@functools.cache
def _template() -> Any:
    return environment().get_template("page.jinja")


def render(facts: Mapping[str, Any]) -> str:
    """The page as HTML, of the facts of `FitFiles.facts`."""
    return str(_template().render(facts))
