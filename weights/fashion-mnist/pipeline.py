"""Images from a latent diffusion checkpoint: text, class labels, both or nothing in, pictures out.

This one file, saved into every checkpoint as pipeline.py, is the whole pipeline, so that plain diffusers opens the folder:
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. latentdiff is needed only to run one of its samplers.
"""

import contextlib
import copy
import hashlib
import importlib
import json
import math
import operator
import threading
from collections.abc import Callable, Iterator
from inspect import signature
from pathlib import Path
from typing import Any, Union

import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

# Read now and not when saving: diffusers runs this file from a cache where the next checkpoint's file replaces it.
_SOURCE = Path(__file__).read_text(encoding="utf-8")
_LOGGER = logging.get_logger("diffusers.latent_diffusion")  # so that diffusers.utils.logging.set_verbosity is heard
_LISTED_CLASSES = 60
_FETCHING = ("quantization_config", "fusion_config", "transformers_weights")  # keys by which a part imports or fetches more
_ATTENTION = (None, "eager", "sdpa")  # of torch; others may be fetched from the Hub, and run
_MOST = {"steps": 100_000, "sample_size": 4096, "tokens": 100_000}  # beyond these a number is a mistake, and takes all memory
_OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Of StableDiffusionPipeline: what its calls do unless told, and entries of its folders that make no picture
_STOCK_DEFAULTS = {"default_guidance_scale": 7.5, "default_num_inference_steps": 50}
_PARTS = ("unet", "vae", "scheduler", "text_encoder", "tokenizer")
_STOCK_ONLY = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")

# The schedulers of diffusers that can be swapped in by from_config, by the noise that they are made for. The others run
# the other way, have noise of their own, or need more than a network's output.
_VP = (
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
_VP_OR_FLOW = (  # a flow where use_flow_sigmas is set
    "DEISMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "SASolverScheduler",
    "UniPCMultistepScheduler",
)
_FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler")
_EDM = ("EDMDPMSolverMultistepScheduler", "EDMEulerScheduler")
_RUNS_ON = {"vp": _VP + _VP_OR_FLOW, "flow": _FLOW + _VP_OR_FLOW, "edm": _EDM}
# Two-stage steps in sigma: they need a second sigma that is not far below the first
_TWO_STAGE = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler")
# What a scheduler raises where it cannot take its config, the number of steps or the network's output
_SCHEDULER_ERRORS = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NotImplementedError,
    TypeError,
    ValueError,
)
_SIGMA_OPTIONS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas")
# Annotations of a pipeline's __init__ in the one form that older diffusers reads
_ListOrDict = Union[list, dict, None]  # noqa: UP007
_ListOrTuple = Union[list, tuple, None]  # noqa: UP007
_DictOrNone = Union[dict, None]  # noqa: UP007
_IntOrNone = Union[int, None]  # noqa: UP007
_ModuleOrNone = Union[torch.nn.Module, None]  # noqa: UP007
_StrOrNone = Union[str, None]  # noqa: UP007
_TOKENIZING = threading.Lock()  # a tokenizer's padding and truncation are its state, so two threads must not use one at once


class PipelineInputError(ValueError):
    """A call the checkpoint cannot answer; one line that says what would be valid."""


class NonFiniteError(ValueError):
    """An output that is not finite; one line that names the first stage that made it."""


def require(holds: Any, otherwise: str) -> None:
    """Raise PipelineInputError unless something holds."""
    if not holds:
        raise PipelineInputError(otherwise)


class LatentDiffusionPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Latent diffusion for square or oblong, grey or colour images; a folder in Stable Diffusion's layout opens as one, too."""

    model_cpu_offload_seq = "text_encoder->unet->vae"
    refuse_non_finite = True  # set it to False to get NaN and infinity out as they are
    _optional_components = ["scheduler", "text_encoder", "tokenizer"]
    _callback_tensor_inputs = ["latents"]  # what callback_on_step_end can be given

    def __init__(
        self,
        unet: torch.nn.Module,  # UNet2DModel or UNet2DConditionModel over latents [B, c, h, w]; its sample_size gives h and w
        vae: torch.nn.Module,  # any diffusers autoencoder with decode(z).sample; its config holds the latent normaliser
        scheduler: Any,  # of diffusers, with set_timesteps and step; None for a noise schedule that diffusers lacks
        class_names: _ListOrDict = None,  # in the order of their index; a dict is from "index" to name
        null_class: _IntOrNone = None,  # index of the "no class" embedding; None where training never dropped the class
        image_size: _ListOrTuple = None,  # (H, W) of the content; decoded images are larger where training padded them
        prediction: _StrOrNone = None,  # for latentdiff's samplers: "epsilon", "sample", "v_prediction", "score", "flow", "edm"
        schedule: _DictOrNone = None,  # for them, too: {"name": ..., parameters} of make_schedule; None: read from scheduler
        default_guidance_scale: float = 1.0,  # the defaults are used by a call that does not say
        default_guidance_interval: _ListOrTuple = None,
        default_num_inference_steps: int = 20,
        default_sampler: _StrOrNone = None,  # the latentdiff sampler that runs where scheduler is None
        text_encoder: _ModuleOrNone = None,  # of transformers: the U-Net attends to its last states [B, L, d] and
        tokenizer: Any = None,  # L is model_max_length; padding is masked where the encoder's config says use_attention_mask
        null_prompt: _StrOrNone = "",  # the text that stands for "no text"; None where training never dropped the text
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        self._own_scheduler = scheduler  # what was published; another may be swapped in
        self._interrupt = False
        self._num_timesteps = 0
        self._guidance_scale = default_guidance_scale
        if isinstance(class_names, (list, tuple)):  # a list of strings would look like a (library, class) pair
            class_names = {str(i): str(name) for i, name in enumerate(class_names)}
        self.register_to_config(
            class_names=class_names,
            null_class=null_class,
            null_prompt=null_prompt,
            prediction=prediction,
            schedule=schedule,
            image_size=list(image_size) if image_size is not None else None,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
            default_num_inference_steps=default_num_inference_steps,
            default_sampler=default_sampler,
        )

    @property
    def interrupt(self) -> bool:
        """Whether the rest of this call's steps is to be skipped: a callback may set `pipe._interrupt = True`."""
        return self._interrupt

    @property
    def num_timesteps(self) -> int:
        """How many steps the call that runs now takes, or the last one took."""
        return self._num_timesteps

    @property
    def guidance_scale(self) -> float:
        """The scale of the call that runs now, or of the last one."""
        return self._guidance_scale

    @property
    def class_names(self) -> list[str]:
        """Class names in the order of their index; empty where the checkpoint has none."""
        names = self.config.class_names or {}
        return [names[key] for key in sorted(names, key=int)]

    @property
    def num_classes(self) -> int:
        """How many classes can be asked for (the null class is not one); 0 for an unconditional network."""
        rows = self.unet.config.get("num_class_embeds") or 0
        return rows - 1 if rows and self.config.null_class is not None else rows

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(c, h, w) of one latent."""
        size = self.unet.config.get("sample_size")
        require(size is not None, "unet/config.json has no sample_size: it must give the latent's height and width")
        height, width = (size, size) if isinstance(size, int) else size
        sane = all(isinstance(side, int) and 1 <= side <= _MOST["sample_size"] for side in (height, width))
        require(sane, f"unet/config.json: sample_size {size}: must be from 1 to {_MOST['sample_size']}")
        return self.unet.config.in_channels, height, width

    def class_index(self, label: str | int | None) -> int:
        """The embedding row of a class given by name, number (42 or "42"; a name comes first) or None (no class)."""
        names, count, null = self.class_names, self.num_classes, self.config.null_class
        if label is None:
            needed = "this checkpoint has no null class, so every image needs a class"
            require(null is not None, f"{needed}; {self.describe_classes()}")
            return null
        if isinstance(label, str) and label in names:
            return names.index(label)
        number = None
        if isinstance(label, str):
            number = int(label) if label.isdecimal() else None
        elif not isinstance(label, bool) and hasattr(label, "__index__"):
            try:  # an integer of Python, numpy or torch
                number = operator.index(label)
            except TypeError:
                number = None
        require(number is not None and 0 <= number < count, f"unknown class {label!r}; {self.describe_classes()}")
        return number

    def describe_classes(self) -> str:
        if (count := self.num_classes) == 0:
            kind = "is unconditional" if self.text_encoder is None else "is told by text (prompt=)"
            return f"this checkpoint {kind} and takes no class labels"
        names = self.class_names or [""] * count
        names = [name if name.isprintable() else repr(name) for name in names]  # an escape code would drive the terminal
        listed = ", ".join(f"{i} {name}".strip() for i, name in enumerate(names[:_LISTED_CLASSES]))
        return f"the classes are: {listed}" + (f", ... ({count} in all)" if count > _LISTED_CLASSES else "")

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
    ) -> ImagePipelineOutput | tuple:
        """Draw images. PipelineInputError, naming what would be valid, for what this checkpoint cannot do.

        NonFiniteError, naming the first stage at fault, where latents or images are not finite: damaged or diverged weights,
        guidance that is too strong, a network that overflows in float16.

        Args:
            prompt: None and "" are "no text". What the text encoder has no tokens left for is cut off with a warning.
            class_labels: names and numbers; None is "no class". With a list of prompts, one for all of them or as many.
            negative_prompt, negative_class_labels: what to guide away from, in place of "no text" and "no class".
            num_images_per_label: images for each entry of `class_labels` or `prompt`, side by side in the result.
            guidance_scale: 2207.12598 on every latent channel: uncond + scale (cond - uncond). 1 is off.
            guidance_interval: (low, high) in t of 0 = data to 1 = noise; guided there (2404.07724).
            num_inference_steps: of the scheduler or sampler. None: the checkpoint's; some SDE samplers then take more.
            generator: one for the batch, or a list of one per image (image i is then the same at any batch size).
            latents: starting noise [B, c, h, w] of unit variance instead of drawn noise.
            sampler, sampler_options: one of `latentdiff.samplers.names()` instead of the diffusers scheduler; its keywords.
            guidance: a function denoiser -> denoiser, put around the classifier-free-guided one under `sampler`.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent" (normalised).
            callback_on_step_end: f(pipe, step, timestep (under `sampler` t in [0, 1]), {"latents": x}); may return new ones so,
                and may set `pipe._interrupt = True`, which skips the remaining steps.
            return_dict: False gives a plain tuple.
            callback_on_step_end_tensor_inputs: what the callback is given: ["latents"] or nothing.
        """
        config, sampler = self.config, sampler or (self.config.default_sampler if self.scheduler is None else None)
        steps = config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        interval = config.default_guidance_interval if guidance_interval is None else guidance_interval
        ordered = interval is None or len(interval) == 2 and 0 <= interval[0] <= interval[1] <= 1
        unread = not sampler and (sampler_options or guidance is not None)
        require(output_type in _OUTPUT_TYPES, f"output_type {output_type!r}: must be one of {', '.join(_OUTPUT_TYPES)}")
        require(sampler or self.scheduler, "this checkpoint has neither a scheduler nor a default_sampler: sampler= is needed")
        require(not unread, "sampler_options and guidance: sampler= is needed, the diffusers scheduler reads neither")
        if hasattr(callback_on_step_end, "tensor_inputs"):  # a callback object of diffusers says what it reads
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        valid = f"must be of {self._callback_tensor_inputs}"
        require(not unknown, f"callback_on_step_end_tensor_inputs {unknown}: {valid}")
        callback = step_callback(callback_on_step_end, callback_on_step_end_tensor_inputs)
        generator = list(generator) if isinstance(generator, tuple) else generator
        each = generator if isinstance(generator, list) else [generator]
        valid = all(one is None or isinstance(one, torch.Generator) for one in each)
        require(valid, f"generator {generator}: must be a torch.Generator, or a list of one per image")
        require(hasattr(steps, "__index__"), f"num_inference_steps {steps}: must be a whole number")
        require(steps >= 1, f"num_inference_steps {steps}: must be at least 1")
        require(steps <= _MOST["steps"], f"num_inference_steps {steps}: must be at most {_MOST['steps']}")
        require(ordered, f"guidance_interval {interval}: must be (low, high), 0 <= low <= high <= 1 in t")
        wanted, away = self._asked(prompt, class_labels, negative_prompt, negative_class_labels, num_images_per_label)
        scale = self._guidance(guidance_scale, wanted, away)
        if cuts := self.cut_off(wanted[0] + (away[0] if scale != 1.0 else [])):
            taken = self.tokenizer.model_max_length
            _LOGGER.warning(f"The text encoder takes {taken} tokens of a prompt, so these parts are cut off: {cuts}")
        device = self._execution_device  # a walk over all modules, a tenth of a one-image call where it is asked four times
        self._interrupt, self._guidance_scale, self._num_timesteps = False, scale, steps
        told = self.conditioning(*wanted, device), self.conditioning(*away, device) if scale != 1.0 else {}
        run, x = self._run_scheduler, self._noise(len(wanted[0]), generator, latents, device)  # [B, c, h, w]
        if sampler:
            try:  # not by an import statement: diffusers scans for those and would warn of a package this can do without
                runs = importlib.import_module("latentdiff.samplers.of_pipeline")
            except ImportError as error:
                raise PipelineInputError(f"sampler={sampler!r} needs the latentdiff package: {error}") from error
            run = runs.by_sampler(self, sampler, num_inference_steps is None, sampler_options or {}, guidance)
        call = (x, told, scale, interval, steps, generator)
        before, failure, finite = generator_states(generator), "", True
        try:
            x = run(*call, callback)
            finite = not self.refuse_non_finite or all_finite(x)
        except FloatingPointError as error:  # latentdiff's samplers look at their samples themselves
            failure, finite = str(error), False
        if not finite:
            restore_generators(generator, before)
            raise NonFiniteError(self._first_non_finite(run, call, failure or "the scheduler's latents are not finite"))
        images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _asked(self, prompt, class_labels, negative_prompt, negative_class_labels, per_label: int) -> tuple[tuple, tuple]:
        """(texts [B], embedding rows [B]) of the images and of what to guide away from; None is no text, or no row taken."""
        require(per_label >= 1, f"num_images_per_label {per_label}: must be at least 1")
        texts, rows = self.parse_prompts(prompt, "prompt"), self._rows(class_labels, "class_labels")
        few, many = sorted((len(texts), len(rows)))
        require(few in (1, many), f"{len(texts)} prompts and {len(rows)} class_labels: give as many, or one of either")
        needed = self.text_encoder is not None and self.config.null_prompt is None and None in texts
        require(not needed, "this checkpoint was trained without text dropout, so every image needs a prompt")
        texts_away = self.parse_prompts(negative_prompt, "negative_prompt")
        nothing, count = [self.config.null_class if self.num_classes else None], many * per_label
        rows_away = nothing if negative_class_labels is None else self._rows(negative_class_labels, "negative_class_labels")
        for name, entries in (("negative_prompt", texts_away), ("negative_class_labels", rows_away)):
            require(count % len(entries) == 0, f"{name}: {len(entries)} entries for {count} images; give one, or one per image")
        pairs = (texts, rows), (texts_away, rows_away)
        return tuple([[one for one in each for _ in range(count // len(each))] for each in pair] for pair in pairs)

    def parse_prompts(self, prompt: Any, name: str = "prompt") -> list[str | None]:
        texts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        textual = texts and all(isinstance(text, (str, type(None))) for text in texts)
        require(textual, f"{name} {prompt!r}: must be a text, or a list of texts that is not empty")
        surrogates = any("\ud800" <= character <= "\udfff" for text in texts for character in text or "")
        require(not surrogates, f"{name} {prompt!r}: is not valid UTF-8")
        readable = self.text_encoder is not None or all(text is None for text in texts)
        require(readable, f"{name}: this checkpoint has no text encoder; {self.describe_classes()}")
        return [text if text and text.strip() else None for text in texts]

    def _rows(self, class_labels: Any, name: str) -> list[int | None]:
        labels = class_labels.tolist() if hasattr(class_labels, "tolist") else class_labels  # of a tensor or an array
        labels = list(labels) if isinstance(labels, (list, tuple)) else [labels]
        require(labels, f"{name} is empty; {self.describe_classes()}")
        return [None if label is None and self.num_classes == 0 else self.class_index(label) for label in labels]

    def _guidance(self, asked: float | None, wanted: tuple[list, list], away: tuple[list, list]) -> float:
        """The scale to use; refuses guidance that could do nothing or that the network never learnt."""
        (texts, rows), (texts_away, rows_away), null = wanted, away, self.config.null_class
        classed, classed_away = (any(row not in (None, null) for row in some) for some in (rows, rows_away))
        something = classed or classed_away or any(texts) or any(texts_away)
        scale = float((self.config.default_guidance_scale if something else 1.0) if asked is None else asked)
        require(0 <= scale < math.inf, f"guidance_scale {scale:g}: must be a finite number of at least 0; 1 is off")
        require(scale == 1.0 or something, f"guidance_scale {scale:g}: there is no class or prompt to guide to")
        without = "class" if classed and null is None and None in rows_away else None
        if without is None and any(texts) and self.config.null_prompt is None and None in texts_away:
            without = "text"
        missing = f"trained without {without} dropout, so it has no unconditional prediction to guide away from"
        valid = scale == 1.0 or without is None
        require(valid, f"guidance_scale {scale:g}: this checkpoint was {missing}; the only valid value is 1")
        return scale

    def _tokens(self) -> int:
        """Tokens that each prompt is padded or cut to; refused where the tokenizer would abort the process over them."""
        length = self.tokenizer.model_max_length
        sane = isinstance(length, int) and self.tokenizer.num_special_tokens_to_add() < length <= _MOST["tokens"]
        require(sane, f"tokenizer: model_max_length {str(length)[:40]}: must be as many tokens as the encoder reads")
        return length

    def cut_off(self, texts: list[str | None]) -> list[str]:
        """What prompts say beyond the tokens that the text encoder takes; an entry for each that says more."""
        if not (said := [text for text in dict.fromkeys(texts) if text]):
            return []
        taken = self._tokens() - self.tokenizer.num_special_tokens_to_add()
        with _TOKENIZING:
            tokens = self.tokenizer(said, add_special_tokens=False, verbose=False).input_ids
        return [self.tokenizer.decode(row[taken:]).strip() for row in tokens if len(row) > taken]

    @torch.no_grad()
    def conditioning(self, prompts: list[str | None], labels: list[int | None], device=None) -> dict[str, torch.Tensor]:
        """What the U-Net is given for B images: class_labels [B], encoder_hidden_states [B, L, d], or neither."""
        told, device = {}, device or self._execution_device
        if labels[0] is not None:
            told["class_labels"] = torch.tensor(labels, device=device)
        if self.text_encoder is not None:
            texts = [self.config.null_prompt or "" if text is None else text for text in prompts]
            self._tokens()
            with _TOKENIZING:
                tokens = self.tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt")
            masked = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(device) if masked else None
            states = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
            told["encoder_hidden_states"] = states.to(self.unet.dtype)
        return told

    def _noise(self, count: int, generator: Any, latents: torch.Tensor | None, device=None) -> torch.Tensor:
        """Unit-variance float32 noise [B, c, h, w], given or drawn."""
        shape, device = (count, *self.latent_shape), device or self._execution_device
        generators = len(generator) if isinstance(generator, list) else count
        require(generators == count, f"{generators} generators for {count} images: pass one, or one per image")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        require(latents.shape == shape, f"latents of shape {list(latents.shape)}: this call needs {list(shape)}")
        return latents.to(device, torch.float32)

    def _run_scheduler(self, noise, told, scale, interval, steps, generator, callback) -> torch.Tensor:
        """The reverse process of the diffusers scheduler: unit-variance noise to normalised latents [B, c, h, w]."""
        conditional, negative = told
        fixed = {"encoder_hidden_states": None} if "encoder_hidden_states" in signature(self.unet.forward).parameters else {}
        both = {**fixed, **{name: torch.cat([value, negative[name]]) for name, value in conditional.items() if negative}}
        scheduler = self._prepared_scheduler(steps, noise.device)
        name = type(scheduler).__name__
        keywords = {"generator": generator} if "generator" in signature(scheduler.step).parameters else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        self._num_timesteps = len(scheduler.timesteps)
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, (timestep, fed) in enumerate(zip(scheduler.timesteps, fed_times(scheduler), strict=True)):
                if self.interrupt:
                    continue
                with scheduler_errors(name):
                    scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
                guided = scale != 1.0 and (interval is None or within(interval, scheduler, fed))
                seen = (torch.cat([scaled, scaled]) if guided else scaled).to(self.unet.dtype)  # all around it in float32
                output = self.unet(seen, fed, **(both if guided else {**fixed, **conditional})).sample.float()
                if guided:
                    towards, away = output.chunk(2)  # each [B, c, h, w]
                    # The weights sum to one, so this is the same in every parameterization of the network.
                    output = away + scale * (towards - away)
                with scheduler_errors(name):
                    x = scheduler.step(output, timestep, x, **keywords, return_dict=False)[0]
                x = (callback(self, i, timestep, {"latents": x}) or {}).get("latents", x) if callback else x
                bar.update()
        return x

    def _first_non_finite(self, run: Callable, call: tuple, otherwise: str) -> str:
        """Which stage's output is the first that is not finite: found by making the latents of a failed call once more."""
        noise, told, scale = call[:3]
        if not all_finite(noise):
            return "latents: the starting noise is not finite"
        for name, conditioning in zip(("prompt", "negative_prompt"), told, strict=True):
            states = conditioning.get("encoder_hidden_states")
            if states is not None and not all_finite(states):
                return f"text encoder: its output for {name} is not finite; {suspicion(self.text_encoder, states)}"
        evaluations = 0

        def watch(unet: torch.nn.Module, inputs: tuple, output: Any) -> None:
            nonlocal evaluations
            evaluations += 1
            if not all_finite(output.sample):
                timestep = float(torch.as_tensor(inputs[1]).reshape(-1)[0])
                where = f"evaluation {evaluations}, timestep {timestep:g}, guidance scale {scale:g}"
                raise NonFiniteError(f"U-Net: its output is not finite ({where}); {suspicion(unet, inputs[0])}")

        hook = self.unet.register_forward_hook(watch)
        try:
            again = run(*call, None)
        except NonFiniteError as error:
            return str(error)
        except FloatingPointError:
            pass
        else:
            if all_finite(again):
                return "callback_on_step_end: the latents are finite without it, and not finite with it"
        finally:
            hook.remove()
        return f"sampler: each output of the U-Net is finite, and yet {otherwise}"

    def _prepared_scheduler(self, steps: int, device: Any) -> Any:
        """A copy of the scheduler, set to so many steps; PipelineInputError where it cannot draw from this checkpoint.

        A copy, because a scheduler counts its steps: two threads may call one pipeline. The pipeline's own is set to the
        same steps, for callbacks that look at it.
        """
        scheduler = copy.deepcopy(self.scheduler)
        self._check_scheduler(scheduler)
        with scheduler_errors(type(scheduler).__name__):
            scheduler.set_timesteps(steps, device=device)
            if hasattr(scheduler, "set_begin_index"):
                scheduler.set_begin_index(0)  # else it looks for the first timestep, which some sigmas hold more than once
            check_sigmas(scheduler)
            self.scheduler.set_timesteps(steps, device=device)
        return scheduler

    def _check_scheduler(self, scheduler: Any) -> None:
        """PipelineInputError for a scheduler of other noise, or for another prediction, than the network was trained for."""
        name, noise = type(scheduler).__name__, self._noise_kind()
        kinds = {c.__name__ for c in type(scheduler).__mro__}
        known = type(scheduler).__module__.startswith("diffusers.") or kinds.intersection(_VP + _VP_OR_FLOW + _FLOW + _EDM)
        if noise is None or not known:
            return  # a scheduler of somebody's own: there is nothing to hold it to
        usable = _RUNS_ON.get(noise, ())
        valid = ", ".join(sorted(usable)) or "none of diffusers: give sampler="
        wrong_class = f"scheduler: {name} cannot draw from this checkpoint, whose noise is {noise}; valid: {valid}"
        require(kinds.intersection(usable), wrong_class)
        by_config = f"make it by {name}.from_config(pipe.scheduler.config), from the checkpoint's own scheduler"
        if kinds.intersection(_VP_OR_FLOW):
            runs_flow = bool(scheduler.config.get("use_flow_sigmas"))
            wrong_noise = f"scheduler: {name} has use_flow_sigmas={runs_flow}, the checkpoint's noise is {noise}; {by_config}"
            require(runs_flow == (noise == "flow"), wrong_noise)
        if noise != "vp":
            return
        own, prediction = getattr(self._own_scheduler, "config", {}), scheduler.config.get("prediction_type")
        expected = self.config.prediction or own.get("prediction_type", prediction)
        wrong = f"scheduler: {name}'s prediction_type is {prediction}, the network predicts {expected}; {by_config}"
        require(prediction == expected, wrong)
        trained, given = (getattr(each, "alphas_cumprod", None) for each in (self._own_scheduler, scheduler))
        same = trained is None or given is None or trained.shape == given.shape and torch.allclose(trained, given, atol=1e-3)
        if not same:
            _LOGGER.warning(f"{name} has other betas than the checkpoint's own scheduler; {by_config}")

    def _noise_kind(self) -> str | None:
        """What the network was trained on: "vp", "flow", "edm", another schedule's name, or None where nothing states it."""
        stated = (self.config.schedule or {}).get("name")
        if stated in ("flow", "edm", "ve", "subvp"):
            return stated
        if stated is not None:
            return "vp"
        if self._own_scheduler is None:
            return None
        kinds = {c.__name__ for c in type(self._own_scheduler).__mro__}
        if kinds.intersection(_FLOW) or kinds.intersection(_VP_OR_FLOW) and self._own_scheduler.config.get("use_flow_sigmas"):
            return "flow"
        return next((noise for noise in ("vp", "edm") if kinds.intersection(_RUNS_ON[noise])), None)

    def _decode(self, latents: torch.Tensor, output_type: str) -> Any:
        """Images of latents [B, c, h, w], the padded border cut off, as "pil" (grey for one channel), "np" or "pt"."""
        raw = denormalise(latents, self.vae.config).to(self.vae.dtype)
        images = self.vae.decode(raw).sample.float()  # [B, C, H, W]
        if self.refuse_non_finite and not all_finite(images):  # before they are clamped, which would hide an infinity
            raise NonFiniteError(f"decoder: its output is not finite; {suspicion(self.vae, raw, ('encoder.', 'quant_conv.'))}")
        height, width = self.config.image_size or images.shape[-2:]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        require(min(top, left) >= 0, f"image_size {[height, width]} exceeds the decoded {list(images.shape[-2:])}")
        shown = output_type != "pil" or images.shape[1] in (1, 3, 4)
        require(shown, f"output_type 'pil' cannot show {images.shape[1]} channels: use np or pt")
        return VaeImageProcessor().postprocess(images[..., top : top + height, left : left + width], output_type)

    def to_json_string(self) -> str:
        """model_index.json, naming this class as [file, class] for diffusers to find in the folder, or stock's where alike."""
        index = json.loads(super().to_json_string())
        index["_class_name"] = ["pipeline", type(self).__name__]
        if self.text_encoder is not None and self.num_classes == 0 and self._suits_stock():
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _suits_stock(self) -> bool:
        """Whether stock's one scaling_factor, uncut pictures and use of the scheduler are right: it opens without this file."""
        config, sampling = self.vae.config, getattr(self.scheduler, "config", {})
        factor = 2 ** (len(config.get("block_out_channels") or [0]) - 1)
        whole = self.config.image_size in (None, [side * factor for side in self.latent_shape[1:]])
        means, stds = config.get("latents_mean") or [], config.get("latents_std") or []
        moved = any([config.get("shift_factor"), *means, *(std - 1 for std in stds)])
        # Stock corrects steps_offset and clip_sample without being asked, and cannot run a flow
        corrected = sampling.get("timestep_spacing") == "leading" and sampling.get("steps_offset", 1) != 1
        corrected = corrected or sampling.get("clip_sample") or sampling.get("use_flow_sigmas")
        return whole and not (moved or corrected) and hasattr(self.scheduler, "scale_model_input")

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json and, beside it, this file as pipeline.py; and the hashes of each part's weights.

        save_pretrained ends with this, so that the hashes are those of what it has saved.
        """
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        for part in self.components:
            write_hashes(Path(save_directory, part))
        Path(save_directory, "pipeline.py").write_text(_SOURCE, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: Any, **_: Any) -> dict[str, Any]:  # older diffusers: dduf_entries=None
        # Whoever calls from_pretrained on this class has the code already: none from the folder is run.
        config = json.loads(Path(json_file).read_text(encoding="utf-8"))
        if config.get("_class_name") == "StableDiffusionPipeline":
            config = {**_STOCK_DEFAULTS, **{k: v for k, v in config.items() if k not in _STOCK_ONLY}}
        refuse_code(Path(json_file).parent, config)
        if "_class_name" in config:
            config["_class_name"] = cls.__name__
        return config


def refuse_code(folder: Path, index: dict) -> None:
    """PipelineInputError where opening a folder would run code that lies in it, or fetch some from the Hub.

    An Auto class asks to run what an auto_map names, and diffusers loads whatever looks like a (library, class) pair.
    """
    for part, pair in index.items():
        if part.startswith("_") or not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str)):
            continue
        library, name = pair[0], str(pair[1])
        plain = library in ("diffusers", "transformers") and (not name.startswith("Auto") or name.startswith("Autoencoder"))
        require(part in _PARTS and plain, f"model_index.json: {part} {pair}: not a plain class of diffusers or transformers")
        file = folder / part / "config.json"
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        for key, value in config.items() if isinstance(config, dict) else ():
            fetched = value is not None if key in _FETCHING else "attn_implementation" in key and value not in _ATTENTION
            require(not fetched, f"{file}: {key} {str(value)[:60]} would import or fetch code; leave it out")


def all_finite(values: torch.Tensor) -> bool:
    """Whether no entry is NaN or infinite; waits for the device."""
    return bool(values.isfinite().all())


def suspicion(network: torch.nn.Module, given: torch.Tensor, unused: tuple[str, ...] = ()) -> str:
    """Why the output of a network may not be finite.

    given: its input [B, ...], or its output where the input is no numbers. unused: how weights without a part in it begin.
    """
    for name, weight in network.named_parameters():
        if not name.startswith(unused) and not all_finite(weight):
            return f"its weight {name} is not finite: the file is damaged, or training diverged"
    largest, dtype = given.abs().max().item(), str(given.dtype).removeprefix("torch.")
    hint = "guidance, steps or weights make them overflow"
    if given.dtype == torch.float16:
        hint += "; float32 or bfloat16 hold larger numbers"
    return f"its weights are finite, its numbers reach {largest:.3g} in {dtype}: {hint}"


def generator_states(generator: Any) -> list[torch.Tensor]:
    """What `restore_generators` needs; nothing where the global generator draws."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    return [one.get_state() for one in generators if one is not None]


def restore_generators(generator: Any, states: list[torch.Tensor]) -> None:
    """Take generators back to an earlier state, so that the same numbers are drawn again."""
    generators = generator if isinstance(generator, (list, tuple)) else [generator]
    for one, state in zip((one for one in generators if one is not None), states, strict=True):
        one.set_state(state)


def write_hashes(part: Path) -> None:
    """hashes.json, {name: {bytes, sha256}} of the weight files in a part's folder; latentdiff checks it when it loads them."""
    hashes = {}
    for file in sorted(part.glob("*.safetensors")):
        digest = hashlib.sha256()
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        hashes[file.name] = {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}
    if hashes:
        (part / "hashes.json").write_text(json.dumps(hashes, indent=2) + "\n", encoding="utf-8")
    else:  # pickled, or not weights at all: those of an earlier save would be wrong
        (part / "hashes.json").unlink(missing_ok=True)


@contextlib.contextmanager
def scheduler_errors(name: str) -> Iterator[None]:
    """Turn what a scheduler raises within the block into one PipelineInputError that names it."""
    try:
        yield
    except PipelineInputError:
        raise
    except _SCHEDULER_ERRORS as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise PipelineInputError(f"scheduler: {name} cannot run with these settings: {reason}") from error


def check_sigmas(scheduler: Any) -> None:
    """PipelineInputError where the steps that a scheduler has set cannot be right.

    On a flow sigma is at most 1; some options (use_karras_sigmas) put the sigmas of betas in its place. Heun's and KDPM2's
    second evaluation divides by the second sigma an error that grows with the first: 20,000 to 10 on a cosine schedule.
    """
    name, sigmas = type(scheduler).__name__, getattr(scheduler, "sigmas", None)
    if sigmas is None or len(sigmas) < 3:
        return
    if scheduler.config.get("use_flow_sigmas"):
        settings = [k for k, v in scheduler.config.items() if v is True and k in _SIGMA_OPTIONS]
        require(float(sigmas.max()) < 1.01, f"scheduler: {name} does not run a flow with {', '.join(settings)}: leave it out")
    elif scheduler.config.get("use_beta_sigmas") and float(sigmas[0]) > 1:
        useful = int(((sigmas > 0.2) & (sigmas < 20)).sum())
        otherwise = f"scheduler: {name} with use_beta_sigmas takes all its steps at sigmas of {float(sigmas[-3]):.3g} and more"
        require(useful, f"{otherwise}, where there is no picture yet; leave it out, or take use_karras_sigmas")
    if type(scheduler).__name__ in _TWO_STAGE:
        largest, second = (float(sigma) for sigma in torch.unique(sigmas).flip(0)[:2])
        steep = largest > 1000 and largest > 20 * second
        advice = "set use_karras_sigmas=True, or take another scheduler"
        jump = f"its first step would go from sigma {largest:.0f} to {second:.3g} at once"
        require(not steep, f"scheduler: {name} cannot draw from this checkpoint in so many steps: {jump}; {advice}")


def step_callback(callback: Callable[..., dict | None] | None, names: list[str] | tuple[str, ...]) -> Callable | None:
    """A callback of a step that is given, of its tensors, those of `names` alone; None for None."""
    if callback is None:
        return None

    def call(pipe: Any, step: int, timestep: Any, tensors: dict[str, torch.Tensor]) -> dict | None:
        return callback(pipe, step, timestep, {name: value for name, value in tensors.items() if name in names})

    return call


def fed_times(scheduler: Any) -> torch.Tensor:
    """What the network is told at each timestep: N sigma on flow sigmas, for which diffusers cuts N sigma to an integer."""
    if not scheduler.config.get("use_flow_sigmas", False) or type(scheduler).__name__ in _FLOW:
        return scheduler.timesteps
    return (scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps).to(scheduler.timesteps.device)


def within(interval: tuple[float, float], scheduler: Any, timestep: torch.Tensor) -> bool:
    """Whether a timestep lies in an interval of t, ends included: t N for flow, ln(sigma_max t) / 4 for EDM, else t N - 1."""
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    t = (float(timestep) + (0 if flow else 1)) / config.num_train_timesteps
    if "sigma_data" in config:
        t = min(1.0, math.exp(4 * float(timestep)) / config.sigma_max)  # rounding may take the first beyond 1
    return interval[0] <= t <= interval[1]


def denormalise(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """Raw z of normalised z_n: z_n latents_std / scaling_factor + latents_mean; without these two + shift_factor, std 1."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        mean, std = config.get("shift_factor") or 0.0, 1.0
    mean, std = (torch.as_tensor(values).to(latents).reshape(1, -1, 1, 1) for values in (mean, std))
    return latents / (config.get("scaling_factor") or 1.0) * std + mean
