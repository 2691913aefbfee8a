"""Training in processes of its own, for tests that need several of them or kill them: imports once, then forks.

As a program: `python processes.py JOBS.json`, a list of jobs carried out one after another; their results are printed
as one JSON list. A job is {"config": YAML, "world": N, "resume": bool}, with "kill_after" seconds, counted from when the
file "once" is there, by "signal" (SIGKILL), and "limit", the bytes a file may have. Its result is {"codes": exit status
of each process (-signal if killed), "stderr": of the first, "seconds": how long it ran}.
"""

import json
import os
import resource
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def carry_out(jobs: list[dict[str, Any]], seconds: float = 600) -> list[dict[str, Any]]:
    """Run jobs in a fresh interpreter, whose torch has no threads yet, and return their results."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "jobs.json"
        path.write_text(json.dumps(jobs))
        command = [sys.executable, __file__, str(path)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def job(config: Path, world: int = 1, resume: bool = False, **more: Any) -> dict[str, Any]:
    return {"config": str(config), "world": world, "resume": resume, **more}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_job(wanted: dict[str, Any]) -> dict[str, Any]:
    world, log = wanted["world"], tempfile.TemporaryFile()
    port, began = free_port(), time.monotonic()
    children = [start(wanted, rank, world, port, log.fileno()) for rank in range(world)]
    if wanted.get("kill_after") is not None:
        while not there(wanted.get("once")) and time.monotonic() - began < 240:
            time.sleep(0.01)
        time.sleep(wanted["kill_after"])
        for child in children:
            os.kill(child, getattr(signal, wanted.get("signal", "SIGKILL")))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    log.seek(0)
    return {"codes": codes, "stderr": log.read().decode(errors="replace"), "seconds": time.monotonic() - began}


def there(path: str | None) -> bool:
    return path is None or (Path(path).exists() and (Path(path).is_dir() or Path(path).stat().st_size > 0))


def start(wanted: dict[str, Any], rank: int, world: int, port: int, log: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        if world > 1:
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1",
                           "LOCAL_WORLD_SIZE": str(world), "MASTER_PORT": str(port)}  # fmt: skip
        os.dup2(log if rank == 0 else os.open(os.devnull, os.O_WRONLY), 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if wanted.get("limit"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["limit"], wanted["limit"]))
        from latentdiff.cli import main

        main(["train", wanted["config"], *(["--resume"] if wanted["resume"] else [])])
        code = 0
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def warm_up() -> None:
    """Import what a training run does, once for all of them."""
    import diffusers  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import AutoencoderKL, UNet2DModel, VQModel  # noqa: F401

    import latentdiff.pipelines.latent_diffusion
    import latentdiff.training.autoencoder
    import latentdiff.training.diffusion  # noqa: F401

    torch.set_num_threads(1)  # threads would not survive a fork


if __name__ == "__main__":
    warm_up()
    print(json.dumps([run_job(wanted) for wanted in json.loads(Path(sys.argv[1]).read_text())]))
