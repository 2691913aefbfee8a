"""gpu.py's dry mode: the same code at toy size, on a CPU, with what it leaves behind."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

BENCHMARKS = Path(__file__).parent / "benchmarks"
SCRIPT = BENCHMARKS / "gpu.py"


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu

    return gpu


def call(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=300)


def test_everything_is_measured_at_toy_size(tmp_path, gpu):
    done = call("measure", "--dry", "--seconds", "280", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert list(report["parts"]) == list(gpu.PARTS) and report["left_out"] == []
    assert all(part["rows"] and part["problem"] is None for part in report["parts"].values())
    checks = [row for row in report["parts"]["correctness"]["rows"] if "right" in row]
    assert len(checks) >= 20 and all(row["right"] for row in checks)
    for name in ("stage 2, LDM-class", "stage 1, 64 pixels"):
        rows = {row["name"]: row for row in report["parts"][name]["rows"]}
        assert rows["latentdiff"]["img/s"] > 0 and rows["plain diffusers loop"]["times latentdiff's"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["gpu.json", "gpu.md"]


def test_a_part_that_hangs_or_fails_leaves_what_it_had_measured(tmp_path, gpu, monkeypatch):
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "def measure(name, device, clock, results):\n"
        "    results.add('first', value=1)\n"
        "    if name == 'fails':\n"
        "        raise ValueError('no such thing')\n"
        "    time.sleep(60)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(gpu, "PARTS", {"hangs": ("hanging", 5), "fails": ("hanging", 60)})
    hung = gpu.run_part("hangs", 5, True, tmp_path, "cpu")
    failed = gpu.run_part("fails", 60, True, tmp_path, "cpu")
    assert hung["rows"] == failed["rows"] == [{"name": "first", "value": 1}] and hung["seconds"] < 50
    assert hung["problem"] == gpu.CUT_OFF and failed["problem"] == "ValueError: no such thing"


def test_a_tolerance_that_is_not_kept_is_a_failure(tmp_path, gpu, monkeypatch):
    (tmp_path / "wrong.py").write_text(
        "def measure(name, device, clock, results):\n    results.add('pictures', right=name == 'fine')\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    arguments = type("Arguments", (), {"out": str(tmp_path), "seconds": 60, "dry": True, "device": "cpu", "only": None})
    for name, status in (("fine", 0), ("not fine", 1)):
        monkeypatch.setattr(gpu, "PARTS", {name: ("wrong", 5)})
        assert gpu.measure(arguments) == status
    assert "| pictures | NO |" in (tmp_path / "gpu.md").read_text()


def test_a_clock_that_has_run_out_leaves_the_rest_out_and_says_so(tmp_path):
    done = call("measure", "--dry", "--seconds", "0", "--only", "card", "cache", "--out", str(tmp_path))
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert done.returncode == 0 and report["parts"] == {} and report["left_out"] == ["card", "cache"]
    assert "no time: card, cache" in (tmp_path / "gpu.md").read_text()


def test_training_goes_from_a_packed_folder_to_a_checkpoint_in_pieces_and_back(tmp_path):
    for part in ("train", "test"):
        folder = tmp_path / "data" / part
        folder.mkdir(parents=True)
        lines = []
        for k in range(24):
            pixels = np.full((64, 64, 3), (10 * k, 250 - 10 * k, 128), np.uint8)
            Image.fromarray(pixels).save(folder / f"{k:02d}.png")
            lines.append(json.dumps({"file_name": f"{k:02d}.png", "text": f"colour number {k}"}))
        (folder / "metadata.jsonl").write_text("\n".join(lines))
    packed = call("pack", str(tmp_path / "cargo"), "--data", str(tmp_path / "data"))
    assert packed.returncode == 0, packed.stderr[-2000:]
    trained = call("train", str(tmp_path / "cargo"), "--dry", "--out", str(tmp_path / "out"))
    assert trained.returncode == 0, trained.stderr[-2000:]
    report = json.loads((tmp_path / "out" / "gpu-train.json").read_text())
    files = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert files == ["gpu-train.json", *report["pieces"], "samples.png"] and len(files) + 2 <= 8
    assert call("join", str(tmp_path / "out"), str(tmp_path / "model")).returncode == 0
    from latentdiff.checkpoints import load

    pipeline = load(tmp_path / "model")
    images = pipeline(prompt="colour number 3", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
