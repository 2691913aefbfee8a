"""Commands killed at random moments or at every file event, and started again: what is left must lead to the same result.

As a program, outside CI: `python tests/kills.py FOLDER [--kills 100] [--events] [--only NAME ...]`. One interpreter imports
everything once and forks a child for each run. It prints, for each scenario, how many kills went on to the files of an
unbroken run, byte for byte and none besides; the exit status is 1 where one did not.

A scenario is one command with what it writes to. To add one, write a function of a folder that returns a `Scenario`, and
name it in SCENARIOS.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
EVENTS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass
class Scenario:
    """A command line and what it writes.

    output: the file or folder that it writes to, and nowhere else.
    command(): the arguments of latentdiff that a user gives now, at first and after a kill, by what lies there.
    before(): puts `output` in the state in which the command starts; by default there is none.
    compared(path): whether a file, by its path relative to output, must be as in an unbroken run.
    """

    name: str
    output: Path
    command: Callable[[], list[str]]
    before: Callable[[], None] = lambda: None
    compared: Callable[[Path], bool] = lambda path: path.parts[:1] != ("logs",)  # TensorBoard names files by time

    def clear(self) -> None:
        remove(self.output)

    def prepare(self) -> None:
        self.clear()
        self.before()

    def result(self) -> dict[str, str]:
        """{relative path: hash} of every file that is compared, hidden ones too."""
        return {name: value for name, value in hashes(self.output).items() if self.compared(Path(name))}


# Scenarios


def train_scenario(stage: str, folder: Path) -> Scenario:
    from tiny_runs import autoencoder_tree, diffusion_tree, write_yaml

    from latentdiff.training import state

    output = folder / f"run-{stage}"
    often = {"train__steps": 2, "train__save_minutes": 1e-9, "train__keep": 1, "train__picture_every": 1}
    if stage == "autoencoder":
        tree = autoencoder_tree(data(folder), output, **often)
    else:
        often |= {"train__snapshot_every": 1, "train__best": "validation/loss_ema"}
        tree = diffusion_tree(data(folder), output, first_stage(folder), **often)
    config = write_yaml(folder / f"{stage}.yaml", tree)

    def command() -> list[str]:
        return ["train", str(config), *(["--resume"] if state.newest_step(output) is not None else [])]

    return Scenario(stage, output, command)


def publish_scenario(folder: Path) -> Scenario:
    trained = train_scenario("diffusion", folder / "of-publish")
    run = folder / "run-publish"
    if not (folder / "published").exists():
        run_to_end(trained)
        os.rename(trained.output, folder / "published")
    # An older step in the place of the newest: the folder that is there is exchanged
    return Scenario("publish", run, lambda: ["publish", str(run), "--step", "1"], lambda: copy(folder / "published", run))


def generate_scenario(folder: Path) -> Scenario:
    trained = train_scenario("diffusion", folder / "of-generate")
    if not trained.output.exists():
        run_to_end(trained)
    output, few = folder / "images", ["--num-images", "3", "--steps", "1", "--batch-size", "2"]
    command = ["generate", "--all-classes", "--model", str(trained.output / "model"), *few, "--out", str(output)]
    return Scenario("generate", output, lambda: command)


def encode_scenario(folder: Path) -> Scenario:
    from tiny_runs import diffusion_tree, write_yaml

    output = folder / "run-encode"
    changes = {"cache__shard_size": 3, "cache__batch_size": 2, "data__flips": True}  # 12 images: 4 shards
    config = write_yaml(folder / "encode.yaml", diffusion_tree(data(folder), output, first_stage(folder), **changes))
    return Scenario("encode", output, lambda: ["encode", str(config)])


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "autoencoder": lambda folder: train_scenario("autoencoder", folder),
    "diffusion": lambda folder: train_scenario("diffusion", folder),
    "publish": publish_scenario,
    "generate": generate_scenario,
    "encode": encode_scenario,
}


def data(folder: Path) -> Path:
    from tiny_runs import write_stripes

    return folder / "data" if (folder / "data").exists() else write_stripes(folder / "data", 16)


def first_stage(folder: Path) -> Path:
    """An autoencoder for stage 2, trained once a folder."""
    from tiny_runs import autoencoder_tree, write_yaml

    output = folder / "first-stage"
    if not output.exists():
        config = write_yaml(folder / "first-stage.yaml", autoencoder_tree(data(folder), output, train__steps=20))
        run_to_end(Scenario("first stage", output, lambda: ["train", str(config)]))
    return output


# Running and killing


def fork(arguments: list[str], log: Path, hook: Callable[[], None] = lambda: None) -> int:
    """A child that runs a command of latentdiff; its process id. hook: called in the child first."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        with open(log, "wb") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        hook()
        from latentdiff.cli import main

        main(arguments)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run_to_end(scenario: Scenario, hook: Callable[[], None] = lambda: None) -> float:
    """Run a scenario's command to its end; seconds. AssertionError with its output where it fails."""
    log, began = scenario.output.with_name(f"{scenario.output.name}.log"), time.monotonic()
    log.parent.mkdir(parents=True, exist_ok=True)
    code = os.waitstatus_to_exitcode(os.waitpid(fork(scenario.command(), log, hook), 0)[1])
    assert code == 0, f"{scenario.name}: exit {code}\n{log.read_text(errors='replace')[-2000:]}"
    return time.monotonic() - began


