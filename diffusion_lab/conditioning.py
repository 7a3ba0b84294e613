"""Conditions: class labels (or nothing) -> what a backbone is given, and label dropout."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass
class Condition:
    """What a backbone may use; a field that is None does not exist for this model.

    B batch, L tokens, D the backbone's `condition_width`.
    """

    vector: Tensor | None = None  # (B, D)     added to the noise embedding
    tokens: Tensor | None = None  # (B, L, D)  attended to, or prepended
    labels: Tensor | None = None  # (B,)       raw, for third-party networks


class Unconditional(nn.Module):
    """Ignores labels: every sample has the same, empty condition."""

    conditional = False

    def __init__(self, num_classes: int, width: int):
        super().__init__()

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """The empty condition for `count` samples."""
        return Condition()

    def drop(self, labels: Tensor | None, rate: float, generator=None) -> None:
        """Nothing to drop."""
        return None


class ClassLabel(nn.Module):
    """One learned vector a class, and one for the null label, `num_classes` (arXiv:2207.12598)."""

    conditional = True

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                "conditioning=class_label needs labelled data, and this data set has no classes; "
                "use conditioning=none"
            )
        self.null_label = num_classes
        self.embedding = nn.Embedding(num_classes + 1, width)
        nn.init.normal_(self.embedding.weight, std=0.02)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B,) int64, or None for `count` unconditional samples -> (B, D), (B, 1, D)."""
        if labels is None:
            device = self.embedding.weight.device
            labels = torch.full((count,), self.null_label, device=device)
        vector = self.embedding(labels)
        return Condition(vector, vector[:, None], labels)

    def drop(self, labels: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
        """Each label is replaced by the null label with probability `rate`, sample by sample."""
        dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
        return torch.where(dropped, self.null_label, labels)
