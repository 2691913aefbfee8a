"""Class labels as the U-Net receives them, and their per-sample dropout for classifier-free guidance (2207.12598)."""

from dataclasses import dataclass

import torch

from latentdiff.errors import UserError
from latentdiff.rng import rand


def drop(
    labels: torch.Tensor,
    null_class: int,
    p: float,
    generator: torch.Generator | list[torch.Generator] | None = None,
) -> torch.Tensor:
    """Labels [B] with each one replaced by `null_class` with probability p, independently of its neighbours.

    A list of B generators makes the fate of image i the same at any batch size. The input is left as it is.
    """
    dropped = rand((labels.shape[0],), generator, labels.device, torch.float32) < p  # [B]
    return torch.where(dropped, torch.full_like(labels, null_class), labels)


@dataclass(frozen=True)
class ClassCondition:
    """Which rows of the U-Net's class embedding mean what.

    Args:
        num_classes: real classes, rows 0 .. num_classes - 1.
        dropout: probability with which training replaces a label by the null class. 0: there is no null class, and a
            network trained so cannot be guided.
    """

    num_classes: int
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.num_classes < 1:
            raise UserError(f"num_classes {self.num_classes}: a class condition needs at least one class")
        if not 0 <= self.dropout < 1:
            raise UserError(f"class dropout {self.dropout}: must be at least 0 and below 1")

    @property
    def null_class(self) -> int | None:
        """The row that stands for "no class": num_classes, or None without dropout."""
        return self.num_classes if self.dropout > 0 else None

    @property
    def num_embeddings(self) -> int:
        """Rows of the embedding, the null class included: the U-Net's num_class_embeds."""
        return self.num_classes + (self.null_class is not None)

    def __call__(self, labels: torch.Tensor, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """Labels [B], integers in [0, num_embeddings), as the keywords of the U-Net's forward.

        Raises:
            UserError: a label is out of range. It is looked for on the device the labels come from, so hand them over
                on the CPU: there it costs nothing, and on a GPU an embedding only aborts the process.
        """
        labels = labels.long()
        if labels.numel() and not 0 <= int(labels.min()) <= int(labels.max()) < self.num_embeddings:
            raise UserError(
                f"class labels from {int(labels.min())} to {int(labels.max())}: this model's rows are 0 to "
                f"{self.num_embeddings - 1} ({self.num_classes} classes)"
            )
        return {"class_labels": labels.to(device)}

    def drop(
        self, labels: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None = None
    ) -> torch.Tensor:
        """Training's labels [B]: each dropped with the probability of this condition."""
        if self.null_class is None:
            return labels
        return drop(labels, self.null_class, self.dropout, generator)

    def unconditional(self, batch: int, device: torch.device | str | None = None) -> dict[str, torch.Tensor]:
        """The keywords for `batch` images without a class."""
        if self.null_class is None:
            raise UserError("class dropout is 0, so the model has no null class and no unconditional prediction")
        return {"class_labels": torch.full((batch,), self.null_class, dtype=torch.long, device=device)}
