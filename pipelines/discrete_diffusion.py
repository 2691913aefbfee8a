"""Discrete diffusion: images from a model over the codes of an autoencoder that has a codebook.

What it shares with latent diffusion (prompts, classes, images, masks, decoding) is in latent_diffusion.py beside this file. A
checkpoint's pipeline.py is that file and this one together, so that plain diffusers opens the folder:

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

It needs diffusers and torch alone, and transformers for a model that reads text.

How a call makes images, in the order of `DiscreteDiffusionPipeline.__call__`:
    check             refuse what cannot work, and say what would be valid
    match_inputs      one prompt and one class label for every image
    conditioning      prompts and class labels become what the U-Net is given
    encode_codes      the codes of an image that is given, which are kept where nothing is filled
    draw_codes        from nothing but masks, or random codes, to codes, step by step, with the U-Net
    decode_codes      the autoencoder turns codes into images
"""

import functools
import json
import math
import re
from collections.abc import Callable
from inspect import getfile, signature
from pathlib import Path
from typing import Any, Union

import torch
from diffusers import ImagePipelineOutput

from latentdiff.pipelines.latent_diffusion import (
    IMAGE_STRENGTH,
    MASK_FILL,
    MASK_MARGIN,
    LatentDiffusionPipeline,
    NonFiniteError,
    PipelineInputError,
    all_finite,
    free_cells,
    non_finite_cause,
    repeated,
    step_callback,
    with_border,
)

# The import above, which a checkpoint's pipeline.py does without: there latent_diffusion.py stands in front
_IMPORT = re.compile(r"^from latentdiff\.pipelines\.latent_diffusion import \([^)]*\)\n", re.MULTILINE)

ORDERS = ("random", "confidence")
PROCESSES = ("absorbing", "uniform")
LEVELS = ("together", "coarse_first")
SAMPLER_OPTIONS = {"temperature": 1.0, "confidence_noise": 4.5}  # of MaskGIT's code
CODE_OUTPUTS = ("pil", "np", "pt", "codes")
TIMESTEPS = 1000  # the U-Net is given TIMESTEPS t
FREE = -1  # in known codes: a position that is drawn
_LEAST = -1e4  # nats; stands for a log-probability of -inf, with which the difference of two would be NaN
_TINY = 1e-12

# The probability alpha(t) that a code is clean at t, as in `latentdiff.discrete.schedules`
SCHEDULES = {
    "linear": lambda t: 1 - t,
    "cosine": lambda t: 2 * torch.sin(math.pi / 4 * (1 - t)) ** 2,
    "cosine_squared": lambda t: torch.sin(math.pi / 2 * (1 - t)) ** 2,
}

_DictOrNone = Union[dict, None]  # noqa: UP007
_IntOrNone = Union[int, None]  # noqa: UP007
_ListOrDict = Union[list, dict, None]  # noqa: UP007
_ListOrTuple = Union[list, tuple, None]  # noqa: UP007
_ModuleOrNone = Union[torch.nn.Module, None]  # noqa: UP007
_StrOrNone = Union[str, None]  # noqa: UP007


