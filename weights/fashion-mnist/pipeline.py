"""Latent diffusion: images from prompts, class labels, both or neither; and changed or completed images.

This file is saved into every checkpoint as pipeline.py, so that plain diffusers opens the folder:

    pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)

It is complete: it needs diffusers and torch, and transformers for a model that reads text. The latentdiff package is needed
only for its own samplers (`sampler=`).

How a call makes images, in the order of `LatentDiffusionPipeline.__call__`:
    check_inputs      refuse what cannot work, and say what would be valid
    match_inputs      one prompt and one class label for every image
    conditioning      prompts and class labels become what the U-Net is given
    prepare_latents   noise of the size of the latents
    prepare_start     the latents of an image that is given, which denoising then starts from
    denoise           a scheduler or sampler takes the noise to latents, step by step, with the U-Net
    decode_latents    the autoencoder turns latents into images
"""

import contextlib
import copy
import functools
import hashlib
import importlib.util
import json
import math
import operator
import threading
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, NamedTuple, Union

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

# Read now and not when saving: diffusers runs this file from a cache, where the next checkpoint's file replaces it
_SOURCE = Path(__file__).read_text(encoding="utf-8")
# A logger below "diffusers", so that diffusers.utils.logging.set_verbosity acts on it
_LOGGER = logging.get_logger("diffusers.latent_diffusion")
# A tokenizer keeps its padding and truncation as state, so two threads must not use it at once
_TOKENIZER_LOCK = threading.Lock()

OUTPUT_TYPES = ("pil", "np", "pt", "latent")
LISTED_CLASSES = 60  # classes that a message names
# A larger number is a mistake, or would take all memory
MAX_STEPS = 100_000
MAX_SAMPLE_SIZE = 4096
MAX_TOKENS = 100_000
# Changing an image. The value of masked pixels before they are encoded (mid-grey in [-1, 1]), and the latent cells around the
# mask that are drawn anew too
MASK_FILL = 0.0
MASK_MARGIN = 2  # measured by tests/benchmarks/completion.py
IMAGE_STRENGTH = 0.8  # of a call with an image and no mask, as in diffusers

# Folders in the layout of StableDiffusionPipeline: the defaults of its calls, and its entries that make no picture
STABLE_DIFFUSION_DEFAULTS = {"default_guidance_scale": 7.5, "default_num_inference_steps": 50}
STABLE_DIFFUSION_ONLY = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")

# What a folder may name without running code from it or from the Hub: see `refuse_code`
PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
OWN_AUTOENCODERS = "vq_models"  # autoencoders that diffusers does not have; this file of latentdiff is saved with them
FETCHING_KEYS = ("quantization_config", "fusion_config", "transformers_weights")
TORCH_ATTENTION = (None, "eager", "sdpa")

# The schedulers of diffusers that can be swapped in by from_config, by the noise that they are made for. The others run
# from data to noise, add noise of their own, or need more than the output of a network.
VP_SCHEDULERS = (
    "DDIMScheduler",
    "DDIMParallelScheduler",
    "DDPMScheduler",
    "DDPMParallelScheduler",
    "DPMSolverSDEScheduler",
    "EulerAncestralDiscreteScheduler",
    "EulerDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "LCMScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
    "TCDScheduler",
)
VP_OR_FLOW_SCHEDULERS = (  # for a flow where use_flow_sigmas is set
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
EDM_SCHEDULERS = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
SCHEDULERS = {
    "vp": VP_SCHEDULERS + VP_OR_FLOW_SCHEDULERS,
    "flow": FLOW_SCHEDULERS + VP_OR_FLOW_SCHEDULERS,
    "edm": EDM_SCHEDULERS,
}
# These count their steps from the first, so they cannot begin in the middle of their timesteps
FROM_THE_FIRST_STEP = ("PNDMScheduler",)
# A step of these has a second stage, so the second sigma must not be far below the first
TWO_STAGE_SCHEDULERS = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# latentdiff's samplers of the ODE, which a bridge needs: those of the SDE replace its starting images by noise
BRIDGE_SAMPLERS = ("euler", "heun", "dopri5", "dpmpp_2m", "dpmpp_3m")
# What a scheduler raises for a config, a number of steps or an output of the network that it cannot take
SCHEDULER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)

# Annotations of a pipeline's __init__, in the only form that older diffusers reads
_ListOrDict = Union[list, dict, None]  # noqa: UP007
_ListOrTuple = Union[list, tuple, None]  # noqa: UP007
_DictOrNone = Union[dict, None]  # noqa: UP007
_IntOrNone = Union[int, None]  # noqa: UP007
_FloatOrNone = Union[float, None]  # noqa: UP007
_ModuleOrNone = Union[torch.nn.Module, None]  # noqa: UP007
_StrOrNone = Union[str, None]  # noqa: UP007


class PipelineInputError(ValueError):
    """A call that the checkpoint cannot answer. One line that says what would be valid."""


class NonFiniteError(ValueError):
    """An output that holds NaN or infinity. One line that names the part of the pipeline that made it first."""


class ImageStart(NamedTuple):
    """What denoising starts from, and keeps, in a call with an image.

    Attributes:
        strength: the share of the steps that run, from 0 to 1. At 1 the start is noise alone.
        latents: normalised latents of the images, [B, c, h, w]; None at strength 1.
        known: normalised latents that are kept where is_free is False, [B, c, h, w]; None without a mask.
        is_free: the latent cells that are drawn anew, bool [B, 1, h, w]; None without a mask.
    """

    strength: float
    latents: torch.Tensor | None
    known: torch.Tensor | None = None
    is_free: torch.Tensor | None = None

    def skipped_steps(self, steps: int) -> int:
        """How many of a number of steps do not run, the first ones: as in diffusers, but one runs at any strength above 0."""
        if self.strength == 0:
            return steps
        return steps - max(1, min(steps, int(steps * self.strength + 1e-6)))

    def noised(self, noise: torch.Tensor, alpha: float, sigma: float, prior_std: float) -> torch.Tensor:
        """The noisy latents [B, c, h, w] at the first step that runs (SDEdit, arXiv 2108.01073, algorithm 1).

        noise: unit-variance noise [B, c, h, w]. alpha, sigma: factors of latents and noise at that step. prior_std: the
        standard deviation of pure noise there.
        """
        latents = noise * prior_std if self.latents is None else alpha * self.latents + sigma * noise
        return self.keep(latents, noise, alpha, sigma)

    def keep(self, latents: torch.Tensor, noise: torch.Tensor, alpha: float, sigma: float) -> torch.Tensor:
        """Noisy latents with alpha known + sigma noise in the cells that are not free (Score SDE, arXiv 2011.13456, I.2)."""
        if self.known is None or self.is_free is None:
            return latents
        return torch.where(self.is_free, latents, alpha * self.known + sigma * noise)


class LatentDiffusionPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Images from a latent diffusion model, grey or colour, square or oblong.

    A folder in Stable Diffusion's layout opens as one, too. For the methods that load, save and move a pipeline see
    `DiffusionPipeline`; for LoRA weights see `StableDiffusionLoraLoaderMixin`.

    Args:
        unet: `UNet2DModel` or `UNet2DConditionModel` over latents [B, c, h, w]. Its sample_size gives h and w.
        vae: a diffusers autoencoder with decode(z).sample. Its config holds the mean and standard deviation of the latents.
        scheduler: a diffusers scheduler, or None for a noise schedule that diffusers does not have.
        class_names: class names in the order of their index, or a dict from "index" to name.
        null_class: index of the "no class" embedding; None where training never dropped the class.
        image_size: (H, W) of the images; decoded images are larger where training padded them.
        prediction: what the U-Net predicts, for latentdiff's samplers: "epsilon", "sample", "v_prediction", "score", "flow"
            or "edm".
        schedule: the noise schedule, for latentdiff's samplers: {"name": ..., parameters} of
            `latentdiff.schedules.make_schedule`. None: read from the scheduler.
        default_guidance_scale, default_guidance_interval, default_num_inference_steps: for calls that do not give them.
        default_sampler: the latentdiff sampler that runs where scheduler is None.
        default_guidance_rule, default_guidance_rescale, default_guidance_options: guidance_rule, guidance_rescale and
            guidance_options of calls that do not give them. None: "cfg", 0 and no options.
        text_encoder: a transformers encoder. The U-Net attends to its last hidden states [B, L, d].
        tokenizer: of the text encoder; its model_max_length is L. Padding is masked where the encoder's config sets
            use_attention_mask.
        null_prompt: the text that stands for "no text"; None where training never dropped the text.
        image_condition: the second image that the U-Net is given: {"kind": "low_resolution", "mask", "grey" or "pair";
            "factor": how many times smaller it is; "dropped": whether training left it out at times}. None: none is given.
        bridge: the data set that a bridge starts from; None: the model starts from noise. A bridge is given latents= of that
            data set's images in every call.

    Attributes:
        refuse_non_finite: whether NaN and infinity in latents or images raise `NonFiniteError`. Set it to False to get them.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    refuse_non_finite = True
    _optional_components = ["scheduler", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: Any,
        class_names: _ListOrDict = None,
        null_class: _IntOrNone = None,
        image_size: _ListOrTuple = None,
        prediction: _StrOrNone = None,
        schedule: _DictOrNone = None,
        default_guidance_scale: float = 1.0,
        default_guidance_interval: _ListOrTuple = None,
        default_num_inference_steps: int = 20,
        default_sampler: _StrOrNone = None,
        text_encoder: _ModuleOrNone = None,
        tokenizer: Any = None,
        null_prompt: _StrOrNone = "",
        bridge: _StrOrNone = None,
        image_condition: _DictOrNone = None,
        default_guidance_rule: _StrOrNone = None,
        default_guidance_rescale: _FloatOrNone = None,
        default_guidance_options: _DictOrNone = None,
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        if isinstance(class_names, (list, tuple)):  # diffusers would take a list of strings for a (library, class) pair
            class_names = {str(i): str(name) for i, name in enumerate(class_names)}
        self.register_to_config(
            class_names=class_names,
            null_class=null_class,
            null_prompt=null_prompt,
            image_condition=image_condition,
            prediction=prediction,
            schedule=schedule,
            image_size=list(image_size) if image_size is not None else None,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
            default_num_inference_steps=default_num_inference_steps,
            default_sampler=default_sampler,
        )
        later = {  # each is written only where it is set, so that model_index.json of other checkpoints stays as it was
            "bridge": bridge,
            "default_guidance_rule": default_guidance_rule,
            "default_guidance_rescale": default_guidance_rescale,
            "default_guidance_options": default_guidance_options,
        }
        self.register_to_config(**{key: value for key, value in later.items() if value is not None})
        self._published_scheduler = scheduler  # pipe.scheduler may be swapped later
        self._interrupt = False
        self._num_timesteps = 0
        self._guidance_scale = default_guidance_scale

    @property
    def interrupt(self) -> bool:
        """Whether the remaining steps of this call are skipped. A callback may set `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """Steps of the current call, or of the last one."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the current call, or of the last one."""
        return self._guidance_scale

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their index; empty where the checkpoint has none."""
        names = self.config.class_names or {}
        return [names[key] for key in sorted(names, key=int)]

    @property
    def num_classes(self) -> int:
        """How many classes there are, without the null class; 0 for a U-Net without classes."""
        rows = self.unet.config.get("num_class_embeds") or 0
        return rows - 1 if rows and self.config.null_class is not None else rows

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent. PipelineInputError where the U-Net's config does not give it."""
        size = self.unet.config.get("sample_size")
        if size is None:
            raise PipelineInputError("unet/config.json has no sample_size: it must give the latent's height and width")
        height, width = (size, size) if isinstance(size, int) else size
        if not all(isinstance(side, int) and 1 <= side <= MAX_SAMPLE_SIZE for side in (height, width)):
            raise PipelineInputError(f"unet/config.json: sample_size {size}: must be from 1 to {MAX_SAMPLE_SIZE}")
        # A U-Net that is given a second image takes more channels than a latent has
        key = "in_channels" if self.config.image_condition is None else "out_channels"
        return self.unet.config[key], height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model makes by default."""
        _, height, width = self.latent_shape
        size = self.config.image_size or (height * self.vae_factor, width * self.vae_factor)
        channels = self.vae.config.get("in_channels") or self.vae.config.get("out_channels")
        return channels, *size

    @property
    def vae_factor(self) -> int:
        """The side of an image over that of its latents."""
        config = self.vae.config
        widths = config.get("block_out_channels") or config.get("encoder_block_out_channels") or [0]
        return 2 ** (len(widths) - 1)

    def describe_classes(self) -> str:
        """The classes of this checkpoint in one line, for messages."""
        count = self.num_classes
        if count == 0:
            kind = "is unconditional" if self.text_encoder is None else "reads prompts (prompt=)"
            if self.config.image_condition and self.text_encoder is None:
                kind = "is given an image (condition_image=)"
            return f"this checkpoint {kind} and takes no class labels"
        names = self.class_names or [""] * count
        names = [name if name.isprintable() else repr(name) for name in names]  # an escape code would drive the terminal
        listed = ", ".join(f"{i} {name}".strip() for i, name in enumerate(names[:LISTED_CLASSES]))
        return f"the classes are: {listed}" + (f", ... ({count} in all)" if count > LISTED_CLASSES else "")

    def class_index(self, label: str | int | None) -> int:
        """The embedding row of a class.

        label: a name, a number (42 or "42"; names come first), or None for "no class". PipelineInputError for anything else.
        """
        names, null_class = self.class_names, self.config.null_class
        if label is None:
            if null_class is None:
                raise PipelineInputError(
                    f"this checkpoint has no null class, so every image needs a class; {self.describe_classes()}"
                )
            return null_class
        if isinstance(label, str) and label in names:
            return names.index(label)
        number = None
        if isinstance(label, str):
            number = int(label) if label.isdecimal() else None
        elif not isinstance(label, bool):
            with contextlib.suppress(TypeError):  # an integer of Python, numpy or torch
                number = operator.index(label)
        if number is None or not 0 <= number < self.num_classes:
            raise PipelineInputError(f"unknown class {label!r}; {self.describe_classes()}")
        return number

    def parse_prompts(self, prompt: Any, name: str = "prompt") -> list[str | None]:
        """A list of texts from a prompt or a list of prompts, with None for "no text".

        name: of the argument, for messages. PipelineInputError for what is not text, or for text that the model cannot read.
        """
        texts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not texts or not all(isinstance(text, (str, type(None))) for text in texts):
            raise PipelineInputError(f"{name} {prompt!r}: must be a text, or a list of texts that is not empty")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text or ""):
            raise PipelineInputError(f"{name} {prompt!r}: is not valid UTF-8")
        if self.text_encoder is None and any(text is not None for text in texts):
            raise PipelineInputError(f"{name}: this checkpoint has no text encoder; {self.describe_classes()}")
        return [text if text and text.strip() else None for text in texts]

    def parse_class_labels(self, class_labels: Any, name: str = "class_labels") -> list[int | None]:
        """A list of embedding rows from a label or a list, tensor or array of labels; None where the U-Net has no classes.

        name: of the argument, for messages. PipelineInputError for an unknown class.
        """
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        if not labels:
            raise PipelineInputError(f"{name} is empty; {self.describe_classes()}")
        return [None if label is None and self.num_classes == 0 else self.class_index(label) for label in labels]

    def check_inputs(
        self,
        num_images_per_label,
        guidance_interval,
        num_inference_steps,
        generator,
        sampler,
        sampler_options,
        guidance,
        output_type,
        callback_on_step_end_tensor_inputs,
        image=None,
        strength=None,
        mask_image=None,
        mask_margin=None,
        height=None,
        width=None,
    ) -> None:
        """PipelineInputError for arguments of `__call__` that cannot work, whatever the prompts and class labels are."""
        if output_type not in OUTPUT_TYPES:
            raise PipelineInputError(f"output_type {output_type!r}: must be one of {', '.join(OUTPUT_TYPES)}")
        if not sampler and not self.scheduler:
            raise PipelineInputError("this checkpoint has neither a scheduler nor a default_sampler: sampler= is needed")
        if not sampler and (sampler_options or guidance is not None):
            raise PipelineInputError("sampler_options and guidance: sampler= is needed, the diffusers scheduler reads neither")
        bridge = self.config.get("bridge")
        if bridge is not None and sampler is not None and sampler not in BRIDGE_SAMPLERS:
            valid = ", ".join(BRIDGE_SAMPLERS)
            raise PipelineInputError(f"sampler {sampler!r} adds noise, and a bridge has none; valid: {valid}")
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise PipelineInputError(f"callback_on_step_end_tensor_inputs {unknown}: must be of {self._callback_tensor_inputs}")
        generators = generator if isinstance(generator, list) else [generator]
        if not all(each is None or isinstance(each, torch.Generator) for each in generators):
            raise PipelineInputError(f"generator {generator}: must be a torch.Generator, or a list of one per image")
        if not hasattr(num_inference_steps, "__index__"):
            raise PipelineInputError(f"num_inference_steps {num_inference_steps}: must be a whole number")
        if num_inference_steps < 1:
            raise PipelineInputError(f"num_inference_steps {num_inference_steps}: must be at least 1")
        if num_inference_steps > MAX_STEPS:
            raise PipelineInputError(f"num_inference_steps {num_inference_steps}: must be at most {MAX_STEPS}")
        interval = guidance_interval
        if interval is not None and not (len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1):
            raise PipelineInputError(f"guidance_interval {interval}: must be (low, high), 0 <= low <= high <= 1 in t")
        if num_images_per_label < 1:
            raise PipelineInputError(f"num_images_per_label {num_images_per_label}: must be at least 1")
        self._check_image_inputs(image, strength, mask_image, mask_margin)
        for name, side in (("height", height), ("width", width)):
            most = MAX_SAMPLE_SIZE * self.vae_factor
            if side is not None and not (hasattr(side, "__index__") and 1 <= side <= most):
                raise PipelineInputError(f"{name} {side}: must be a whole number of pixels, at least 1 and at most {most}")

    def _check_image_inputs(self, image, strength, mask_image, mask_margin) -> None:
        """PipelineInputError for the arguments that change an image, where they do not go together or are out of range."""
        if image is None:
            others = {"strength": strength, "mask_image": mask_image, "mask_margin": mask_margin}
            given = [name for name, value in others.items() if value is not None]
            if given:
                raise PipelineInputError(f"{given[0]}: goes with image=, the image to change; give that too")
            return
        if strength is not None and not (hasattr(strength, "__float__") and 0 <= float(strength) <= 1):
            raise PipelineInputError(f"strength {strength}: must be from 0 (the image stays) to 1 (nothing of it does)")
        if mask_margin is not None and mask_image is None:
            raise PipelineInputError("mask_margin: goes with mask_image=, whose white is filled; give that too")
        if mask_margin is not None and not (hasattr(mask_margin, "__index__") and 0 <= mask_margin <= MAX_SAMPLE_SIZE):
            raise PipelineInputError(f"mask_margin {mask_margin}: must be a whole number of latent cells, at least 0")
        if not hasattr(self.vae, "encode"):
            raise PipelineInputError(f"image: {type(self.vae).__name__} cannot encode images, so none can be changed")

    def match_inputs(
        self, prompt, class_labels, negative_prompt, negative_class_labels, num_images_per_label: int = 1, num_given: int = 1
    ) -> tuple[list[str | None], list[int | None], list[str | None], list[int | None]]:
        """(texts, labels, negative texts, negative labels), each a list with one entry per image.

        None stands for no text, and for no embedding row where the U-Net has no classes. num_given: how many images the call
        gives. PipelineInputError where the numbers of entries do not go together.
        """
        texts = self.parse_prompts(prompt, "prompt")
        labels = self.parse_class_labels(class_labels, "class_labels")
        fewer, more = sorted((len(texts), len(labels)))
        if fewer not in (1, more):
            raise PipelineInputError(f"{len(texts)} prompts and {len(labels)} class_labels: give as many, or one of either")
        if 1 not in (num_given, more) and num_given != more:
            raise PipelineInputError(f"{num_given} images and {more} prompts or class_labels: give as many, or one of either")
        more = max(more, num_given)
        if self.text_encoder is not None and self.config.null_prompt is None and None in texts:
            raise PipelineInputError("this checkpoint was trained without text dropout, so every image needs a prompt")
        negative_texts = self.parse_prompts(negative_prompt, "negative_prompt")
        if negative_class_labels is None:
            negative_labels = [self.config.null_class if self.num_classes else None]
        else:
            negative_labels = self.parse_class_labels(negative_class_labels, "negative_class_labels")
        count = more * num_images_per_label
        for name, entries in (("negative_prompt", negative_texts), ("negative_class_labels", negative_labels)):
            if count % len(entries):
                raise PipelineInputError(f"{name}: {len(entries)} entries for {count} images; give one, or one per image")
        lists = (texts, labels, negative_texts, negative_labels)
        return tuple([entry for entry in entries for _ in range(count // len(entries))] for entries in lists)

    def match_guidance_scale(
        self, guidance_scale, texts, labels, negative_texts, negative_labels, has_image=False, image_scale=None
    ) -> float:
        """The guidance scale of a call: the one given, else the checkpoint's default, or 1 where nothing is asked for.

        has_image: whether the call gives a condition image, which guidance_scale guides to where there is no class or text.
        image_scale: image_guidance_scale of the call. PipelineInputError for guidance that could do nothing, or for which the
        U-Net was not trained.
        """
        null_class = self.config.null_class
        has_class = any(label not in (None, null_class) for label in labels)
        has_target = self._has_target(texts, labels, negative_texts, negative_labels)
        takes_image_alone = self.num_classes == 0 and self.text_encoder is None
        if guidance_scale is None:
            has_default = has_target or (has_image and takes_image_alone)
            guidance_scale = self.config.default_guidance_scale if has_default else 1.0
        scale = float(guidance_scale)
        for name, value in (("guidance_scale", scale), ("image_guidance_scale", 1.0 if image_scale is None else image_scale)):
            if not isinstance(value, (int, float)) or not 0 <= value < math.inf:
                raise PipelineInputError(f"{name} {value}: must be a finite number of at least 0; 1 is off")
        if image_scale is not None and not has_image:
            raise PipelineInputError(f"image_guidance_scale {image_scale:g}: there is no condition_image to guide to")
        if scale == 1.0 and image_scale in (None, 1.0):
            return scale
        if not has_target and not has_image:
            raise PipelineInputError(f"guidance_scale {scale:g}: there is no class or prompt to guide to")
        never_dropped = None
        if has_class and null_class is None and None in negative_labels:
            never_dropped = "class"
        elif any(texts) and self.config.null_prompt is None and None in negative_texts:
            never_dropped = "text"
        elif (
            has_image and not self.config.image_condition.get("dropped") and (not has_target or image_scale not in (None, 1.0))
        ):
            never_dropped = "image"
        if never_dropped:
            shown = f"guidance_scale {scale:g}" if scale != 1.0 else f"image_guidance_scale {image_scale:g}"
            raise PipelineInputError(
                f"{shown}: this checkpoint was trained without {never_dropped} dropout, so it has no "
                "unconditional prediction to guide away from; the only valid value is 1"
            )
        return scale

    def _has_target(self, texts, labels, negative_texts, negative_labels) -> bool:
        """Whether a call has a class or a text, to guide to or away from."""
        nothing = (None, self.config.null_class)
        return any(label not in nothing for label in [*labels, *negative_labels]) or any([*texts, *negative_texts])

    def match_weak_scale(self, guidance_scale, has_negative: bool, image_scale=None) -> float:
        """The scale of autoguidance: the one given, or the checkpoint's default. PipelineInputError for one out of range."""
        if has_negative:
            raise PipelineInputError("weak_unet: stands in for the negative prompt and class; give it or those")
        if image_scale is not None:
            raise PipelineInputError("image_guidance_scale: needs the U-Net without the image, and weak_unet stands in for it")
        scale = float(self.config.default_guidance_scale if guidance_scale is None else guidance_scale)
        if not 0 <= scale < math.inf:
            raise PipelineInputError(f"guidance_scale {scale:g}: must be a finite number of at least 0; 1 is off")
        return scale

    def match_guidance_rule(
        self, name: str | None, rescale: float | None, options: dict | None, is_guided: bool = True
    ) -> dict[str, Any] | None:
        """The rule of guidance and its options, or None for the plain rule. PipelineInputError for values out of range.

        name, rescale, options: of the call; None: the checkpoint's defaults. The default options go with the default rule, so a
        call that names a rule has only the options that it gives. is_guided: whether the call is guided at all; else the
        defaults have no part in it.
        """
        if not is_guided and name is None and rescale is None and options is None:
            return None
        if name is None:
            name = self.config.get("default_guidance_rule") or "cfg"
            options = self.config.get("default_guidance_options") if options is None else options
        if rescale is None:
            rescale = self.config.get("default_guidance_rescale") or 0.0
        if not (hasattr(rescale, "__float__") and 0 <= float(rescale) <= 1):
            raise PipelineInputError(f"guidance_rescale {rescale}: must be from 0, which is off, to 1")
        if not isinstance(name, str) or not isinstance(options or {}, dict) or {"name", "rescale"} & set(options or {}):
            raise PipelineInputError("guidance_rule: must be a name, and guidance_options a dict with options of that rule")
        if name == "cfg" and not rescale and not options:
            return None
        return {**(options or {}), "name": name, "rescale": float(rescale)}

    def num_tokens(self) -> int:
        """Tokens that each prompt is padded or cut to. PipelineInputError where the tokenizer would abort the process."""
        length = self.tokenizer.model_max_length
        if not isinstance(length, int) or not self.tokenizer.num_special_tokens_to_add() < length <= MAX_TOKENS:
            raise PipelineInputError(
                f"tokenizer: model_max_length {str(length)[:40]}: must be as many tokens as the encoder reads"
            )
        return length

    def cut_off(self, texts: list[str | None]) -> list[str]:
        """The ends of prompts that are longer than the text encoder reads, one entry for each such prompt."""
        distinct = [text for text in dict.fromkeys(texts) if text]
        if not distinct:
            return []
        available = self.num_tokens() - self.tokenizer.num_special_tokens_to_add()
        with _TOKENIZER_LOCK:
            rows = self.tokenizer(distinct, add_special_tokens=False, verbose=False).input_ids
        return [self.tokenizer.decode(row[available:]).strip() for row in rows if len(row) > available]

    @torch.no_grad()
    def conditioning(
        self, prompts: list[str | None], labels: list[int | None], device: torch.device | None = None
    ) -> dict[str, torch.Tensor]:
        """The keyword arguments of the U-Net for B images: class_labels [B], encoder_hidden_states [B, L, d], or neither.

        prompts: one text for each image, None for "no text". labels: embedding rows, or None where the U-Net has no classes.
        """
        device = device or self._execution_device
        keywords = {}
        if labels[0] is not None:
            keywords["class_labels"] = torch.tensor(labels, device=device)
        if self.text_encoder is not None:
            keywords["encoder_hidden_states"] = self.encode_prompt(prompts, device)
        return keywords

    def encode_prompt(self, prompts: list[str | None], device: torch.device) -> torch.Tensor:
        """The text encoder's last hidden states of B prompts, [B, L, d] in the U-Net's dtype."""
        texts = [self.config.null_prompt or "" if text is None else text for text in prompts]
        self.num_tokens()
        with _TOKENIZER_LOCK:
            tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
        uses_mask = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(device) if uses_mask else None
        hidden_states = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return hidden_states.to(self.unet.dtype)

    def prepare_latents(
        self,
        count: int,
        generator: Any,
        latents: torch.Tensor | None,
        device: torch.device | None = None,
        size: tuple[int, int] | None = None,
    ) -> torch.Tensor:
        """The starting noise of `count` images, given or drawn: unit-variance float32 [count, c, h, w].

        size: (H, W) of the images; None: the model's. PipelineInputError where the number of generators or the shape of the
        given latents is wrong.
        """
        device = device or self._execution_device
        shape = (count, *self._latent_shape_of(size))
        if isinstance(generator, list) and len(generator) != count:
            raise PipelineInputError(f"{len(generator)} generators for {count} images: pass one, or one per image")
        bridge = self.config.get("bridge")
        if latents is None and bridge is not None:
            raise PipelineInputError(
                f"this checkpoint is a bridge from {bridge}: give latents= of its images (latentdiff.translation.encode_images)"
            )
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if latents.shape != shape:
            raise PipelineInputError(f"latents of shape {list(latents.shape)}: this call needs {list(shape)}")
        return latents.to(device, torch.float32)

    def _latent_shape_of(self, size: tuple[int, int] | None) -> tuple[int, int, int]:
        """(c, h, w) of the latents of images of `size`, with a border to what the U-Net can halve. None: the model's size."""
        channels, height, width = self.latent_shape
        if size is None or tuple(size) == tuple(self.image_shape[1:]):
            return channels, height, width
        halvings = 2 ** (len(self.unet.config.get("block_out_channels") or [0]) - 1)
        height, width = (-(-side // (self.vae_factor * halvings)) * halvings for side in size)
        return channels, height, width

    def prepare_image(self, image: Any, size: tuple[int, int] | None = None, name: str = "image") -> torch.Tensor:
        """Images as float32 [N, C, H, W] in [0, 1], C and (H, W) being the model's, or `size`.

        image: a PIL image, which is brought to that size; an array [H, W], [H, W, C] or [N, H, W, C] or a tensor [C, H, W] or
        [N, C, H, W] in [0, 1], of that size; or a list of them. uint8 counts from 0 to 255. name: of the argument; masks
        have one channel. PipelineInputError for anything else.
        """
        channels, *default = self.image_shape
        is_mask = name in ("mask_image", "condition_mask")
        channels = 1 if is_mask else channels
        height, width = size or default
        entries = list(image) if isinstance(image, (list, tuple)) else [image]
        if not entries:
            raise PipelineInputError(f"{name}: is an empty list; give an image")
        pictures = []
        for entry in entries:
            if isinstance(entry, PIL.Image.Image):
                entry = pil_pixels(entry, channels, (height, width), is_mask)
            pictures.append(as_batch(entry, name))
        for each in pictures:
            expected = (channels, height, width)
            if each.shape[1:] != expected:
                raise PipelineInputError(
                    f"{name} of (channels, height, width) {tuple(each.shape[1:])}: this call needs {expected}; a PIL image is "
                    "brought to that size, and height= and width= change it"
                )
            if not bool(((each >= 0) & (each <= 1)).all()):
                raise PipelineInputError(f"{name}: its values must be from 0 to 1")
        return torch.cat(pictures)

    def encode_image(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the normalised latents of images, each float32 [N, c, h, w].

        The standard deviation is 0 for autoencoders that draw nothing. images: [N, C, H, W] in [-1, 1], with the border of
        the autoencoder. NonFiniteError where the encoder gives NaN or infinity.
        """
        images = images.to(self.vae.dtype)
        output = self.vae.encode(images)
        if hasattr(output, "latent_dist"):
            mean, std = output.latent_dist.mean.float(), output.latent_dist.std.float()
        else:
            mean = (output.latents if hasattr(output, "latents") else output.latent).float()
            std = torch.zeros_like(mean)
        if self.refuse_non_finite and not (all_finite(mean) and all_finite(std)):
            cause = non_finite_cause(self.vae, images, unused=("decoder.", "post_quant_conv."))
            raise NonFiniteError(f"encoder: its output is not finite; {cause}")
        centre = normalise(mean, self.vae.config)
        return centre, normalise(mean + std, self.vae.config) - centre

    def prepare_start(
        self,
        images: torch.Tensor,
        masks: torch.Tensor | None,
        strength: float,
        noise: torch.Tensor,
        generator: Any,
        margin: int = MASK_MARGIN,
    ) -> ImageStart:
        """The latents of images to change, each drawn from the autoencoder's posterior.

        Masked pixels become mid-grey before they are encoded, so what was there changes nothing at strength 1.

        Args:
            images: [N, C, H, W] in [0, 1], on any device; N divides B.
            masks: [M, 1, H, W], at least 0.5 where an image is filled; M divides B. None: the whole image changes.
            strength: from 0 to 1.
            noise: the starting noise, [B, c, h, w], for its shape and device.
            generator: draws from the posterior: one, or a list of B.
            margin: latent cells around the mask that are free too.
        """
        count, _, *cells = noise.shape
        canvas = [side * self.vae_factor for side in cells]

        def draw(pictures: torch.Tensor) -> torch.Tensor:
            mean, std = self.encode_image(with_border(pictures.to(noise.device) * 2 - 1, canvas, -1.0))
            if mean.shape[1:] != noise.shape[1:]:
                taken = list(noise.shape[1:])
                raise PipelineInputError(f"image: its latents are {list(mean.shape[1:])}, the U-Net takes {taken}")
            drawn = randn_tensor(noise.shape, generator=generator, device=noise.device, dtype=torch.float32)
            return repeated(mean, count) + repeated(std, count) * drawn

        known = is_free = None
        if masks is not None:
            most = max(len(images), len(masks))
            is_filled = repeated(masks, most) >= 0.5
            filled = torch.where(is_filled, torch.tensor((MASK_FILL + 1) / 2), repeated(images, most))
            known = draw(filled)
            is_free = repeated(free_cells(with_border(masks, canvas, 0.0), cells, margin), count).to(noise.device)
        latents = draw(images) if strength < 1 else None
        return ImageStart(strength, latents, known, is_free)

    def prepare_condition(
        self, image: Any, mask: Any, size: tuple[int, int] | None = None
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The condition images of a call, [N, C, H', W'] in [-1, 1], and their masks [N, 1, H, W]; None where there are none.

        image, mask: as `prepare_image` takes them. size: (H, W) of the images that are made; None: the model's. H' and W' are
        `factor` times smaller. PipelineInputError where the model is not given such an image, or needs one.
        """
        rule = self.config.image_condition
        if rule is None and (image is not None or mask is not None):
            name = "condition_mask" if image is None else "condition_image"
            raise PipelineInputError(
                f"{name}: this checkpoint is given no image; image= changes one. {self.describe_classes()}"
            )
        if rule is None or (image is None and mask is None and rule.get("dropped")):
            return None, None
        if image is None:
            raise PipelineInputError(
                "this checkpoint was trained with an image on every sample, so each call needs condition_image"
            )
        if mask is None and rule["kind"] == "mask":
            raise PipelineInputError(
                "condition_image: this checkpoint completes images, so it needs condition_mask too, white to fill"
            )
        if mask is not None and rule["kind"] != "mask":
            raise PipelineInputError(
                f"condition_mask: this checkpoint is given an image of kind {rule['kind']}, without a mask"
            )
        height, width = size or self.image_shape[1:]
        factor = rule.get("factor") or 1
        if height % factor or width % factor:
            raise PipelineInputError(
                f"height and width {(height, width)}: must be multiples of {factor}, for the condition image"
            )
        given = self.prepare_image(image, (height // factor, width // factor), "condition_image") * 2 - 1
        if rule["kind"] == "grey":
            given = in_grey(given)
        if mask is None:
            return given, None
        masks = self.prepare_image(mask, (height, width), "condition_mask")
        most = max(len(given), len(masks))
        return repeated(given, most), repeated(masks, most)

    def encode_condition(
        self, given: torch.Tensor | None, masks: torch.Tensor | None, noise: torch.Tensor, size: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """What the U-Net is given beside x_t: the mask and the normalised latents of condition images, float32 [B, e, h, w].

        Zeros where there is no condition image, as training drops it; None for a U-Net that is given none.
        given, masks, size: as `prepare_condition` has them. noise: [B, c, h, w], for its shape and device.
        """
        if self.config.image_condition is None:
            return None
        count, channels, *cells = noise.shape
        if given is None:
            return torch.zeros(count, self.unet.config.in_channels - channels, *cells, device=noise.device)
        padded = [side * self.vae_factor for side in cells]
        picture = condition_picture(given, masks, size or self.image_shape[1:], padded)
        beside, _ = self.encode_image(picture.to(noise.device))
        if masks is not None:
            beside = torch.cat([condition_mask(masks, padded, cells).to(beside), beside], dim=1)
        return repeated(beside, count)

    def guide_by_image(self, scale, image_scale, positive, negative, beside, has_target) -> tuple[tuple, float, float]:
        """(what the U-Net is given in each branch of guidance; the scale of the first two, and that of the image).

        Guidance by class or text keeps the image in both branches. Guidance by the image compares with a third one that has
        neither (InstructPix2Pix, arXiv 2211.09800, eq. 3):
            bare + image_scale (negative - bare) + scale (positive - negative)
        Two branches are enough where both scales are equal, and where there is no class or text to guide to.

        positive, negative: from `conditioning`; negative is empty at scale 1. beside: from `encode_condition`.
        has_target: whether there is a class or text to guide to.
        """
        key, nothing = "image_condition", torch.zeros_like(beside)
        with_image = {**positive, key: beside}
        if not has_target:
            scale = scale if image_scale is None else image_scale
            return (with_image, {**positive, key: nothing} if scale != 1.0 else {}), scale, 1.0
        image_scale = 1.0 if image_scale is None else image_scale
        if image_scale == 1.0:
            return (with_image, {**negative, key: beside} if negative else {}), scale, 1.0
        if image_scale == scale:
            return (with_image, {**negative, key: nothing}), scale, 1.0
        return (with_image, {**negative, key: beside}, {**negative, key: nothing}), scale, image_scale

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
        latents: torch.Tensor | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        guidance: Callable[[Any], Any] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        return_dict: bool = True,
        callback_on_step_end_tensor_inputs: list[str] | tuple[str, ...] = ("latents",),
        guidance_rule: str | None = None,
        guidance_rescale: float | None = None,
        guidance_options: dict[str, float] | None = None,
        weak_unet: torch.nn.Module | None = None,
        image: Any = None,
        strength: float | None = None,
        mask_image: Any = None,
        mask_margin: int | None = None,
        height: int | None = None,
        width: int | None = None,
        condition_image: Any = None,
        condition_mask: Any = None,
        image_guidance_scale: float | None = None,
    ) -> ImagePipelineOutput | tuple:
        """Make images, or change or complete given ones.

        Args:
            prompt: the text or texts to draw. None and "" are "no text". What is longer than the text encoder reads is cut
                off with a warning.
            class_labels: names or numbers of classes; None is "no class". With a list of prompts: one for all, or one each.
            negative_prompt: what to guide away from, in place of "no text".
            negative_class_labels: what to guide away from, in place of "no class".
            num_images_per_label: images for each entry of `prompt` or `class_labels`, next to each other in the result.
            guidance_scale: scale of classifier-free guidance (Ho & Salimans, arXiv 2207.12598), applied to every latent
                channel: negative + scale (positive - negative). At least 0; 1 is off. None: the checkpoint's default.
            guidance_interval: (low, high): guide only at times t within it, where 0 is data and 1 is noise (Kynkäänniemi et
                al., arXiv 2404.07724). None: the checkpoint's default.
            num_inference_steps: steps of the scheduler or sampler. None: the checkpoint's default, or more for some samplers.
            generator: one for the batch, or a list with one per image; image i is then the same at any batch size.
            latents: unit-variance noise [B, c, h, w] to start from, instead of drawn noise. A bridge: normalised latents of
                the images that it starts from.
            sampler: a name of `latentdiff.samplers.names()`, to run in place of the diffusers scheduler.
            sampler_options: keyword arguments of the sampler.
            guidance: a function denoiser -> denoiser, put around the guided denoiser of the sampler.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent" (normalised latents).
            callback_on_step_end: called as f(pipe, step, timestep, {"latents": latents}) after each step; with a sampler,
                timestep is t in [0, 1]. It may return {"latents": changed} and may set `pipe._interrupt = True`, which skips
                the remaining steps.
            return_dict: False for a plain tuple.
            callback_on_step_end_tensor_inputs: the tensors that the callback is given: ["latents"] or nothing.
            guidance_rule: how the positive and the negative prediction are combined, a name of `latentdiff.guidance.RULES`:
                "cfg"; "apg", adaptive projected guidance (arXiv 2410.02416); "cfg_zero", the scale of CFG-Zero* (arXiv
                2503.18886). None: the checkpoint's default.
            guidance_rescale: phi of guidance rescale (Lin et al., arXiv 2305.08891), in [0, 1], on x0; 0 is off. None: the
                checkpoint's default.
            guidance_options: options of the rule: parallel, threshold and momentum of "apg", zero_init of "cfg_zero"; see
                `latentdiff.guidance.Rule`. None: the checkpoint's default, or none where guidance_rule is given.
            weak_unet: a U-Net that was trained less, or is smaller, to guide away from in place of "no text" and "no class":
                autoguidance (Karras et al., arXiv 2406.02507). guidance_scale is then its scale.
            image: an image to change, or a list: one for all prompts or class labels, or one each. A PIL image is brought to
                the model's size; an array or a tensor has that size, with values in [0, 1]. Noise is added to its latents, and
                the last part of the steps takes that away again (SDEdit, Meng et al., arXiv 2108.01073).
            strength: how much of the image may change, from 0 (it is encoded and decoded, no more) to 1 (it is not used, except
                outside of a mask): the share of the steps that run. None: 0.8, or 1 with mask_image.
            mask_image: what to fill: white is drawn anew, black stays, as in diffusers. One, or as many as images. Every pixel
                that stays is the given one exactly, unless output_type is "latent". At strength 1 the masked pixels of `image`
                are not used.
            mask_margin: latent cells around those that the mask touches that are drawn anew too; their pixels stay. None: 2.
            height, width: of the images, in pixels. None: the model's size. The U-Net was trained on that, so others may be
                worse. With a mask, a larger canvas continues an image beyond its edges.
            condition_image: the second image that a model with one is given (`config.image_condition`): what to enlarge, to
                complete, to colour, or the paired picture. One, or one for each image; as `image`, at its own size. None: no
                image, for a model that was trained without it on some samples, and `image` for one that completes images.
            condition_mask: what is hidden of it: white is to be filled. None: `mask_image`.
            image_guidance_scale: how strongly the condition image counts: 1 is as it was trained, more is more
                (InstructPix2Pix, arXiv 2211.09800, eq. 3). Without a class and a prompt guidance_scale is that too.

        Returns:
            `ImagePipelineOutput` with `images`, or a tuple with the images.

        Raises:
            PipelineInputError: a call that the checkpoint cannot answer; it says what would be valid.
            NonFiniteError: latents or images that hold NaN or infinity; it names the first part at fault. The cause may be
                damaged or diverged weights, guidance that is too strong, or a network that overflows in float16.

        Examples:
            >>> import torch
            >>> from diffusers import DiffusionPipeline

            >>> pipe = DiffusionPipeline.from_pretrained("weights/fashion-mnist", trust_remote_code=True)
            >>> generator = torch.Generator().manual_seed(0)
            >>> images = pipe(class_labels=["Sneaker", "Bag"], guidance_scale=2.0, generator=generator).images
            >>> images[0].save("sneaker.png")
            >>> boot = pipe(class_labels="Ankle boot", image=images[0], strength=0.6, generator=generator).images[0]
        """
        # 0. Take the checkpoint's defaults
        if not sampler and self.scheduler is None:
            sampler = self.config.default_sampler
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        interval = self.config.default_guidance_interval if guidance_interval is None else guidance_interval
        generator = list(generator) if isinstance(generator, tuple) else generator
        if hasattr(callback_on_step_end, "tensor_inputs"):  # a callback object of diffusers
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        default_strength = IMAGE_STRENGTH if mask_image is None else 1.0

        # 1. Check inputs. Raise an error that says what would be valid
        self.check_inputs(
            num_images_per_label,
            interval,
            steps,
            generator,
            sampler,
            sampler_options,
            guidance,
            output_type,
            callback_on_step_end_tensor_inputs,
            image,
            strength,
            mask_image,
            mask_margin,
            height,
            width,
        )
        size = None
        if height is not None or width is not None:
            size = (height or self.image_shape[1], width or self.image_shape[2])
        given = None if image is None else self.prepare_image(image, size)  # [N, C, H, W] in [0, 1]
        masks = None if mask_image is None else self.prepare_image(mask_image, size, "mask_image")  # [M, 1, H, W]
        num_given = 1 if given is None else len(given)
        if masks is not None and 1 not in (len(masks), num_given) and len(masks) != num_given:
            raise PipelineInputError(f"mask_image: {len(masks)} for {num_given} images; give one, or one for each image")
        num_given = max(num_given, 0 if masks is None else len(masks))
        if (self.config.image_condition or {}).get("kind") == "mask" and mask_image is not None:
            condition_image = image if condition_image is None else condition_image
            condition_mask = mask_image if condition_mask is None else condition_mask
        beside_image, beside_mask = self.prepare_condition(condition_image, condition_mask, size)
        has_image = beside_image is not None
        if has_image and 1 not in (len(beside_image), num_given) and len(beside_image) != num_given:
            raise PipelineInputError(f"condition_image: {len(beside_image)} for {num_given} images; give one, or one for each")
        num_given = max(num_given, len(beside_image) if has_image else 0)
        texts, labels, negative_texts, negative_labels = self.match_inputs(
            prompt, class_labels, negative_prompt, negative_class_labels, num_images_per_label, num_given
        )
        if weak_unet is None:
            scale = self.match_guidance_scale(
                guidance_scale, texts, labels, negative_texts, negative_labels, has_image, image_guidance_scale
            )
        else:
            scale = self.match_weak_scale(
                guidance_scale, any(negative_texts) or negative_class_labels is not None, image_guidance_scale
            )
        is_guided = scale != 1.0
        rule = self.match_guidance_rule(
            guidance_rule, guidance_rescale, guidance_options, is_guided or image_guidance_scale not in (None, 1.0)
        )
        if cuts := self.cut_off(texts + (negative_texts if is_guided else [])):
            _LOGGER.warning(
                f"The text encoder takes {self.tokenizer.model_max_length} tokens of a prompt, so these parts are cut off: "
                f"{cuts}"
            )

        # 2. Define call parameters
        device = self._execution_device  # a walk over all modules, so it is read once
        self._interrupt = False
        self._guidance_scale = scale
        self._num_timesteps = steps

        # 3. Encode prompts and class labels: those to guide towards, and the negative ones to guide away from
        positive = self.conditioning(texts, labels, device)
        has_negative = is_guided and weak_unet is None
        negative = self.conditioning(negative_texts, negative_labels, device) if has_negative else {}

        # 4. Prepare latents
        noise = self.prepare_latents(len(texts), generator, latents, device, size)  # [B, c, h, w]
        conditions, image_scale = (positive, negative), 1.0
        beside = self.encode_condition(beside_image, beside_mask, noise, size)  # [B, e, h, w]
        if beside is not None:
            has_target = self._has_target(texts, labels, negative_texts, negative_labels)
            if not negative and image_guidance_scale not in (None, 1.0) and has_target:
                negative = self.conditioning(negative_texts, negative_labels, device)
            if weak_unet is not None:
                conditions = ({**positive, "image_condition": beside}, {})
            else:
                conditions, scale, image_scale = self.guide_by_image(
                    scale, image_guidance_scale, positive, negative, beside, has_target
                )
        start = None
        if given is not None:
            strength = default_strength if strength is None else float(strength)
            margin = MASK_MARGIN if mask_margin is None else mask_margin
            start = self.prepare_start(given, masks, strength, noise, generator, margin)

        # 5. Denoise, by the diffusers scheduler or by a sampler of latentdiff
        if sampler:
            use_default = num_inference_steps is None
            run = self._load_sampler(sampler, use_default, sampler_options, guidance, rule, weak_unet, start, image_scale)
        else:
            run = self._load_scheduler(rule, weak_unet, start, image_scale)
        callback = step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self.denoise(run, noise, conditions, scale, interval, steps, generator, callback)

        # 6. Decode
        kept = None if masks is None else (given, masks)
        images = latents if output_type == "latent" else self.decode_latents(latents, output_type, size, kept)

        # Offload all models
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def denoise(self, run, noise, conditions, scale, interval, steps, generator, callback) -> torch.Tensor:
        """Normalised latents [B, c, h, w] from noise, by `run`, a function such as `_run_scheduler`.

        NonFiniteError where they hold NaN or infinity, with the generators as they were before.
        """
        arguments = (noise, conditions, scale, interval, steps, generator)
        states = generator_states(generator)
        failure = None
        try:
            latents = run(*arguments, callback)
            if self.refuse_non_finite and not all_finite(latents):
                failure = "the scheduler's latents are not finite"
        except FloatingPointError as error:  # latentdiff's samplers check their samples themselves
            failure = str(error)
        if failure is not None:
            restore_generators(generator, states)
            raise NonFiniteError(self._find_non_finite(run, arguments, failure))
        return latents

    def _load_sampler(
        self,
        name: str,
        use_default_steps: bool,
        options: dict | None,
        guidance: Callable | None,
        rule: dict | None = None,
        weak_unet: torch.nn.Module | None = None,
        start: ImageStart | None = None,
        image_scale: float = 1.0,
    ) -> Callable:
        """A sampler of latentdiff, as a function with the arguments of `_run_scheduler`."""
        samplers = load_samplers(f"sampler={name!r}")
        more: dict[str, Any] = {} if rule is None and weak_unet is None else {"rule": rule, "weak": weak_unet}
        of_image = ({} if start is None else {"start": start}) | ({} if image_scale == 1.0 else {"image_scale": image_scale})
        if not of_image.keys() <= signature(samplers.by_sampler).parameters.keys():
            raise PipelineInputError(f"image with sampler={name!r}: the installed latentdiff is too old for it")
        more |= of_image
        with rule_errors():
            return samplers.by_sampler(self, name, use_default_steps, options or {}, guidance, **more)

    def _load_scheduler(
        self,
        rule: dict | None,
        weak_unet: torch.nn.Module | None,
        start: ImageStart | None = None,
        image_scale: float = 1.0,
    ) -> Callable:
        """`_run_scheduler`, with a rule of guidance, a U-Net to guide away from, and an image to start from."""
        combine = None
        if rule is not None:
            with rule_errors():
                combine = load_samplers(f"guidance_rule={rule['name']!r}").output_rule(self, rule)
        more = {"combine": combine, "weak_unet": weak_unet, "start": start, "image_scale": image_scale}
        return functools.partial(self._run_scheduler, **more)

    def _run_scheduler(
        self,
        noise,
        conditions,
        scale,
        interval,
        steps,
        generator,
        callback,
        combine=None,
        weak_unet=None,
        start=None,
        image_scale=1.0,
    ) -> torch.Tensor:
        """The reverse process by the diffusers scheduler: from unit-variance noise to normalised latents [B, c, h, w].

        conditions: the U-Net's keyword arguments, positive and negative; the negative ones are empty at scale 1 and with a weak
        U-Net. A third entry is without the second image, see `guide_by_image`, and image_scale its scale. combine: a rule of
        guidance in the place of the plain one. weak_unet: see `__call__`. start: an `ImageStart`, or None.
        """
        # 1. Prepare the scheduler
        scheduler, levels = self._prepare_scheduler(steps, noise.device, start)
        name = type(scheduler).__name__
        times = network_times(scheduler)
        first = len(times) + 1 - len(levels) if levels else 0
        timesteps, times = scheduler.timesteps[first:], times[first:]
        extra_step_kwargs = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        prior_std = getattr(scheduler, "init_noise_sigma", 1.0)
        latents = noise * prior_std if start is None else start.noised(noise, *levels[0], prior_std)
        self._num_timesteps = len(timesteps)

        # 2. Prepare the U-Net's keyword arguments: without guidance for B images, with guidance for 2 B, positive ones first
        positive = conditions[0]
        required = {}
        if "encoder_hidden_states" in signature(self.unet.forward).parameters:
            required = {"encoder_hidden_states": None}  # for a U-Net that could attend to text and was trained without
        plain_kwargs = {**required, **positive}
        branches = [each for each in conditions if each]
        guided_kwargs = {**required, **{key: torch.cat([each[key] for each in branches]) for key in positive}}
        plain_image, guided_image = (kwargs.pop("image_condition", None) for kwargs in (plain_kwargs, guided_kwargs))
        has_guidance = len(branches) > 1 or (weak_unet is not None and scale != 1.0)

        # 3. Denoising loop
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, (timestep, time) in enumerate(zip(timesteps, times, strict=True)):
                if self.interrupt:
                    continue

                # expand the latents if guidance is on at this timestep
                is_guided = has_guidance and (interval is None or within(interval, scheduler, time))
                with scheduler_errors(name):
                    has_input_scale = hasattr(scheduler, "scale_model_input")
                    model_input = scheduler.scale_model_input(latents, timestep) if has_input_scale else latents
                plain_input = model_input
                has_branches = is_guided and weak_unet is None
                model_input = torch.cat([model_input] * len(branches)) if has_branches else model_input
                beside = guided_image if has_branches else plain_image
                if beside is not None:  # the second image is further channels, without noise
                    model_input = torch.cat([model_input, beside], dim=1)

                # predict; the network runs in its own dtype, everything around it in float32
                kwargs = guided_kwargs if has_branches else plain_kwargs
                output = self.unet(model_input.to(self.unet.dtype), time, **kwargs).sample.float()

                # guide; the weights of the plain rule sum to one, so it is the same whatever the network predicts
                if is_guided:
                    bare = []
                    if weak_unet is None:
                        output_positive, output_negative, *bare = output.chunk(len(branches))  # each [B, c, h, w]
                    else:
                        output_positive = output
                        output_negative = weak_unet(model_input.to(weak_unet.dtype), time, **plain_kwargs).sample.float()
                    if combine is None:
                        output = output_negative + scale * (output_positive - output_negative)
                    else:
                        output = combine(plain_input, time, output_positive, output_negative, scale)
                    if bare:
                        output = output + (image_scale - 1) * (output_negative - bare[0])

                # compute the previous noisy sample x_t -> x_t-1
                with scheduler_errors(name):
                    latents = scheduler.step(output, timestep, latents, **extra_step_kwargs, return_dict=False)[0]

                # keep the known latents, at the noise of the next step; between the two stages of a step there is none
                if start is not None and (i + 1) % getattr(scheduler, "order", 1) == 0:
                    latents = start.keep(latents, noise, *levels[i + 1])

                if callback is not None:
                    changed = callback(self, i, timestep, {"latents": latents}) or {}
                    latents = changed.get("latents", latents)
                progress_bar.update()
        return latents if start is None else start.keep(latents, noise, 1.0, 0.0)

    def _prepare_scheduler(
        self, steps: int, device: Any, start: ImageStart | None = None
    ) -> tuple[Any, list[tuple[float, float]]]:
        """(a copy of the scheduler, set to a number of steps; the noise levels of the steps that run, see `noise_levels`).

        There are no levels without a start. PipelineInputError where the scheduler cannot sample from this checkpoint.

        A copy, because a scheduler counts its steps, and two threads may call one pipeline. The pipeline's own scheduler is
        set to the same steps, for callbacks that read it.
        """
        scheduler = copy.deepcopy(self.scheduler)
        name = type(scheduler).__name__
        self._check_scheduler(scheduler)
        if start is not None and class_names_of(scheduler).intersection(FROM_THE_FIRST_STEP):
            raise PipelineInputError(f"image: {name} cannot change images; take another scheduler, or sampler=")
        levels: list[tuple[float, float]] = []
        with scheduler_errors(name):
            scheduler.set_timesteps(steps, device=device)
            check_sigmas(scheduler)
            first = 0
            if start is not None:
                order = getattr(scheduler, "order", 1)
                whole_steps = -(-len(scheduler.timesteps) // order)
                first = min(start.skipped_steps(whole_steps) * order, len(scheduler.timesteps))
                levels = noise_levels(scheduler)[first:]
            if first and "LMSDiscreteScheduler" in class_names_of(scheduler):
                # Its order grows with the number of the step, so the first step that runs must be its first
                scheduler.timesteps, scheduler.sigmas = scheduler.timesteps[first:], scheduler.sigmas[first:]
                first = 0
            if hasattr(scheduler, "set_begin_index"):
                # else it searches for the first timestep, which some grids of sigmas hold more than once
                scheduler.set_begin_index(first)
            self.scheduler.set_timesteps(steps, device=device)
        return scheduler, levels

    def _check_scheduler(self, scheduler: Any) -> None:
        """PipelineInputError for a scheduler of another noise or another prediction than the network was trained for."""
        name = type(scheduler).__name__
        noise = self._noise_kind()
        classes = class_names_of(scheduler)
        is_listed = classes.intersection(VP_SCHEDULERS + VP_OR_FLOW_SCHEDULERS + FLOW_SCHEDULERS + EDM_SCHEDULERS)
        if noise is None or not (is_listed or type(scheduler).__module__.startswith("diffusers.")):
            return  # nothing is known of the noise, or of the user's own class of scheduler

        # Its class
        usable = SCHEDULERS.get(noise, ())
        if not classes.intersection(usable):
            valid = ", ".join(sorted(usable)) or "none of diffusers: give sampler="
            raise PipelineInputError(
                f"scheduler: {name} cannot draw from this checkpoint, whose noise is {noise}; valid: {valid}"
            )
        by_config = f"make it by {name}.from_config(pipe.scheduler.config), from the checkpoint's own scheduler"
        runs_flow = bool(scheduler.config.get("use_flow_sigmas"))
        if classes.intersection(VP_OR_FLOW_SCHEDULERS) and runs_flow != (noise == "flow"):
            raise PipelineInputError(
                f"scheduler: {name} has use_flow_sigmas={runs_flow}, the checkpoint's noise is {noise}; {by_config}"
            )
        if noise != "vp":
            return

        # Its prediction and betas
        published = getattr(self._published_scheduler, "config", {})
        prediction = scheduler.config.get("prediction_type")
        expected = self.config.prediction or published.get("prediction_type", prediction)
        if prediction != expected:
            raise PipelineInputError(
                f"scheduler: {name}'s prediction_type is {prediction}, the network predicts {expected}; {by_config}"
            )
        trained = getattr(self._published_scheduler, "alphas_cumprod", None)
        given = getattr(scheduler, "alphas_cumprod", None)
        if trained is None or given is None:
            return
        if trained.shape != given.shape or not torch.allclose(trained, given, atol=1e-3):
            _LOGGER.warning(f"{name} has other betas than the checkpoint's own scheduler; {by_config}")

    def _noise_kind(self) -> str | None:
        """The noise of training: "vp", "flow", "edm", the name of another schedule, or None where nothing states it."""
        name = (self.config.schedule or {}).get("name")
        if name is not None:
            return name if name in ("flow", "edm", "ve", "subvp") else "vp"
        if self._published_scheduler is None:
            return None
        classes = class_names_of(self._published_scheduler)
        uses_flow_sigmas = self._published_scheduler.config.get("use_flow_sigmas")
        if classes.intersection(FLOW_SCHEDULERS) or classes.intersection(VP_OR_FLOW_SCHEDULERS) and uses_flow_sigmas:
            return "flow"
        return next((noise for noise in ("vp", "edm") if classes.intersection(SCHEDULERS[noise])), None)

    def _find_non_finite(self, run: Callable, arguments: tuple, otherwise: str) -> str:
        """Which part's output is the first that is not finite, found by a second run of a failed call.

        otherwise: how the first run failed, for the case that the outputs of all parts are finite.
        """
        # 1. What the U-Net was given
        noise, conditions, scale = arguments[:3]
        if not all_finite(noise):
            return "latents: the starting noise is not finite"
        for name, condition in zip(("prompt", "negative_prompt"), conditions[:2], strict=True):
            hidden_states = condition.get("encoder_hidden_states")
            if hidden_states is not None and not all_finite(hidden_states):
                cause = non_finite_cause(self.text_encoder, hidden_states)
                return f"text encoder: its output for {name} is not finite; {cause}"

        # 2. Each output of the U-Net
        evaluations = 0

        def check_output(unet: torch.nn.Module, inputs: tuple, output: Any) -> None:
            nonlocal evaluations
            evaluations += 1
            if not all_finite(output.sample):
                timestep = float(torch.as_tensor(inputs[1]).reshape(-1)[0])
                where = f"evaluation {evaluations}, timestep {timestep:g}, guidance scale {scale:g}"
                raise NonFiniteError(f"U-Net: its output is not finite ({where}); {non_finite_cause(unet, inputs[0])}")

        hook = self.unet.register_forward_hook(check_output)
        try:
            latents = run(*arguments, None)
        except NonFiniteError as error:
            return str(error)
        except FloatingPointError:
            pass
        else:
            # 3. The callback, which the second run leaves out
            if all_finite(latents):
                return "callback_on_step_end: the latents are finite without it, and not finite with it"
        finally:
            hook.remove()

        # 4. The steps between the U-Net's outputs
        return f"sampler: each output of the U-Net is finite, and yet {otherwise}"

    def decode_latents(
        self,
        latents: torch.Tensor,
        output_type: str = "pil",
        size: tuple[int, int] | None = None,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """Images of normalised latents [B, c, h, w], without the border that training padded.

        Args:
            latents: normalised latents.
            output_type: "pil" (grey images for one channel), "np" or "pt".
            size: (H, W) of the images; None: the model's.
            kept: (images [N, C, H, W] in [0, 1], masks [M, 1, H, W]): the pixels of the images stay where the masks are below
                0.5. N and M divide B.

        Raises:
            NonFiniteError: the decoder gives NaN or infinity.
        """
        raw = denormalise(latents, self.vae.config).to(self.vae.dtype)
        return self.finish_images(self.vae.decode(raw).sample, raw, output_type, size, kept)

    def finish_images(
        self,
        images: torch.Tensor,
        raw: torch.Tensor,
        output_type: str,
        size: tuple[int, int] | None = None,
        kept: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> Any:
        """What `decode_latents` returns of the decoder's output [B, C, H, W] in [-1, 1]. raw: what the decoder was given."""
        images = images.float()
        if self.refuse_non_finite and not all_finite(images):  # before they are clamped, which would hide an infinity
            cause = non_finite_cause(self.vae, raw, unused=("encoder.", "quant_conv."))
            raise NonFiniteError(f"decoder: its output is not finite; {cause}")
        height, width = size or self.config.image_size or images.shape[-2:]
        top = (images.shape[-2] - height) // 2
        left = (images.shape[-1] - width) // 2
        if min(top, left) < 0:
            raise PipelineInputError(f"image_size {[height, width]} exceeds the decoded {list(images.shape[-2:])}")
        if output_type == "pil" and images.shape[1] not in (1, 3, 4):
            raise PipelineInputError(f"output_type 'pil' cannot show {images.shape[1]} channels: use np or pt")
        images = images[..., top : top + height, left : left + width]
        if kept is not None:
            given, masks = (repeated(values.to(images.device), len(images)) for values in kept)
            # The processor maps [-1, 1] to [0, 1], where the given pixels are exact; so they come after it
            images = torch.where(masks >= 0.5, VaeImageProcessor().postprocess(images, "pt"), given)
            return VaeImageProcessor(do_normalize=False).postprocess(images, output_type)
        return VaeImageProcessor().postprocess(images, output_type)

    def to_json_string(self) -> str:
        """The text of model_index.json.

        It names this class as [file, class], or StableDiffusionPipeline where that makes the same images.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline", type(self).__name__]
        if index.get("image_condition") is None:
            index.pop("image_condition", None)
        if self.text_encoder is not None and self.num_classes == 0 and self._suits_stable_diffusion():
            index["_class_name"] = "StableDiffusionPipeline"
            index["requires_safety_checker"] = False
            index["safety_checker"] = [None, None]
            index["feature_extractor"] = [None, None]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _suits_stable_diffusion(self) -> bool:
        """Whether StableDiffusionPipeline makes the same images: it scales latents by one factor and does not cut images."""
        config = self.vae.config
        factor = 2 ** (len(config.get("block_out_channels") or [0]) - 1)
        is_uncropped = self.config.image_size in (None, [side * factor for side in self.latent_shape[1:]])
        means, stds = config.get("latents_mean") or [], config.get("latents_std") or []
        is_shifted = any([config.get("shift_factor"), *means, *(std - 1 for std in stds)])
        # It changes steps_offset and clip_sample of a scheduler's config, and cannot run a flow
        scheduler = getattr(self.scheduler, "config", {})
        is_changed = scheduler.get("timestep_spacing") == "leading" and scheduler.get("steps_offset", 1) != 1
        is_changed = is_changed or scheduler.get("clip_sample") or scheduler.get("use_flow_sigmas")
        is_changed = is_changed or self.config.image_condition is not None
        return is_uncropped and not (is_shifted or is_changed) and hasattr(self.scheduler, "scale_model_input")

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json, this file as pipeline.py, and hashes.json of the weights in each part's folder.

        save_pretrained calls this last, so the hashes are those of the weights that it has saved.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        name_own_autoencoder(Path(save_directory, "model_index.json"))
        for part in self.components:
            write_hashes(Path(save_directory, part))
        Path(save_directory, "pipeline.py").write_text(_SOURCE, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, **_: Any) -> dict[str, Any]:  # older diffusers passes dduf_entries=None
        """model_index.json as from_pretrained reads it. Whoever calls this class has its code: none of the folder is run."""
        config = json.loads(Path(json_file).read_text(encoding="utf-8"))
        if config.get("_class_name") == "StableDiffusionPipeline":
            own = {key: value for key, value in config.items() if key not in STABLE_DIFFUSION_ONLY}
            config = {**STABLE_DIFFUSION_DEFAULTS, **own}
        refuse_code(Path(json_file).parent, config)
        if config.get("vae", [None])[0] == OWN_AUTOENCODERS and importlib.util.find_spec("latentdiff") is not None:
            config["vae"] = [f"latentdiff.pipelines.{OWN_AUTOENCODERS}", config["vae"][1]]
        if "_class_name" in config:
            config["_class_name"] = cls.__name__
        return config


def denormalise(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The autoencoder's latents z of normalised latents z_n [B, c, h, w], by the autoencoder's config.

    z = z_n latents_std / scaling_factor + latents_mean; without these two, z = z_n / scaling_factor + shift_factor.
    """
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("shift_factor") or 0.0, 1.0
    mean, std = (torch.as_tensor(values).to(latents).reshape(1, -1, 1, 1) for values in (mean, std))
    return latents / (config.get("scaling_factor") or 1.0) * std + mean


def normalise(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The normalised latents of an autoencoder's latents [B, c, h, w], by the autoencoder's config: undoes `denormalise`."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("shift_factor") or 0.0, 1.0
    mean, std = (torch.as_tensor(values).to(latents).reshape(1, -1, 1, 1) for values in (mean, std))
    return (latents - mean) / std * (config.get("scaling_factor") or 1.0)


def repeated(values: torch.Tensor, count: int) -> torch.Tensor:
    """[count, ...] of values [N, ...], each `count` / N times in a row. PipelineInputError where N does not divide count."""
    if count % len(values):
        raise PipelineInputError(f"{len(values)} images for {count} results: give one, or one each")
    return values.repeat_interleave(count // len(values), dim=0)


def pil_pixels(image: PIL.Image.Image, channels: int, size: tuple[int, int], is_mask: bool = False) -> np.ndarray:
    """A PIL image as uint8 [H, W, channels], brought to `size` (H, W). What is transparent becomes white, of a mask black."""
    if image.mode in ("LA", "PA", "RGBA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        below = (0, 0, 0, 255) if is_mask else (255, 255, 255, 255)
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, below), image)
    image = image.convert("L" if channels == 1 else "RGB")
    if image.size != (size[1], size[0]):
        resample = PIL.Image.Resampling.BOX if is_mask else PIL.Image.Resampling.LANCZOS
        image = image.resize((size[1], size[0]), resample)
    pixels = np.array(image)
    return pixels[..., None] if pixels.ndim == 2 else pixels


def as_batch(image: Any, name: str) -> torch.Tensor:
    """float32 [N, C, H, W] in [0, 1] of an array [H, W], [H, W, C] or [N, H, W, C], or a tensor [H, W], [C, H, W] or
    [N, C, H, W]. uint8 counts from 0 to 255. name: of the argument. PipelineInputError for anything else.
    """
    is_array = isinstance(image, np.ndarray)
    if not (is_array or isinstance(image, torch.Tensor)) or image.ndim not in (2, 3, 4):
        raise PipelineInputError(f"{name}: must be a PIL image, an array [H, W, C], a tensor [C, H, W], or a list of them")
    if image.ndim == 2:
        image = image[..., None] if is_array else image[None]
    image = image[None] if image.ndim == 3 else image
    batch = torch.from_numpy(np.ascontiguousarray(image)).permute(0, 3, 1, 2) if is_array else image.detach().cpu()
    return batch.float() / 255 if batch.dtype == torch.uint8 else batch.float()


def with_border(images: torch.Tensor, size: list[int] | tuple[int, int], value: float) -> torch.Tensor:
    """Images [B, C, H, W] in the middle of `size` (H', W'), with a border of one value, as training pads them."""
    rows, columns = size[0] - images.shape[-2], size[1] - images.shape[-1]
    border = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
    return torch.nn.functional.pad(images, border, value=value)


def free_cells(masks: torch.Tensor, cells: list[int] | tuple[int, int], margin: int) -> torch.Tensor:
    """The latent cells that masks touch, and `margin` cells around: bool [B, 1, h, w].

    masks: [B, 1, H, W], at least 0.5 where pixels are filled. cells: (h, w); H and W are multiples of them.
    """
    touched = torch.nn.functional.adaptive_max_pool2d((masks >= 0.5).float(), tuple(cells))
    if margin:
        touched = torch.nn.functional.max_pool2d(touched, 2 * margin + 1, stride=1, padding=margin)
    return touched > 0.5


def in_grey(images: torch.Tensor) -> torch.Tensor:
    """Images [B, 3, H, W] in [-1, 1] without colour: the luma of ITU-R 601, rounded to 8 bits, in each channel."""
    luma = (images * torch.tensor([0.299, 0.587, 0.114]).to(images)[:, None, None]).sum(1, keepdim=True)
    return (((luma + 1) * 127.5).round() / 127.5 - 1).expand_as(images)


def condition_picture(
    given: torch.Tensor,
    masks: torch.Tensor | None,
    size: list[int] | tuple[int, int],
    padded: list[int] | tuple[int, int],
) -> torch.Tensor:
    """What is encoded of condition images: [B, C, H', W'] in [-1, 1]. Training and the pipeline both make it here.

    Args:
        given: [B, C, H, W] in [-1, 1], or smaller; those are enlarged by bicubic interpolation.
        masks: [B, 1, H, W], at least 0.5 where pixels are hidden; these become mid-grey. None: none are.
        size: (H, W) of the images that are made.
        padded: (H', W') with the border that training pads.
    """
    if tuple(given.shape[-2:]) != tuple(size):
        given = torch.nn.functional.interpolate(given, tuple(size), mode="bicubic", align_corners=False).clamp(-1, 1)
    if masks is not None:
        given = torch.where(masks >= 0.5, MASK_FILL, given)
    return with_border(given, padded, -1.0)


def condition_mask(
    masks: torch.Tensor, padded: list[int] | tuple[int, int], cells: list[int] | tuple[int, int]
) -> torch.Tensor:
    """Which share of each latent cell is hidden, [B, 1, h, w]. masks, padded: as of `condition_picture`. cells: (h, w)."""
    hidden = with_border((masks >= 0.5).float(), padded, 0.0)
    return torch.nn.functional.adaptive_avg_pool2d(hidden, tuple(cells))


def step_callback(callback: Callable[..., dict | None] | None, names: list[str] | tuple[str, ...]) -> Callable | None:
    """A callback that is given only the tensors of `names`; None for None."""
    if callback is None:
        return None

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict | None:
        return callback(pipe, step, timestep, {name: value for name, value in tensors.items() if name in names})

    return call


def network_times(scheduler: Any) -> torch.Tensor:
    """What the network is given at each timestep [steps]: the timestep itself, or N sigma on flow sigmas.

    On flow sigmas diffusers cuts N sigma to an integer for the timestep. The network was trained on N sigma itself.
    """
    timesteps = scheduler.timesteps
    if not scheduler.config.get("use_flow_sigmas", False) or type(scheduler).__name__ in FLOW_SCHEDULERS:
        return timesteps
    return (scheduler.sigmas[: len(timesteps)] * scheduler.config.num_train_timesteps).to(timesteps.device)


def within(interval: tuple[float, float], scheduler: Any, timestep: torch.Tensor) -> bool:
    """Whether a timestep lies in an interval of t in [0, 1], ends included.

    A timestep is N t on a flow, ln(sigma_max t) / 4 for EDM, and N t - 1 otherwise.
    """
    config = scheduler.config
    if "sigma_data" in config:
        t = min(1.0, math.exp(4 * float(timestep)) / config.sigma_max)  # rounding may take the first beyond 1
    else:
        is_flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
        t = (float(timestep) + (0 if is_flow else 1)) / config.num_train_timesteps
    return interval[0] <= t <= interval[1]


def noise_levels(scheduler: Any) -> list[tuple[float, float]]:
    """(factor of the data, factor of the noise) in a scheduler's latents before each of its timesteps, then after the last.

    The scheduler has its timesteps set. The second stage of a step counts as a timestep. ValueError for an unknown class.
    """
    classes = class_names_of(scheduler)
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None and getattr(scheduler, "alphas_cumprod", None) is not None:
        alpha_bars = scheduler.alphas_cumprod.cpu()[scheduler.timesteps.long().cpu()].double()
        return [*zip(alpha_bars.sqrt().tolist(), (1 - alpha_bars).sqrt().tolist(), strict=True), (1.0, 0.0)]
    if sigmas is None or not classes.intersection(VP_SCHEDULERS + VP_OR_FLOW_SCHEDULERS + FLOW_SCHEDULERS + EDM_SCHEDULERS):
        raise ValueError("its noise levels are not known, so it cannot start from an image")
    sigmas = sigmas.cpu().double()[: len(scheduler.timesteps) + 1]
    factors = torch.ones_like(sigmas)  # latents of Euler's kind and of EDM are x0 + sigma eps
    if classes.intersection(FLOW_SCHEDULERS) or scheduler.config.get("use_flow_sigmas"):
        factors = 1 - sigmas
    elif classes.intersection(VP_OR_FLOW_SCHEDULERS):
        factors = 1 / (sigmas**2 + 1).sqrt()
        sigmas = sigmas * factors
    return list(zip(factors.tolist(), sigmas.tolist(), strict=True))


def class_names_of(scheduler: Any) -> set[str]:
    """The names of a scheduler's class and of its parents."""
    return {each.__name__ for each in type(scheduler).__mro__}


def load_samplers(what: str) -> Any:
    """The module of latentdiff that runs its samplers and rules. PipelineInputError, beginning with `what`, without it."""
    try:  # not by an import statement: diffusers would warn of a package that this file can do without
        return importlib.import_module("latentdiff.samplers.of_pipeline")
    except ImportError as error:
        raise PipelineInputError(f"{what} needs the latentdiff package: {error}") from error


@contextlib.contextmanager
def rule_errors() -> Iterator[None]:
    """Turn what latentdiff refuses of a rule of guidance within the block into a PipelineInputError."""
    try:
        yield
    except PipelineInputError:
        raise
    except ValueError as error:
        raise PipelineInputError(str(error)) from error


@contextlib.contextmanager
def scheduler_errors(name: str) -> Iterator[None]:
    """Turn what a scheduler raises within the block into one PipelineInputError that names it."""
    try:
        yield
    except PipelineInputError:
        raise
    except SCHEDULER_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PipelineInputError(f"scheduler: {name} cannot run with these settings: {reason}") from error


def check_sigmas(scheduler: Any) -> None:
    """PipelineInputError where the sigmas that a scheduler has set cannot give images."""
    name = type(scheduler).__name__
    sigmas = getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < 3:
        return

    # On a flow sigma is at most 1. Some options (use_karras_sigmas) put the sigmas of betas in its place
    if scheduler.config.get("use_flow_sigmas"):
        if float(sigmas.max()) >= 1.01:
            options = [key for key, value in scheduler.config.items() if value is True and key in SIGMA_OPTIONS]
            raise PipelineInputError(f"scheduler: {name} does not run a flow with {', '.join(options)}: leave it out")
    elif scheduler.config.get("use_beta_sigmas") and float(sigmas[0]) > 1:
        if not bool(((sigmas > 0.2) & (sigmas < 20)).any()):
            raise PipelineInputError(
                f"scheduler: {name} with use_beta_sigmas takes all its steps at sigmas of {float(sigmas[-3]):.3g} and more, "
                "where there is no picture yet; leave it out, or take use_karras_sigmas"
            )

    # The second stage of these divides by the second sigma an error that grows with the first. On a cosine schedule they
    # may be 20,000 and 10
    if name in TWO_STAGE_SCHEDULERS:
        largest, second = (float(sigma) for sigma in torch.unique(sigmas).flip(0)[:2])
        if largest > 1000 and largest > 20 * second:
            raise PipelineInputError(
                f"scheduler: {name} cannot draw from this checkpoint in so many steps: its first step would go from sigma "
                f"{largest:.0f} to {second:.3g} at once; set use_karras_sigmas=True, or take another scheduler"
            )


def generator_states(generator: Any) -> list[torch.Tensor]:
    """The states of one generator or of a list of them, for `restore_generators`; [] where the global generator draws."""
    generators = generator if isinstance(generator, list) else [generator]
    return [each.get_state() for each in generators if each is not None]


def restore_generators(generator: Any, states: list[torch.Tensor]) -> None:
    """Take generators back to an earlier state, so that they draw the same numbers again."""
    generators = generator if isinstance(generator, list) else [generator]
    for each, state in zip((each for each in generators if each is not None), states, strict=True):
        each.set_state(state)


def all_finite(values: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite. Waits for the device."""
    return bool(values.isfinite().all())


def non_finite_cause(network: torch.nn.Module, values: torch.Tensor, unused: tuple[str, ...] = ()) -> str:
    """Why the output of a network may not be finite, in words.

    values: the network's input [B, ...], or its output where the input is not made of numbers. unused: the prefixes of
    weights that play no part in the output.
    """
    for name, weight in network.named_parameters():
        if not name.startswith(unused) and not all_finite(weight):
            return f"its weight {name} is not finite: the file is damaged, or training diverged"
    largest, dtype = values.abs().max().item(), str(values.dtype).removeprefix("torch.")
    hint = "guidance, steps or weights make them overflow"
    if values.dtype == torch.float16:
        hint += "; float32 or bfloat16 hold larger numbers"
    return f"its weights are finite, its numbers reach {largest:.3g} in {dtype}: {hint}"


def write_hashes(part: Path) -> None:
    """Write hashes.json, {name: {bytes, sha256}} of the weight files in a part's folder. latentdiff checks it on loading."""
    hashes = {}
    for file in sorted(part.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        hashes[file.name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    if hashes:
        (part / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    else:  # pickled weights, or none: the hashes of an earlier save would be wrong
        (part / "hashes.json").unlink(missing_ok=True)


def name_own_autoencoder(index: Path) -> None:
    """Name an autoencoder of latentdiff's own in a model_index.json by the file in vae/: diffusers writes the whole module."""
    config = json.loads(index.read_text(encoding="utf-8"))
    pair = config.get("vae") or [None]
    if str(pair[0]).split(".")[-1] == OWN_AUTOENCODERS:
        config["vae"] = [OWN_AUTOENCODERS, pair[1]]
        index.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def refuse_code(folder: Path, index: dict) -> None:
    """PipelineInputError where opening a folder would run code that lies in it, or fetch code from the Hub.

    index: model_index.json. diffusers loads whatever looks like a (library, class) pair in it, and an Auto class runs what
    an auto_map names. An autoencoder of latentdiff's own may be named: its code is the installed one's, or where latentdiff
    is not installed that of vae/, beside this file, whose code runs already.
    """
    for part, pair in index.items():
        is_pair = isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)
        if part.startswith("_") or not is_pair:
            continue
        library, name = pair[0], str(pair[1])
        is_auto = name.startswith("Auto") and not name.startswith("Autoencoder")
        is_own = (part, library) == ("vae", OWN_AUTOENCODERS)
        if part not in PARTS or library not in ("diffusers", "transformers") and not is_own or is_auto:
            raise PipelineInputError(f"model_index.json: {part} {pair}: not a plain class of diffusers or transformers")
        file = folder / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for key, value in config.items() if isinstance(config, dict) else ():
            fetches = (
                value is not None if key in FETCHING_KEYS else "attn_implementation" in key and value not in TORCH_ATTENTION
            )
            if fetches:
                raise PipelineInputError(f"{file}: {key} {str(value)[:60]} would import or fetch code; leave it out")
