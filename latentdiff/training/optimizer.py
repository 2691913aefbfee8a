"""AdamW, the learning rate of each step, and the gradient's norm."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from latentdiff.config import OptimizerConfig
from latentdiff.training import distributed


def make_optimizer(parameters: Any, config: OptimizerConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) over `parameters`: an iterable of parameters, or a list of parameter groups."""
    return torch.optim.AdamW(
        parameters, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay, eps=config.eps, fused=True
    )


def learning_rate(config: OptimizerConfig, step: int, steps: int, share: float = 0.0) -> float:
    """The learning rate of one step. It depends on nothing else, so a resumed run continues it exactly.

    It falls by the steps, or by the clock where that is further on.

    Args:
        config: the optimizer's section: lr, schedule, warmup_steps, decay_share, final_share.
        step: the step's number, 0 <= step < steps.
        steps: how many steps the whole run has at most.
        share: of the run's time, what is used, 0 to 1; 0 in a run without train.minutes.
    """
    falls_by_clock = (1.0 - share) / config.decay_share
    if step < config.warmup_steps:
        rising = config.lr * (step + 1) / config.warmup_steps
        return min(rising, _fallen(config, share, falls_by_clock)) if share > 0.0 else rising
    done = max((step - config.warmup_steps) / max(1, steps - config.warmup_steps), share)
    return _fallen(config, done, min((steps - step) / (config.decay_share * steps), falls_by_clock))


def _fallen(config: OptimizerConfig, done: float, wsd: float) -> float:
    """The learning rate after the warm-up. done: share of the run that is over; wsd: of wsd's decay, what is to come."""
    shapes = {
        "constant": 1.0,
        "linear": 1.0 - done,
        "cosine": 0.5 * (1.0 + math.cos(math.pi * done)),
        "wsd": min(1.0, wsd),
    }
    return config.lr * (config.final_share + (1.0 - config.final_share) * shapes[config.schedule])


def set_learning_rate(optimizer: Any, lr: float) -> None:
    """Give every parameter group of an optimizer this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradient(module: nn.Module, largest: float | None) -> float:
    """Scale the gradients of a module down to a norm of at most `largest`, and return the norm they had before.

    largest: None only measures. The norm of a sharded module is that of the whole module; every process calls this.
    """
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), largest if largest is not None else math.inf)
    return float(distributed.whole(norm))