class DiscreteDiffusionPipeline(LatentDiffusionPipeline):
    """Images from a discrete diffusion model: it draws codes, which the autoencoder decodes.

    Args:
        unet: `UNet2DModel` or `UNet2DConditionModel`. Its input has L (K + 1) channels of zeros and ones, which say the code of
            each of L levels, the last one of K + 1 being the mask; its output L K channels, the logits of the clean codes.
        vae: a diffusers `VQModel`, or an autoencoder that is used as one.
        process: {"name": "absorbing" or "uniform", "schedule": a name of SCHEDULES, "levels": one of LEVELS}: what training did
            to the codes. Levels that are not given are "together"; "coarse_first" draws the first level before the second.
        scheduler, prediction, schedule, image_condition: always None; latent diffusion has these.
        default_sampler: the order of calls that do not give one: "random" or "confidence".

    Other arguments and attributes are those of `LatentDiffusionPipeline`.
    """

    _callback_tensor_inputs = ["codes"]

    def __init__(
        self,
        unet: torch.nn.Module,
        vae: torch.nn.Module,
        process: _DictOrNone = None,
        scheduler: Any = None,
        class_names: _ListOrDict = None,
        null_class: _IntOrNone = None,
        image_size: _ListOrTuple = None,
        default_guidance_scale: float = 1.0,
        default_guidance_interval: _ListOrTuple = None,
        default_num_inference_steps: int = 20,
        default_sampler: str = "random",
        text_encoder: _ModuleOrNone = None,
        tokenizer: Any = None,
        null_prompt: _StrOrNone = "",
        prediction: _StrOrNone = None,
        schedule: _DictOrNone = None,
        image_condition: _DictOrNone = None,
    ):
        super().__init__(
            unet,
            vae,
            None,
            class_names=class_names,
            null_class=null_class,
            image_size=image_size,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
            default_num_inference_steps=default_num_inference_steps,
            default_sampler=default_sampler,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            null_prompt=null_prompt,
        )
        process = {"levels": "together", **(process or {})}  # checkpoints of before have no levels
        levels = LEVELS if process.get("name") == "absorbing" else LEVELS[:1]
        for key, valid in (("name", PROCESSES), ("schedule", tuple(SCHEDULES)), ("levels", levels)):
            if process.get(key) not in valid:
                raise PipelineInputError(f"process: its {key} is {process.get(key)!r}; valid: {', '.join(valid)}")
        self.register_to_config(process=process)

    @property
    def num_codes(self) -> int:
        """K: how many codes there are for a position."""
        return self.vae.quantize.n_e

    @property
    def code_shape(self) -> tuple[int, int, int]:
        """(L, h, w) of the codes of one image."""
        channels, height, width = self.latent_shape
        return channels // (self.num_codes + 1), height, width

    def alpha(self, t: float | torch.Tensor) -> torch.Tensor:
        """The probability that a code is clean at t in [0, 1], a number or any shape; float64."""
        return SCHEDULES[self.config.process["schedule"]](torch.as_tensor(t, dtype=torch.float64))

    def level_times(self, t: float) -> torch.Tensor:
        """How far the levels are corrupted at t, as times of the schedule: float64 [1], or [L] where they come in turn."""
        if self.config.process["levels"] == "together":
            return torch.tensor([t], dtype=torch.float64)
        # Each level's turn is twice as long as that of the level after; see `latentdiff.discrete.processes`
        parts = 2.0 ** torch.arange(self.code_shape[0] - 1, -1, -1, dtype=torch.float64)
        inner = (t * (2.0 ** len(parts) - 1) - (parts - 1)) / parts
        return torch.where(inner < 1e-12, 0.0, torch.where(inner > 1 - 1e-12, 1.0, inner))

    def predict(self, codes: torch.Tensor, t: torch.Tensor, **conditioning: torch.Tensor) -> torch.Tensor:
        """The logits of the clean codes, float32 [B, L, h, w, K]: the U-Net's, and for the process "uniform" log q(x_t | x0).

        The second is log(1 + K alpha / (1 - alpha)) for x0 = x_t, as `latentdiff.discrete.add_evidence` has it in training.

        codes: corrupted codes, int64 [B, L, h, w]. t: [B]. conditioning: from `conditioning`.
        """
        logits = code_logits(self.unet, codes, t, self.num_codes, **conditioning).float()
        if self.config.process["name"] == "absorbing":
            return logits
        alpha = self.alpha(t)
        own = torch.log1p(self.num_codes * alpha / (1 - alpha).clamp_min(_TINY)).reshape(-1, 1, 1, 1, 1)  # [B, 1, 1, 1, 1]
        return logits.scatter_add(-1, codes[..., None], own.expand(*codes.shape, 1).to(logits))

    def encode_codes(self, images: torch.Tensor) -> torch.Tensor:
        """The codes of images [B, C, H, W] in [-1, 1], with the border of the autoencoder: int64 [B, L, h, w]."""
        latents = self.vae.encode(images.to(self.vae.dtype)).latents
        if self.refuse_non_finite and not all_finite(latents):
            cause = non_finite_cause(self.vae, images, unused=("decoder.", "post_quant_conv."))
            raise NonFiniteError(f"encoder: its output is not finite; {cause}")
        codes = self.vae.quantize(latents)[2][2]  # [B h w], or with several levels [B h w, L]
        return codes.view(len(images), *latents.shape[2:], -1).movedim(-1, 1).contiguous()

    def decode_codes(
        self, codes: torch.Tensor, output_type: str = "pil", kept: tuple[torch.Tensor, torch.Tensor] | None = None
    ) -> Any:
        """Images of codes [B, L, h, w]. output_type, kept: as in `decode_latents`. NonFiniteError as there."""
        rows = self.vae.quantize.embedding.weight
        books = rows.view(-1, self.num_codes, rows.shape[1])  # [L, K, d]
        raw = torch.stack([book[codes[:, level]] for level, book in enumerate(books)]).sum(0)  # [B, h, w, d]
        raw = raw.movedim(-1, 1).contiguous()
        # A model whose decoder looks rows up by itself would take these for codes; it finds the nearest rows again
        is_quantised = not self.vae.config.get("lookup_from_codebook")
        return self.finish_images(self.vae.decode(raw, force_not_quantize=is_quantised).sample, raw, output_type, kept=kept)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        class_labels: str | int | list | None = None,
        negative_prompt: str | list[str] | None = None,
        negative_class_labels: str | int | list | None = None,
        num_images_per_label: int = 1,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        generator: torch.Generator | list[torch.Generator] | tuple[torch.Generator, ...] | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        return_dict: bool = True,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("codes",),
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        mask_margin: int | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make images, or change or complete given ones.

        Args:
            prompt, class_labels, negative_prompt, negative_class_labels, num_images_per_label, num_inference_steps, generator,
                return_dict: as in `LatentDiffusionPipeline`.
            guidance_scale: scale of classifier-free guidance on log-probabilities: negative + scale (positive - negative), then
                normalised (arXiv 2412.10193, section 3). At least 0; 1 is off. None: the checkpoint's default.
            guidance_interval: (low, high): guide only at times t within it, where 0 is data. None: the checkpoint's default.
            sampler: the order in which positions are drawn. "random": the process backwards in time, which draws from the
                model. "confidence": those that the network is surest of come first (MaskGIT, arXiv 2202.04200, section 3.2),
                for the process "absorbing". None: the checkpoint's default.
            sampler_options: {"temperature": of the logits, 1; "confidence_noise": of the order "confidence", 4.5}.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "codes" (int64 [B, L, h, w]).
            callback_on_step_end: called as f(pipe, step, t, {"codes": codes}) after each step, with t in [0, 1]. It may return
                {"codes": changed} and may set `pipe._interrupt = True`, which skips the remaining steps.
            callback_on_step_end_tensor_inputs: the tensors that the callback is given: ["codes"] or nothing.
            image: an image to change, or a list, as in `LatentDiffusionPipeline`. Its codes are corrupted as at t = strength,
                and the last part of the steps restores them.
            strength: how much of the image may change, from 0 (it is encoded and decoded, no more) to 1 (it is not used, except
                outside of a mask). None: 0.8, or 1 with mask_image.
            mask_image: what to fill: white is drawn anew, black stays. The codes of what stays are given to every step. Every
                pixel that stays is the given one exactly, unless output_type is "codes".
            mask_margin: positions around those that the mask touches that are drawn anew too; their pixels stay. None: 2.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with the images.

        Raises:
            PipelineInputError: a call that the checkpoint cannot answer; it says what would be valid.
            NonFiniteError: logits or images that hold NaN or infinity; it names the first part at fault.
        """
        # 1. Take the checkpoint's defaults, and refuse what cannot work
        sampler = sampler or self.config.default_sampler
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        interval = self.config.default_guidance_interval if guidance_interval is None else guidance_interval
        generator = list(generator) if isinstance(generator, tuple) else generator
        if hasattr(callback_on_step_end, "tensor_inputs"):  # a callback object of diffusers
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        if output_type not in CODE_OUTPUTS:
            raise PipelineInputError(f"output_type {output_type!r}: must be one of {', '.join(CODE_OUTPUTS)}")
        options = self.match_sampler(sampler, sampler_options)
        self.check_inputs(
            num_images_per_label,
            interval,
            steps,
            generator,
            sampler,
            sampler_options,
            None,
            "latent" if output_type == "codes" else output_type,
            callback_on_step_end_tensor_inputs,
            image,
            strength,
            mask_image,
            mask_margin,
        )
        given = None if image is None else self.prepare_image(image)  # [N, C, H, W] in [0, 1]
        masks = None if mask_image is None else self.prepare_image(mask_image, None, "mask_image")  # [M, 1, H, W]
        num_given = 1 if given is None else len(given)
        if masks is not None and 1 not in (len(masks), num_given) and len(masks) != num_given:
            raise PipelineInputError(f"mask_image: {len(masks)} for {num_given} images; give one, or one for each image")
        num_given = max(num_given, 0 if masks is None else len(masks))
        texts, labels, negative_texts, negative_labels = self.match_inputs(
            prompt, class_labels, negative_prompt, negative_class_labels, num_images_per_label, num_given
        )
        scale = self.match_guidance_scale(guidance_scale, texts, labels, negative_texts, negative_labels)
        if isinstance(generator, list) and len(generator) != len(texts):
            raise PipelineInputError(f"{len(generator)} generators for {len(texts)} images: pass one, or one per image")

        # 2. Define call parameters
        device = self._execution_device
        self._interrupt = False
        self._guidance_scale = scale

        # 3. Encode prompts and class labels: those to guide towards, and the negative ones to guide away from
        positive = self.conditioning(texts, labels, device)
        negative = self.conditioning(negative_texts, negative_labels, device) if scale != 1.0 else {}
        predict = functools.partial(self._guided, positive=positive, negative=negative, scale=scale, interval=interval)

        # 4. The codes to start from, and those that stay
        strength = (IMAGE_STRENGTH if masks is None else 1.0) if strength is None else float(strength)
        margin = MASK_MARGIN if mask_margin is None else mask_margin
        count = len(texts)
        start, known = self._given_codes(given, masks, strength if image is not None else 1.0, margin, count, device)

        # 5. Draw codes
        callback = step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        first = 0 if start is None else steps if strength == 0 else steps - max(1, min(steps, int(steps * strength + 1e-6)))
        codes = self.draw_codes(predict, count, steps, generator, sampler, options, start, first, known, callback, device)

        # 6. Decode
        kept = None if masks is None else (given, masks)
        images = codes if output_type == "codes" else self.decode_codes(codes, output_type, kept)

        # Offload all models
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def match_sampler(self, sampler: str, options: dict[str, Any] | None) -> dict[str, float]:
        """The options of the sampler, with their defaults. PipelineInputError for an order or an option that does not exist."""
        if sampler not in ORDERS:
            raise PipelineInputError(f"sampler {sampler!r}: this checkpoint draws codes; valid: {', '.join(ORDERS)}")
        if sampler == "confidence" and self.config.process["name"] != "absorbing":
            raise PipelineInputError("sampler 'confidence': needs masks, and this checkpoint's process has none; valid: random")
        options = {**SAMPLER_OPTIONS, **(options or {})}
        for name, value in options.items():
            if name not in SAMPLER_OPTIONS:
                raise PipelineInputError(f"sampler_options: {name!r} is unknown; valid: {', '.join(SAMPLER_OPTIONS)}")
            least_is_valid = name == "confidence_noise"
            if not isinstance(value, (int, float)) or not (0 <= value if least_is_valid else 0 < value) or math.isinf(value):
                valid = "of at least 0" if least_is_valid else "above 0"
                raise PipelineInputError(f"sampler_options: {name} {value}: must be a finite number {valid}")
        return options

    def draw_codes(
        self,
        predict: Callable[[torch.Tensor, float], torch.Tensor],
        count: int,
        steps: int,
        generator: Any = None,
        sampler: str = "random",
        options: dict[str, float] | None = None,
        start: torch.Tensor | None = None,
        first: int = 0,
        known: torch.Tensor | None = None,
        callback: Callable[..., dict | None] | None = None,
        device: torch.device | None = None,
    ) -> torch.Tensor:
        """Codes [count, L, h, w], int64: the process backwards in time, as `latentdiff.discrete.sample` runs it.

        Args:
            predict: predict(codes, t) -> log-probabilities or logits [B, L, h, w, K].
            count: how many images.
            steps: of equal length in t, from 1 to 0.
            generator: one, a list of `count`, or None.
            sampler, options: from `match_sampler`.
            start: clean codes [count, L, h, w] that are corrupted to the time of the first step that runs. None: t = 1.
            first: the first step that runs.
            known: codes that are kept, with -1 where they are drawn; int64 [count, L, h, w] or None.
            callback: see `__call__`.
            device: of the codes.
        """
        options = SAMPLER_OPTIONS if options is None else options
        device = device or self._execution_device
        times = [1 - i / steps for i in range(steps)] + [0.0]
        codes = self._prior((count, *self.code_shape), generator, device)
        at_start = 1 - self.alpha(self.level_times(times[first])).to(device)  # [G], the share that is masked now
        if start is not None:
            chance = _uniform_numbers(tuple(start.shape), generator, device)
            codes = torch.where(chance < at_start.view(-1, 1, 1), codes, start)
        codes = codes if known is None else torch.where(known >= 0, known, codes)
        free = self._count_masks(codes)  # [B, G]
        self._num_timesteps = steps - first
        with self.progress_bar(total=steps - first) as progress_bar:
            for i in range(first, steps):
                if self.interrupt:
                    continue
                t, s = times[i], times[i + 1]
                probs = (predict(codes, t) / options["temperature"]).softmax(-1)  # [B, L, h, w, K]
                if self.refuse_non_finite and bool(probs.isnan().any()):
                    cause = non_finite_cause(self.unet, codes.float())
                    raise NonFiniteError(f"U-Net: its output is not finite (timestep {TIMESTEPS * t:g}); {cause}")
                if sampler == "confidence":
                    level_times = self.level_times(s).to(device)  # [G]
                    masked = self._count_masks(codes)
                    left = torch.floor(free.double() * ((1 - self.alpha(level_times)) / at_start.clamp_min(_TINY)) + 1e-9)
                    left = left.minimum((masked - 1).double()).clamp_min(1).long()  # at least one fewer, and one at least
                    left = torch.where(level_times == 1, masked, torch.where(level_times == 0, 0, left))
                    codes = _surest(codes, probs, left, options["confidence_noise"] * level_times, generator)
                else:
                    codes = self._step(codes, _drawn(probs, generator), t, s, generator)
                codes = codes if known is None else torch.where(known >= 0, known, codes)
                if callback is not None:
                    changed = callback(self, i - first, t, {"codes": codes}) or {}
                    codes = changed.get("codes", codes)
                progress_bar.update()
        return torch.where(codes == self.num_codes, 0, codes)  # an interrupted call has masks left, which no image has

    def _guided(
        self,
        codes: torch.Tensor,
        t: float,
        positive: dict[str, torch.Tensor],
        negative: dict[str, torch.Tensor],
        scale: float,
        interval: tuple[float, float] | None,
    ) -> torch.Tensor:
        """Logits [B, L, h, w, K] at time t, guided where t is within the interval."""
        times = torch.full((len(codes),), t, dtype=torch.float64, device=codes.device)
        if not negative or not (interval is None or interval[0] <= t <= interval[1]):
            return self.predict(codes, times, **positive)
        both = {key: torch.cat([positive[key], negative[key]]) for key in positive}
        logits = self.predict(torch.cat([codes, codes]), torch.cat([times, times]), **both)
        own, other = logits.log_softmax(dim=-1).clamp_min(_LEAST).chunk(2)
        return torch.lerp(other, own, scale)

    def _given_codes(
        self,
        given: torch.Tensor | None,
        masks: torch.Tensor | None,
        strength: float,
        margin: int,
        count: int,
        device: torch.device,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(the codes that are corrupted to start from, the codes that are kept with -1 elsewhere), [B, L, h, w] or None.

        given: images [N, C, H, W] in [0, 1]. masks: [M, 1, H, W] or None. Masked pixels become mid-grey before they are encoded
        for what is kept, so what was there changes nothing at strength 1.
        """
        if given is None:
            return None, None
        cells = self.code_shape[1:]
        canvas = [side * self.vae_factor for side in cells]

        def codes_of(pictures: torch.Tensor) -> torch.Tensor:
            codes = self.encode_codes(with_border(pictures.to(device) * 2 - 1, canvas, -1.0))
            if codes.shape[1:] != self.code_shape:
                raise PipelineInputError(f"image: its codes are {list(codes.shape[1:])}, the U-Net takes {self.code_shape}")
            return repeated(codes, count)

        known = None
        if masks is not None:
            most = max(len(given), len(masks))
            filled = torch.where(repeated(masks, most) >= 0.5, torch.tensor((MASK_FILL + 1) / 2), repeated(given, most))
            is_free = repeated(free_cells(with_border(masks, canvas, 0.0), cells, margin), count).to(device)
            known = torch.where(is_free, FREE, codes_of(filled))
        return (codes_of(given) if strength < 1 else None), known

    def _prior(self, shape: tuple[int, ...], generator: Any, device: torch.device) -> torch.Tensor:
        """Codes at t = 1: masks, or uniformly random ones."""
        if self.config.process["name"] == "absorbing":
            return torch.full(shape, self.num_codes, device=device)
        chance = _uniform_numbers(shape, generator, device)
        return (chance * self.num_codes).long().clamp(max=self.num_codes - 1)

    def _count_masks(self, codes: torch.Tensor) -> torch.Tensor:
        """How many positions are masked, [B, G]: in each of the levels where they come in turn, else in all together."""
        return codes.eq(self.num_codes).reshape(len(codes), self.level_times(0.0).numel(), -1).sum(2)

    def _step(self, codes: torch.Tensor, x0: torch.Tensor, t: float, s: float, generator: Any) -> torch.Tensor:
        """A draw of q(x_s | x_t, x0) for s < t: codes at s, int64 [B, L, h, w].

        codes: x_t. x0: clean codes, drawn from what the network believes. The draws are those of
        `latentdiff.discrete.processes`: MDLM (arXiv 2406.07524), eq. 7, for masks, and D3PM (arXiv 2107.03006), eq. 3.
        """
        chance = _uniform_numbers(tuple(codes.shape), generator, codes.device)
        alpha_t, alpha_s = (self.alpha(self.level_times(time)).view(-1, 1, 1).to(codes.device) for time in (t, s))
        if self.config.process["name"] == "absorbing":
            is_shown = codes.eq(self.num_codes) & (chance * (1 - alpha_t) >= 1 - alpha_s)
            return torch.where(is_shown, x0, codes)
        # From x0 over x_s to x_t there are four ways, by which of the two steps corrupt. One is drawn by its share
        kept = alpha_t / alpha_s.clamp_min(_TINY)
        ways = [
            torch.where(codes == x0, alpha_t, 0.0).expand_as(chance),  # none: x_s = x0 = x_t
            (alpha_s * (1 - kept) / self.num_codes).expand_as(chance),  # the second alone: x_s = x0
            ((1 - alpha_s) * kept / self.num_codes).expand_as(chance),  # the first alone: x_s = x_t
            ((1 - alpha_s) * (1 - kept) / self.num_codes).expand_as(chance),  # both: x_s is any code
        ]
        way = _drawn(torch.stack(ways, dim=-1), generator)
        anything = (chance * self.num_codes).long().clamp(max=self.num_codes - 1)
        return torch.where(way < 2, x0, torch.where(way == 2, codes, anything))

    def to_json_string(self) -> str:
        """The text of model_index.json, without the entries of latent diffusion that a model over codes has not."""
        index = json.loads(super().to_json_string())
        for key in ("scheduler", "prediction", "schedule", "image_condition"):
            index.pop(key, None)
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, pipeline.py (latent_diffusion.py and this file), and hashes.json of each part's weights."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        Path(save_directory, "pipeline.py").write_text(_COMPLETE_SOURCE, encoding="utf-8")


