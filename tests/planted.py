"""Planted bugs: a function's wrong twin, and a denoiser that lies, to show that a test would see the difference."""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace

import torch

from latentdiff.denoiser import Denoised
from latentdiff.utils.tensors import widen


def planted(function: Callable, *changes: tuple[str, str], **helpers: Callable) -> Callable:
    """A twin of `function` in whose source each `old` (found exactly once) reads `new`; the original stays as it is.

    helpers: what the twin finds under these names in place of what stands beside the original.
    """
    function = inspect.unwrap(function)
    source = textwrap.dedent(inspect.getsource(function))  # a method stands indented
    for old, new in changes:
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__name__}"
        source = source.replace(old, new)
    scope = {**function.__globals__, **helpers}
    exec(compile(source, f"<planted {function.__name__}>", "exec"), scope)
    return scope[function.__name__]


class Lying:
    """A denoiser around another: its score is multiplied by `score` (x0 and eps follow), or its x0 alone by `x0`."""

    def __init__(self, denoiser, score: float = 1.0, x0: float = 1.0):
        self.denoiser, self.schedule, self.score, self.x0 = denoiser, denoiser.schedule, score, x0

    def __call__(self, x: torch.Tensor, t: float | torch.Tensor) -> Denoised:
        seen = self.denoiser(x, t)
        ratio = widen(self.schedule.sigma(seen.t) / self.schedule.alpha(seen.t), x)
        x0 = seen.x0 + ratio * (1 - self.score) * seen.eps  # x = alpha x0 + sigma eps still holds
        return replace(seen, x0=self.x0 * x0, eps=self.score * seen.eps)