def difference(scenario: Scenario, expected: dict[str, str]) -> str:
    """Empty where the files are those of an unbroken run; else which are not."""
    now = scenario.result()
    return ", ".join(sorted(name for name in {**expected, **now} if expected.get(name) != now.get(name)))


def kill_at_random(scenario: Scenario, kills: int, seed: int = 0) -> list[str]:
    """Kill the command at random moments, then let it go on; what went wrong, one line for each kill that did not."""
    draw, problems = random.Random(f"{scenario.name} {seed}"), []
    scenario.prepare()
    run_to_end(scenario)
    expected = scenario.result()
    scenario.prepare()
    longest = run_to_end(scenario)  # the second time: all is warm
    killed = 0
    while killed < kills:
        scenario.prepare()
        moment = draw.uniform(0, longest)
        log = scenario.output.with_name(f"{scenario.output.name}.log")
        child = fork(scenario.command(), log)
        time.sleep(moment)
        os.kill(child, signal.SIGKILL)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != -signal.SIGKILL:
            continue  # it was done already
        killed += 1
        problems += went_on(scenario, expected, f"killed after {moment:.3f} s")
    return problems


def kill_at_every_event(scenario: Scenario, folder: Path) -> tuple[int, list[str]]:
    """(how many, what went wrong) of kills at each file event of a whole run.

    A killed process leaves on disk what lies there at that moment. So one run is enough: before each event, what lies
    there is copied, and each copy that differs from the others is then put in place and gone on from.
    """
    scenario.prepare()
    run_to_end(scenario)
    expected = scenario.result()
    scenario.prepare()
    copies = folder / f"{scenario.name}-events"
    remove(copies)
    copies.mkdir()
    run_to_end(scenario, lambda: copy_at_events(scenario.output, copies))
    left = sorted(copies.iterdir())
    problems: list[str] = []
    for place in left:
        scenario.clear()
        if any(place.iterdir()):
            copy(place / "output", scenario.output)
        problems += went_on(scenario, expected, f"killed before event {place.name}")
    return len(left), problems


def went_on(scenario: Scenario, expected: dict[str, str], when: str) -> list[str]:
    lay = sorted(hashes(scenario.output))
    try:
        run_to_end(scenario)
        wrong = difference(scenario, expected)
    except AssertionError as error:
        wrong = str(error)
    return [f"{scenario.name}, {when}: {wrong}; there lay: {', '.join(lay)}"] if wrong else []


def copy_at_events(output: Path, copies: Path) -> None:
    """From now on in this process: before each file event, copy what lies in `output`, where it is not as at an earlier one."""
    seen: set[str] = set()
    main, count, busy = threading.get_ident(), [0], [False]

    def hook(event: str, arguments: tuple) -> None:
        if event not in EVENTS or busy[0] or threading.get_ident() != main:
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        paths = [a for a in arguments if isinstance(a, (str, bytes, os.PathLike))]
        if paths and all(os.path.isabs(p) and not os.fsdecode(p).startswith(str(output.parent)) for p in paths):
            return
        busy[0] = True
        try:
            count[0] += 1
            digest = json.dumps(hashes(output, folders=True), sort_keys=True)
            if digest not in seen:
                seen.add(digest)
                place = copies / f"{count[0]:05d}-{event}"
                place.mkdir()
                if output.exists():
                    copy(output, place / "output")
        finally:
            busy[0] = False

    sys.addaudithook(hook)


# Files


def hashes(path: Path, folders: bool = False) -> dict[str, str]:
    return dict(_hashes(path, folders))


def _hashes(path: Path, folders: bool) -> Iterator[tuple[str, str]]:
    if path.is_file():
        yield path.name, hashlib.sha256(path.read_bytes()).hexdigest()
    for each in sorted(path.rglob("*")) if path.is_dir() else ():
        name = str(each.relative_to(path))
        if each.is_file():
            yield name, hashlib.sha256(each.read_bytes()).hexdigest()
        elif folders or each.name.startswith("."):
            yield name + "/", ""


def copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy2(source, target)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=100, help="of all scenarios together")
    parser.add_argument("--events", action="store_true", help="kill at every file event instead")
    parser.add_argument("--only", nargs="+", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    from processes import warm_up

    warm_up()
    options.folder.mkdir(parents=True, exist_ok=True)
    folder, failed, share = options.folder.resolve(), 0, -(-options.kills // len(options.only))
    for name in options.only:
        scenario = SCENARIOS[name](folder)
        if options.events:
            count, problems = kill_at_every_event(scenario, folder)
        else:
            count, problems = share, kill_at_random(scenario, share, options.seed)
        for problem in problems:
            print(problem, file=sys.stderr)
        failed += len(problems)
        print(json.dumps({"scenario": name, "kills": count, "went_on": count - len(problems)}), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    sys.exit(main())