def code_logits(
    unet: torch.nn.Module, codes: torch.Tensor, t: torch.Tensor, num_codes: int, **conditioning: torch.Tensor
) -> torch.Tensor:
    """A U-Net's logits of the clean codes, [B, L, h, w, K]. Training and the pipeline both ask it here.

    Args:
        unet: takes L (K + 1) channels and gives L K; it may be wrapped (DDP, torch.compile).
        codes: corrupted codes, int64 [B, L, h, w], each from 0 to K; K is the mask.
        t: times in [0, 1], [B].
        num_codes: K.
        conditioning: keyword arguments of the U-Net.
    """
    batch, levels, height, width = codes.shape
    inner = getattr(unet, "module", unet)
    dtype = next(inner.parameters()).dtype
    channels = torch.zeros(batch, levels, num_codes + 1, height, width, dtype=dtype, device=codes.device)
    channels.scatter_(2, codes[:, :, None], 1.0)
    if "encoder_hidden_states" in signature(getattr(inner, "_orig_mod", inner).forward).parameters:
        conditioning = {"encoder_hidden_states": None, **conditioning}
    logits = unet(channels.flatten(1, 2), (t * TIMESTEPS).float(), **conditioning).sample
    return logits.unflatten(1, (levels, num_codes)).permute(0, 1, 3, 4, 2)


