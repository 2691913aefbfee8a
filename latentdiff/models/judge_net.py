"""The judge: a small network that finds the real picture nearest to a generated one, and recognises its style.

It only measures. It is trained on all real pictures, also on those of held-out pairs, so that it can recognise a picture of
a pair that no model was trained on. Nothing of it is used to train the models that it judges.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from latentdiff.models.feature_net import Convolution, FoldableNetwork, ResidualBlock
from latentdiff.utils.weights import fingerprint

MIN_SIDE = 16
WIDTHS = (32, 64, 128, 192)
COSINE_SCALE = 20.0  # of the identity logits: a softmax over cosines in [-1, 1] is nearly flat for 2,000 classes


class JudgeNet(FoldableNetwork):
    """Embeddings of unit length and styles of pictures [B, 3, H, W] in [-1, 1], any H, W >= 16.

    Each stage halves the resolution. The embedding comes from the mean of the last stage, which learns to be the same in
    every style. So the style is read from means and deviations of the earlier stages, where texture and shading are still
    visible. Batch normalisation (normed) is for training alone, as in `FeatureNet`; fold() merges it into the convolutions.

    Args:
        identities, styles: names of the classes of the two heads.
        widths: channels of the stages, two or more.
        dim: D, the length of an embedding.
        info: facts that are saved with the weights (data, how it was trained, its accuracy); JSON values.
        normed: with batch normalisation, for training.
    """

    kind = "judge"
    arguments = ("identities", "styles", "widths", "dim", "info")

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

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(embeddings of unit length [B, D], style logits [B, styles]) of pictures x. ValueError for another shape."""
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
        """Hex sha256 over structure and weights: equal for judges that compute the same."""
        return fingerprint(self, (self.identities, self.styles, self.widths, self.dim))


def load_judge(folder: str | Path, device: str | torch.device = "cpu") -> JudgeNet:
    """The judge saved in a folder: frozen, in eval mode, on device. UserError as `SavedNetwork.load`."""
    return JudgeNet.load(folder, device)


@torch.no_grad()
def embed(net: JudgeNet, images: Tensor, batch: int = 256) -> tuple[Tensor, Tensor]:
    """(embeddings [N, D], predicted styles [N] int64), on the CPU, of images [N, 3, H, W] in [-1, 1]."""
    device = net.prototypes.device
    results = [net.embed(part.to(device)) for part in images.split(batch)]
    return torch.cat([e.cpu() for e, _ in results]), torch.cat([s.argmax(dim=1).cpu() for _, s in results])
