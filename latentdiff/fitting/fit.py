"""`latentdiff fit`: from a folder of images to an own model, within given hours.

A fit has phases. `look` looks at the data and the machine and plans; `autoencoder` trains stage 1, where the plan has one;
`diffusion` trains stage 2; `choose` keeps the best state; `report` measures it. Each finished phase is recorded in fit.json.
A fit that was stopped goes on in its first unfinished phase, and its clock goes on too.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError, printable
from latentdiff.fitting.budget import Budget, check_hours, in_words, process_age
from latentdiff.fitting.page import PAGE, RECONSTRUCTIONS, LivePage
from latentdiff.fitting.progress import PlanBar
from latentdiff.utils import atomic, locks, processes, progress_bars, signals

FILE, VERSION = "fit.json", 1
PHASES = ("look", "autoencoder", "diffusion", "choose", "report")
DOING = {
    "look": "looking at images and machine",
    "autoencoder": "stage 1, the autoencoder",
    "diffusion": "stage 2, the diffusion model",
    "choose": "choosing the best state",
    "report": "measuring",
}


def fit(
    folder: str | Path,
    hours: float | None = None,
    out: str | Path | None = None,
    base: str | None = None,
    lora: int | None = None,
    resume: bool = False,
    dry_run: bool = False,
    overrides: Sequence[str] = (),
) -> Path | None:
    """Make a latent diffusion model of a folder of images within some hours: plan, train both stages, measure, report.

    The hours are kept by the clock, from the start of the command until the model and its report are there.

    Args:
        folder: the images: a folder with class sub-folders, with captions, or with neither; or another data set, as
            data.source takes it.
        hours: what the whole may take, all parts of a resumed fit together. By default what the plan recommends.
        out: a new folder for everything that is written. By default runs/ and the name of FOLDER.
        base: an existing latent diffusion model to go on from: the folder of a checkpoint, or one in Stable Diffusion's layout.
        lora: train only a LoRA of this rank on the base.
        resume: go on with the fit in the output folder. Its hours, base and other settings are those it began with; more
            hours may be given.
        dry_run: print the plan and write nothing.
        overrides: key=value: `data.` keys; `autoencoder=FOLDER` for a trained first stage; `latents=discrete` for a model over
            the codes of a VQ autoencoder; `stage1.KEY` for a key of stage 1's config; any other key of stage 2's config.

    Returns:
        The folder of the model. None where only the plan was printed.

    Raises:
        UserError: the images, a setting or the output folder cannot be used.
        Interrupted, Stopped: a signal ended the fit, and `resume` goes on with it.
    """
    started_before = process_age() if signals.command_line is not None else 0.0
    source = str(folder)
    if hours is not None:
        check_hours(hours)
    if lora is not None and base is None:
        raise UserError(f"--lora {lora}: give --base too, the model that the LoRA is for")
    if dry_run and resume:
        raise UserError("--dry-run and --resume: give one of them; a fit's plan is in its folder, in fit.json")
    output = Path(out) if out is not None else Path("runs") / default_name(source)
    asked = {"folder": _absolute(source), "hours": hours, "overrides": list(overrides), "base": base, "lora": lora}
    if dry_run:
        if processes.rank() == 0:
            print(*_plan(output, asked)[0].lines(), sep="\n")
        return None
    _join_launch()
    with signals.watched(lambda: _how_to_continue(output, source)), locks.locked(output, "wait for it or give another --out"):
        run = _Fit(output, asked, resume, started_before)
        run.go()
    return output / "model" if processes.rank() == 0 else None


def default_name(source: str) -> str:
    """The name of a fit's folder, from the name of its data set."""
    name = Path(source).expanduser().resolve().name if Path(source).expanduser().exists() else source
    return re.sub(r"[^\w.]+", "-", name).strip("-.") or "images"


def _absolute(source: str) -> str:
    """A data set as fit.json names it, so that a fit can be resumed from another working folder."""
    path = Path(source).expanduser()
    return str(path.resolve()) if path.exists() else source


