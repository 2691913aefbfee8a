"""Running means of what a step reports, over all processes, kept so that a resumed run logs what an unbroken one would."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

Values = Mapping[str, Tensor | tuple[Tensor, int]]


class Averages:
    """Sums and counts of named scalars since they were last taken; each process has its own until then."""

    def __init__(self) -> None:
        self.totals: dict[str, Tensor] = {}  # name -> float64 [2]: sum and count

    def add(self, values: Values) -> None:
        """A mean by name, or (mean, number of samples it is of). The names are the same on every process."""
        for name, value in values.items():
            mean, count = value if isinstance(value, tuple) else (value, 1)
            number = mean.detach().float().cpu().double()
            total = torch.stack([number * count if count else torch.zeros((), dtype=torch.float64), torch.tensor(float(count))])
            self.totals[name] = self.totals.get(name, torch.zeros(2, dtype=torch.float64)) + total

    def take(self, accelerator: Any) -> dict[str, float]:
        """The means over all processes since the last call; a name without samples is left out. Every process calls it."""
        names = sorted(self.totals)
        gathered = self._gathered(accelerator)  # [processes, K, 2]
        self.totals = {}
        sums = gathered.sum(0)
        return {name: float(total / count) for name, (total, count) in zip(names, sums, strict=True) if count > 0}

    def state(self, accelerator: Any) -> dict[str, Tensor]:
        """{name: float64 [processes, 2]}, for a training state. Every process calls it."""
        gathered = self._gathered(accelerator)
        return {name: gathered[:, k] for k, name in enumerate(sorted(self.totals))}

    def restore(self, tensors: Mapping[str, Tensor], accelerator: Any) -> None:
        """Take up what `state` gave; on another number of processes the first goes on with the sum of them all."""
        self.totals = {}
        for name, rows in tensors.items():
            if len(rows) == accelerator.num_processes:
                self.totals[name] = rows[accelerator.process_index].clone()
            else:
                self.totals[name] = rows.sum(0) if accelerator.process_index == 0 else torch.zeros(2, dtype=torch.float64)

    def _gathered(self, accelerator: Any) -> Tensor:
        if not self.totals:  # alike on every process; some backends cannot gather nothing
            return torch.zeros(accelerator.num_processes, 0, 2, dtype=torch.float64)
        own = torch.stack([self.totals[name] for name in sorted(self.totals)])[None]
        if accelerator.num_processes == 1:
            return own
        return accelerator.gather(own.to(accelerator.device)).cpu()
