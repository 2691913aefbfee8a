"""The models of a server, by name: loaded when they are asked for, and freed again."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.errors import UserError
from latentdiff.utils import hashes
from latentdiff.utils.shipped import shipped_weights
from latentdiff.web.worker import WORKER

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.work import Job


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


def facts_of(name: str, shown: str, pipeline: LatentDiffusionPipeline) -> Facts:
    """The facts of a loaded model."""
    from latentdiff import discrete, samplers
    from latentdiff.checkpoints import is_over_codes

    config = pipeline.config
    over_codes = is_over_codes(config)
    reads_text = pipeline.text_encoder is not None
    numbers = [str(k) for k in range(pipeline.num_classes)]
    if reads_text:
        can_guide = config.get("null_prompt") is not None
    else:
        can_guide = bool(numbers) and config.null_class is not None
    return Facts(
        name=name,
        shown=shown,
        class_names=tuple(pipeline.class_names[: len(numbers)] or numbers),
        reads_text=reads_text,
        over_codes=over_codes,
        steps=config.default_num_inference_steps,
        guidance=float(config.default_guidance_scale),
        interval=tuple(map(float, config.default_guidance_interval or (0, 1))),
        can_guide=can_guide,
        samplers=tuple(discrete.ORDERS if over_codes else samplers.names()),
        image_shape=tuple(pipeline.image_shape),
        condition=(config.get("image_condition") or {}).get("kind", ""),
        bridge=config.get("bridge") is not None,
    )


class Models:
    """The models of a server.

    A model is loaded when it is first used. The last `keep` that were used stay in memory. One request at a time uses a
    model, so what a request draws depends on its own settings alone.
    """

    def __init__(self, folders: Mapping[str, Path], keep: int = 2, device: str = "auto"):
        """
        Args:
            folders: {name: folder of a checkpoint}.
            keep: how many may be in memory at a time.
            device: where they run, see `processes.pick_device`.
        """
        self.device = device
        self._folders = dict(folders)
        self._keep = max(1, keep)
        self._locks = {name: threading.Lock() for name in folders}
        self._guard = threading.Lock()  # of the two below
        self._loaded: OrderedDict[str, LatentDiffusionPipeline] = OrderedDict()  # the last used at the end
        self._facts: dict[str, Facts] = {}
        self._verify = hashes.is_checked()  # a context variable, which the threads of the server do not have

    @property
    def names(self) -> list[str]:
        """The names, in the order in which they were given."""
        return list(self._folders)

    @property
    def loaded(self) -> list[str]:
        """The names of the models in memory, the last used at the end."""
        with self._guard:
            return list(self._loaded)

    def folder(self, name: str) -> Path:
        """The folder of a model. UserError for an unknown name. It is never shown to a visitor."""
        if name not in self._folders:
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

    def facts(self, name: str) -> Facts:
        """The facts of a model, which is loaded the first time. UserError for an unknown or a damaged one."""
        self.folder(name)
        if name not in self._facts:
            WORKER.call(partial(self._load, name))
        return self._facts[name]

    def _load(self, name: str) -> None:
        """Have a model in memory."""
        with self.use(name):
            pass

    @contextmanager
    def use(self, name: str, job: Job | None = None) -> Iterator[LatentDiffusionPipeline]:
        """The pipeline of a model, for one request alone. For the thread that computes, see `worker`.

        job: where it is cancelled, the next evaluation of a network ends the block with `Cancelled`.

        UserError for an unknown name, or a checkpoint that cannot be loaded.
        """
        folder = self.folder(name)
        with self._locks[name], ExitStack() as stack:
            pipeline = self._open(name, folder)
            if job is not None:
                job.check()
                for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
                    if part is not None:
                        hook = part.register_forward_pre_hook(lambda *_: job.check())
                        stack.callback(hook.remove)
            yield pipeline

    def _open(self, name: str, folder: Path) -> LatentDiffusionPipeline:
        """The pipeline, loaded if it is not in memory. The caller holds the model's lock."""
        from latentdiff.checkpoints import load
        from latentdiff.generation import place

        with self._guard:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            # Room is made before the next one is loaded. A model that a request uses now stays
            for other in list(self._loaded)[: len(self._loaded) + 1 - self._keep]:
                if not self._locks[other].locked():
                    del self._loaded[other]
        with hashes.checked(self._verify):
            pipeline = load(folder)
        pipeline.set_progress_bar_config(disable=True)
        place(pipeline, self.device)
        with self._guard:
            self._facts[name] = facts_of(name, self.shown(name), pipeline)
            self._loaded[name] = pipeline
        return pipeline
