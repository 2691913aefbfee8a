"""The `latentdiff` command: parse, call one Python function, turn a user's mistake into one line and exit status 2."""

from __future__ import annotations

import contextlib
import difflib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any

import latentdiff
from latentdiff.cli.commands import COMMANDS
from latentdiff.errors import ReportedElsewhere, UserError, printable
from latentdiff.utils import collection, hashes, processes, signals


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, 2 on bad usage or input, 130 on Ctrl-C, 75 on other signals."""
    signals.command_line = list(sys.argv[1:] if argv is None else argv)
    errors, sys.stderr = sys.stderr, _Forgiving(sys.stderr)
    try:
        _run(argv)
    finally:
        signals.command_line, sys.stderr = None, errors


def _run(argv: Sequence[str] | None) -> None:
    try:
        with signals.watched(lambda: ""):
            _command(list(sys.argv[1:] if argv is None else argv))
            sys.stdout.flush()
    except ReportedElsewhere:
        sys.exit(2)
    except UserError as error:
        _say_once(" ".join(str(error).split()))
        sys.exit(2)
    except BrokenPipeError:  # whoever read stdout, such as `head`, has enough of it
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # or Python would complain when it flushes stdout at its end
        sys.exit(0)
    except OSError as error:  # a full disk, a folder that cannot be written: the file is named, the trace helps nobody
        _say_once(f"{error.filename or 'file'}: {error.strerror or error}")
        sys.exit(2)
    except KeyboardInterrupt as end:
        if processes.rank() == 0 and not isinstance(end, signals.Interrupted):
            print("latentdiff: interrupted", file=sys.stderr)
        sys.exit(signals.INTERRUPTED)


class _Forgiving:
    """stderr that may be lost: a closed terminal, or `2>&1 | head`, is no reason to lose work."""

    def __init__(self, stream: Any):
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        with contextlib.suppress(OSError, ValueError):
            return self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            self._stream.flush()


def _say_once(text: str) -> None:
    """Why a command ends, on stderr. Of several processes the first one says it, and the launcher then ends the others.

    One that is still there after a while is alone with its trouble, and says so itself.
    """
    if processes.rank() > 0:
        time.sleep(processes.PATIENCE)
    print(f"latentdiff: {printable(text)}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off stderr, which is ours for progress and the one line of an error."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _yielding_threads() -> None:
    """Let the threads of OpenMP, which torch computes with on a CPU, sleep soon while they wait for one another.

    GNU's OpenMP lets them spin 300,000 turns first. Where another program wants the processors too, they then hold up the very
    thread that they wait for: with four programs for each core, a training step took 15 times as long. Results are the same.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def _command(tokens: list[str]) -> None:
    """Run what the tokens say and print its result."""
    name, rest = tokens[0] if tokens else "", tokens[1:]
    if name in ("-h", "--help"):
        print(_overview(), flush=True)
        sys.exit(0)
    if name == "--version":
        print(f"latentdiff {latentdiff.__version__}", flush=True)
        sys.exit(0)
    if name not in COMMANDS:
        near = difflib.get_close_matches(name, COMMANDS, n=1)
        advice = f"did you mean {near[0]}?" if near else f"valid: {', '.join(COMMANDS)}"
        raise UserError(f"{f'{name}: unknown command' if name else 'COMMAND: missing'}; {advice} (see latentdiff --help)")
    from latentdiff.cli.flags import parse
    from latentdiff.cli.output import in_text

    _quiet_libraries()
    _yielding_threads()
    command = COMMANDS[name]
    with collection.paused():
        function, arguments = parse(name, command, rest)
    with hashes.checked(not arguments.pop("no_verify", False)):
        result = function(**arguments)
    # Of several processes under `accelerate launch` the first one prints
    if result is not None and processes.rank() == 0:
        print(in_text(result, command.output))


def _overview() -> str:
    """The help page of the program, made without loading any command."""
    width = max(map(len, COMMANDS))
    lines = [
        "Usage: latentdiff COMMAND ...",
        "",
        "Train, sample and measure your own latent diffusion models.",
        "",
        "Commands:",
    ]
    lines += [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    lines += ["", "Options:", "  -h, --help  show this page", "  --version   show the version"]
    return "\n".join([*lines, "", "latentdiff COMMAND --help explains a command."])
