"""From a folder of photographs to a grid with the shipped configs, and both stages trained by two processes."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_runs import autoencoder_tree, diffusion_tree, write_yaml

from latentdiff.cli import main
from latentdiff.config import load_config
from latentdiff.models.autoencoder import load_autoencoder
from latentdiff.training import state, train

ROOT = Path(__file__).parent.parent
CONFIGS = ROOT / "configs" / "folder"
COLOURS = {"leaf": (40, 160, 60), "sea": (30, 70, 190), "clay": (180, 90, 50)}


def write_photographs(root: Path, count: int = 200) -> Path:
    """`count` colour JPEGs of mixed sizes in three class sub-folders: a hue, a gradient and noise."""
    generator = np.random.default_rng(0)
    for k in range(count):
        name = list(COLOURS)[k % 3]
        height, width = generator.integers(36, 90, 2)
        light = np.linspace(0.6, 1.3, width)[None, :, None] * generator.uniform(0.8, 1.1)
        pixels = np.array(COLOURS[name]) * light + generator.normal(0, 12, (height, width, 3))
        (root / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(root / name / f"{k:03d}.jpg", quality=85)
    return root


def test_a_folder_of_photographs_goes_through_four_commands_to_a_grid(tmp_path, monkeypatch, capsys):
    write_photographs(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    both = ["data.source=photos", "data.size=[32, 32]", "train.batch_size=16", "train.threads=1", "ema.decay=0.9"]
    stage1 = [
        "output=run/autoencoder",
        "train.steps=24",
        "loss.adversarial_start=12",
        "optimizer.warmup_steps=5",
        "model.config.block_out_channels=[8, 16]",
        "model.config.norm_num_groups=4",
        "optimizer.lr=3e-3",
    ]
    stage2 = [
        "output=run/diffusion",
        "autoencoder=run/autoencoder",
        "train.steps=12",
        "optimizer.warmup_steps=5",
        "model.config.block_out_channels=[16, 16]",
        "model.config.norm_num_groups=4",
        "model.config.attention_head_dim=8",
    ]
    main(["train", str(CONFIGS / "autoencoder.yaml"), *both, *stage1])
    main(["encode", str(CONFIGS / "diffusion.yaml"), *both, *stage2])
    shards = {p: p.stat().st_mtime_ns for p in Path("run").rglob("shard-*")}
    main(["train", str(CONFIGS / "diffusion.yaml"), *both, *stage2])
    assert shards and shards == {p: p.stat().st_mtime_ns for p in Path("run").rglob("shard-*")}  # used, not made again
    command = ["generate", "leaf", "sea", "clay", "--model", "run/diffusion/model", "--num-images", "2", "--steps", "4"]
    main([*command, "--out", "grid.png"])
    main([*command, "--out", "grid.npz"])
    assert capsys.readouterr().out.split() == [
        "run/autoencoder/autoencoder",
        str(Path("run/diffusion/latents")),
        "run/diffusion/model",
        "grid.png",
        "grid.npz",
    ]
    grid = np.asarray(Image.open("grid.png"))
    assert grid.shape[0] == 3 * (2 * 32 + 2) and grid.shape[2] == 3 and grid.std() > 10
    with np.load("grid.npz") as file:
        assert file["arr_0"].shape == (6, 32, 32, 3) and file["arr_1"].tolist() == [1, 1, 2, 2, 0, 0]
        assert file["arr_0"].std() > 5


def test_three_captioned_images_go_through_four_commands_to_a_prompted_picture(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    sizes, rows = {"a red square": (33, 47), "a blue square": (64, 40), "a green square": (51, 90)}, []
    for colour, (text, size) in zip([(220, 30, 30), (30, 60, 220), (30, 180, 60)], sizes.items(), strict=True):
        name = f"{text.split()[1]}.png"
        Image.new("RGB", size, colour).save(Path("mine") / name)
        rows.append(json.dumps({"file_name": name, "text": text}))
    Path("mine/metadata.jsonl").write_text("\n".join(rows) + "\n")
    both = ["data.source=mine", "data.size=[32, 32]", "train.threads=1", "ema.decay=0.9", "data.workers=0"]
    stage1 = [
        "output=run/autoencoder",
        "train.steps=8",
        "train.batch_size=4",
        "loss.adversarial=0",
        "optimizer.warmup_steps=2",
        "model.config.block_out_channels=[8, 16]",
        "model.config.norm_num_groups=4",
        "optimizer.lr=3e-3",
    ]
    stage2 = [
        "output=run/diffusion",
        "autoencoder=run/autoencoder",
        "train.steps=8",
        "train.batch_size=4",
        "optimizer.warmup_steps=2",
        "model.config.block_out_channels=[16, 16]",
        "model.config.norm_num_groups=4",
        "condition.text.width=16",
        "condition.text.layers=1",
        "condition.text.heads=2",
        "model.config.addition_embed_type_num_heads=4",
    ]
    main(["train", str(CONFIGS / "autoencoder.yaml"), *both, *stage1])
    main(["encode", str(CONFIGS / "text.yaml"), *both, *stage2])
    main(["train", str(CONFIGS / "text.yaml"), *both, *stage2])
    model = ["--model", "run/diffusion/model", "--steps", "3", "--num-images", "2"]
    main(["generate", "a red square", "a blue square", *model, "--out", "grid.npz"])
    main(["generate", "a red square", "a blue square", *model, "--negative", "a green square", "--out", "away.npz"])
    assert capsys.readouterr().out.split()[-3:] == ["run/diffusion/model", "grid.npz", "away.npz"]
    with np.load("grid.npz") as file, np.load("away.npz") as away:
        assert file["arr_0"].shape == (4, 32, 32, 3) and file["arr_1"].tolist() == [-1] * 4
        assert file["arr_0"].std() > 1 and (file["arr_0"] != away["arr_0"]).any()
    with pytest.raises(SystemExit) as stopped:
        main(["generate", "--all-classes", "--model", "run/diffusion/model"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and said.count("\n") == 1 and "has no classes, as prompts such as" in said


def launch(config: Path, log: Path) -> subprocess.Popen:
    """The README's line for several processes, with two on the CPU."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    arguments = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--main_process_port", "0"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *arguments, "-m", "latentdiff", "train", str(config)]
    with log.open("w") as stream:
        return subprocess.Popen(command, env=environment, stdout=stream, stderr=subprocess.STDOUT)


