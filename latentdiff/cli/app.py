"""The `latentdiff` command: parse, call one Python function, turn a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

from latentdiff.cli.measures import add_cost, add_device, add_measures
from latentdiff.errors import ReportedElsewhere, UserError, printable
from latentdiff.utils import hashes, processes, signals

# The commands that open weights
OPENING = (
    "generate",
    "train",
    "encode",
    "reconstruct",
    "info",
    "evaluate",
    "compare",
    "tune",
    "agreement",
    "gallery",
    "likelihood",
    "judge",
)
DEFAULT_MODEL = "weights/fashion-mnist"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


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
            arguments = _parsed(argv)
            _quiet_libraries()
            verify = vars(arguments).pop("verify", True)  # of every command alike, so none of their functions takes it
            with hashes.checked(verify):
                arguments.run(arguments)
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


def _parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments; argparse alone would refuse `key=value` after an option, as in `train CONFIG --resume train.steps=9`."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(item.startswith("-") for item in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    return arguments


def _quiet_libraries() -> None:
    """Keep the libraries' own bars and advice off stderr, which is ours for progress and the one line of an error."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def _parser() -> Parser:
    parser = Parser(prog="latentdiff", description="Train, sample and measure your own latent diffusion models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    _add_generate(commands)
    _add_train(commands)
    _add_publish(commands)
    _add_others(commands)
    add_measures(commands)
    _add_prepare(commands)
    _add_import(commands)
    skip = "do not hold weights against the hashes published beside them, which takes seconds a gigabyte"
    for name in OPENING:
        commands.choices[name].add_argument("--no-verify", dest="verify", action="store_false", help=skip)
    return parser


def _add_generate(commands) -> None:
    add = commands.add_parser("generate", help="make images from a checkpoint", description=generate_command.__doc__)
    add.add_argument("what", nargs="*", metavar="WHAT", help="class names or numbers, or prompts")
    add.add_argument("--all-classes", action="store_true", help="every class of the model")
    add.add_argument("--label", metavar="CLASS", help="a class, by name or number, for every prompt of a model told both")
    add.add_argument("--negative", metavar="TEXT", help="a prompt to guide away from")
    add.add_argument("--model", default=DEFAULT_MODEL, metavar="M", help=f"a checkpoint folder (default {DEFAULT_MODEL})")
    add.add_argument("--num-images", type=int, default=8, metavar="N", help="images of each (default 8)")
    add.add_argument("--steps", type=int, metavar="S", help="of the sampler (default: the checkpoint's; more for some)")
    add.add_argument("--sampler", metavar="NAME", help="one of latentdiff's samplers instead of the checkpoint's scheduler")
    add.add_argument("--guidance", type=float, metavar="G", help="classifier-free guidance scale, 1 is off")
    add_cost(add)
    strength = "also guide by the model's own classifier, under --sampler; 1 is Bayes' rule, 0 off"
    add.add_argument("--classifier-strength", type=float, default=0.0, metavar="S", help=strength)
    add.add_argument("--sampler-options", nargs="+", metavar="key=value", help="keywords of --sampler, such as eta=0.5")
    add.add_argument("--seed", type=int, default=0, metavar="K", help="an image is a function of the seed (default 0)")
    add.add_argument("--batch-size", type=int, default=128, metavar="B", help="images made at a time (default 128)")
    add_device(add)
    add.add_argument("--out", default="samples.png", metavar="PATH", help=".png (a labelled grid), .npz, or a folder")
    add.set_defaults(run=generate_command)


def generate_command(arguments) -> None:
    """Make N images of each class or prompt named and write them to a labelled grid, an npz file or a folder."""
    from latentdiff.generation import generate

    options = {k: v for k, v in vars(arguments).items() if k not in ("command", "run")}
    path = generate(**options)
    if processes.rank() == 0:
        print(path)


def _add_train(commands) -> None:
    train = commands.add_parser("train", help="train a stage as a config says", description=train_command.__doc__)
    train.add_argument("config", metavar="CONFIG", help="a YAML file, such as configs/fashion-mnist/diffusion.yaml")
    train.add_argument("overrides", nargs="*", metavar="key=value", help="override a key, such as train.steps=100")
    train.add_argument("--resume", action="store_true", help="go on from the newest training state in the output folder")
    train.set_defaults(run=train_command)


def train_command(arguments) -> None:
    """Train one stage: an autoencoder, a diffusion model on its latents, or a feature network."""
    from latentdiff.checkpoints import resolve_config
    from latentdiff.config import load_config
    from latentdiff.training import train

    folder = train(load_config(resolve_config(arguments.config), arguments.overrides), resume=arguments.resume)
    if processes.rank() == 0:  # of several processes under `accelerate launch` one says the result
        print(folder)


def _add_publish(commands) -> None:
    add = commands.add_parser("publish", help="make a checkpoint of a training state", description=publish_command.__doc__)
    add.add_argument("run_folder", metavar="RUN", help="the output folder of a training run, of either stage")
    add.add_argument("--step", type=int, metavar="N", help="of a state or snapshot (default: the newest state)")
    add.add_argument("--best", action="store_true", help="the state that train.best kept")
    add.add_argument("--out", metavar="DIR", help="a new folder (default: model/ or autoencoder/ in RUN)")
    add.set_defaults(run=publish_command)


def publish_command(arguments) -> None:
    """Publish one step of a training run, as the run would have done had it ended there."""
    from latentdiff.training.publish import publish

    print(publish(arguments.run_folder, arguments.step, arguments.best, arguments.out))


def _add_others(commands) -> None:
    add = commands.add_parser("encode", help="build the latent cache of a diffusion config")
    add.add_argument("config", metavar="CONFIG")
    add.add_argument("overrides", nargs="*", metavar="key=value")
    add.add_argument("--part", metavar="K/N", help="only part K of N, 1 to N, as one of several jobs that share the folder")
    add.set_defaults(run=encode_command)

    add = commands.add_parser("reconstruct", help="images beside what the first stage makes of them")
    add.add_argument("model", metavar="MODEL", help="a checkpoint or an autoencoder's folder")
    add.add_argument("images", nargs="+", metavar="IMAGE")
    add.add_argument("--out", default="reconstructions.png", metavar="PATH", help="a .png file")
    own = "each image at its file's size, instead of brought to the model's size as in training"
    add.add_argument("--own-size", action="store_true", help=own)
    add.set_defaults(run=reconstruct_command)

    add = commands.add_parser("info", help="what a model, a latent cache, a config or a data set is")
    add.add_argument("what", metavar="MODEL|CACHE|CONFIG|DATA", help="of a CONFIG also what its run will cost")
    add.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of a CONFIG, or data.KEY of a DATA")
    add.set_defaults(run=info_command)


def _add_prepare(commands) -> None:
    add = commands.add_parser("prepare", help="make a data set out of public files", description=prepare_command.__doc__)
    add.add_argument("name", choices=["emoji"], metavar="NAME", help="emoji: pictures in two styles, with captions")
    add.add_argument("--out", required=True, metavar="DIR", help="a new or empty folder")
    add.add_argument("--tarballs", nargs="+", metavar="FILE", help="the npm packages' .tgz files, instead of fetching them")
    add.add_argument("--seed", type=int, default=0, metavar="K", help="of the held-out pairs and the captions (default 0)")
    share = "of the pairs of style and emoji, for test/ (default 0.05)"
    add.add_argument("--held-out", type=float, default=0.05, metavar="SHARE", help=share)
    add.set_defaults(run=prepare_command)


def _add_import(commands) -> None:
    add = commands.add_parser("import", help="a checkpoint of an original single file", description=import_command.__doc__)
    add.add_argument("file", metavar="FILE", help="a .safetensors file of the original latent or Stable Diffusion code")
    config = "a folder in Stable Diffusion's layout, or a Hub name: its configs, scheduler and tokenizer, not its weights"
    add.add_argument("--config", required=True, metavar="FOLDER_OR_NAME", help=config)
    add.add_argument("--out", required=True, metavar="DIR", help="a new folder")
    add.set_defaults(run=import_command)


def encode_command(arguments) -> None:
    from latentdiff.training.encode import encode_dataset as encode

    print(encode(arguments.config, arguments.overrides, part=arguments.part))


def reconstruct_command(arguments) -> None:
    from latentdiff.cli.output import dump
    from latentdiff.evaluation.reconstruct import reconstruct

    print(dump(reconstruct(arguments.model, arguments.images, arguments.out, arguments.own_size)))


def prepare_command(arguments) -> None:
    """Write a data set's pictures and captions to a folder with train/ and test/ splits."""
    from latentdiff.cli.output import dump
    from latentdiff.recipes.emoji.prepare import prepare_emoji

    print(dump(prepare_emoji(arguments.out, arguments.tarballs, arguments.seed, arguments.held_out)))


def import_command(arguments) -> None:
    """Make a checkpoint of one .safetensors file in the original Stable Diffusion layout, by diffusers' own converter."""
    from latentdiff.single_file import import_checkpoint

    print(import_checkpoint(arguments.file, arguments.config, arguments.out))


def info_command(arguments) -> None:
    from latentdiff.cli.info import info
    from latentdiff.cli.output import dump

    print(dump(info(arguments.what, arguments.overrides)))
