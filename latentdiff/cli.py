"""The `latentdiff` command: parse, call one Python function, turn a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from latentdiff.errors import UserError

DEFAULT_MODEL = "weights/fashion-mnist"


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def main(argv: Sequence[str] | None = None) -> None:
    """Entry point of the console script; exits with 0, or 2 on bad usage or input."""
    try:
        arguments = _parsed(argv)
        _quiet_libraries()
        arguments.run(arguments)
    except UserError as error:
        print(f"latentdiff: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a full disk, a folder that cannot be written: the file is named, the trace helps nobody
        print(f"latentdiff: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("latentdiff: interrupted", file=sys.stderr)
        sys.exit(130)


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
    _add_others(commands)
    _add_judge(commands)
    _add_prepare(commands)
    _add_import(commands)
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
    _add_cost(add)
    strength = "also guide by the model's own classifier, under --sampler; 1 is Bayes' rule, 0 off"
    add.add_argument("--classifier-strength", type=float, default=0.0, metavar="S", help=strength)
    add.add_argument("--sampler-options", nargs="+", metavar="key=value", help="keywords of --sampler, such as eta=0.5")
    add.add_argument("--seed", type=int, default=0, metavar="K", help="an image is a function of the seed (default 0)")
    add.add_argument("--batch-size", type=int, default=128, metavar="B", help="images made at a time (default 128)")
    add.add_argument("--out", default="samples.png", metavar="PATH", help=".png (a labelled grid), .npz, or a folder")
    add.set_defaults(run=generate_command)


def _add_cost(add) -> None:
    interval = "guide only at t in this interval, 0 is data and 1 noise; 0 1 is everywhere (default: the checkpoint's)"
    add.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help=interval)
    add.add_argument("--precision", default="float32", metavar="P", help="of the U-Net: float32 (default) or bfloat16")


def generate_command(arguments) -> None:
    """Make N images of each class or prompt named and write them to a labelled grid, an npz file or a folder."""
    from latentdiff.generation import generate

    options = {k: v for k, v in vars(arguments).items() if k not in ("command", "run")}
    print(generate(**options))


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
    if os.environ.get("RANK", "0") == "0":  # of several processes under `accelerate launch` one says the result
        print(folder)


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
    add.set_defaults(run=reconstruct_command)

    add = commands.add_parser("evaluate", help="measure generated images against a data set")
    add.add_argument("model", nargs="?", metavar="MODEL", help="a checkpoint (or give --samples)")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--samples", metavar="FILE", help="measure an npz of generate instead of a model")
    add.add_argument("--num-images", type=int, default=5000, metavar="N", help="class-balanced images (default 5000)")
    add.add_argument("--features", default="weights/fashion-mnist-features", metavar="F", help="a feature network's folder")
    add.add_argument("--cas-seeds", type=int, default=1, metavar="N", help="classifiers a side for CAS; 0 leaves it out")
    add.add_argument("--steps", type=int, metavar="S")
    add.add_argument("--sampler", metavar="NAME")
    add.add_argument("--guidance", type=float, metavar="G")
    _add_cost(add)
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=128, metavar="B")
    add.add_argument("--out", metavar="DIR", help="also write evaluation.json and evaluation.md there")
    add.set_defaults(run=evaluate_command)

    add = commands.add_parser("compare", help="samplers side by side: cost and distance at several lengths")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--samplers", nargs="+", required=True, metavar="NAME", help="or scheduler: the checkpoint's own")
    add.add_argument("--steps", nargs="+", type=int, default=[5, 10, 20, 50], metavar="S")
    add.add_argument("--num-images", type=int, default=1000, metavar="N", help="class-balanced images a cell (default 1000)")
    add.add_argument("--features", default="weights/fashion-mnist-features", metavar="F", help="a feature network's folder")
    add.add_argument("--guidance", type=float, metavar="G")
    _add_cost(add)
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=128, metavar="B")
    add.add_argument("--out", default="comparison", metavar="DIR", help="comparison.json and .md; an unfinished one goes on")
    add.set_defaults(run=compare_command)

    add = commands.add_parser("agreement", help="how well models denoise, by noise level, and how far their answers differ")
    add.add_argument("models", nargs="+", metavar="MODEL", help="checkpoints over one autoencoder")
    add.add_argument("--data", required=True, metavar="D", help="whose test images are denoised")
    add.add_argument("--num-images", type=int, default=500, metavar="N")
    add.add_argument("--log-snrs", type=float, nargs="+", default=[-6, -4, -2, 0, 2, 4, 6], metavar="L", help="noise levels")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=100, metavar="B")
    add.set_defaults(run=agreement_command)

    add = commands.add_parser("gallery", help="pictures of what the denoiser does: trajectory, interpolation, guidance")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="whose test images are interpolated between")
    add.add_argument("--steps", type=int, default=40, metavar="S")
    add.add_argument("--sampler", default="dpmpp_2m", metavar="NAME")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--out", default="gallery", metavar="DIR")
    add.set_defaults(run=gallery_command)

    add = commands.add_parser("likelihood", help="bits per dimension of a data set's pixels, a bound through both stages")
    add.add_argument("model", metavar="MODEL")
    add.add_argument("--data", required=True, metavar="D", help="a folder, fashion-mnist, a table or shards (see README)")
    add.add_argument("--num-images", type=int, default=200, metavar="N", help="images of the split (default 200)")
    add.add_argument("--probes", type=int, default=1, metavar="P", help="of Hutchinson's estimator for an image (default 1)")
    add.add_argument("--rtol", type=float, default=1e-2, metavar="T", help="tolerance of the ODE (default 0.01)")
    add.add_argument("--split", default="test", metavar="S", help="test (default) or train")
    add.add_argument("--unconditional", action="store_true", help="under the null class, not each image's own")
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=50, metavar="B")
    add.set_defaults(run=likelihood_command)

    add = commands.add_parser("info", help="what a model, a latent cache, a config or a data set is")
    add.add_argument("what", metavar="MODEL|CACHE|CONFIG|DATA", help="of a CONFIG also what its run will cost")
    add.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of a CONFIG")
    add.set_defaults(run=info_command)


def _add_judge(commands) -> None:
    add = commands.add_parser("judge", help="does a model draw what prompts say", description=judge_command.__doc__)
    add.add_argument("model", metavar="MODEL", help="a checkpoint that reads text")
    add.add_argument("--data", required=True, metavar="DIR", help="pictures with styles and identities (prepare emoji)")
    add.add_argument("--judge", required=True, metavar="FOLDER", help="what training a config with stage: judge made")
    add.add_argument("--num-prompts", type=int, default=200, metavar="N", help="seen pairs (default 200), and all held-out")
    add.add_argument("--steps", type=int, metavar="S")
    add.add_argument("--sampler", metavar="NAME")
    add.add_argument("--guidance", type=float, metavar="G")
    _add_cost(add)
    add.add_argument("--seed", type=int, default=0, metavar="K")
    add.add_argument("--batch-size", type=int, default=64, metavar="B")
    add.add_argument("--out", metavar="DIR", help="also write judge.json, judge.md and grid.png there")
    add.set_defaults(run=judge_command)


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
    from latentdiff.commands import encode

    print(encode(arguments.config, arguments.overrides, part=arguments.part))


def reconstruct_command(arguments) -> None:
    from latentdiff.commands import dump, reconstruct

    print(dump(reconstruct(arguments.model, arguments.images, arguments.out)))


def evaluate_command(arguments) -> None:
    from latentdiff.commands import dump, evaluate

    call = {"seed": arguments.seed, "batch_size": arguments.batch_size, "sampler": arguments.sampler}
    call |= {"num_inference_steps": arguments.steps, "guidance_scale": arguments.guidance, "precision": arguments.precision}
    call["guidance_interval"] = arguments.guidance_interval
    report = evaluate(
        arguments.model, arguments.data, arguments.num_images, arguments.samples, arguments.features, arguments.out,
        arguments.cas_seeds, **call,
    )  # fmt: skip
    print(dump(report))


def compare_command(arguments) -> None:
    from latentdiff.comparison import compare, markdown

    print(markdown(compare(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})), end="")


def agreement_command(arguments) -> None:
    from latentdiff.agreement import agreement, markdown

    print(markdown(agreement(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})), end="")


def gallery_command(arguments) -> None:
    from latentdiff.gallery import gallery

    for path in gallery(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")}):
        print(path)


def likelihood_command(arguments) -> None:
    from latentdiff.commands import dump, likelihood

    print(dump(likelihood(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})))


def judge_command(arguments) -> None:
    """Draw each pair of style and identity from its prompt and find the nearest real pictures, as a trained judge sees."""
    from latentdiff.commands import dump
    from latentdiff.judging import judge

    print(dump(judge(**{k: v for k, v in vars(arguments).items() if k not in ("command", "run")})))


def prepare_command(arguments) -> None:
    """Write a data set's pictures and captions to a folder with train/ and test/ splits."""
    from latentdiff.commands import dump
    from latentdiff.data.emoji import prepare_emoji

    print(dump(prepare_emoji(arguments.out, arguments.tarballs, arguments.seed, arguments.held_out)))


def import_command(arguments) -> None:
    """Make a checkpoint of one .safetensors file in the original Stable Diffusion layout, by diffusers' own converter."""
    from latentdiff.imports import import_checkpoint

    print(import_checkpoint(arguments.file, arguments.config, arguments.out))


def info_command(arguments) -> None:
    from latentdiff.commands import dump
    from latentdiff.facts import info

    print(dump(info(arguments.what, arguments.overrides)))
