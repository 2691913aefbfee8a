"""The commands: which public function each one calls, and how its result is printed.

A command's flags are the function's own parameters, and their help is its docstring (see `latentdiff.cli.flags`). Nothing is
imported before a command is chosen, for torch and diffusers take seconds.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any, NamedTuple


class Command(NamedTuple):
    """One command of the command line."""

    function: str  # module:name, within latentdiff
    summary: str
    positional: tuple[str, ...]  # the parameters that are given by position instead of by a flag
    output: str  # of the result: "paths", "json", "text", or module:name of a function that makes text of it
    opens_weights: bool = True  # has --no-verify
    flags_of: str = ""  # another command, whose help describes the flags that this one's function does not describe


COMMANDS = {
    "fit": Command(
        "fitting.fit:fit",
        "make a model of a folder of images within some hours",
        ("folder", "overrides"),
        "fitting.finish:last_lines",
    ),
    "generate": Command("generation:generate", "make images from a checkpoint", ("what",), "paths"),
    "edit": Command(
        "editing:edit",
        "change, complete, restore, translate, vary or interpolate images",
        ("images",),
        "paths",
        flags_of="generate",
    ),
    "serve": Command("web.serve:serve", "show models and runs on a page in the browser", ("models",), "text"),
    "train": Command("training:train", "train a stage as a config says", ("config", "overrides"), "paths"),
    "publish": Command(
        "training.publish:publish", "make a checkpoint of a training state", ("run_folder",), "paths", opens_weights=False
    ),
    "encode": Command(
        "training.encode:encode_dataset", "build the latent cache of a diffusion config", ("config", "overrides"), "paths"
    ),
    "reconstruct": Command(
        "evaluation.reconstruct:reconstruct", "show images beside their reconstructions", ("model", "images"), "json"
    ),
    "info": Command("cli.info:info", "describe a model, a latent cache, a config or a data set", ("what", "overrides"), "json"),
    "evaluate": Command("evaluation.evaluate:evaluate", "measure generated images against a data set", ("model",), "json"),
    "compare": Command(
        "evaluation.compare:compare", "put records of evaluate, or one model's samplers, side by side", ("what",), "text"
    ),
    "card": Command(
        "evaluation.model_card:card", "put a record's values into a model card", ("model",), "paths", opens_weights=False
    ),
    "tune": Command(
        "evaluation.tuning:tune",
        "search sampler, steps and guidance; the best become the default",
        ("model",),
        "evaluation.tuning:tuning_markdown",
    ),
    "agreement": Command(
        "evaluation.compare_denoisers:agreement",
        "compare how well models denoise at each noise level",
        ("models",),
        "evaluation.compare_denoisers:agreement_markdown",
    ),
    "gallery": Command(
        "evaluation.gallery:gallery", "draw a trajectory, an interpolation and guidance scales", ("model",), "paths"
    ),
    "likelihood": Command(
        "evaluation.measure_likelihood:measure_likelihood", "bound the bits per dimension of a data set", ("model",), "json"
    ),
    "judge": Command("evaluation.judge:judge", "measure whether a model draws what prompts say", ("model",), "json"),
    "prepare": Command("recipes:prepare", "make a data set out of public files", ("name",), "json", opens_weights=False),
    "import": Command(
        "single_file:import_checkpoint", "make a checkpoint of an original single file", ("file",), "paths", opens_weights=False
    ),
}


def load(place: str) -> Any:
    """The object that "module:name" stands for, within latentdiff."""
    module, _, name = place.partition(":")
    return getattr(import_module(f"latentdiff.{module}"), name)