def _uniform_numbers(shape: tuple[int, ...], generator: Any, device: torch.device) -> torch.Tensor:
    """Uniform numbers in [0, 1), float64 [B, ...], drawn where the generators are: one, a list of B, or torch's default."""
    if isinstance(generator, list):
        rows = [torch.rand(tuple(shape[1:]), generator=g, device=g.device, dtype=torch.float64) for g in generator]
        return torch.stack(rows).to(device)
    source = device if generator is None else generator.device
    return torch.rand(tuple(shape), generator=generator, device=source, dtype=torch.float64).to(device)


def _drawn(probs: torch.Tensor, generator: Any) -> torch.Tensor:
    """One draw from each of the distributions probs [B, ..., S], which need not sum to 1: int64 [B, ...].

    What has probability 0 is not drawn.
    """
    cumulative = probs.cumsum(dim=-1, dtype=torch.float64)
    total = cumulative[..., -1:]
    place = _uniform_numbers(tuple(probs.shape[:-1]), generator, probs.device)[..., None] * total
    place = torch.minimum(place, torch.nextafter(total, torch.zeros_like(total)))  # rounding may have reached the total
    return torch.searchsorted(cumulative, place, right=True)[..., 0]


def _surest(codes: torch.Tensor, probs: torch.Tensor, left: torch.Tensor, noise: torch.Tensor, generator: Any) -> torch.Tensor:
    """codes [B, ...] with all masks drawn from probs [B, ..., K], and of each group the least sure ones masked again.

    left: how many, [B, G]. noise: of the confidences, [G].
    """
    drawn, mask = _drawn(probs, generator), probs.shape[-1]
    groups = len(codes), left.shape[1], -1
    is_masked = codes.eq(mask).reshape(groups)
    confidence = probs.gather(-1, drawn[..., None])[..., 0].double().log().reshape(groups)
    if bool((noise > 0).any()):
        chance = _uniform_numbers(tuple(codes.shape), generator, codes.device).reshape(groups)
        confidence = confidence - noise[:, None] * torch.log(-torch.log(chance))  # Gumbel noise
    confidence = torch.where(is_masked, confidence, torch.inf)
    rank = confidence.argsort(dim=2, stable=True).argsort(dim=2)  # 0: the least sure
    again = (is_masked & (rank < left[..., None])).reshape(codes.shape)
    return torch.where(again, mask, torch.where(is_masked.reshape(codes.shape), drawn, codes))


def _complete_source() -> str:
    """The text of a checkpoint's pipeline.py: this file after latent_diffusion.py, or pipeline.py itself where it runs."""
    own = Path(__file__).read_text(encoding="utf-8")
    if _IMPORT.search(own) is None:
        return own
    return Path(getfile(LatentDiffusionPipeline)).read_text(encoding="utf-8") + "\n\n" + _IMPORT.sub("", own)


# Read now and not when saving: diffusers runs pipeline.py from a cache, where the next checkpoint's file replaces it
_COMPLETE_SOURCE = _complete_source()
