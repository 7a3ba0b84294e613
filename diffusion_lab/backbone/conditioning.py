"""Conditions: labels (or none) -> vectors and tokens for a backbone, and label dropout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import optional, ranges, whole, whole_list

EXAMPLES = 1000  # training labels that a model keeps, to draw samples of
FREQUENCIES = (0.25, 0.5, 1.0, 2.0)  # half turns per standard deviation of a number
ENDS = (0.05, 0.95)  # quantiles of the labels of a grid's first and last row


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
                "a condition needs labelled data, but this data set has no classes; use none, or "
                "numeric_label if its labels are numbers"
            )
        self.null_label = num_classes

    def drop(self, labels: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
        """Replaces each label by the null label with probability `rate`, sample by sample."""
        dropped = torch.rand(labels.shape, generator=generator, device=labels.device) < rate
        return torch.where(dropped, self.null_label, labels)

    def is_null(self, labels: Tensor) -> Tensor:
        """Whether each label is the null label, bool (B,)."""
        return labels == self.null_label


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


class NumericLabel(nn.Module):
    """A network's vector, and one token, of a label of K numbers; a learned one of no label.

    Numbers are standardised by mean and standard deviation of the training labels, which the model
    keeps, with some of these labels. A label of NaN is the null label of guidance
    (arXiv:2207.12598).
    """

    conditional = True
    null_label = math.nan
    mean: Tensor  # (K,)
    std: Tensor  # (K,)
    examples: Tensor  # (EXAMPLES, K)

    @ranges(size=optional(whole(1)))
    def __init__(self, num_classes: int, width: int, size: int | None):
        super().__init__()
        if size is None:
            raise ValueError(
                "this condition needs labels that are numbers, and this data set has none; use "
                "class_label or none, or write their size if the images are not here"
            )
        self.size = size
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("examples", torch.zeros(EXAMPLES, size))
        self.first = nn.Linear(size * (1 + 2 * len(FREQUENCIES)), width)
        self.last = nn.Linear(width, width)
        self.null = nn.Parameter(torch.empty(width))
        for weight in (self.last.weight, self.null):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.last.bias)

    def learn(self, labels: Tensor) -> None:
        """Takes the scale of numbers, and examples, from training labels (N, K)."""
        self.mean.copy_(labels.mean(0))
        std = labels.std(0, correction=0)
        self.std.copy_(torch.where(std > 0, std, 1.0))
        chosen = random_places(len(labels), min(EXAMPLES, len(labels)))
        self.examples.copy_(labels[chosen].repeat(-(-EXAMPLES // len(chosen)), 1)[:EXAMPLES])

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B, K), or None for `count` unconditional samples -> (B, D), (B, 1, D)."""
        if labels is None:
            labels = self.mean.new_full((count, self.size), self.null_label)
        known = ~self.is_null(labels)[:, None]
        numbers = torch.where(known, (labels - self.mean) / self.std, 0.0)
        turns = [math.pi * frequency * numbers for frequency in FREQUENCIES]
        features = [numbers, *(f(turn) for turn in turns for f in (torch.sin, torch.cos))]
        hidden = nn.functional.silu(self.first(torch.cat(features, 1)))
        vector = torch.where(known, self.last(hidden), self.null)
        return Condition(vector, vector[:, None])

    def drop(self, labels: Tensor, rate: float, generator: torch.Generator | None = None) -> Tensor:
        """Replaces each label (B, K) by the null label with probability `rate`."""
        dropped = torch.rand(len(labels), generator=generator, device=labels.device) < rate
        return labels.masked_fill(dropped[:, None], self.null_label)

    def is_null(self, labels: Tensor) -> Tensor:
        """Whether each label (B, K) is the null label, bool (B,)."""
        return labels.isnan().any(1)

    def typical(self, ids: Sequence[int]) -> Tensor:
        """Labels (B, K) for samples `ids`: training labels at random, always the same ones."""
        return self.examples.cpu()[[i % EXAMPLES for i in ids]]

    def spread(self, count: int) -> Tensor:
        """Labels (count, K) for the rows of a grid.

        One number goes from the 5 % to the 95 % quantile; of more, training labels are taken.
        """
        if self.size > 1:
            return self.typical(range(count))
        return self.examples.cpu().quantile(torch.linspace(*ENDS, count), dim=0)


def blank_labels(conditioning: nn.Module, count: int, device: torch.device | str) -> Tensor:
    """Labels for `count` images whose values do not matter: classes or numbers 0."""
    if isinstance(conditioning, NumericLabel):
        return torch.zeros(count, conditioning.size, device=device)
    return torch.zeros(count, dtype=torch.int64, device=device)
