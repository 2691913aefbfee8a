"""What train.precision=auto costs: python tests/benchmarks/precision.py [--rounds N] [CONFIG ...]

Each config (both stages of configs/fashion-mnist unless others are named) is planned by `latentdiff info` in float32, in
bfloat16 and with auto, in turns. Reported are the training steps' samples a second, medians over rounds, what auto chose in
each round, and the rate of its choice over that of the faster precision: at least 0.95 is asked for.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from latentdiff.cli.info import info

ROOT = Path(__file__).parent.parent.parent
CONFIGS = [ROOT / "configs" / "fashion-mnist" / name for name in ("autoencoder-kl.yaml", "diffusion.yaml")]
PRECISIONS = ("float32", "bfloat16")
ASKED = 0.95


def measure(config: str | Path, rounds: int) -> dict[str, object]:
    """Rates by precision, the choices of auto, and the least share of the faster precision's rate that a choice has."""
    rates: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    choices = []
    for _ in range(rounds):
        for name in PRECISIONS:
            rates[name].append(info(str(config), [f"train.precision={name}"])["step"]["samples_per_second"])
        choices.append(info(str(config), ["train.precision=auto"]))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    shares = [medians[facts["step"]["precision"]] / max(medians.values()) for facts in choices]
    return {
        "config": str(config),
        "samples_per_second": medians,
        "auto": [facts["precision"] for facts in choices],
        "share_of_the_faster": min(shares),
        "reached": min(shares) >= ASKED,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("configs", nargs="*", default=CONFIGS, metavar="CONFIG")
    parser.add_argument("--rounds", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    print(json.dumps([measure(config, arguments.rounds) for config in arguments.configs], indent=2))


if __name__ == "__main__":
    main()