def _how_to_continue(output: Path, source: str) -> str:
    """What is printed after a signal."""
    python = f"fit({source!r}, resume=True)" if output == Path("runs") / default_name(source) else "fit(..., resume=True)"
    return f"what was done is saved; go on with: {signals.command(['--resume'], python)}"


def _plan(output: Path, asked: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """(the plan of a fit, facts on the pretrained first stage as JSON values).

    output: the fit's folder. asked: folder, hours, overrides, base and lora. UserError for what cannot be done.
    """
    from latentdiff.fitting import machine, plan
    from latentdiff.fitting.base import base_settings
    from latentdiff.fitting.facts import look
    from latentdiff.fitting.first_stage import try_autoencoder

    overrides, hours = asked["overrides"], asked["hours"]
    words = plan.sort_overrides(overrides)  # a mistyped key is refused before anything is read
    facts = look(asked["folder"], words.data)
    _say(f"{facts.images} pictures; looking at the machine, and timing what it can train, takes up to half a minute")
    here = machine.measure()
    base = None if asked["base"] is None else base_settings(asked["base"], asked["lora"], facts, overrides)
    data, _ = plan.choose_data(facts, here, hours, overrides, base)
    verdict = None
    if base is None and words.autoencoder != plan.TRAIN:
        verdict = try_autoencoder(words.autoencoder, data, device=here.device)
    first_stage = {} if verdict is None else verdict.as_json()
    return plan.make_plan(facts, here, hours, verdict, overrides, base, output), first_stage


class _Fit:
    """One call of `fit` in its output folder.

    Attributes:
        output: the folder.
        record: the content of fit.json.
        budget: the clock.
    """

    def __init__(self, output: Path, asked: dict[str, Any], resume: bool, age: float):
        self.output, self.main = output, processes.rank() == 0
        problem = None
        if self.main:
            try:
                self.record, self.is_new = open_record(output, asked, resume)
            except UserError as error:
                problem = error
        processes.raise_together(problem)
        if self.main and self.is_new:
            self.write()
        processes.meet()
        self.read()
        self.budget = Budget(output, self.record["hours"] or math.inf, age, self.main)

    # The record

    def read(self) -> None:
        """Read fit.json, on a process that does not write it."""
        if not self.main:
            self.record = json.loads((self.output / FILE).read_text(encoding="utf-8"))

    def write(self, **changes: Any) -> None:
        """Change the record, and write it where this process is the main one."""
        self.record |= changes
        if self.main:
            atomic.write_json(self.output / FILE, self.record)

    def unfinished(self) -> list[str]:
        """The phases that are not done, in order."""
        return [phase for phase in PHASES if self.record["phases"].get(phase) not in ("done", "skipped")]

    def mark(self, phase: str, status: str) -> None:
        """Record "running", "done" or "skipped" for a phase."""
        self.write(phases={**self.record["phases"], phase: status})

    # The phases

    def go(self) -> None:
        """Run the phases that are not done."""
        if not self.unfinished():
            if self.main:
                _say(f"{self.output}: this fit is finished; more --hours let it train on")
            return
        # The page goes last, so that it shows the clock as it stopped
        with LivePage(self.output, self.main), self.budget, PlanBar(None, self.budget.used, self.main) as bar:
            while self.unfinished():
                phase = self.unfinished()[0]
                bar.phase(DOING[phase], None if phase == "look" else 3600 * self.budget.hours)
                if phase == "choose" and processes.count() > 1 and not _leave_launch():
                    return  # one process does the rest
                if phase == "look":
                    self.look()
                    continue
                if self.main:
                    seconds = self.budget.share(phase, self.needs(), self.unfinished())
                    self.mark(phase, "running")
                    _say(f"{DOING[phase]}: {in_words(seconds)} of the {in_words(max(0, self.budget.left))} that are left")
                    if phase in ("autoencoder", "diffusion"):
                        self.write(minutes={**self.record["minutes"], phase: self.minutes(phase, seconds)})
                processes.meet()
                self.read()
                if phase in ("autoencoder", "diffusion"):
                    self.train(phase)
                else:
                    getattr(self, phase)(seconds)
                self.mark(phase, "done")

    def look(self) -> None:
        """Look at the data and the machine, plan, print the plan, and write the configs. A refusal leaves no folder."""
        problem = None
        if self.main:
            try:
                self.write_plan(*_plan(self.output, self.record))
            except UserError as error:
                problem = error
                self.budget.discard()
                shutil.rmtree(self.output / "configs", ignore_errors=True)
                (self.output / FILE).unlink(missing_ok=True)
        processes.raise_together(problem)
        processes.meet()
        self.read()
        self.budget.hours = self.record["hours"]

    def write_plan(self, plan: Any, first_stage: dict[str, Any]) -> None:
        """Print a plan, write its configs, and record it."""
        from latentdiff.fitting.first_stage import show_reconstructions
        from latentdiff.fitting.plan import write_configs
        from latentdiff.training.train_discrete import of_stage

        of_stage(plan.diffusion)[0](plan.diffusion)
        for line in plan.lines():
            _say(line)
        _say(f"watch: {self.output / PAGE} in a browser; Ctrl-C stops it, and --resume goes on")
        write_configs(plan, self.output)
        phases = {**self.record["phases"], "look": "done"}
        if plan.autoencoder is None:
            phases["autoencoder"] = "skipped"
            show_reconstructions(plan.diffusion, self.output / RECONSTRUCTIONS, first_stage.get("seconds_per_image"))
        self.write(hours=plan.hours, plan=plan.as_json() | {"first_stage": first_stage}, phases=phases)

    def needs(self) -> dict[str, float]:
        """The planned seconds of each phase; in proportion where more hours were given than the plan is for."""
        plan = self.record["plan"]
        return {phase: seconds * self.record["hours"] / plan["hours"] for phase, seconds in plan["seconds"].items()}

    def config(self, phase: str) -> Any:
        """The config of a stage, with the minutes that it may take now."""
        from latentdiff.config import load_config

        minutes = self.record["minutes"].get(phase)
        path = self.output / "configs" / f"{phase}.yaml"
        config: Any = load_config(path, [] if minutes is None else [f"train.minutes={minutes}"])
        # The upper bound of the steps is for the hours of the plan
        own = ("stage1." if phase == "autoencoder" else "") + "train.steps="
        if not any(item.startswith(own) for item in self.record["overrides"]):
            config.train.steps = math.ceil(config.train.steps * max(1.0, self.record["hours"] / self.record["plan"]["hours"]))
        return config

    def minutes(self, phase: str, seconds: float) -> float:
        """What train.minutes is to be for a stage that may take so many seconds more: its earlier parts count too."""
        from latentdiff.training import state

        return round((state.seconds_used(self.output / phase) + seconds) / 60, 4)

    def train(self, phase: str) -> None:
        """Train a stage, or go on with it. Every process calls this."""
        from latentdiff.training.accelerator import torch_settings_restored

        config, resume = self.config(phase), (self.output / phase / "run.json").is_file()
        with torch_settings_restored():
            if phase == "autoencoder":
                from latentdiff.training.train_autoencoder import train_autoencoder

                train_autoencoder(config, resume)
            else:
                from latentdiff.training.train_diffusion import run_stage
                from latentdiff.training.train_discrete import of_stage

                run_stage(config, resume, None, *of_stage(config))

    def choose(self, seconds: float) -> None:
        """Keep the best state of stage 2 as <output>/model."""
        from latentdiff.fitting.choose import choose_state

        free = not any(item.startswith("sample.guidance=") for item in self.record["overrides"])
        choice = choose_state(self.config("diffusion"), seconds, self.output / "model", guidance=free)
        self.write(choice=choice.as_json())

    def report(self, seconds: float) -> None:
        """Draw samples.png, measure the model, fill its card, and record the last lines."""
        from latentdiff.fitting import finish

        self.write(**finish.finish(self.output, self.config("diffusion"), self.record, seconds))


def open_record(output: Path, asked: dict[str, Any], resume: bool) -> tuple[dict[str, Any], bool]:
    """(the record of the fit in a folder, whether it is a new one).

    Args:
        output: the fit's folder.
        asked: what the call says: folder, hours, overrides, base and lora.
        resume: whether it is to go on.

    Raises:
        UserError: the folder holds something else, a fit that is not to go on, or a fit of other settings.
    """
    fresh = {"version": VERSION, **asked, "plan": None, "phases": {}, "minutes": {}}
    file, contents = output / FILE, locks.contents(output)
    if not file.is_file():
        if contents:
            raise UserError(f"--out {output}: is not empty, and holds no fit; give a new folder")
        if resume:
            _say(f"{output}: nothing was saved yet; the fit starts from its beginning")
        return fresh, True
    if not resume:
        raise UserError(f"{output}: holds a fit already; go on with --resume, or give another --out")
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        if record["version"] != VERSION:
            raise UserError(f"{file}: is of version {record['version']}, and this is latentdiff's version {VERSION}")
        record = {**fresh, **record}
        check_agrees(file, record, asked)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{file}: damaged ({' '.join(str(error).split())[:80]}); give another --out") from None
    return record, False


def check_agrees(file: Path, record: dict[str, Any], asked: dict[str, Any]) -> None:
    """Take more hours into a fit's record. UserError where the call says otherwise than the fit that is to go on."""
    if record["folder"] != asked["folder"]:
        raise UserError(f"{file}: is a fit of {record['folder']}, not of {asked['folder']}; give its --out")
    for name in ("base", "lora"):
        if asked[name] is not None and asked[name] != record[name]:
            raise UserError(f"--{name} {asked[name]}: the fit began with {record[name]}; leave it out, or give another --out")
    began = dict(item.partition("=")[::2] for item in record["overrides"])
    for item in asked["overrides"]:
        key, _, value = item.partition("=")
        if began.get(key) != value:
            before = f"{key}={began[key]}" if key in began else f"without {key}"
            raise UserError(
                f"{item}: the fit began {'with ' if key in began else ''}{before}; leave it out, or give another --out"
            )
    if asked["hours"] is None or asked["hours"] == record["hours"]:
        return
    if record["hours"] is not None and asked["hours"] < record["hours"]:
        raise UserError(f"--hours {asked['hours']:g}: the fit began with {record['hours']:g}; only more can be given")
    _say(f"{file.parent}: goes on with {asked['hours']:g} hours (was {record['hours'] or 'not planned yet'})")
    record["hours"] = asked["hours"]
    if record["phases"].get("diffusion") == "done":  # stage 2 trains on, and what follows is done again
        for phase in ("diffusion", "choose", "report"):
            record["phases"].pop(phase, None)


def _join_launch() -> None:
    """Join the processes of a launch as training needs it, before they first wait for one another."""
    if processes.count() == 1:
        return
    import torch.distributed as dist
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import parse_flag_from_env

    if not dist.is_initialized():
        AcceleratorState._reset_state(reset_partial_state=True)
        PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=processes.LIMIT)
        processes.leave_at_exit()


def _leave_launch() -> bool:
    """Leave the processes of a launch. Returns whether this is the process that goes on, as if it were alone."""
    from accelerate.state import AcceleratorState

    processes.leave()
    if processes.rank() > 0:
        return False
    for name in ("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        os.environ.pop(name, None)
    AcceleratorState._reset_state(reset_partial_state=True)
    return True


def _say(line: str) -> None:
    """A line on stderr, above any bar, of the main process."""
    if processes.rank() == 0:
        progress_bars.print_line(printable(line))
