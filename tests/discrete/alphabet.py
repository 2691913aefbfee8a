"""The truth about diffusion of codes where every state can be listed. Nothing here calls the library's formulas."""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from latentdiff.discrete import Process


class Alphabet:
    """A random joint distribution of `positions` codes out of `num_codes`, and what follows from it by enumeration; float64.

    joint: the probability of each of the S states, [S]. states: their codes, [S, N].
    """

    def __init__(self, num_codes: int = 3, positions: int = 3, seed: int = 0, sharpness: float = 1.5):
        self.num_codes, self.positions = num_codes, positions
        self.states = listed(num_codes, positions)
        noise = torch.randn(len(self.states), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        self.joint = (sharpness * noise).softmax(0)

    def draw(self, n: int, seed: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        return self.states[torch.multinomial(self.joint, n, replacement=True, generator=generator)]

    def log_prob(self, codes: Tensor) -> Tensor:
        return self.joint.log()[place(codes, self.num_codes)]

    def histogram(self, codes: Tensor) -> Tensor:
        """How often each state is among codes [B, N], [S]."""
        return torch.bincount(place(codes, self.num_codes), minlength=len(self.states)).double()

    def predict(self, process: Process, joints: Tensor | None = None) -> Callable[..., Tensor]:
        """An exact network: log p(x0_i | x_t). With joints [C, S] it takes label= [B], which says whose row's joint holds."""
        clean = one_hot(self.states, self.num_codes).double()  # [S, N, K]

        def network(codes: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
            alpha = process.schedule.alpha(t)
            if process.mask is not None:
                alpha = torch.full_like(alpha, 0.5)  # any between 0 and 1: what is clean is certain, and a mask says nothing
            corruption = transition(process, alpha)[:, : self.num_codes]  # [B, K, values of x_t]
            posterior = self.joint.expand(len(codes), -1) if joints is None else joints[label]  # [B, S]
            for i in range(self.positions):
                seen = corruption[torch.arange(len(codes)), :, codes[:, i]]  # q(x_t,i | x0_i), [B, K]
                posterior = posterior * seen[:, self.states[:, i]]
            posterior = posterior / posterior.sum(1, keepdim=True)
            return torch.einsum("bs,snk->bnk", posterior, clean).log()

        return network

    def chain(self, process: Process, steps: int, predict: Callable[..., Tensor]) -> Tensor:
        """The exact distribution [S] of what `steps` steps of sampling draw."""
        states = listed(process.num_states, self.positions)  # [M, N], of x_t
        chances = torch.zeros(process.num_states, dtype=torch.float64)
        chances[process.mask if process.mask is not None else slice(None)] = 1.0
        chances = (chances / chances.sum())[states].prod(1)
        for i in range(steps, 0, -1):
            beliefs = predict(states, torch.full((len(states),), i / steps, dtype=torch.float64)).exp()  # [M, N, K]
            back = bayes(process, i / steps, (i - 1) / steps)  # [K, x_t, x_s]
            moves = torch.einsum("mnk,kmnz->mnz", beliefs, back[:, states])
            move = torch.ones(len(states), len(states), dtype=torch.float64)
            for n in range(self.positions):
                move = move * moves[:, n, states[:, n]]
            chances = chances @ move
        is_clean = (states < self.num_codes).all(1)
        torch.testing.assert_close(chances[is_clean].sum(), torch.ones((), dtype=torch.float64))
        return chances[is_clean]


def listed(size: int, positions: int) -> Tensor:
    """All states, [size^positions, positions]; the last position counts fastest."""
    return torch.cartesian_prod(*[torch.arange(size)] * positions).reshape(-1, positions)


def place(codes: Tensor, size: int) -> Tensor:
    """Where each row of codes [B, N] stands in `listed`, [B]."""
    return (codes * size ** torch.arange(codes.shape[1] - 1, -1, -1)).sum(1)


def transition(process: Process, kept: float | Tensor) -> Tensor:
    """The matrix [..., from, to] of one position that is kept with probability kept [...], else corrupted."""
    kept = torch.as_tensor(kept, dtype=torch.float64)[..., None, None]
    corrupted = torch.zeros(process.num_states, dtype=torch.float64)
    corrupted[process.mask if process.mask is not None else slice(None)] = 1.0
    return kept * torch.eye(process.num_states, dtype=torch.float64) + (1 - kept) * corrupted / corrupted.sum()


def bayes(process: Process, t: float, s: float) -> Tensor:
    """q(x_s | x_t, x0) by Bayes' rule, [x0, x_t, x_s]; 0 where x_t cannot come from x0."""
    alpha_t, alpha_s = (float(process.schedule.alpha(time)) for time in (t, s))
    first = transition(process, alpha_s)[: process.num_codes]  # [x0, x_s]
    second = transition(process, alpha_t / alpha_s)  # [x_s, x_t]
    both = first[:, None, :] * second.T[None]  # [x0, x_t, x_s]
    return (both / both.sum(-1, keepdim=True)).nan_to_num(0.0)


def chi_square(counts: Tensor, chances: Tensor) -> float:
    """The chi-square statistic less its mean, in units of its standard deviation: about N(0, 1) if they agree."""
    expected = counts.sum() * chances
    degrees = len(chances) - 1
    return float((((counts - expected) ** 2 / expected).sum() - degrees) / (2 * degrees) ** 0.5)


def total_variation(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().sum() / 2)
