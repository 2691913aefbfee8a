"""latentdiff: train, measure and publish your own latent diffusion models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.training.republish import publish

__all__ = ["LatentDiffusionPipeline", "publish"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # diffusers takes seconds to import, so the pipeline is looked up only when it is asked for
    if name == "LatentDiffusionPipeline":
        from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

        return LatentDiffusionPipeline
    if name == "publish":
        from latentdiff.training.republish import publish

        return publish
    raise AttributeError(f"module 'latentdiff' has no attribute {name!r}")
