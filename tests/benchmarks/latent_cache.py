"""Memory and speed of reading the latent cache, at several sizes: python tests/benchmarks/latent_cache.py [COUNT ...]

Caches of made-up latents are written to a temporary folder (2 KiB an image, so a million take 2 GB), and each is read in
a process of its own as training reads it: batches in shuffled order, a fresh draw of every posterior. Resident memory is
told apart as Linux does: anonymous pages are the process's own; file pages are the mapped cache's, which the system
takes back when it needs them.
"""

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from latentdiff.data.shuffling import stream
from latentdiff.data.tensor_shards import shard_count, shard_path, shard_rows, write_manifest, write_shard

COUNTS = (10_000, 100_000, 1_000_000)
SHAPE = (8, 8, 8)  # as weights/emoji has
BATCH, SECONDS = 256, 20.0


def write_cache(folder: Path, count: int) -> None:
    """A finished cache of `count` random latents."""
    folder.mkdir(parents=True)
    made_of = {
        "format": 1,
        "autoencoder": "made up",
        "preprocessing": {},
        "data": "made up",
        "count": count,
        "flips": False,
        "dtype": "float16",
        "shard_size": 4096,
    }
    generator = torch.Generator().manual_seed(0)
    for number in range(shard_count(made_of)):
        rows = len(shard_rows(made_of, number))
        mean = torch.randn((rows, *SHAPE), generator=generator).half()
        labels = torch.randint(0, 10, (rows,), generator=generator)
        write_shard(shard_path(folder, number), {"mean": mean, "std": 0.1 * mean.abs(), "labels": labels}, made_of)
    manifest = {"identity": made_of, "latent_shape": list(SHAPE), "labelled": True, "class_names": [str(k) for k in range(10)]}
    write_manifest(folder, manifest)


def memory() -> dict[str, float]:
    """Resident MiB of this process by kind."""
    found = {}
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name in ("RssAnon", "RssFile"):
            found[name] = int(value.split()[0]) / 1024
    return found


def read_cache(folder: Path, seconds: float = SECONDS) -> dict[str, float]:
    """Read shuffled batches for so many seconds."""
    from latentdiff.data.latent_cache import open_cache
    from latentdiff.utils.random import randn

    torch.set_num_threads(1)
    before, began = memory(), time.monotonic()
    cache = open_cache(folder)
    opened = time.monotonic() - began
    generator, step, largest = torch.Generator().manual_seed(0), 0, 0.0
    began = time.monotonic()
    while time.monotonic() - began < seconds:
        mean, std = cache.moments(stream(len(cache), 0, step * BATCH, BATCH))
        z = mean + std * randn(mean.shape, generator)
        assert z.shape == (BATCH, *SHAPE)
        largest, step = max(largest, memory()["RssAnon"]), step + 1
    taken = time.monotonic() - began
    after = memory()
    return {
        "count": len(cache),
        "open_seconds": opened,
        "samples_per_second": step * BATCH / taken,
        "own_mib": largest - before["RssAnon"],
        "mapped_mib": after["RssFile"] - before["RssFile"],
    }


def main(counts: list[int]) -> None:
    print("| latents | on disk | open | samples/s | own memory | mapped pages |\n|---|---|---|---|---|---|")
    for count in counts:
        with tempfile.TemporaryDirectory() as root:
            folder = Path(root) / "cache"
            write_cache(folder, count)
            size = sum(p.stat().st_size for p in folder.iterdir()) / 2**20
            done = subprocess.run([sys.executable, __file__, "--read", str(folder)], capture_output=True, text=True, check=True)
            row = json.loads(done.stdout)
        print(
            f"| {row['count']:,} | {size:,.0f} MiB | {row['open_seconds']:.2f} s | {row['samples_per_second']:,.0f} "
            f"| {row['own_mib']:.0f} MiB | {row['mapped_mib']:,.0f} MiB |"
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["--read"]:
        print(json.dumps(read_cache(Path(sys.argv[2]), *map(float, sys.argv[3:]))))
    else:
        main([int(text) for text in sys.argv[1:]] or list(COUNTS))
