"""`latentdiff fit --base MODEL`: what the config of stage 2 has to be to go on from an existing latent diffusion model.

Its autoencoder, text encoder, noise schedule and prediction are kept. Its U-Net is trained on, whole or by a LoRA.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError

LORA_RATE = 2e-4  # learning rate of a LoRA
WHOLE_RATE = 1e-5  # of a whole U-Net of Stable Diffusion's size, as in diffusers' examples
OWN_SHARE = 0.2  # of the rate that a model of latentdiff was trained with
STEPS, GUIDANCE = 25, 7.5  # of pictures, for a base that states none (Stable Diffusion's guidance)
LARGEST = 1024  # pixels of a side that a base may draw

Words = Sequence[str]  # key=value


def base_settings(base: str, lora: int | None, facts: Any, overrides: Words = ()) -> dict[str, Any]:
    """Changes of a stage-2 config that a base asks for, as nested dicts; each section that is named is complete.

    The keys are autoencoder, normaliser, data (size, channels and perhaps caption), model, schedule, prediction, noise_levels,
    weighting, min_snr_gamma, condition, optimizer (lr) and sample. "notes" is no key of a config: lines for people, on what is
    done with the base.

    Args:
        base: the folder of a checkpoint, or of a pipeline in Stable Diffusion's layout.
        lora: rank of a LoRA; None trains the whole U-Net.
        facts: of the pictures: `source`, `classes` ({name: count}) and `captions` (None without any).
        overrides: key=value words of the fit; one of data.caption is kept.

    Raises:
        UserError: the folder is no such model, cannot be trained on here, or needs classes that the pictures do not have; or
            a word names another autoencoder or U-Net.
    """
    return _Base(base, lora, facts, overrides).settings()


class _Base:
    """A base and what it means for a folder of pictures; see `base_settings`.

    Attributes:
        folder: of the base.
        index: its model_index.json.
        unet: its U-Net's config.
        kind: what it is conditioned on: a value of condition.type.
    """

    def __init__(self, base: str, lora: int | None, facts: Any, overrides: Words):
        from latentdiff import checkpoints
        from latentdiff.utils.json_files import read_json

        self.base, self.lora, self.facts = base, lora, facts
        self.captioned = any(item.startswith("data.caption=") for item in overrides)
        for item in overrides:
            if item.startswith(("autoencoder=", "model.pretrained=")):
                raise UserError(f"{item}: --base {base} brings its own autoencoder and U-Net; leave it out")
        self.folder = checkpoints.resolve_model(base, "--base").resolve()
        checkpoints.check(self.folder)
        self.index, self.unet = (read_json(self.folder / name) for name in ("model_index.json", "unet/config.json"))
        self.config = checkpoints.read_meta(self.folder).get("config") if (self.folder / checkpoints.META).is_file() else None
        self.kind = self._kind()
        self._check_lora()

    def _kind(self) -> str:
        if self.index.get("image_condition"):
            raise UserError(
                f"--base {self.base}: is given a second image for every image, and fit has none; train it by `latentdiff train`"
            )
        takes_class = self.unet.get("num_class_embeds") is not None
        takes_text = (self.folder / "text_encoder" / "config.json").is_file()
        kinds = [kind for kind, takes in (("class", takes_class), ("text", takes_text)) if takes]
        if takes_class and not self.facts.classes:
            raise UserError(
                f"--base {self.base}: draws by class, and {self.facts.source} has no classes; sort its pictures into a "
                "sub-folder for each class"
            )
        return "+".join(kinds) or "none"

    def _check_lora(self) -> None:
        kind = self.unet.get("_class_name")
        if self.lora is None:
            return
        if self.lora < 1:
            raise UserError(f"--lora {self.lora}: must be a rank of at least 1, such as 8")
        if kind != "UNet2DConditionModel":
            raise UserError(
                f"--lora {self.lora}: the U-Net of --base {self.base} is a {kind}, and a LoRA is for a UNet2DConditionModel; "
                "leave --lora out to train the whole U-Net"
            )
        if "class" in self.kind and list(self.facts.classes) != self.class_names:
            raise UserError(
                f"--lora {self.lora}: the classes of {self.facts.source} are not those of --base {self.base}, and a LoRA "
                "learns no new ones; leave --lora out to train the whole U-Net"
            )

    @property
    def class_names(self) -> list[str]:
        """The classes of the base in the order of their rows."""
        names = self.index.get("class_names") or {}
        return [names[key] for key in sorted(names, key=int)]

    # The settings

    def settings(self) -> dict[str, Any]:
        """See `base_settings`."""
        from latentdiff.models.unet import recorded_noise

        name, parameters, prediction = recorded_noise(self.folder)
        model: dict[str, Any] = {"pretrained": str(self.folder)}
        if self.lora is not None:
            model["lora"] = {"rank": self.lora}
        elif "class" in self.kind and list(self.facts.classes) != self.class_names:
            model["match_classes"] = True
        return {
            "autoencoder": str(self.folder / "vae"),
            "normaliser": "stored",
            "data": self.data(),
            "model": model,
            "schedule": {"name": name, "params": parameters},
            "prediction": prediction,
            **self.loss(),
            "condition": self.condition(),
            "optimizer": {"lr": self.rate()},
            "sample": self.sample(),
            "notes": self.notes(),
        }

    def data(self) -> dict[str, Any]:
        """The size and channels of the base's images, and a caption for pictures that have none."""
        from latentdiff.utils.json_files import read_json

        vae = read_json(self.folder / "vae" / "config.json")
        blocks = vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0]
        factor, side = 2 ** (len(blocks) - 1), self.unet.get("sample_size")
        size = None
        if side is not None:  # with the border of a base whose images are padded, as pictures of other sizes cannot be
            size = [each * factor for each in (side if isinstance(side, list) else [side, side])]
        if size is None or not all(isinstance(each, int) and 0 < each <= LARGEST for each in size):
            raise UserError(f"--base {self.base}: unet/config.json has no sample_size of images up to {LARGEST} pixels")
        data: dict[str, Any] = {"size": list(size), "channels": int(vae.get("in_channels", 3))}
        if "text" in self.kind and self.facts.captions is None and not self.captioned:
            data["caption"] = self.caption()
        return data

    def caption(self) -> str:
        """The caption of pictures without one: their class, or else the name of their folder."""
        if len(self.facts.classes) > 1:
            return "{class}"
        return " ".join(Path(self.facts.source).resolve().name.replace("_", " ").replace("-", " ").split()) or "a picture"

    def loss(self) -> dict[str, Any]:
        """What a model of latentdiff was trained with; else the plain loss at uniform times."""
        keys = {"noise_levels": "uniform", "weighting": "none", "min_snr_gamma": 5.0}
        return {key: (self.config or {}).get(key, default) for key, default in keys.items()}

    def condition(self) -> dict[str, Any]:
        """The condition of the base; its text encoder stays as it is."""
        condition: dict[str, Any] = {"type": self.kind}
        if "text" in self.kind:
            condition["text"] = {"encoder": str(self.folder)}
        return condition

    def rate(self) -> float:
        """The learning rate."""
        if self.lora is not None:
            return LORA_RATE
        own = ((self.config or {}).get("optimizer") or {}).get("lr")
        return OWN_SHARE * float(own) if own else WHOLE_RATE

    def sample(self) -> dict[str, Any]:
        """How pictures are drawn: as the base says."""
        stable = self.index.get("_class_name") == "StableDiffusionPipeline" and "default_guidance_scale" not in self.index
        guidance = GUIDANCE if stable else float(self.index.get("default_guidance_scale", 1.0))
        sample = {
            "guidance": guidance if self.kind != "none" else 1.0,
            "steps": int(self.index.get("default_num_inference_steps", STEPS)),
        }
        sampler = self.index.get("default_sampler")
        return sample if sampler is None else {**sample, "scheduler": None, "sampler": sampler}

    # In words

    def notes(self) -> list[str]:
        """What is done with the base, one thought a line."""
        how = "the whole U-Net" if self.lora is None else f"a LoRA of rank {self.lora} of its U-Net"
        kept = "its autoencoder and its noise schedule are kept"
        if "text" in self.kind:
            kept = "its autoencoder, its text encoder and its noise schedule are kept"
        lines = [f"goes on from {self.base}: trains {how}; {kept}"]
        if self.lora is None and "class" in self.kind:
            lines += self._class_lines()
        caption = self.data().get("caption")
        if caption is not None:
            shown = "the name of its class" if caption == "{class}" else repr(caption)
            lines.append(f"the pictures have no captions, so each has {shown}; data.caption=… sets another")
        if self.kind == "none" and self.facts.classes:
            lines.append(f"the classes of {self.facts.source} are not used, as the base draws without them")
        if self.kind == "text" and self.facts.classes and caption is None:
            lines.append(f"the classes of {self.facts.source} are not used, as the base reads captions alone")
        return lines

    def _class_lines(self) -> list[str]:
        names = list(self.facts.classes)
        new, gone = [n for n in names if n not in self.class_names], [n for n in self.class_names if n not in names]
        lines = []
        if new:
            lines.append(f"classes that are new to the base start from what it draws without a class: {_listed(new)}")
        if gone:
            lines.append(f"classes of the base that are not in {self.facts.source} are dropped: {_listed(gone)}")
        return lines


def _listed(names: list[str]) -> str:
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")
