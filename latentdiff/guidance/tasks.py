"""Restoring an image by a diffusion model: inpainting, upscaling, deblurring and colouring, each by its task's name.

The model is not trained for the task: `Reconstruction` draws from its posterior given the observed image. Of inpainting
`KnownPixels` is another way.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from latentdiff.denoiser import DenoiserLike
from latentdiff.errors import UserError
from latentdiff.guidance.gradient import Reconstruction
from latentdiff.guidance.known_pixels import KnownPixels
from latentdiff.guidance.operators import Blur, Downsample, Grey, Mask, Operator, of_latents


@dataclass(frozen=True)
class Settings:
    """How a task is solved.

    The method for "upscale" is the best of three on 20 images, and that for "colorize" was chosen by emoji; see
    tests/benchmarks/README.md. The other tasks have the numbers of "upscale", unmeasured.

    Attributes:
        method: of `Reconstruction`, or "known_pixels" for `KnownPixels`, which reads none of the next three.
        noise_std: standard deviation of the noise that the observation is taken to have, for pixels in [-1, 1]. A smaller one
            keeps closer to the observation.
        strength: 1 is Bayes' rule; below it the observation counts less.
        solver_steps: of "pigdm" and "mmps".
        sampler, steps: of `latentdiff.samplers`.
        sampler_options: of the sampler.
        guidance: scale of classifier-free guidance towards what the call says that the image shows; None: the pipeline's.
        known_noise: `noise` of `KnownPixels`.
    """

    method: str
    noise_std: float
    strength: float
    solver_steps: int
    sampler: str
    steps: int
    sampler_options: tuple[tuple[str, Any], ...] = ()
    guidance: float | None = None
    known_noise: float = 1.0


SETTINGS = {
    "inpaint": Settings("mmps", 0.05, 1.0, 5, "dpmpp_2m_sde", 10),
    "upscale": Settings("mmps", 0.02, 1.0, 5, "dpmpp_2m_sde", 10),
    "deblur": Settings("mmps", 0.02, 1.0, 5, "dpmpp_2m_sde", 10),
    # The error of a first stage is about 0.1. Colours came out false with guidance by the prompt, and garish at strength 1
    "colorize": Settings("dps", 0.1, 0.1, 5, "dpmpp_2m_sde", 50, guidance=1.0),
}
TASKS = tuple(SETTINGS)
KNOWN_PIXELS = Settings("known_pixels", 0.0, 1.0, 0, "dpmpp_2m_sde", 24, known_noise=0.5)


@dataclass(frozen=True, eq=False)
class Restoration:
    """How a pipeline restores an image: `pipe(..., output_type="pt", **restoration.call).images`, then `finish`.

    Attributes:
        operator: what the image was observed through; it maps images [B, C, H, W] in [-1, 1].
        y: the observation, [1 or B, ...].
        observe: the operator after the decoder; it maps latents.
        settings: the method and its numbers.
        encode, decode: latents of images and images of latents, of method "known_pixels".
        mask: what is hidden, of that method.
    """

    operator: Operator
    y: Tensor
    observe: Callable[[Tensor], Tensor]
    settings: Settings
    encode: Callable[[Tensor], Tensor] | None = None
    decode: Callable[[Tensor], Tensor] | None = None
    mask: Tensor | None = None

    def guide(self, denoiser: DenoiserLike) -> Reconstruction | KnownPixels:
        """The denoiser with guidance to the observation: the pipeline's `guidance`."""
        s = self.settings
        if s.method == "known_pixels":
            assert self.mask is not None and self.encode is not None and self.decode is not None
            return KnownPixels(denoiser, self.y, self.mask, self.encode, self.decode, s.known_noise)
        return Reconstruction(
            denoiser, self.observe, self.y, s.strength, s.noise_std, solver_steps=s.solver_steps, method=s.method
        )

    @property
    def call(self) -> dict[str, Any]:
        """The arguments of the pipeline's call: sampler, sampler_options, num_inference_steps, guidance; also guidance_scale
        where the settings have one."""
        s = self.settings
        scale = {} if s.guidance is None else {"guidance_scale": s.guidance}
        return {
            "sampler": s.sampler,
            "sampler_options": dict(s.sampler_options),
            "num_inference_steps": s.steps,
            "guidance": self.guide,
            **scale,
        }

    def finish(self, images: Tensor) -> Tensor:
        """Images [B, C, H, W] in [0, 1] that agree with the observation, where the operator allows it; clipped to [0, 1]."""
        return (self.operator.project(2 * images - 1, self.y).clamp(-1, 1) + 1) / 2


