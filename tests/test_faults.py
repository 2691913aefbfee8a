"""A training run killed at random points, again and again: nothing whole is lost, nothing half is ever taken for whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from processes import ROOT, free_port, start
from safetensors import safe_open
from tiny_runs import diffusion_tree, write_yaml

from latentdiff.data.cache import open_cache
from latentdiff.training import state

KILLS = 50


def newest(output: Path) -> int:
    folders = state.state_folders(output)
    return int(folders[-1].name.removeprefix("step-")) if folders else 0


def check(output: Path, before: int) -> None:
    """What must hold of a run's folder at any moment."""
    for folder in state.state_folders(output):
        assert state.damage(folder) is None, folder
    assert newest(output) >= before
    if (output / "latents" / "manifest.json").exists():
        assert len(open_cache(output / "latents")) == 36
    if (output / "model").exists():
        index = json.loads((output / "model" / "model_index.json").read_text())
        assert {"unet", "vae"} <= set(index) and json.loads((output / "model" / "latentdiff.json").read_text())["steps"]
        for part in ("unet", "vae"):
            with safe_open(output / "model" / part / "diffusion_pytorch_model.safetensors", "pt") as weights:
                assert list(weights.keys())
    if (output / "run.json").exists():
        assert json.loads((output / "run.json").read_text())["stage"] == "diffusion"


def kill_at_random(folder: Path, tree: dict, kills: int, seed: int = 0) -> dict[str, int]:
    """Runs, each killed after a random time or finished; those that finish make room for a new one."""
    draw, counts = random.Random(seed), {"killed": 0, "finished": 0, "resumed": 0}
    number, longest = 0, 6.0
    while counts["killed"] < kills:
        output = folder / f"run-{number}"
        config = write_yaml(folder / "run.yaml", {**tree, "output": str(output)})
        before, resume = newest(output), bool(state.state_folders(output))
        with open(os.devnull, "w") as nowhere:
            child = start({"config": str(config), "resume": resume}, 0, 1, free_port(), *[nowhere.fileno()] * 2)
            began, limit = time.monotonic(), draw.uniform(0.0, 1.1 * longest)
            done = 0
            while not done and time.monotonic() - began < limit:
                done, status = os.waitpid(child, os.WNOHANG)
                time.sleep(0.002)
            if not done:
                os.kill(child, signal.SIGKILL)
                status = os.waitpid(child, 0)[1]
        check(output, before)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, -signal.SIGKILL), code
        counts["resumed"] += resume
        counts["killed" if code else "finished"] += 1
        if code == 0:
            longest = min(longest, time.monotonic() - began) if not resume else longest
            number += 1
    return counts


@pytest.mark.slow
def test_fifty_kills_lose_nothing(tmp_path, stripe_folder, autoencoder_run):
    changes = {"train__steps": 25, "train__save_minutes": 1e-9, "train__picture_every": 10}
    tree = diffusion_tree(stripe_folder, tmp_path / "run", autoencoder_run, **changes)
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    command = [sys.executable, __file__, str(tmp_path), str(KILLS)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    counts = json.loads(done.stdout.splitlines()[-1])
    assert counts["killed"] == KILLS and counts["finished"] >= 1 and counts["resumed"] >= 5, counts


if __name__ == "__main__":
    from processes import warm_up

    warm_up()
    root = Path(sys.argv[1])
    print(json.dumps(kill_at_random(root, json.loads((root / "tree.json").read_text()), int(sys.argv[2]))))
