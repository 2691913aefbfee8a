"""The judge: a small network that says which real picture a generated one is nearest to, and in which style it is.

It is a measuring device, not a competitor: it is trained on all real pictures, those of the held-out pairs too, so that
a drawing of a pair no model has seen can be recognised. What it knows never reaches a model that it judges.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.feature_net import Convolution, ResidualBlock
from latentdiff.utils.weights import fingerprint, load_network, save_network

MIN_SIDE = 16
WIDTHS = (32, 64, 128, 192)
COSINE_SCALE = 20.0  # of the logits: cosines in [-1, 1] could not tell 2,000 classes apart


class JudgeNet(nn.Module):
    """Pictures [B, 3, H, W] in [-1, 1], any H, W >= 16, to embeddings of unit length and to styles.

    Stages, each halving the resolution. The embedding comes from the mean of the last, which learns to be the same
    in every style; so the style is read off means and deviations of the others, where texture and shading still
    are. As in `FeatureNet` batch normalisation serves training alone (normed) and fold() merges it into the convolutions.

    Args:
        identities, styles: the names of the classes of the two heads.
        widths: channels of the stages, two or more. dim: D, of the embedding.
        info: facts kept beside the weights (data, how trained, own accuracy); JSON values.
    """

    def __init__(
        self,
        identities: Sequence[str],
        styles: Sequence[str],
        widths: Sequence[int] = WIDTHS,
        dim: int = 192,
        info: dict[str, Any] | None = None,
        normed: bool = False,
    ) -> None:
        super().__init__()
        self.identities, self.styles = list(identities), list(styles)
        self.widths, self.dim, self.info = tuple(widths), dim, dict(info or {})
        stages: list[nn.Module] = [nn.Sequential(Convolution(3, widths[0], 2, normed), nn.ReLU())]
        for before, width in zip(widths, widths[1:], strict=False):
            stages.append(nn.Sequential(Convolution(before, width, 2, normed), nn.ReLU(), ResidualBlock(width, normed)))
        self.stages = nn.ModuleList(stages)
        self.projection = nn.Linear(widths[-1], dim)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(len(self.identities), dim), dim=1))
        texture, hidden = 2 * sum(widths[:-1]) + widths[-1], widths[-1]
        self.style_head = nn.Sequential(nn.Linear(texture, hidden), nn.ReLU(), nn.Linear(hidden, len(self.styles)))

    def fold(self) -> "JudgeNet":
        """Merge batch normalisation into the convolutions, in place; returns self, in eval mode."""
        for module in self.modules():
            if isinstance(module, Convolution):
                module.fold()
        return self.eval()

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings of unit length [B, D], style logits [B, styles])."""
        if x.ndim != 4 or x.shape[1] != 3 or min(x.shape[2:]) < MIN_SIDE:
            raise ValueError(f"the judge takes [B, 3, H, W] with H, W >= {MIN_SIDE}, got {list(x.shape)}")
        texture = []
        for stage in self.stages[:-1]:
            x = stage(x)
            variance, mean = torch.var_mean(x, dim=(2, 3), correction=0)
            texture += [mean, (variance + 1e-4).sqrt()]
        pooled = self.stages[-1](x).mean(dim=(2, 3))  # [B, widths[-1]]
        return F.normalize(self.projection(pooled), dim=1), self.style_head(torch.cat([*texture, pooled], dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(identity logits [B, identities], style logits [B, styles]), for training."""
        embedding, style = self.embed(x)
        return COSINE_SCALE * embedding @ F.normalize(self.prototypes, dim=1).T, style

    def fingerprint(self) -> str:
        """Hex sha256 over structure and weights."""
        return fingerprint(self, (self.identities, self.styles, self.widths, self.dim))

    def save(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors (float32) into folder.

        Raises:
            ValueError: the network still has its batch normalisation; fold() it first.
        """
        if any(isinstance(module, nn.BatchNorm2d) for module in self.modules()):
            raise ValueError("fold() the judge before saving it")
        config = {
            "_class_name": "JudgeNet",
            "identities": self.identities,
            "styles": self.styles,
            "widths": list(self.widths),
            "dim": self.dim,
            "info": self.info,
        }
        save_network(self, config, folder)


def load_judge(folder: str | Path, device: str | torch.device = "cpu") -> JudgeNet:
    """The frozen judge saved in folder, in eval mode on device.

    Raises:
        UserError: a file is missing, damaged, or does not describe a judge; the message names it.
    """
    keys = ("identities", "styles", "widths", "dim", "info")
    return load_network(folder, lambda config: JudgeNet(**{key: config[key] for key in keys}), "judge", device)


@torch.no_grad()
def embed(net: JudgeNet, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """(embeddings [N, D], predicted styles [N] int64), on the CPU, of images [N, 3, H, W] in [-1, 1]."""
    device = net.prototypes.device
    seen = [net.embed(part.to(device)) for part in images.split(batch)]
    return torch.cat([e.cpu() for e, _ in seen]), torch.cat([s.argmax(dim=1).cpu() for _, s in seen])
