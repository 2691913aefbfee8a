"""Commands in processes of their own, for tests that need several of them or kill them: imports once, then forks.

As a program: `python processes.py JOBS.json`, a list of jobs carried out one after another; their results are printed
as one JSON list. A job is {"config": YAML, "world": N, "resume": bool}, with "environment" variables, "kill_after" seconds,
counted from when the file "once" is there, by "signal" (SIGKILL), "limit", the bytes a file may have, and "weigh", the start
of paths to which each process of a stage 2 writes what it held (see `weigh`). Its result is {"codes": exit status of each
process (-signal if killed), "stderr": of the first, "seconds": how long it ran}. Or it is {"command": arguments, "world": N}:
the result's "stderr" and "stdout" are then of all processes, and as under a launcher one that fails ends them all.
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
from collections.abc import Callable, Iterable
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


def command(*arguments: Any, world: int = 1) -> dict[str, Any]:
    return {"command": [str(argument) for argument in arguments], "world": world}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def run_job(wanted: dict[str, Any]) -> dict[str, Any]:
    world, log, out = wanted["world"], tempfile.TemporaryFile(), tempfile.TemporaryFile()
    port, began = free_port(), time.monotonic()
    children = [start(wanted, rank, world, port, log.fileno(), out.fileno()) for rank in range(world)]
    if wanted.get("kill_after") is not None:
        while not there(wanted.get("once")) and time.monotonic() - began < 240:
            time.sleep(0.01)
        time.sleep(wanted["kill_after"])
        for child in children:
            os.kill(child, getattr(signal, wanted.get("signal", "SIGKILL")))
    codes = ended(children, wanted.get("command") is not None)
    said = {}
    for name, file in (("stderr", log), ("stdout", out)):
        file.seek(0)
        said[name] = file.read().decode(errors="replace")
    return {"codes": codes, **said, "seconds": time.monotonic() - began}


def ended(children: list[int], together: bool) -> list[int]:
    """The exit status of each child, in order. together: the first that fails ends the others."""
    codes: dict[int, int] = {}
    while len(codes) < len(children):
        child, status = os.wait()
        codes[child] = os.waitstatus_to_exitcode(status)
        for other in children if together and codes[child] else ():
            if other not in codes:
                os.kill(other, signal.SIGTERM)
    return [codes[child] for child in children]


def there(path: str | None) -> bool:
    return path is None or (Path(path).exists() and (Path(path).is_dir() or Path(path).stat().st_size > 0))


def start(wanted: dict[str, Any], rank: int, world: int, port: int, log: int, out: int) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.environ |= wanted.get("environment", {})
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background
        if world > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_PORT": str(port),
            }
        arguments, nowhere = wanted.get("command"), os.open(os.devnull, os.O_WRONLY)
        os.dup2(log if rank == 0 or arguments else nowhere, 2)
        os.dup2(out if arguments else nowhere, 1)
        if wanted.get("limit"):
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (wanted["limit"], wanted["limit"]))
        from latentdiff.cli import main

        weighed = weigh(Path(f"{wanted['weigh']}-{rank}.json")) if wanted.get("weigh") else None
        main(arguments or ["train", wanted["config"], *(["--resume"] if wanted["resume"] else [])])
        code = 0
        if weighed:
            weighed()
    except SystemExit as stopped:
        code = stopped.code if isinstance(stopped.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def weigh(path: Path) -> Callable[[], None]:
    """A function that writes {"weights", "average", "moments": how many numbers of each this process holds in itself}."""
    from latentdiff.training import train_diffusion

    trainers, prepare = [], train_diffusion.DiffusionTrainer.prepare_validation

    def noted(trainer: Any) -> None:
        trainers.append(trainer)
        prepare(trainer)

    def count(tensors: Iterable[Any]) -> int:
        return sum((t.to_local() if hasattr(t, "to_local") else t).numel() for t in tensors)

    def write() -> None:
        trainer = trainers[0]
        moments = [slots["exp_avg"] for slots in trainer.optimizer.state.values()]
        counts = {"weights": count(trainer.model.parameters()), "average": count(trainer.ema.average.values())}
        path.write_text(json.dumps(counts | {"moments": count(moments)}))

    train_diffusion.DiffusionTrainer.prepare_validation = noted
    return write


def warm_up() -> None:
    """Import what a training run does, once for all of them."""
    import diffusers  # noqa: F401
    import torch
    import torch.utils.tensorboard  # noqa: F401
    from diffusers import AutoencoderKL, UNet2DModel, VQModel  # noqa: F401

    import latentdiff.pipelines.latent_diffusion
    import latentdiff.training.train_autoencoder
    import latentdiff.training.train_diffusion  # noqa: F401

    torch.set_num_threads(1)  # threads would not survive a fork


if __name__ == "__main__":
    warm_up()
    print(json.dumps([run_job(wanted) for wanted in json.loads(Path(sys.argv[1]).read_text())]))