def restoration(
    task: str,
    observed: Tensor,
    decode: Callable[[Tensor], Tensor],
    image_size: Sequence[int],
    mask: Tensor | None = None,
    blur_std: float = 1.0,
    encode: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Restoration:
    """How to restore an image, by the task's name.

    Args:
        task: "inpaint" (a part is hidden), "upscale" (the resolution is low), "deblur" or "colorize" (grey).
        observed: the image to restore, [1 or B, C, h, w] in [-1, 1]. For "upscale" the size (h, w) is smaller than image_size,
            by one whole factor. For "colorize" C is 1, or 3 with the colours not read. Else it is like the result.
        decode: images [B, C, H, W] in [-1, 1] of latents, differentiable, such as `LatentCodec(pipe.vae).decode`.
        image_size: (H, W) of the model's images, `pipe.config.image_size`; a border around them is cut off.
        mask: for "inpaint": [H, W], [1, 1, H, W] or [B, 1, H, W], 1 (white) where pixels are to be filled in.
        blur_std: for "deblur": standard deviation of the Gaussian blur, in pixels.
        encode: latents of images [B, C, H, W] in [-1, 1], border included, for method="known_pixels" of "inpaint".
        settings: any of the fields of `Settings`, in the place of the task's default.

    Returns:
        The `Restoration`.

    Raises:
        UserError: an unknown task or setting, a sampler that does not end, an image of another size, or a mask that is missing
            or hides nothing.
    """
    if task not in SETTINGS:
        raise UserError(f"task {task!r}: unknown; valid: {', '.join(TASKS)}")
    unknown = settings.keys() - vars(SETTINGS[task]).keys()
    if unknown:
        raise UserError(f"task {task}: has no setting {sorted(unknown)[0]!r}; valid: {', '.join(vars(SETTINGS[task]))}")
    operator = _operator(task, observed, image_size, mask, blur_std)
    y = observed
    if task == "inpaint":
        y = operator(observed)
    elif task == "colorize" and observed.shape[1] == 3:
        y = operator(observed)
    uses_pixels = settings.get("method") == KNOWN_PIXELS.method
    if uses_pixels and (task != "inpaint" or encode is None):
        raise UserError(f"task {task}: method known_pixels is of inpaint, with encode=; leave it out")
    chosen = Settings(**{**vars(KNOWN_PIXELS if uses_pixels else SETTINGS[task]), **settings})
    if chosen.sampler == "dopri5" and chosen.method in ("pigdm", "mmps"):
        # Where conjugate gradients stop a step earlier or later the slope jumps, and adaptive steps shrink without end
        raise UserError(f"task {task}: sampler dopri5 does not end with method {chosen.method}; take another, such as heun")
    seen = of_latents(operator, decode, image_size)
    if not isinstance(operator, Mask):
        return Restoration(operator, y, seen, chosen)
    return Restoration(operator, y, seen, chosen, encode, decode, 1 - operator.known)


def _operator(task: str, observed: Tensor, image_size: Sequence[int], mask: Tensor | None, blur_std: float) -> Operator:
    """The operator of a task. UserError where the image or the mask does not fit."""
    height, width = observed.shape[-2:]
    size = f"the image is {height}x{width}"
    if task == "upscale":
        factor = image_size[0] // height
        if factor < 2 or (factor * height, factor * width) != tuple(image_size):
            raise UserError(f"task upscale: {size}, which is no whole part of the model's {image_size[0]}x{image_size[1]}")
        return Downsample(factor)
    if (height, width) != tuple(image_size):
        raise UserError(f"task {task}: {size}, and the model's images are {image_size[0]}x{image_size[1]}")
    if task == "deblur":
        return Blur(blur_std)
    if task == "colorize":
        if observed.shape[1] not in (1, 3):
            raise UserError(f"task colorize: the image has {observed.shape[1]} channels; it must be grey or of 3 colours")
        return Grey()
    if mask is None:
        raise UserError("task inpaint: needs a mask, white where the image is to be filled in")
    operator = Mask(mask)
    if bool(operator.known.flatten(1).all(1).any()):
        raise UserError("task inpaint: the mask hides nothing; white pixels are filled in")
    return operator
