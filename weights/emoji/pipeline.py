"""Images from a latent diffusion checkpoint: text, class labels, both or nothing in, pictures out.

This one file, saved into every checkpoint as pipeline.py, is the whole pipeline, so that plain diffusers opens the folder:
`DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`. latentdiff is needed only to run one of its samplers.
"""

import importlib
import inspect
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput
from diffusers.loaders import StableDiffusionLoraLoaderMixin
from diffusers.utils.torch_utils import randn_tensor

# Read now and not when saving: diffusers runs this file from a cache where the next checkpoint's file replaces it.
_SOURCE = Path(__file__).read_text(encoding="utf-8")
_SAVED_AS = "pipeline"
_LISTED_CLASSES = 60
# Of StableDiffusionPipeline: what its calls do unless told, and entries of its folders that make no picture
_STOCK_DEFAULTS = {"default_guidance_scale": 7.5, "default_num_inference_steps": 50}
_STOCK_ONLY = ("safety_checker", "feature_extractor", "image_encoder", "requires_safety_checker")


class PipelineInputError(ValueError):
    """A call the checkpoint cannot answer; one line that says what would be valid."""


class LatentDiffusionPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin):
    """Latent diffusion on text, classes, both or nothing, for square or oblong, grey or colour images.

    A folder in Stable Diffusion's layout opens as one, too.

    Args:
        unet: `UNet2DModel` or `UNet2DConditionModel` over latents [B, c, h, w]; `config.sample_size` gives h and w.
        vae: any diffusers autoencoder with `decode(z).sample`; its config holds the latent normaliser.
        scheduler: any diffusers scheduler with `set_timesteps` and `step`; None for a noise schedule that diffusers lacks.
        text_encoder, tokenizer: of transformers, where the U-Net attends to text: it is given the encoder's last states of
            `tokenizer.model_max_length` tokens. The encoder is told of padding where its config says use_attention_mask.
        class_names: names in the order of their index (a list, or a dict from "index" to name), or None.
        null_class: index of the "no class" embedding, or None where training never dropped the class.
        null_prompt: the text that stands for "no text", or None where training never dropped the text.
        image_size: (H, W) of the real content; decoded images are larger where training padded them.
        prediction, schedule: what latentdiff's own samplers take the network for: "epsilon", "sample", "v_prediction",
            "score", "flow" or "edm", and {"name": ..., parameters} for `make_schedule`. None: read from the scheduler.
        default_guidance_scale, default_guidance_interval, default_num_inference_steps: used by a call that does not say.
        default_sampler: the latentdiff sampler that runs where `scheduler` is None.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"
    _optional_components = ["scheduler", "text_encoder", "tokenizer"]

    def __init__(
        self,
        unet: torch.nn.Module,
        vae: torch.nn.Module,
        scheduler: Any,
        class_names: list | dict | None = None,
        null_class: int | None = None,
        image_size: list | tuple | None = None,
        prediction: str | None = None,
        schedule: dict | None = None,
        default_guidance_scale: float = 1.0,
        default_guidance_interval: list | tuple | None = None,
        default_num_inference_steps: int = 20,
        default_sampler: str | None = None,
        text_encoder: torch.nn.Module | None = None,
        tokenizer: Any = None,
        null_prompt: str | None = "",
    ):
        super().__init__()
        self.register_modules(unet=unet, vae=vae, scheduler=scheduler, text_encoder=text_encoder, tokenizer=tokenizer)
        if isinstance(class_names, (list, tuple)):  # a list of strings would look like a (library, class) pair
            class_names = {str(i): str(name) for i, name in enumerate(class_names)}
        self.register_to_config(
            class_names=class_names, null_class=null_class, null_prompt=null_prompt, prediction=prediction, schedule=schedule,
            image_size=list(image_size) if image_size is not None else None, default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval, default_num_inference_steps=default_num_inference_steps,
            default_sampler=default_sampler,
        )  # fmt: skip

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
        if size is None:
            raise PipelineInputError("unet/config.json has no sample_size: it must give the latent's height and width")
        height, width = (size, size) if isinstance(size, int) else size
        return self.unet.config.in_channels, height, width

    def class_index(self, label: str | int | None) -> int:
        """The embedding row of a class given by name, number (42 or "42"; a name comes first) or None (no class)."""
        names, count, null = self.class_names, self.num_classes, self.config.null_class
        if label is None:
            if null is None:
                raise PipelineInputError(
                    f"this checkpoint has no null class, so every image needs a class; {self._listed_classes()}"
                )
            return null
        if isinstance(label, str) and label in names:
            return names.index(label)
        number = int(label) if isinstance(label, str) and label.isdecimal() else label
        if isinstance(number, int) and not isinstance(number, bool) and 0 <= number < count:
            return number
        raise PipelineInputError(f"unknown class {label!r}; {self._listed_classes()}")

    def _listed_classes(self) -> str:
        if (count := self.num_classes) == 0:
            kind = "is unconditional" if self.text_encoder is None else "is told by text (prompt=)"
            return f"this checkpoint {kind} and takes no class labels"
        names = self.class_names or [""] * count
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
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        sampler: str | None = None,
        sampler_options: dict[str, Any] | None = None,
        guidance: Callable[[Any], Any] | None = None,
        output_type: str = "pil",
        callback_on_step_end: Callable[..., dict | None] | None = None,
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple:
        """Draw images.

        Args:
            prompt: a text or a list of them, for a checkpoint with a text encoder; None is "no text".
            class_labels: a name, a number, None, or a list of them (mixed as you like); None is "no class". With a
                list of prompts, one for all of them or as many.
            negative_prompt, negative_class_labels: what to guide away from, in place of "no text" and "no class".
            num_images_per_label: images for each entry of `class_labels` or `prompt`, side by side in the result.
            guidance_scale: 2207.12598 on every latent channel: uncond + scale (cond - uncond). 1 is off. None: the default.
            guidance_interval: (low, high) in t of 0 = data to 1 = noise; guided there (2404.07724). None: the default.
            num_inference_steps: of the scheduler or sampler. None: the checkpoint's; some SDE samplers then take more.
            generator: one for the batch, or a list of one per image (image i is then the same at any batch size).
            latents: starting noise [B, c, h, w] of unit variance instead of drawn noise.
            sampler, sampler_options: one of `latentdiff.samplers.names()` instead of the diffusers scheduler; its keywords.
            guidance: a function denoiser -> denoiser, put around the classifier-free-guided one under `sampler`.
            output_type: "pil", "np" ([B, H, W, C] in [0, 1]), "pt" ([B, C, H, W] in [0, 1]) or "latent" (normalised).
            callback_on_step_end: f(pipe, step, timestep (under `sampler` t in [0, 1]), {"latents": x}); may return new ones so.
            return_dict: False gives a plain tuple.
        Raises PipelineInputError for what this checkpoint cannot do, naming what it can.
        """
        if output_type not in ("pil", "np", "pt", "latent"):
            raise PipelineInputError(f"output_type {output_type!r}: must be one of pil, np, pt, latent")
        if self.scheduler is None and (sampler := sampler or self.config.default_sampler) is None:
            raise PipelineInputError("this checkpoint has neither a scheduler nor a default_sampler: sampler= is needed")
        if sampler is None and (sampler_options or guidance is not None):
            raise PipelineInputError("sampler_options and guidance: sampler= is needed, the diffusers scheduler reads neither")
        steps = self.config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        if steps < 1:
            raise PipelineInputError(f"num_inference_steps {steps}: must be at least 1")
        interval = self.config.default_guidance_interval if guidance_interval is None else guidance_interval
        if interval is not None and (len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1):
            raise PipelineInputError(f"guidance_interval {interval}: must be (low, high), 0 <= low <= high <= 1 in t")
        prompts, labels = self._wanted(prompt, class_labels, num_images_per_label)  # B of each
        negative = self._negative(negative_prompt, negative_class_labels, len(prompts))
        scale = self._guidance(guidance_scale, prompts, labels, negative)
        told = self.conditioning(prompts, labels), self.conditioning(*negative) if scale != 1.0 else {}
        noise = self._noise(len(prompts), generator, latents)  # [B, c, h, w]
        asked = (sampler, num_inference_steps, sampler_options or {}, guidance)
        run = partial(self._run_sampler, *asked) if sampler else self._run_scheduler
        latents = run(noise, told, scale, interval, steps, generator, callback_on_step_end)
        images = latents if output_type == "latent" else to_output(self._decode(latents), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _wanted(self, prompt: Any, class_labels: Any, per_label: int) -> tuple[list[str | None], list[int | None]]:
        """The text (None: no text) and the embedding row (None: the network takes none) of each of B images."""
        if per_label < 1:
            raise PipelineInputError(f"num_images_per_label {per_label}: must be at least 1")
        texts, rows = self._texts(prompt, "prompt"), self._rows(class_labels, "class_labels")
        if min(len(texts), len(rows)) not in (1, max(len(texts), len(rows))):
            raise PipelineInputError(f"{len(texts)} prompts and {len(rows)} class_labels: give as many, or one of either")
        if self.text_encoder is not None and self.config.null_prompt is None and None in texts:
            raise PipelineInputError("this checkpoint was trained without text dropout, so every image needs a prompt")
        count = max(len(texts), len(rows)) * per_label
        return spread(texts, count), spread(rows, count)

    def _negative(self, prompt: Any, class_labels: Any, count: int) -> tuple[list[str | None], list[int | None]]:
        """The same of what is guided away from: "nothing" unless it is named."""
        null = self.config.null_class if self.num_classes else None
        texts = self._texts(prompt, "negative_prompt")
        rows = [null] if class_labels is None else self._rows(class_labels, "negative_class_labels")
        for name, entries in (("negative_prompt", texts), ("negative_class_labels", rows)):
            if count % len(entries):
                raise PipelineInputError(f"{name}: {len(entries)} entries for {count} images; give one, or one per image")
        return spread(texts, count), spread(rows, count)

    def _texts(self, prompt: Any, name: str) -> list[str | None]:
        texts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
        if not texts or not all(isinstance(text, (str, type(None))) for text in texts):
            raise PipelineInputError(f"{name} {prompt!r}: must be a text, or a list of texts that is not empty")
        if any("\ud800" <= character <= "\udfff" for text in texts for character in text or ""):
            raise PipelineInputError(f"{name} {prompt!r}: is not valid UTF-8")
        if self.text_encoder is None and any(text is not None for text in texts):
            raise PipelineInputError(f"{name}: this checkpoint has no text encoder; {self._listed_classes()}")
        return [text if text and text.strip() else None for text in texts]

    def _rows(self, class_labels: Any, name: str) -> list[int | None]:
        if hasattr(class_labels, "tolist"):  # a tensor or an array
            class_labels = class_labels.tolist()
        labels = list(class_labels) if isinstance(class_labels, (list, tuple)) else [class_labels]
        if not labels:
            raise PipelineInputError(f"{name} is empty; {self._listed_classes()}")
        unlabelled = self.num_classes == 0 and all(label is None for label in labels)
        return [None if unlabelled else self.class_index(label) for label in labels]

    def _guidance(self, asked: float | None, prompts: list, labels: list, negative: tuple[list, list]) -> float:
        """The scale to use; refuses guidance that could do nothing or that the network never learnt."""
        config = self.config
        classed, classed_away = (any(row not in (None, config.null_class) for row in rows) for rows in (labels, negative[1]))
        texted, texted_away = (any(texts) for texts in (prompts, negative[0]))
        something = classed or classed_away or texted or texted_away
        scale = float((config.default_guidance_scale if something else 1.0) if asked is None else asked)
        if not 0 <= scale < math.inf:
            raise PipelineInputError(f"guidance_scale {scale:g}: must be a finite number of at least 0; 1 is off")
        if scale != 1.0 and not something:
            raise PipelineInputError(f"guidance_scale {scale:g}: there is no class or prompt to guide to")
        missing = [("class", classed, config.null_class, negative[1]), ("text", texted, config.null_prompt, negative[0])]
        for kind, used, null, away in missing:
            if scale != 1.0 and used and null is None and None in away:
                raise PipelineInputError(
                    f"guidance_scale {scale:g}: this checkpoint was trained without {kind} dropout, so it has no "
                    "unconditional prediction to guide away from; the only valid value is 1"
                )
        return scale

    @torch.no_grad()
    def conditioning(self, prompts: list[str | None], labels: list[int | None]) -> dict[str, torch.Tensor]:
        """What the U-Net is given for B images: class_labels [B], encoder_hidden_states [B, L, d], or neither."""
        told, device = {}, self._execution_device
        if labels[0] is not None:
            told["class_labels"] = torch.tensor(labels, device=device)
        if self.text_encoder is not None:
            texts = [self.config.null_prompt or "" if text is None else text for text in prompts]
            length = self.tokenizer.model_max_length
            tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
            masked = getattr(self.text_encoder.config, "use_attention_mask", False)
            mask = tokens.attention_mask.to(device) if masked else None
            told["encoder_hidden_states"] = self.text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0]
        return told

    def _noise(self, count: int, generator: Any, latents: torch.Tensor | None) -> torch.Tensor:
        """Unit-variance float32 noise [B, c, h, w], given or drawn."""
        shape = (count, *self.latent_shape)
        if isinstance(generator, list) and len(generator) != count:
            raise PipelineInputError(f"{len(generator)} generators for {count} images: pass one, or one per image")
        if latents is None:
            return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        if tuple(latents.shape) != shape:
            raise PipelineInputError(f"latents of shape {list(latents.shape)}: this call needs {list(shape)}")
        return latents.to(self._execution_device, torch.float32)

    def _network(self, x: torch.Tensor, timestep: torch.Tensor, told: dict[str, torch.Tensor]) -> torch.Tensor:
        """The U-Net in its own dtype, everything around it in float32."""
        conditioning = {k: v.to(self.unet.dtype) if v.is_floating_point() else v for k, v in told.items()}
        if "encoder_hidden_states" in inspect.signature(self.unet.forward).parameters:
            conditioning.setdefault("encoder_hidden_states", None)
        return self.unet(x.to(self.unet.dtype), timestep, **conditioning).sample.float()

    def _run_scheduler(self, noise, told, scale, interval, steps, generator, callback) -> torch.Tensor:
        """The reverse process of the diffusers scheduler: unit-variance noise to normalised latents [B, c, h, w]."""
        scheduler, (conditional, negative) = self.scheduler, told
        both = {name: torch.cat([value, negative[name]]) for name, value in conditional.items()} if scale != 1.0 else {}
        scheduler.set_timesteps(steps, device=noise.device)
        keywords = {"generator": generator} if "generator" in inspect.signature(scheduler.step).parameters else {}
        x = noise * getattr(scheduler, "init_noise_sigma", 1.0)
        with self.progress_bar(total=len(scheduler.timesteps)) as bar:
            for i, (timestep, fed) in enumerate(zip(scheduler.timesteps, fed_times(scheduler), strict=True)):
                scaled = scheduler.scale_model_input(x, timestep) if hasattr(scheduler, "scale_model_input") else x
                if scale != 1.0 and within(interval, scheduler, fed):
                    towards, away = self._network(torch.cat([scaled, scaled]), fed, both).chunk(2)  # each [B, c, h, w]
                    # The weights sum to one, so this is the same in every parameterization of the network.
                    output = away + scale * (towards - away)
                else:
                    output = self._network(scaled, fed, conditional)
                x = scheduler.step(output, timestep, x, **keywords, return_dict=False)[0]
                if callback is not None:
                    x = (callback(self, i, timestep, {"latents": x}) or {}).get("latents", x)
                bar.update()
        return x

    def _run_sampler(self, name, asked, options, guide, noise, told, scale, interval, steps, generator, callback):
        """The same with one of latentdiff's samplers."""
        # Not an import statement: diffusers scans this file for those and would warn about a package it can do without
        try:
            denoisers, guidances, samplers = (
                importlib.import_module(f"latentdiff.{room}") for room in ("denoiser", "guidance", "samplers")
            )
        except ImportError as error:
            raise PipelineInputError(f"sampler={name!r} needs the latentdiff package: {error}") from error
        steps = samplers.default_steps(name, steps) if asked is None and name != self.config.default_sampler else steps
        told = [{k: v.to(self.unet.dtype) if v.is_floating_point() else v for k, v in keywords.items()} for keywords in told]
        denoiser = guidances.ClassifierFree(denoisers.Denoiser.from_pipeline(self), *told, scale, interval=interval)
        denoiser = denoiser if guide is None else guide(denoiser)
        with self.progress_bar(total=steps) as bar:

            def report(step: int, t: float, x: torch.Tensor, x0: torch.Tensor) -> torch.Tensor | None:
                bar.update()
                return (callback(self, step, t, {"latents": x}) or {}).get("latents") if callback else None

            return samplers.sample(denoiser, noise, sampler=name, steps=steps, generator=generator, callback=report, **options)

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Normalised latents [B, c, h, w] to images [B, C, H, W] in [0, 1], the padded border cut off."""
        images = self.vae.decode(denormalise(latents, self.vae.config).to(self.vae.dtype)).sample.float()
        height, width = self.config.image_size or images.shape[-2:]
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        if min(top, left) < 0:
            raise PipelineInputError(f"image_size {[height, width]} exceeds the decoded {list(images.shape[-2:])}")
        return (images[..., top : top + height, left : left + width] / 2 + 0.5).clamp(0, 1)

    def to_json_string(self) -> str:
        """model_index.json, naming this class as [file, class] so that diffusers takes it from the folder.

        One that diffusers' own StableDiffusionPipeline runs alike is named so: it then opens without this file's code.
        """
        index = json.loads(super().to_json_string())
        index["_class_name"] = [_SAVED_AS, type(self).__name__]
        if self._is_stable_diffusion():
            index |= {"_class_name": "StableDiffusionPipeline", "requires_safety_checker": False}
            index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    def _is_stable_diffusion(self) -> bool:
        """Whether text alone drives it, and stock's one scaling_factor, uncut pictures and use of the scheduler are right."""
        config, sampling = self.vae.config, getattr(self.scheduler, "config", {})
        factor = 2 ** (len(config.get("block_out_channels") or [0]) - 1)
        whole = self.config.image_size in (None, [side * factor for side in self.latent_shape[1:]])
        centred = not any([config.get("shift_factor") or 0, *(config.get("latents_mean") or [])])
        centred = centred and all(value == 1 for value in config.get("latents_std") or [])
        # Stock corrects steps_offset and clip_sample without being asked, and cannot run a flow
        alike = sampling.get("timestep_spacing") != "leading" or sampling.get("steps_offset", 1) == 1
        alike = alike and not any(sampling.get(key) for key in ("use_flow_sigmas", "clip_sample"))
        alike = alike and hasattr(self.scheduler, "scale_model_input")
        return self.text_encoder is not None and self.num_classes == 0 and whole and centred and alike

    def save_config(self, save_directory: Any, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write model_index.json and, beside it, this file as pipeline.py."""
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)
        Path(save_directory, f"{_SAVED_AS}.py").write_text(_SOURCE, encoding="utf-8")

    @classmethod
    def _dict_from_json_file(cls, json_file: Any) -> dict[str, Any]:
        # Whoever calls from_pretrained on this class has the code already: none from the folder is run.
        config = json.loads(Path(json_file).read_text(encoding="utf-8"))
        if config.get("_class_name") == "StableDiffusionPipeline":
            config = {**_STOCK_DEFAULTS, **{k: v for k, v in config.items() if k not in _STOCK_ONLY}}
        if "_class_name" in config:
            config["_class_name"] = cls.__name__
        return config


def spread(entries: list, count: int) -> list:
    """`count` entries from a divisor of as many, each repeated side by side."""
    return [entry for entry in entries for _ in range(count // len(entries))]


def fed_times(scheduler: Any) -> torch.Tensor:
    """What the network is told at each timestep: N sigma on flow sigmas, for which diffusers cuts N sigma to an integer."""
    if not scheduler.config.get("use_flow_sigmas", False):
        return scheduler.timesteps
    return (scheduler.sigmas[: len(scheduler.timesteps)] * scheduler.config.num_train_timesteps).to(scheduler.timesteps.device)


def within(interval: tuple[float, float] | None, scheduler: Any, timestep: torch.Tensor) -> bool:
    """Whether a timestep lies in an interval of t, ends included: t N for flow, ln(sigma_max t) / 4 for EDM, else t N - 1."""
    if interval is None:
        return True
    config = scheduler.config
    flow = type(scheduler).__name__.startswith("FlowMatch") or config.get("use_flow_sigmas", False)
    t = (float(timestep) + (0 if flow else 1)) / config.num_train_timesteps
    if "sigma_data" in config:
        t = min(1.0, math.exp(4 * float(timestep)) / config.sigma_max)  # rounding may take the first beyond 1
    return interval[0] <= t <= interval[1]


def denormalise(latents: torch.Tensor, config: Any) -> torch.Tensor:
    """The autoencoder's own latents [B, c, h, w] from normalised ones: z = z_n std / scaling_factor + mean.

    mean and std are latents_mean and latents_std, per channel; without them z = z_n / scaling_factor + shift_factor.
    """
    latents = latents / (config.get("scaling_factor") or 1.0)
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return latents + (config.get("shift_factor") or 0.0)
    mean, std = (torch.as_tensor(values).to(latents).reshape(1, -1, 1, 1) for values in (mean, std))
    return latents * std + mean


def to_output(images: torch.Tensor, output_type: str) -> torch.Tensor | np.ndarray | list[PIL.Image.Image]:
    """Images [B, C, H, W] in [0, 1] as "pt", "np" [B, H, W, C] or "pil" (grey for one channel)."""
    array = images.cpu().permute(0, 2, 3, 1).numpy()  # [B, H, W, C]
    if output_type in ("pt", "np"):
        return images if output_type == "pt" else array
    if array.shape[-1] not in (1, 3, 4):
        raise PipelineInputError(f"output_type 'pil' cannot show {array.shape[-1]} channels: use np or pt")
    pixels = (array * 255).round().astype(np.uint8)
    return [PIL.Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image) for image in pixels]
