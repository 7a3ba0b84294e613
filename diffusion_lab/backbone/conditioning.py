"""Conditions: class labels (or none) -> vectors and tokens for a backbone, and label dropout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.common.ranges import optional, ranges, whole_list


@dataclass
class Condition:
    """A condition that a backbone may use; a field that is None does not exist for this model.

    B batch, L tokens, D the backbone's `condition_width`.
    """

    vector: Tensor | None = None  # (B, D)     added to the noise embedding
    tokens: Tensor | None = None  # (B, L, D)  attended to, or prepended
    labels: Tensor | None = None  # (B,)       raw, for third-party networks
    modulation: Tensor | None = None  # (B, K D)  shared by blocks; a network sets it

    def joined(self, vector: Tensor) -> "Condition":
        """Adds one more condition (B, D): to the vector, and as a further token."""
        token = vector[:, None]
        return Condition(
            vector if self.vector is None else self.vector + vector,
            token if self.tokens is None else torch.cat([self.tokens, token], dim=1),
            self.labels,
        )

    def after(self, vector: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `vector` (B, D) + the condition's own, and `vector` before the own tokens."""
        total = vector if self.vector is None else vector + self.vector
        token = vector[:, None]
        return total, token if self.tokens is None else torch.cat([token, self.tokens], dim=1)


class Unconditional(nn.Module):
    """Ignores labels: every sample has the same, empty condition."""

    conditional = False

    def __init__(self, num_classes: int, width: int):
        super().__init__()

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """The empty condition for `count` samples."""
        return Condition()

    def drop(self, labels: Tensor | None, rate: float, generator=None) -> None:
        """Does nothing, as there are no labels to drop."""
        return None


class Labelled(nn.Module):
    """The labels 0, ..., num_classes - 1 of images, and the null label `num_classes`."""

    conditional = True

    def __init__(self, num_classes: int):
        super().__init__()
        if num_classes < 1:
            raise ValueError(
                "a condition needs labelled data, but this data set has no classes; use none"
            )
        self.null_label = num_classes

    def drop(self, labels: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
        """Replaces each label by the null label with probability `rate`, sample by sample."""
        dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
        return torch.where(dropped, self.null_label, labels)


class RawLabels(Labelled):
    """The label itself, for a network that embeds it."""

    null: Tensor

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes)
        # a buffer, as without weights nothing else says on which device this is
        self.register_buffer("null", torch.tensor(num_classes), persistent=False)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B,) int64, or None for `count` null labels."""
        return Condition(labels=self.null.repeat(count) if labels is None else labels)


class Attributes(Labelled):
    """Several attributes in one label: a learned vector and a token for each attribute's value.

    The null label is for guidance (arXiv:2207.12598). `sizes` are the numbers of values; with sizes
    (m, n), label i has the values i // n and i % n. None means one attribute. Raises ValueError if
    the product of the sizes is not num_classes.
    """

    @ranges(sizes=optional(whole_list(1)))
    def __init__(self, num_classes: int, width: int, sizes: Sequence[int] | None):
        super().__init__(num_classes)
        self.sizes = [num_classes] if sizes is None else list(sizes)
        if math.prod(self.sizes) != num_classes:
            raise ValueError(
                f"sizes={self.sizes} makes {math.prod(self.sizes)} labels, but this "
                f"data set has {num_classes}; write sizes whose product is {num_classes}"
            )
        self.embeddings = nn.ModuleList(nn.Embedding(size + 1, width) for size in self.sizes)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.get_parameter("weight"), std=0.02)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B,) int64, or None for `count` unconditional samples -> (B, D), (B, L, D)."""
        if labels is None:
            device = next(self.parameters()).device
            labels = torch.full((count,), self.null_label, device=device)
        step = math.prod(self.sizes)
        parts: list[Tensor] = []
        for size, embedding in zip(self.sizes, self.embeddings, strict=True):
            step //= size
            value = labels // step % size
            parts.append(embedding(torch.where(labels == self.null_label, size, value)))
        tokens = torch.stack(parts, dim=1)  # (B, L, D)
        return Condition(tokens.sum(1), tokens, labels)


class ClassLabel(Attributes):
    """One learned vector per class, and one for the null label."""

    def __init__(self, num_classes: int, width: int):
        super().__init__(num_classes, width, sizes=None)
