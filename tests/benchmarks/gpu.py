"""Everything worth knowing of one GPU, in minutes: python tests/benchmarks/gpu.py measure | pack | train | join

    gpu.py measure [--out DIR] [--seconds 300] [--only NAME ...]   correctness, training steps, sampling, the latent cache
    gpu.py pack FOLDER                                             what `train` needs, at most 60 MB; needs a network
    gpu.py train FOLDER [--out DIR] [--seconds 240]                configs/emoji/diffusion.yaml, as long as the clock allows
    gpu.py join DIR MODEL                                          the checkpoint that `train` left in pieces, in one folder

--dry runs the same code at toy size on a CPU; CI does that. Each part runs in a process of its own, which ends at its limit:
what it had measured by then is kept. DIR receives gpu.json and gpu.md after every part, in at most 8 files of 16 MiB.

README.md beside this file lists the files and the packages that a machine without a network must be given.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]  # the other benchmarks, and the tests' tiny runs

# name -> (module, seconds it may take of a full measurement). The most valuable ones come first: what is cut off is the last
PARTS: dict[str, tuple[str, float]] = {
    "card": ("gpu_card", 15),
    "correctness": ("gpu_correctness", 60),
    "stage 2, LDM-class": ("gpu_steps", 50),
    "stage 2, 64-pixel text model": ("gpu_steps", 30),
    "stage 2, weights/fashion-mnist": ("gpu_steps", 30),
    "stage 1, LDM-class": ("gpu_steps", 25),
    "stage 1, 64 pixels": ("gpu_steps", 20),
    "stage 1, weights/fashion-mnist": ("gpu_steps", 20),
    "sampling": ("gpu_rates", 30),
    "cache": ("gpu_rates", 20),
    "compile, weights/fashion-mnist": ("gpu_steps", 60),
    "compile, LDM-class": ("gpu_steps", 120),
}
CUT_OFF = "cut off by the clock"
SPARE = 3.0  # seconds kept back at the end, to write the results


@dataclass
class Clock:
    """Until when a part may measure. Parts ask `left` before each piece of work and leave out what does not fit."""

    end: float
    dry: bool

    @classmethod
    def of(cls, seconds: float, dry: bool) -> Clock:
        return cls(time.monotonic() + seconds, dry)

    def left(self) -> float:
        return self.end - time.monotonic()

    def slot(self, seconds: float) -> float:
        """Seconds that one measurement may take: `seconds` of them, or what is left; a blink in a dry run."""
        return min(0.05 if self.dry else seconds, max(0.0, self.left()))


@dataclass
class Results:
    """What a part has found, written at once: a line of JSON each, so that nothing is lost where the part is cut off."""

    path: Path
    values: list[dict[str, Any]] = field(default_factory=list)

    def add(self, name: str, **values: Any) -> None:
        """One row of a table: what was measured, and its values by column."""
        self.values.append({"name": name, **values})
        with self.path.open("a") as lines:
            lines.write(json.dumps(self.values[-1]) + "\n")


def run_part(name: str, seconds: float, dry: bool, folder: Path, device: str) -> dict[str, Any]:
    """Run a part in a process of its own, killed at the limit; its rows, how long it took, and what went wrong.

    On a CPU the process is forked, so that the libraries are imported once. A GPU that this process has opened cannot be used
    after a fork, and importing the libraries may open it; there the process is a new one.
    """
    path = folder / f"part-{list(PARTS).index(name)}.jsonl"
    began = time.monotonic()
    method = "fork" if device == "cpu" else "spawn"
    child = multiprocessing.get_context(method).Process(target=_child, args=(name, seconds, dry, path, device))
    child.start()
    child.join(seconds + SPARE)
    problem = None
    if child.is_alive():
        child.kill()
        child.join()
        problem = CUT_OFF
    elif child.exitcode:
        problem = f"ended with status {child.exitcode}"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    path.unlink(missing_ok=True)
    problems = [row.pop("problem") for row in rows if "problem" in row]
    return {
        "rows": [row for row in rows if len(row) > 1],
        "seconds": round(time.monotonic() - began, 1),
        "problem": "; ".join([*problems, *([problem] if problem and not problems else [])]) or None,
    }


def _child(name: str, seconds: float, dry: bool, path: Path, device: str) -> None:
    results = Results(path)
    try:
        import torch

        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"  # what the trainers' device goes by
            torch.set_num_threads(max(1, min(2, torch.get_num_threads())))
        if dry:
            import torch._dynamo

            torch._dynamo.config.disable = True  # a compiler takes minutes; what is around it is what is tried
        torch.manual_seed(0)
        part = importlib.import_module(PARTS[name][0]).measure
        part(name, torch.device(device), Clock.of(seconds, dry), results)
    except Exception as error:  # a part that fails must not take the others with it
        import traceback

        traceback.print_exc()
        results.add(name, problem=f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
        os._exit(1)


def write(folder: Path, report: dict[str, Any]) -> None:
    """gpu.json and gpu.md, each replaced at once."""
    for name, text in (("gpu.json", json.dumps(report, indent=1)), ("gpu.md", markdown(report))):
        temporary = folder / f".{name}"
        temporary.write_text(text)
        temporary.replace(folder / name)


def markdown(report: dict[str, Any]) -> str:
    lines = [f"# {report['device']}\n"]
    for name, part in report["parts"].items():
        lines.append(f"\n## {name} ({part['seconds']} s)\n")
        if part["problem"]:
            lines.append(f"Problem: {part['problem']}\n")
        columns = list(dict.fromkeys(column for row in part["rows"] for column in row))
        if columns:
            lines.append(f"| {' | '.join(c.replace('name', '') if c == 'name' else c for c in columns)} |")
            lines.append("|---" * len(columns) + "|")
        for row in part["rows"]:
            lines.append(f"| {' | '.join(cell(row.get(column)) for column in columns)} |")
    if report["left_out"]:
        lines.append(f"\nLeft out, for there was no time: {', '.join(report['left_out'])}.")
    return "\n".join(lines) + "\n"


def cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "NO"
    if isinstance(value, float):
        return f"{value:.4g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def warm_up() -> None:
    """Import what the parts import, so that each child starts at once."""
    import diffusers
    import torch
    import transformers

    from latentdiff import checkpoints, samplers, training  # noqa: F401
    from latentdiff.training import train_autoencoder, train_diffusion  # noqa: F401

    for name in ("AutoencoderKL", "UNet2DModel", "UNet2DConditionModel", "DDPMScheduler"):
        getattr(diffusers, name)
    transformers.CLIPTextModel  # noqa: B018
    torch.zeros(1)


def measure(arguments: argparse.Namespace) -> int:
    """Every part in turn until the clock runs out; exit status 1 where a part of them found something wrong."""
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + arguments.seconds
    warm_up()
    device = pick(arguments)
    report: dict[str, Any] = {"device": device, "dry": arguments.dry, "parts": {}, "left_out": []}
    for name, (_, limit) in PARTS.items():
        if arguments.only and not any(wanted in name for wanted in arguments.only):
            continue
        # At toy size a part takes seconds; on a busy machine more, and then nothing is to be cut off
        seconds = min(math.inf if arguments.dry else limit, end - time.monotonic() - SPARE)
        if seconds < (1 if arguments.dry else 5):
            report["left_out"].append(name)
            write(folder, report)
            continue
        print(f"gpu.py: {name} ({seconds:.0f} s at most)", file=sys.stderr, flush=True)
        report["parts"][name] = run_part(name, seconds, arguments.dry, folder, device)
        write(folder, report)
    print((folder / "gpu.md").read_text())
    wrong = [
        f"{name}: {row['name']}" for name, part in report["parts"].items() for row in part["rows"] if row.get("right") is False
    ]
    problems = {name: part["problem"] for name, part in report["parts"].items()}
    wrong += [f"{name}: {problem}" for name, problem in problems.items() if problem not in (None, CUT_OFF)]
    for line in wrong:
        print(f"gpu.py: wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


def pick(arguments: argparse.Namespace) -> str:
    """The device's name: cpu in a dry run, else the accelerator. It is asked for in a child, so that forks can open it."""
    if arguments.device:
        return arguments.device
    if arguments.dry:
        return "cpu"
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(_accelerator)
    if found is None:
        raise SystemExit("gpu.py: torch finds no accelerator here; --dry tries everything at toy size on the CPU")
    return found


