"""weights/emoji's second stage, trained for as long as the clock allows, from data and latents brought along."""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "emoji" / "diffusion.yaml"
LIMIT = 60 * 2**20  # bytes that may be brought along
PIECE = 15 * 2**20  # bytes of a file that is brought back
MOST = 5  # such files: with gpu-train.json, pictures and the tables of `measure` there are 8
BATCH = 256  # of a step on an accelerator; the shipped config has 64
SHARE = 0.8  # of the time left that is planned for steps: validation, pictures and states take the rest


def pack(arguments: argparse.Namespace) -> None:
    """Pictures, captions, the first stage and its latents of all pictures, in one folder."""
    from latentdiff.recipes.emoji.prepare import prepare_emoji
    from latentdiff.training.encode import encode_dataset as encode

    folder = Path(arguments.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.data:
        shutil.copytree(arguments.data, folder / "data", dirs_exist_ok=True)
    else:
        prepare_emoji(folder / "data")
    shutil.copytree(ROOT / "weights" / "emoji" / "vae", folder / "vae", dirs_exist_ok=True)
    encode(CONFIG, overrides(folder, folder / "unused"))
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{folder}: {size / 2**20:.1f} MiB", file=sys.stderr)
    if size > LIMIT:
        raise SystemExit(f"gpu.py pack: {folder} has {size / 2**20:.1f} MiB, and {LIMIT // 2**20} may be brought along")


def overrides(folder: Path, output: Path) -> list[str]:
    return [
        f"data.source={folder / 'data'}",
        f"autoencoder={folder / 'vae'}",
        f"cache.folder={folder / 'latents'}",
        f"output={output}",
    ]


def scaled(folder: Path, output: Path, steps: int, dry: bool) -> Any:
    """The shipped config at a larger batch, its learning rate times the root of the ratio; a toy's network in a dry run."""
    from latentdiff.config import load_config

    batch = 8 if dry else BATCH
    changes = [
        *overrides(folder, output),
        f"train.batch_size={batch}",
        f"train.steps={steps}",
        f"train.picture_every={max(1, math.ceil(steps / 3))}",
        "train.precision=bfloat16",
        f"optimizer.lr={3e-4 * math.sqrt(batch / 64)}",
        f"optimizer.warmup_steps={min(300, max(1, steps // 20))}",
    ]
    if dry:
        changes += [
            "model.config.block_out_channels=[16, 32]",
            "model.config.norm_num_groups=4",
            "model.config.addition_embed_type_num_heads=4",
            "condition.text.width=32",
            "condition.text.vocabulary=400",
            "condition.text.layers=1",
            "validation_images=16",
            "sample.steps=2",
            "sample.per_class=1",
        ]
    return load_config(CONFIG, changes)


def train(arguments: argparse.Namespace) -> None:
    """Time a few steps, train as many as fit, publish, and leave the checkpoint in pieces beside its pictures."""
    end = time.monotonic() + arguments.seconds
    folder, out = Path(arguments.folder), Path(arguments.out)
    out.mkdir(parents=True, exist_ok=True)
    if arguments.device == "cpu" or arguments.dry:
        os.environ["ACCELERATE_USE_CPU"] = "true"
    from latentdiff.training import train as run

    work = out / "run"
    shutil.rmtree(work, ignore_errors=True)
    seconds = seconds_of_a_step(scaled(folder, work, 1000, arguments.dry))
    steps = 4 if arguments.dry else max(10, int(SHARE * (end - time.monotonic()) / seconds))
    config = scaled(folder, work, steps, arguments.dry)
    print(f"gpu.py train: {seconds * 1e3:.1f} ms a step of {config.train.batch_size}, {steps} steps", file=sys.stderr)
    began = time.monotonic()
    model = run(config)
    trained = time.monotonic() - began
    names = split(model, out)
    pictures = sorted((work / "pictures").glob("*.png"))
    shutil.copy(pictures[-1], out / "samples.png")
    report = {
        "steps": steps,
        "batch": config.train.batch_size,
        "seconds": round(trained, 1),
        "images a second": config.train.batch_size / seconds,
        "validation loss": last(work / "metrics.jsonl", "validation/loss_ema"),
        "pieces": names,
    }
    (out / "gpu-train.json").write_text(json.dumps(report, indent=1))
    shutil.rmtree(work)
    print(json.dumps(report, indent=1))


def seconds_of_a_step(config: Any) -> float:
    """Of the trainer's own step on the cached latents, without a picture or a state."""
    from gpu_steps import our_step, seconds_a_step

    from latentdiff.training import conditioning, train_diffusion
    from latentdiff.training.accelerator import start_accelerator
    from latentdiff.training.latents import prepare_latents

    accelerator = start_accelerator(config.train)
    latents = prepare_latents(config, accelerator)
    reader, _ = conditioning.open_text(config, latents.images, accelerator, resume=False)
    conditions = conditioning.prepare_conditions(config, latents, accelerator, None, reader)
    trainer = train_diffusion.DiffusionTrainer(config, latents, conditions, accelerator)
    found = seconds_a_step(our_step(trainer), accelerator.device, 3.0)[0]
    shutil.rmtree(config.output, ignore_errors=True)  # the tokenizer was written there
    return found


def last(metrics: Path, name: str) -> float | None:
    values = [json.loads(line).get(name) for line in metrics.read_text().splitlines()]
    return next((value for value in reversed(values) if value is not None), None)


def split(model: Path, out: Path) -> list[str]:
    """A checkpoint as model.tar-00, -01, ... of at most PIECE bytes each."""
    whole = out / "model.tar"
    with tarfile.open(whole, "w") as archive:
        archive.add(model, "model")
    names = []
    with whole.open("rb") as stream:
        while block := stream.read(PIECE):
            names.append(f"model.tar-{len(names):02d}")
            (out / names[-1]).write_bytes(block)
    whole.unlink()
    if len(names) > MOST:
        raise SystemExit(f"gpu.py train: the checkpoint takes {len(names)} files of {PIECE // 2**20} MiB, {MOST} may come back")
    return names


def join(arguments: argparse.Namespace) -> None:
    """The checkpoint whose pieces `train` left in a folder."""
    model = Path(arguments.model)
    if model.exists():
        raise SystemExit(f"gpu.py join: {model} is there already; name a new folder")
    pieces = sorted(Path(arguments.pieces).glob("model.tar-*"))
    if not pieces:
        raise SystemExit(f"gpu.py join: {arguments.pieces} has no model.tar-00; `gpu.py train` leaves it there")
    whole, unpacked = model.with_name(f".{model.name}.tar"), model.with_name(f".{model.name}")
    try:
        with whole.open("wb") as stream:
            for piece in pieces:
                stream.write(piece.read_bytes())
        with tarfile.open(whole) as archive:
            archive.extractall(unpacked, filter="data")
        (unpacked / "model").rename(model)
    finally:
        whole.unlink(missing_ok=True)
        shutil.rmtree(unpacked, ignore_errors=True)
