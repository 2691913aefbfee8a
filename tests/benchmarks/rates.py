"""Start-up of the command, encoding, decoding and reading the latent cache: python tests/benchmarks/rates.py

The command is timed from outside, from its call to its end with the picture written. Its start-up is timed in a process
that does the same but ends where the first image would be begun: interpreter, imports, loading the weights.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import latent_cache
import reporting
import torch
from speed import timed

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "weights" / "fashion-mnist"
BATCH, CACHED, SECONDS = 64, 10_000, 5.0
UP_TO_THE_FIRST = """
import os, sys
from latentdiff import cli, generation
generation.generate_share = lambda *args, **options: os._exit(0)
cli.main(sys.argv[1:])
"""
# Of the command: `-m latentdiff` and the installed script do the same
COMMAND = ("-m", "latentdiff")


def generating(rounds: int, device: str) -> reporting.Table:
    """Seconds of `latentdiff generate` with one image and with 16, and of its start-up, in turns."""
    calls = {"1 image": (COMMAND, 1), "16 images": (COMMAND, 16), "of these start-up": (("-c", UP_TO_THE_FIRST), 1)}
    rows: dict[str, dict[str, list[float]]] = {name: {"seconds": []} for name in calls}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(rounds + 1):
            for name, (how, count) in calls.items():
                call = [
                    sys.executable,
                    *how,
                    "generate",
                    "Sneaker",
                    "--num-images",
                    str(count),
                    "--device",
                    device,
                    "--out",
                    str(Path(folder) / "out.png"),
                ]
                began = time.perf_counter()
                subprocess.run(call, cwd=ROOT, check=True, capture_output=True)
                if number:  # the first one reads the files from the disk
                    rows[name]["seconds"].append(time.perf_counter() - began)
    return reporting.Table("`latentdiff generate Sneaker` from the shell", {"seconds": "{:.2f}"}, rows, {"rounds": rounds})


def coding(rounds: int, device: torch.device) -> reporting.Table:
    """Images a second through the first stage of weights/fashion-mnist, BATCH at a time."""
    from latentdiff.models.autoencoder import load_autoencoder
    from latentdiff.models.codec import LatentCodec

    codec = LatentCodec(load_autoencoder(str(MODEL / "vae")).to(device))
    images = torch.rand(BATCH, 1, 32, 32, device=device) * 2 - 1
    latents = codec.normalise(codec.moments(images)[0])
    work = {"encode": partial(codec.moments, images), "decode": partial(codec.decode, latents)}
    rows: dict[str, dict[str, list[float]]] = {}
    for number in range(rounds + 1):
        for name, call in work.items():
            for precision in ("float32", "bfloat16"):
                with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                    seconds = timed(lambda call=call: [call() for _ in range(4)], device)
                values = rows.setdefault(f"{name}, {precision}", {"images/s": []})["images/s"]
                if number:
                    values.append(4 * BATCH / seconds)
    about = {"batch": BATCH, "rounds": rounds, "threads": torch.get_num_threads()}
    return reporting.Table("The first stage of weights/fashion-mnist", {"images/s": "{:,.0f}"}, rows, about)


def reading(rounds: int) -> reporting.Table:
    """Latents a second out of a cache, by a process with one thread; latent_cache.py has larger caches and the memory."""
    values = []
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "cache"
        latent_cache.write_cache(folder, CACHED)
        for _ in range(rounds):
            call = [sys.executable, latent_cache.__file__, "--read", str(folder), str(SECONDS)]
            done = subprocess.run(call, capture_output=True, text=True, check=True)
            values.append(json.loads(done.stdout)["samples_per_second"])
    rows = {f"{CACHED:,} latents": {"latents/s": values}}
    return reporting.Table("Reading the latent cache in shuffled batches", {"latents/s": "{:,.0f}"}, rows, {"threads": 1})


def tables(arguments: argparse.Namespace) -> list[reporting.Table]:
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
        os.environ["OMP_NUM_THREADS"] = str(arguments.threads)  # of the command
    rounds = arguments.rounds
    return [generating(rounds, arguments.device), coding(3 * rounds, torch.device(arguments.device)), reading(rounds)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    reporting.command(parser, tables)


if __name__ == "__main__":
    main()
