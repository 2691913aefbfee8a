"""Discrete diffusion: diffusion of codes, such as the indices that a VQ autoencoder makes of an image.

Codes are int64 [B, ...], each in 0..num_codes - 1. Every position is corrupted by itself: at time t it is still clean with
probability alpha(t), which falls from 1 at t = 0 to 0 at t = 1. `Absorbing` replaces the others by one further code, the mask,
`Uniform` by codes that are drawn uniformly.

A network is a function predict(codes, t, **conditioning) -> logits [B, ..., num_codes]: of the clean codes, given corrupted
codes [B, ...] and t, float64 [B]. Under `Absorbing` the codes that it gets hold the mask code num_codes, to which no logit
belongs. The same function serves training (`loss`), sampling (`sample`) and measuring (`bound`).
"""

from latentdiff.discrete.bound import bound, bound_terms, loss
from latentdiff.discrete.guidance import ClassifierFree
from latentdiff.discrete.processes import LEVELS, PROCESSES, Absorbing, Process, Uniform, add_evidence, make_process
from latentdiff.discrete.sampling import ORDERS, sample
from latentdiff.discrete.schedules import SCHEDULES, Schedule

__all__ = [
    "LEVELS",
    "ORDERS",
    "PROCESSES",
    "SCHEDULES",
    "Absorbing",
    "ClassifierFree",
    "Process",
    "Schedule",
    "Uniform",
    "add_evidence",
    "bound",
    "bound_terms",
    "loss",
    "make_process",
    "sample",
]
