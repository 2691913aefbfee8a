"""What the page knows of the models: their names, their folders, and what each can do. Nothing here needs torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from latentdiff.errors import UserError
from latentdiff.utils.json_files import read_json
from latentdiff.utils.shipped import INDEX, META, resolve_model, shipped_weights

MODEL = "model"  # the folder of a run or a fit that holds its checkpoint
# `samplers.names()` and `discrete.ORDERS`, which take an import of torch to ask
SAMPLERS = (
    "ancestral",
    "ddim",
    "euler_maruyama",
    "reverse_diffusion",
    "predictor_corrector",
    "annealed_langevin",
    "euler",
    "heun",
    "dopri5",
    "dpmpp_2m",
    "dpmpp_3m",
    "dpmpp_2m_sde",
)
ORDERS = ("random", "confidence")


@dataclass(frozen=True)
class Facts:
    """What a page needs to know of a model to offer its settings.

    Attributes:
        name: how the page names it.
        shown: how a command names it: a name that works anywhere, or the page's own name in the place of its folder.
        class_names: the names of its classes; their numbers where they have no names; empty without classes.
        reads_text: whether it draws prompts.
        over_codes: whether it draws codes.
        steps: steps of a call that gives none.
        guidance: the scale of a call that gives none.
        interval: the times at which guidance is on, (0, 1) for all of them.
        can_guide: whether classifier-free guidance can change its images.
        samplers: the names that --sampler may have.
        image_shape: (C, H, W) of an image.
        condition: the kind of picture that it is given beside the noise; "" for none.
        bridge: whether it starts from images of another data set.
    """

    name: str
    shown: str
    class_names: tuple[str, ...]
    reads_text: bool
    over_codes: bool
    steps: int
    guidance: float
    interval: tuple[float, float]
    can_guide: bool
    samplers: tuple[str, ...]
    image_shape: tuple[int, int, int]
    condition: str
    bridge: bool

    @property
    def pixels(self) -> int:
        """The pixels of one image."""
        return self.image_shape[1] * self.image_shape[2]


def facts_of(name: str, shown: str, config: Mapping[str, Any], unet: Mapping[str, Any], vae: Mapping[str, Any]) -> Facts:
    """The facts of a model.

    Args:
        name: how the page names it.
        shown: how a command names it.
        config: of the pipeline, which is its model_index.json.
        unet, vae: the configs of these networks.

    Raises:
        LookupError, TypeError, ValueError: what is not the config of such a model.
    """
    over_codes = config.get("process") is not None
    reads_text = (config.get("text_encoder") or (None, None))[1] is not None
    rows = unet.get("num_class_embeds") or 0
    numbers = [str(k) for k in range(rows - 1 if rows and config.get("null_class") is not None else rows)]
    class_names = config.get("class_names") or {}
    names = [class_names[key] for key in sorted(class_names, key=int)]
    if reads_text:
        can_guide = config["null_prompt"] is not None
    else:
        can_guide = bool(numbers) and config.get("null_class") is not None
    # The size of an image, of the size of its latents
    side = unet["sample_size"]
    sides = (side, side) if isinstance(side, int) else side
    factor = 2 ** (len(vae.get("block_out_channels") or vae.get("encoder_block_out_channels") or [0]) - 1)
    height, width = config.get("image_size") or (sides[0] * factor, sides[1] * factor)
    low, high = map(float, config.get("default_guidance_interval") or (0, 1))
    return Facts(
        name=name,
        shown=shown,
        class_names=tuple(names[: len(numbers)] or numbers),
        reads_text=reads_text,
        over_codes=over_codes,
        steps=int(config["default_num_inference_steps"]),
        guidance=float(config["default_guidance_scale"]),
        interval=(low, high),
        can_guide=can_guide,
        samplers=ORDERS if over_codes else SAMPLERS,
        image_shape=(vae.get("in_channels") or vae["out_channels"], height, width),
        condition=(config.get("image_condition") or {}).get("kind", ""),
        bridge=config.get("bridge") is not None,
    )


def read_facts(name: str, shown: str, folder: Path) -> Facts | None:
    """The facts of a checkpoint, of its files.

    None where they do not say it: a checkpoint of another program, whose pipeline has defaults, or a damaged one.
    """
    parts = ("", "unet", "vae")
    files = [folder / part / ("config.json" if part else INDEX) for part in parts]
    try:
        return facts_of(name, shown, *(json.loads(file.read_text(encoding="utf-8")) for file in files))
    except (OSError, LookupError, TypeError, ValueError, AttributeError, RecursionError):
        return None


class Folders:
    """The names of models, and where they are."""

    def __init__(self, folders: Mapping[str, Path]):
        """folders: {name: folder of a checkpoint}."""
        self._folders = dict(folders)

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were given."""
        return list(self._folders)

    def folder(self, name: str) -> Path:
        """The folder of a model. UserError for an unknown name. It is never shown to a visitor."""
        if not isinstance(name, str) or name not in self._folders:
            raise UserError(
                f"model {str(name)[:60]!r}: unknown; valid: {', '.join(self._folders) or 'none, there is no model'}"
            )
        return self._folders[name]

    def shown(self, name: str) -> str:
        """How a command names a model: weights/NAME where it ships with latentdiff, else the page's name for it."""
        folder = self.folder(name)
        shipped = shipped_weights(folder.name)
        is_shipped = shipped is not None and shipped.resolve() == folder.resolve()
        return f"weights/{folder.name}" if is_shipped else name


def find_models(names: Sequence[str]) -> tuple[dict[str, Path], Path | None]:
    """({name on the page: folder of a checkpoint}, the folder whose runs are shown by default).

    A folder of a fit or a run stands for its model. While it has none yet, its runs are shown alone.

    UserError for a folder that is neither, or whose description, latentdiff.json, is damaged.
    """
    folders: dict[str, Path] = {}
    runs = None
    for given in names:
        folder = resolve_model(given, "MODEL")
        title = folder.resolve().name
        if not (folder / INDEX).is_file() and any((folder / file).is_file() for file in ("fit.json", "run.json")):
            runs = runs or folder
            if not (folder / MODEL / INDEX).is_file():
                continue
            folder = folder / MODEL
        elif title == MODEL:
            title = folder.resolve().parent.name
        if (folder / META).exists():  # a folder of another program has none
            read_json(folder / META)
        name, number = title, 2
        while name in folders:
            name, number = f"{title} ({number})", number + 1
        folders[name] = folder
    return folders, runs
