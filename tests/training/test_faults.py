"""Runs that are killed: whatever a kill leaves is gone on from to the result of an unbroken run, and nothing else is left."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

KILLS = Path(__file__).parents[1] / "kills.py"


def killed(folder: Path, *arguments: str) -> list[dict]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(KILLS), str(folder), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


LEAST = [("autoencoder", 30), ("diffusion", 45), ("publish", 20), ("encode", 15), ("generate", 20)]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "least"), LEAST)
def test_a_kill_at_any_file_event_is_gone_on_from(tmp_path, name, least):
    (counts,) = killed(tmp_path, "--events", "--only", name)
    assert counts["went_on"] == counts["kills"] >= least


@pytest.mark.slow
def test_ten_kills_at_random_are_gone_on_from(tmp_path):
    counts = killed(tmp_path, "--kills", "10")
    assert sum(count["went_on"] for count in counts) == sum(count["kills"] for count in counts) >= 10
