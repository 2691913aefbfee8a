"""latentdiff: train, measure and publish your own latent diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentdiff import _moved

if TYPE_CHECKING:
    from latentdiff.cli.info import info
    from latentdiff.config import load_config
    from latentdiff.denoiser import Denoiser
    from latentdiff.editing import edit
    from latentdiff.errors import UserError
    from latentdiff.evaluation.compare import compare
    from latentdiff.evaluation.compare_denoisers import agreement
    from latentdiff.evaluation.evaluate import evaluate
    from latentdiff.evaluation.gallery import gallery
    from latentdiff.evaluation.judge import judge
    from latentdiff.evaluation.measure_likelihood import measure_likelihood
    from latentdiff.evaluation.model_card import card
    from latentdiff.evaluation.reconstruct import reconstruct
    from latentdiff.evaluation.tuning import tune
    from latentdiff.fitting.fit import fit
    from latentdiff.generation import generate
    from latentdiff.guidance import ClassifierFree
    from latentdiff.likelihood import log_prob
    from latentdiff.pipelines.discrete_diffusion import DiscreteDiffusionPipeline
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.recipes import prepare
    from latentdiff.samplers import encode, sample
    from latentdiff.schedules import make_schedule
    from latentdiff.single_file import import_checkpoint
    from latentdiff.training import train
    from latentdiff.training.encode import encode_dataset
    from latentdiff.training.publish import publish
    from latentdiff.web.serve import serve

__version__ = "0.1.0"
__all__ = [
    "ClassifierFree",
    "Denoiser",
    "DiscreteDiffusionPipeline",
    "LatentDiffusionPipeline",
    "UserError",
    "__version__",
    "agreement",
    "card",
    "compare",
    "edit",
    "encode",
    "encode_dataset",
    "evaluate",
    "fit",
    "gallery",
    "generate",
    "import_checkpoint",
    "info",
    "judge",
    "load_config",
    "log_prob",
    "make_schedule",
    "measure_likelihood",
    "prepare",
    "publish",
    "reconstruct",
    "sample",
    "serve",
    "train",
    "tune",
]

# Where each public name is defined. torch and diffusers take seconds to import, so a name is looked up when it is first used.
_HOMES = {
    "ClassifierFree": "guidance",
    "Denoiser": "denoiser",
    "DiscreteDiffusionPipeline": "pipelines.discrete_diffusion",
    "LatentDiffusionPipeline": "pipelines.latent_diffusion",
    "UserError": "errors",
    "agreement": "evaluation.compare_denoisers",
    "card": "evaluation.model_card",
    "compare": "evaluation.compare",
    "edit": "editing",
    "encode": "samplers",
    "encode_dataset": "training.encode",
    "evaluate": "evaluation.evaluate",
    "fit": "fitting.fit",
    "gallery": "evaluation.gallery",
    "generate": "generation",
    "import_checkpoint": "single_file",
    "info": "cli.info",
    "judge": "evaluation.judge",
    "load_config": "config",
    "log_prob": "likelihood",
    "make_schedule": "schedules",
    "measure_likelihood": "evaluation.measure_likelihood",
    "prepare": "recipes",
    "publish": "training.publish",
    "reconstruct": "evaluation.reconstruct",
    "sample": "samplers",
    "serve": "web.serve",
    "train": "training",
    "tune": "evaluation.tuning",
}

_moved.install()


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
    value = getattr(import_module(f"latentdiff.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