def _accelerator() -> str | None:
    import torch

    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if kind is None else kind.type


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--out", default=os.environ.get("OUT", "gpu-results"), metavar="DIR")
    common.add_argument("--device", help="cpu, cuda, ...; default: the accelerator")
    common.add_argument("--dry", action="store_true", help="toy sizes, on the CPU")
    add = commands.add_parser("measure", parents=[common])
    add.add_argument("--seconds", type=float, default=300)
    add.add_argument("--only", nargs="+", metavar="NAME", help="parts whose name has one of these words")
    add = commands.add_parser("pack")
    add.add_argument("folder")
    add.add_argument("--data", metavar="FOLDER", help="of `latentdiff prepare emoji`; made anew unless given")
    add = commands.add_parser("train", parents=[common])
    add.add_argument("folder")
    add.add_argument("--seconds", type=float, default=240)
    add = commands.add_parser("join")
    add.add_argument("pieces", metavar="DIR")
    add.add_argument("model", metavar="MODEL")
    arguments = parser.parse_args()
    if arguments.command == "measure":
        raise SystemExit(measure(arguments))
    import gpu_train

    {"pack": gpu_train.pack, "train": gpu_train.train, "join": gpu_train.join}[arguments.command](arguments)


if __name__ == "__main__":
    main()
