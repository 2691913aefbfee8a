"""Training steps beside the peers': python tests/benchmarks/speed.py [--rounds N] [--repeat N] [--memory] [--profile]

All contenders run under bfloat16 autocast with AdamW, gradient clipping and an average of the weights, on pictures of
noise of Fashion-MNIST's shape, in one process and in turns: a round times each once. The machine's own bfloat16 matrix
rate is measured in the same rounds, and a contender's share of it is by the floating point operations counted in its step.

"plain" is the loop of diffusers' examples at the same network (class, config): "encoding" encodes each batch with the
autoencoder, as the examples do, "cached" holds the latents in memory. MONAI's networks and inferers, and
denoising-diffusion-pytorch's U-Net in pixel space, join where they can be imported (README.md says how).

--memory adds the peak of resident memory of a process that does nothing but build one contender and train three steps (on
a GPU, of what torch allocates there). --profile prints where the time of latentdiff's steps and of a generation goes,
instead.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import contenders
import peers
import reporting
import torch
from contenders import Contender, Setting

Builder = Callable[[Setting], Contender]
OURS = "latentdiff"
STAGES: dict[str, dict[str, Builder]] = {
    "Stage 2, the U-Net of weights/fashion-mnist": {
        OURS: contenders.our_stage2,
        "plain, cached": contenders.plain_stage2,
        "plain, encoding": partial(contenders.plain_stage2, encode=True),
        "MONAI, cached": peers.monai_stage2,
        "MONAI, encoding": partial(peers.monai_stage2, encode=True),
        "denoising-diffusion-pytorch, pixels": peers.lucidrains_stage2,
    },
    "Stage 1, the autoencoder of weights/fashion-mnist without its perceptual loss": {
        OURS: contenders.our_stage1,
        "plain": contenders.plain_stage1,
        "MONAI": peers.monai_stage1,
    },
}
SAMPLES, TIMES, SHARE, MEMORY = "samples/s", "ours is so many times as fast", "of the matrix rate", "peak memory, MiB"
FORMATS = {SAMPLES: "{:.0f}", TIMES: "{:.2f}", SHARE: "{:.0%}", "GFLOP a sample": "{:.2f}", "M parameters": "{:.2f}"}


def wait(device: torch.device) -> None:
    """Until what was asked of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call: Callable[[], Any], device: torch.device) -> float:
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def matrix_rate(device: torch.device, size: int = 2048, slow: float = 1e10) -> float:
    """FLOP/s of one bfloat16 matrix product of this size.

    A processor without bfloat16 makes less than `slow` even of a small product. There the small one's rate is the answer: the
    large one would take minutes.
    """
    for each in (size // 8, size):
        a = torch.randn(each, each, dtype=torch.bfloat16, device=device)
        a[:, :8] @ a[:8]  # what is set up once is not timed
        rate = 4 * 2 * each**3 / timed(lambda a=a: [a @ a for _ in range(4)], device)
        if device.type == "cpu" and rate < slow:
            break
    return rate


def flops(contender: Contender) -> float:
    """Of one step: convolutions and matrix products, forward and backward."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        contender.step(0)
    return float(counter.get_total_flops())


def build(builders: dict[str, Builder], setting: Setting) -> dict[str, Contender]:
    """Those whose project is installed; of the others it says so."""
    found = {}
    for name, builder in builders.items():
        try:
            found[name] = builder(setting)
        except ImportError as error:
            print(f"{name}: left out ({error})", file=sys.stderr)
    return found


def measure(found: dict[str, Contender], rounds: int, device: torch.device) -> tuple[dict[str, list[float]], list[float]]:
    """Seconds of each step in each round, and the matrix rates; the contenders in another order each round."""
    times: dict[str, list[float]] = {name: [] for name in found}
    rates = []
    for contender in found.values():
        contender.step(0)
    for number in range(1, rounds + 1):
        names = list(found)
        for name in names[number % len(names) :] + names[: number % len(names)]:
            times[name].append(timed(partial(found[name].step, number), device))
        rates.append(matrix_rate(device))
    return times, rates


def stage_table(title: str, found: dict[str, Contender], setting: Setting, batch: int, rounds: int) -> reporting.Table:
    """Samples a second of each, of how many times ours is that round by round, and the share of the matrix rate."""
    work = {name: flops(contender) for name, contender in found.items()}
    times, rates = measure(found, rounds, setting.device)
    rate = statistics.median(rates)
    rows: dict[str, dict[str, list[float]]] = {}
    for name, seconds in times.items():
        rows[name] = {
            SAMPLES: [batch / s for s in seconds],
            TIMES: [s / ours for s, ours in zip(seconds, times[OURS], strict=True)],
            SHARE: [work[name] / statistics.median(seconds) / rate],
            "GFLOP a sample": [work[name] / batch / 1e9],
            "M parameters": [sum(p.numel() for p in found[name].network.parameters()) / 1e6],
        }
    about = {"batch": batch, "rounds": rounds, "threads": torch.get_num_threads(), "matrix TFLOP/s": rate / 1e12}
    return reporting.Table(title, dict(FORMATS), rows, about)


def peak(device: torch.device) -> float:
    """MiB: the most that was resident of this process, or allocated by torch on a GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    # getrusage would do, were it not that a process starts with the peak of the one that started it
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory_of(title: str, name: str, arguments: argparse.Namespace, folder: Path) -> float:
    """The peak of a process of its own."""
    call = [
        sys.executable,
        __file__,
        "--alone",
        title,
        name,
        str(folder),
        "--batch",
        str(arguments.batch),
        "--device",
        arguments.device,
        "--threads",
        str(torch.get_num_threads()),
    ]
    done = subprocess.run(call, stdout=subprocess.PIPE, text=True, check=True)
    return float(done.stdout.split()[-1])


def alone(title: str, name: str, setting: Setting) -> float:
    contender = STAGES[title][name](setting)
    for number in range(3):
        contender.step(number)
    return peak(setting.device)


def tables(arguments: argparse.Namespace) -> list[reporting.Table]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    if arguments.device == "cpu":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # what the trainers' device goes by
    device = torch.device(arguments.device)
    if arguments.alone:
        title, name, folder = arguments.alone
        print(alone(title, name, Setting(Path(folder), arguments.batch, device)))
        return []
    found = []
    with tempfile.TemporaryDirectory() as root:
        setting = Setting(Path(root), arguments.batch, device)
        setting.prepare()
        for number, (title, builders) in enumerate(STAGES.items()):
            if arguments.profile:
                import profiles

                found.append(profiles.table(title, builders[OURS](setting).step, device))
                continue
            ready = build(builders, setting)
            table = stage_table(title, ready, setting, setting.batch // (number + 1), arguments.rounds)
            names = list(ready)
            del ready
            if arguments.memory:
                table.formats[MEMORY] = "{:,.0f}"
                for name in names:
                    table.rows[name][MEMORY] = [memory_of(title, name, arguments, setting.folder)]
            found.append(table)
    if arguments.profile:
        found += profiles.generation(device)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=128, help="of stage 2; stage 1 takes half of it (default 128)")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=False, help="the peak of each, alone")
    parser.add_argument("--profile", action="store_true", help="where latentdiff's time goes, instead")
    parser.add_argument("--alone", nargs=3, help=argparse.SUPPRESS)
    reporting.command(parser, tables, later=["--no-memory"])


if __name__ == "__main__":
    main()
