"""Pictures of how images arise while a model samples: x0 estimates of the network's own evaluations.

They are read off evaluations that the sampler makes anyway, and nothing is drawn at random. So the images stay the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from PIL import Image

    from latentdiff.pipelines.latent_diffusion import LatentDiffusionPipeline

ROWS = 2  # images that are followed
COLUMNS = 6  # steps that are shown
SIDE = 64  # pixels that a small image is enlarged to, at least


class Trajectory:
    """A growing picture of the first images of a batch: a row is an image, a column an x0 estimate, from noise to data.

    An estimate is noted after each step, and decoded only when a picture is asked for.
    """

    def __init__(self, pipeline: LatentDiffusionPipeline, scale: float):
        """scale: of classifier-free guidance, for evaluations of twice as many samples, those to guide to in front."""
        self.pipeline, self.scale = pipeline, scale
        self.estimates: list[Any] = []  # of x0, one for each column: latents [n, c, h, w], or codes [n, L, h, w]
        self._last: tuple[Any, Any, Any] | None = None  # the network's input, its time and its output

    @contextmanager
    def watching(self) -> Iterator[Trajectory]:
        """Within the block the network's evaluations are noted."""

        def note(_: Any, args: tuple[Any, ...], output: Any) -> None:
            self._last = (args[0], args[1], output.sample)

        handle = self.pipeline.unet.register_forward_hook(note)
        try:
            yield self
        finally:
            handle.remove()
            self._last = None

    def add(self, step: int, steps: int, count: int) -> bool:
        """After a step: note one more column. Returns whether there is one; not each step is shown.

        step: its number from 0, of `steps`. count: images of the batch.
        """
        shown = np.linspace(0, steps - 1, min(COLUMNS, steps)).round()
        if self._last is None or step not in shown:
            return False
        self.estimates.append(self._estimate(*self._last, count))
        return True

    def _estimate(self, given: Any, times: Any, output: Any, count: int) -> Any:
        """The x0 estimates of the first ROWS of `count` images, from the network's input, its time and its output."""
        from latentdiff.checkpoints import is_over_codes

        rows = min(ROWS, count)
        own = output[:rows].detach().float()
        if len(output) == 2 * count:
            other = output[count : count + rows].detach().float()
            own = other + self.scale * (own - other)
        if is_over_codes(self.pipeline.config):
            return own.unflatten(1, (self.pipeline.code_shape[0], self.pipeline.num_codes)).argmax(2)
        return self._clean(given[:rows], times, own)

    def _clean(self, given: Any, times: Any, output: Any) -> Any:
        """x0 [n, c, h, w] of what the network was given and of its output, as `samplers.of_pipeline.output_rule` has it."""
        from latentdiff import prediction
        from latentdiff.denoiser import Denoiser
        from latentdiff.utils.tensors import per_sample, widen

        denoiser = Denoiser.from_pipeline(self.pipeline)
        schedule = denoiser.schedule
        given = given[:, : output.shape[1]].float()  # a second image lies beside x as further channels
        times = times if getattr(times, "ndim", 0) == 0 else times[: len(given)]
        t = per_sample(schedule.time_from_timestep(times), given)
        x = given / widen(schedule.input_scale(t), given)
        return prediction.solve(denoiser.prediction, schedule, x, t, output)[0]

    def columns(self) -> list[np.ndarray]:
        """The estimates so far, decoded: uint8 [n, H, W, C] each."""
        import torch

        from latentdiff.checkpoints import is_over_codes

        estimates = torch.cat(self.estimates)  # decoded together: each call of a network has its costs
        with torch.no_grad():
            if is_over_codes(self.pipeline.config):
                images = self.pipeline.decode_codes(estimates, "np")
            else:
                images = self.pipeline.decode_latents(estimates, "np")
        return np.split(np.round(images * 255).astype(np.uint8), len(self.estimates))

    def picture(self) -> Image.Image:
        """All columns so far."""
        from latentdiff.utils.images import tile

        columns = self.columns()
        rows = [[column[k] for column in columns] for k in range(len(columns[0]))]
        return tile(rows, max(1, -(-SIDE // max(columns[0].shape[1:3]))))
