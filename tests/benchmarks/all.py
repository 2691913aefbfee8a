"""Every benchmark of speed, and the ratios that matter in one table: python tests/benchmarks/all.py [--repeat N] [...]

Runs speed.py, sampling.py and rates.py one after another, each in processes of its own, --repeat times (3), and prints
their tables as they are done. latent_cache.py, which takes 2 GB of disk, is run by itself.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import reporting
import sampling
import speed

HERE = Path(__file__).parent
BEST = "stock diffusers at its best setting"


def measured(name: str, arguments: list[str]) -> list[reporting.Table]:
    print(f"{name} {' '.join(arguments)}", file=sys.stderr)
    tables = reporting.run_again(str(HERE / name), arguments)
    print("\n".join(table.markdown() for table in tables), flush=True)
    return tables


def summary(stage2: reporting.Table, stage1: reporting.Table, images: reporting.Table, starts: reporting.Table) -> str:
    """What is asked for beside what was reached, as the cells of the tables have it; a peer that was left out is not in it."""
    ours = speed.OURS
    wanted = [
        (stage2, name, speed.TIMES, f"training step, stage 2: times {name}", asked)
        for name, asked in (
            ("plain, encoding", "2.5"),
            ("plain, cached", "1.5"),
            ("MONAI, encoding", ""),
            ("MONAI, cached", ""),
            ("denoising-diffusion-pytorch, pixels", ""),
        )
    ]
    wanted += [(stage2, ours, speed.SHARE, "training step, stage 2: of the matrix rate", "40%")]
    wanted += [
        (stage1, name, speed.TIMES, f"training step, stage 1: times {name}", asked)
        for name, asked in (("plain", "1.5"), ("MONAI", ""))
    ]
    wanted += [
        (images, sampling.OURS, f"to best at {batch}", f"images, {batch} at a time: times {BEST}", "3") for batch in (1, 64)
    ]
    wanted += [
        (starts, "16 images", "seconds", "seconds of `latentdiff generate` with 16 images", "at most 6"),
        (starts, "of these start-up", "seconds", "seconds of its start-up", "at most 4"),
    ]
    rows = [
        f"| {said} | {asked or '–'} | {table.cell(row, column)} |"
        for table, row, column, said, asked in wanted
        if row in table.rows
    ]
    return "\n".join(["\nRatios\n", "| | asked for | reached |", "|---|---|---|", *rows])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=128, help="of a training step, stage 2 (default 128)")
    parser.add_argument(
        "--quality", type=int, default=1000, metavar="N", help="images of the Fréchet distance; 0 leaves it out"
    )
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    found = parser.parse_args()
    common = ["--repeat", str(found.repeat), "--rounds", str(found.rounds), "--device", found.device]
    common += ["--threads", str(found.threads)] if found.threads else []
    stage2, stage1 = measured("speed.py", [*common, "--memory", "--batch", str(found.batch)])
    (images,) = measured("sampling.py", [*common, "--quality", str(found.quality)])
    starts, *_ = measured("rates.py", common)
    print(summary(stage2, stage1, images, starts))


if __name__ == "__main__":
    main()
