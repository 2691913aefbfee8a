"""How two estimates become a guided one: plain extrapolation, adaptive projected guidance, and CFG-Zero*.

`ClassifierFree` and `Autoguidance` each have two estimates: one to guide to, and one to guide away from.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from latentdiff import prediction as predictions
from latentdiff.denoiser import Denoised
from latentdiff.errors import UserError
from latentdiff.utils.tensors import widen

RULES = ("cfg", "apg", "cfg_zero")


@dataclass(frozen=True)
class Rule:
    """A rule by its name. With p the estimate to guide to, n the one to guide away from, and w the scale:

    - "cfg": n + w (p - n), on x0 and eps. The weights sum to one, so it is the same in every parameterization.
    - "apg": adaptive projected guidance (arXiv 2410.02416), on x0: p + (w - 1) (d_orthogonal + parallel d_parallel),
      where d = p - n is split into what is parallel to p and what is orthogonal to it. The parallel part raises contrast and
      saturation; without it large scales do not overexpose. d is first shortened to the norm `threshold`. The paper's momentum
      is left out: an estimate here depends on x and t alone.
    - "cfg_zero": the optimised scale of CFG-Zero* (arXiv 2503.18886), on the velocity of the ODE: s n + w (p - s n) with
      s = <p, n> / |n|^2. The paper's zero-init, which sets the velocity of the first step to 0, is left out.

    All norms and products are over the entries of one sample.

    Args:
        name: one of `RULES`.
        parallel: of "apg", the paper's eta: the share of the parallel part that is kept; 1 is all of it. Below 0 or above 1 is
            allowed.
        threshold: of "apg", the paper's r, above 0: the largest norm of d; inf is off.

    Raises:
        UserError: an unknown name, or an option that is out of range or of another rule.
    """

    name: str = "cfg"
    parallel: float = 0.0
    threshold: float = math.inf

    def __post_init__(self) -> None:
        if self.name not in RULES:
            raise UserError(f"guidance rule: {self.name!r} is unknown; valid: {', '.join(RULES)}")
        if not (math.isfinite(self.parallel) and self.threshold > 0):
            raise UserError(f"guidance rule: parallel {self.parallel} must be finite, and threshold {self.threshold} above 0")
        if self.name != "apg" and (self.parallel != 0 or self.threshold != math.inf):
            raise UserError(f"guidance rule: {self.name} has no parallel and no threshold; they are options of apg")

    def combine(self, x: Tensor, p: Denoised, n: Denoised, scale: float) -> tuple[Tensor, Tensor]:
        """The guided x0 and eps, each [B, ...], at x = x_t [B, ...]. p, n: the estimates to guide to and away from."""
        if self.name == "apg":
            d = p.x0 - n.x0
            if self.threshold < math.inf:
                d = d * widen((self.threshold / _dot(d, d).sqrt().clamp_min(1e-30)).clamp(max=1), d)
            along = widen(_dot(d, p.x0) / _dot(p.x0, p.x0).clamp_min(1e-30), d) * p.x0
            shift = (scale - 1) * (d - (1 - self.parallel) * along)
            ratio = widen(p.schedule.alpha(p.t) / p.schedule.sigma(p.t), d)
            return p.x0 + shift, p.eps - ratio * shift  # alpha x0 + sigma eps stays x
        if self.name == "cfg_zero":
            velocity, other = p.velocity, n.velocity
            other = widen(_dot(velocity, other) / _dot(other, other).clamp_min(1e-30), other) * other
            velocity = torch.lerp(other, velocity, scale)
            return predictions.solve("flow", p.schedule, x.to(velocity.dtype), p.t, velocity)
        return torch.lerp(n.x0, p.x0, scale), torch.lerp(n.eps, p.eps, scale)


CFG = Rule()


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each sample's entries, [B]."""
    return (a * b).reshape(len(a), -1).sum(1)
