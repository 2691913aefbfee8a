"""latentdiff: train, measure and publish your own latent diffusion models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from latentdiff import _moved

if TYPE_CHECKING:
    from latentdiff.config import load_config
    from latentdiff.denoiser import Denoiser
    from latentdiff.errors import UserError
    from latentdiff.evaluation.evaluate import evaluate
    from latentdiff.generation import generate
    from latentdiff.guidance import ClassifierFree
    from latentdiff.likelihood import log_prob
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.samplers import encode, sample
    from latentdiff.schedules import make_schedule
    from latentdiff.training import train
    from latentdiff.training.publish import publish

__version__ = "0.1.0"
__all__ = [
    "ClassifierFree",
    "Denoiser",
    "LatentDiffusionPipeline",
    "UserError",
    "__version__",
    "encode",
    "evaluate",
    "generate",
    "load_config",
    "log_prob",
    "make_schedule",
    "publish",
    "sample",
    "train",
]

# Where each public name is defined. torch and diffusers take seconds to import, so a name is looked up when it is first used.
_HOMES = {
    "ClassifierFree": "guidance",
    "Denoiser": "denoiser",
    "LatentDiffusionPipeline": "pipelines.latent_diffusion",
    "UserError": "errors",
    "encode": "samplers",
    "evaluate": "evaluation.evaluate",
    "generate": "generation",
    "load_config": "config",
    "log_prob": "likelihood",
    "make_schedule": "schedules",
    "publish": "training.publish",
    "sample": "samplers",
    "train": "training",
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
