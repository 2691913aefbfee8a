"""The models of a server, in the process that computes: loaded when they are asked for, and freed again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from latentdiff.utils import hashes, processes
from latentdiff.web.facts import Facts, Folders, facts_of, find_models

if TYPE_CHECKING:
    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline
    from latentdiff.web.jobs.job import Job


class Models(Folders):
    """The models of a server, in the process that computes. It belongs to one thread.

    A model is loaded when it is first used. The last `keep` that were used stay in memory.
    """

    def __init__(
        self,
        folders: Mapping[str, Path],
        keep: int = 2,
        device: str = "auto",
        verify: bool = True,
    ):
        """
        Args:
            folders: {name: folder of a checkpoint}.
            keep: how many may be in memory at a time.
            device: where they run, see `processes.pick_device`.
            verify: whether their weights are compared with their hashes.
        """
        super().__init__(folders)
        self.device = device
        self._keep = max(1, keep)
        self._verify = verify
        self._loaded: OrderedDict[str, LatentDiffusionPipeline] = OrderedDict()  # the last used at the end
        self._facts: dict[str, Facts] = {}

    @property
    def loaded(self) -> list[str]:
        """The names of the models in memory, the last used at the end."""
        return list(self._loaded)

    def facts(self, name: str) -> Facts:
        """The facts of a model, which is loaded the first time. UserError for an unknown or a damaged one."""
        self.folder(name)
        if name not in self._facts:
            self._open(name)
        return self._facts[name]

    @contextmanager
    def use(self, name: str, job: Job | None = None) -> Iterator[LatentDiffusionPipeline]:
        """The pipeline of a model.

        job: where it is cancelled, the next evaluation of a network ends the block with `Cancelled`.

        UserError for an unknown name, or a checkpoint that cannot be loaded.
        """
        with ExitStack() as stack:
            pipeline = self._open(name)
            if job is not None:
                job.check()
                for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
                    if part is not None:
                        hook = part.register_forward_pre_hook(lambda *_: job.check())
                        stack.callback(hook.remove)
            yield pipeline

    def _open(self, name: str) -> LatentDiffusionPipeline:
        """The pipeline, loaded if it is not in memory."""
        from latentdiff.checkpoints import load
        from latentdiff.generation import place

        folder = self.folder(name)
        if name in self._loaded:
            self._loaded.move_to_end(name)
            return self._loaded[name]
        while len(self._loaded) >= self._keep:  # room is made before the next one is loaded
            self._loaded.popitem(last=False)
        with hashes.checked(self._verify):
            pipeline = load(folder)
        pipeline.set_progress_bar_config(disable=True)
        place(pipeline, self.device)
        self._facts[name] = facts_of(name, self.shown(name), pipeline.config, pipeline.unet.config, pipeline.vae.config)
        self._loaded[name] = pipeline
        return pipeline


def open_models(names: Sequence[str], keep: int, device: str, verify: bool) -> Models:
    """The models of a command's arguments, all of them checked and the first one loaded. UserError for what cannot be."""
    from latentdiff.checkpoints import check

    folders, _ = find_models(names)
    processes.pick_device(device)
    for folder in folders.values():
        check(folder)
    models = Models(folders, keep, device, verify)
    for name in models.names[:1]:
        models.facts(name)
    return models


def ready(models: Models, _: Job) -> None:
    """A request that does nothing: it succeeds when the models are there."""


def facts(models: Models, _: Job, name: str) -> Facts:
    """A request: the facts of a model."""
    return models.facts(name)