@pytest.mark.slow
def test_two_processes_train_both_stages(tmp_path, stripe_folder, autoencoder_run):
    # Plain gradient noise is not to be amplified: Adam's first steps are signs, so a large eps keeps them comparable
    same = {"optimizer__eps": 1e-3, "optimizer__lr": 1e-2, "train__steps": 4, "data__flips": True}
    trees = {
        "stage1": autoencoder_tree(
            stripe_folder,
            tmp_path / "stage1",
            train__steps=10,
            train__precision="auto",
            loss__adversarial=0.5,
            loss__discriminator_channels=4,
            loss__discriminator_layers=1,
        ),
        "stage2": diffusion_tree(stripe_folder, tmp_path / "stage2", autoencoder_run, **same),
    }
    configs = {name: write_yaml(tmp_path / f"{name}.yaml", tree) for name, tree in trees.items()}
    running = {name: launch(path, tmp_path / f"{name}.log") for name, path in configs.items()}
    alone = diffusion_tree(stripe_folder, tmp_path / "alone", autoencoder_run, **same)
    train(load_config(write_yaml(tmp_path / "alone.yaml", alone)))
    for name, process in running.items():
        code = process.wait(240)
        log = (tmp_path / f"{name}.log").read_text()
        assert code == 0, log
        lines = [line for line in log.splitlines() if line.startswith("latentdiff")]
        measured = r"(float32|bfloat16) \(auto: measured" if name == "stage1" else "float32, "  # one process measures for both
        assert len(lines) == 1, log
        assert re.match(rf"latentdiff train: 2 process\(es\), device cpu.*precision {measured}", lines[0]), log
        assert "global batch 8" in lines[0]
    # Stage 2 draws everything for the global batch, so two processes take the steps of one
    two, one = (state.load_state(tmp_path / name)[0] for name in ("stage2", "alone"))
    start = {key: float((value - one["ema"][key]).abs().max()) for key, value in one["model"].items()}
    assert max(start.values()) > 1e-3  # the weights have moved by far more than the tolerance
    for part in ("model", "ema"):
        for key, value in one[part].items():
            torch.testing.assert_close(two[part][key], value, rtol=1e-4, atol=2e-5, msg=f"{part} {key}")
    first, second = ((tmp_path / name / "metrics.jsonl").read_text() for name in ("stage2", "alone"))
    assert len(first.splitlines()) == len(second.splitlines())
    vae = load_autoencoder(str(tmp_path / "stage1"))
    assert all(bool(value.isfinite().all()) for value in vae.state_dict().values())
    assert (tmp_path / "stage1" / "report.json").is_file() and (tmp_path / "stage2" / "model" / "model_index.json").is_file()
