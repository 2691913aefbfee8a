"""A small classifier of noised latents: p(class | x_t, t)."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.errors import UserError
from latentdiff.schedules import make_schedule
from latentdiff.utils.tensors import per_sample, widen
from latentdiff.utils.weights import SavedNetwork

GROUPS = 8  # of the normalisation, which is never over the batch: a gradient must belong to one sample
WAVES = 8  # sines and cosines of the noise level


class Block(nn.Module):
    """Two convolutions with a skip connection, scaled by the noise level in between. [B, c, h, w] -> [B, c, h, w]."""

    def __init__(self, width: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, width, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(GROUPS, width), nn.Conv2d(width, width, 3, padding=1)
        self.level = nn.Linear(embedding, 2 * width)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        gain, shift = self.level(embedding)[:, :, None, None].chunk(2, dim=1)  # each [B, c, 1, 1]
        y = self.norm2(self.conv1(F.silu(self.norm1(x))))
        return x + self.conv2(F.silu(y * (1 + gain) + shift))


class LatentClassifier(SavedNetwork):
    """A classifier of noised, normalised latents [B, channels, h, w]: classifier(x, t, labels) -> log p(label | x_t, t) [B].

    A stage at full resolution, one at half, a mean over positions, and a linear head. Its inputs are x_t / sqrt(alpha^2 +
    sigma^2) and the angle atan(sigma / alpha) of the noise level, so it is built alike for every schedule.

    Args:
        channels: of the latents.
        classes: how many there are.
        schedule: {"name": ..., parameters} of `make_schedule`, which give t its meaning.
        widths: channels of the two stages, multiples of 8.
        info: facts that are stored with the weights (class names, accuracy, training); JSON values.

    Raises:
        UserError: wrong widths, or an unknown schedule.
    """

    kind = "classifier"
    arguments = ("channels", "classes", "schedule", "widths", "info")

    def __init__(
        self,
        channels: int,
        classes: int,
        schedule: Mapping[str, Any],
        widths: Sequence[int] = (48, 96),
        info: Mapping[str, Any] | None = None,
    ):
        super().__init__()
        if len(widths) != 2 or any(width < 1 or width % GROUPS for width in widths):
            raise UserError(f"classifier: widths needs two multiples of {GROUPS}, one a stage, got {list(widths)}")
        with torch.device("cpu"):  # a schedule holds numbers, also where the network is made on the meta device
            self.schedule = make_schedule(**schedule)
        self.config = {"channels": channels, "classes": classes, "schedule": dict(schedule), "widths": list(widths)}
        self.info = dict(info or {})
        first, second = widths
        self.embed = nn.Sequential(nn.Linear(2 * WAVES, second), nn.SiLU(), nn.Linear(second, second), nn.SiLU())
        self.stem = nn.Conv2d(channels, first, 3, padding=1)
        self.stage1 = Block(first, second)
        self.down = nn.Conv2d(first, second, 3, stride=2, padding=1)
        self.stage2 = nn.ModuleList([Block(second, second) for _ in range(2)])
        self.norm, self.head = nn.GroupNorm(GROUPS, second), nn.Linear(second, classes)

    def log_probs(self, x: Tensor, t: float | Tensor) -> Tensor:
        """log p(class | x_t, t) of every class, float32 [B, classes]. x: x_t [B, channels, h, w]. t: a float or [B]."""
        times = per_sample(t, x)
        alpha, sigma = self.schedule.alpha(times), self.schedule.sigma(times)
        angle = torch.atan2(sigma, alpha)[:, None] * torch.arange(1, WAVES + 1, dtype=torch.float64, device=x.device)
        embedding = self.embed(torch.cat([angle.sin(), angle.cos()], dim=1).to(self.head.weight.dtype))  # [B, w2]
        x = (x / widen((alpha**2 + sigma**2).sqrt(), x)).to(self.head.weight.dtype)
        x = self.down(self.stage1(self.stem(x), embedding))
        for block in self.stage2:
            x = block(x, embedding)
        pooled = F.silu(self.norm(x)).mean(dim=(2, 3))  # [B, w2]
        return F.log_softmax(self.head(pooled).float(), dim=1)

    def forward(self, x: Tensor, t: float | Tensor, labels: Tensor) -> Tensor:
        """log p(label | x_t, t), float32 [B], for labels int64 [B]. x: x_t [B, channels, h, w]. t: a float or [B]."""
        return self.log_probs(x, t).gather(1, labels.to(x.device)[:, None])[:, 0]

    def saved_arguments(self) -> dict[str, Any]:
        """The constructor arguments that config.json holds, as JSON values."""
        return {**self.config, "info": self.info}


def load_classifier(folder: str | Path, device: str | torch.device = "cpu") -> LatentClassifier:
    """The `LatentClassifier` saved in a folder, frozen: classifier(x, t, labels) -> log p(label | x_t, t) [B].

    UserError, naming the file, where one is missing, damaged, or does not describe a LatentClassifier.
    """
    return LatentClassifier.load(folder, device)
