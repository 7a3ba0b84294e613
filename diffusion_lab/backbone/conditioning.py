"""Conditions: labels (or none) -> vectors and tokens for a backbone, and label dropout."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.backbone.attention import SelfAttention
from diffusion_lab.common.labels import AttributeClasses, Captions, Classes, Labels, Numbers
from diffusion_lab.common.ranges import Count, optional, ranges, whole_list

LETTER, SPAN = 32, 8  # numbers of a byte, and bytes of a token of a caption
FREQUENCIES = (0.25, 0.5, 1.0, 2.0)  # half turns per standard deviation of a number


@dataclass
class Condition:
    """A condition that a backbone may use; a field that is None does not exist for this model.

    B batch, L tokens, D the backbone's `condition_width`.
    """

    vector: Tensor | None = None  # (B, D)     added to the noise embedding
    tokens: Tensor | None = None  # (B, L, D)  attended to, or prepended
    labels: Tensor | None = None  # (B,)       raw, for third-party networks
    modulation: Tensor | None = None  # (B, K D)  shared by blocks; a network sets it
    kept: Tensor | None = None  # (B, M)    the patches, in order, that a block sees if not all

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


class Conditioning(nn.Module):
    """Embeds labels; `labels` says what they are. Raises ValueError if they are not of its kind."""

    conditional = True

    labels: Any

    def __init__(self, labels: Labels):
        super().__init__()
        self.labels = labels

    def drop(
        self, labels: Tensor, rate: float, generator: torch.Generator | None = None
    ) -> Tensor | None:
        """Replaces each label by the null label with probability `rate`."""
        dropped = torch.rand(len(labels), generator=generator, device=labels.device) < rate
        return self.labels.drop(labels, dropped)

    def known(self, labels: Tensor | None, count: int) -> Tensor:
        """The labels, or `count` null labels for None."""
        if labels is None:
            return self.labels.null(count, next(self.parameters()).device)
        return labels


class Unconditional(Conditioning):
    """Ignores labels: every sample has the same, empty condition."""

    conditional = False

    def __init__(self, labels: Labels, width: int):
        super().__init__(Classes(()))

    def drop(self, labels: Tensor, rate: float, generator: torch.Generator | None = None) -> None:
        """Does nothing, as there are no labels to drop."""

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """The empty condition for `count` samples."""
        return Condition()


def require_classes(labels: Labels) -> Classes:
    """The labels, if they are classes; raises ValueError if not."""
    if not isinstance(labels, Classes) or not labels.classes:
        raise ValueError(
            "a condition needs labelled data, but this data set has no classes; use none, "
            "numeric_label if its labels are numbers, or caption if they are texts"
        )
    return labels


class RawLabels(Conditioning):
    """The class itself, for a network that embeds it."""

    def __init__(self, labels: Labels, width: int):
        super().__init__(require_classes(labels))
        # a buffer, as without weights nothing else says on which device this is
        self.null = nn.Buffer(labels.null(1), persistent=False)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B,) int64, or None for `count` null labels."""
        return Condition(labels=self.null.repeat(count) if labels is None else labels)


class Attributes(Conditioning):
    """Several attributes in one class: a learned vector and a token for each attribute's value.

    `sizes` are the numbers of values (see `common.labels.AttributeClasses`); None is one attribute.
    """

    @ranges(sizes=optional(whole_list(1)))
    def __init__(self, labels: Labels, width: int, sizes: Sequence[int] | None):
        names = require_classes(labels).names
        super().__init__(AttributeClasses(names, [len(names)] if sizes is None else sizes))
        self.sizes: list[int] = self.labels.sizes
        self.embeddings = nn.ModuleList(nn.Embedding(size + 1, width) for size in self.sizes)
        for embedding in self.embeddings:
            nn.init.normal_(embedding.get_parameter("weight"), std=0.02)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B,) int64, or None for `count` unconditional samples -> (B, D), (B, L, D)."""
        labels = self.known(labels, count)
        values = zip(self.embeddings, self.labels.values(labels), strict=True)
        tokens = torch.stack([embedding(value) for embedding, value in values], dim=1)  # (B, L, D)
        return Condition(tokens.sum(1), tokens, labels)


class ClassLabel(Attributes):
    """One learned vector per class, and one for the null label."""

    def __init__(self, labels: Labels, width: int):
        super().__init__(labels, width, sizes=None)


class NumericLabel(Conditioning):
    """A network's vector, and one token, of a label of K numbers; a learned one of no label.

    Numbers are standardised by mean and standard deviation of the training labels.
    """

    def __init__(self, labels: Labels, width: int):
        if not isinstance(labels, Numbers):
            raise ValueError(
                "this condition needs labels that are numbers, and this data set has none; use "
                "class_label or none"
            )
        super().__init__(Numbers(labels.size))
        self.first = nn.Linear(labels.size * (1 + 2 * len(FREQUENCIES)), width)
        self.last = nn.Linear(width, width)
        self.null = nn.Parameter(torch.empty(width))
        for weight in (self.last.weight, self.null):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.last.bias)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B, K), or None for `count` unconditional samples -> (B, D), (B, 1, D)."""
        labels = self.known(labels, count)
        known = ~self.labels.is_null(labels)[:, None]
        numbers = torch.where(known, (labels - self.labels.mean) / self.labels.std, 0.0)
        turns = [math.pi * frequency * numbers for frequency in FREQUENCIES]
        features = [numbers, *(f(turn) for turn in turns for f in (torch.sin, torch.cos))]
        hidden = nn.functional.silu(self.first(torch.cat(features, 1)))
        vector = torch.where(known, self.last(hidden), self.null)
        return Condition(vector, vector[:, None])


class CaptionLabel(Conditioning):
    """An encoder of captions by their bytes: a token for each SPAN bytes, and a vector, their mean.

    Bytes see their neighbours, and tokens one another in `depth` layers of self-attention. The null
    label is the empty caption, which has no bytes but zeros.
    """

    @ranges()
    def __init__(self, labels: Labels, width: int, depth: Count):
        if not isinstance(labels, Captions):
            raise ValueError(
                "this condition needs captions, and this data set has none; use class_label or none"
            )
        super().__init__(Captions())
        self.letters = nn.Embedding(256, LETTER)
        self.neighbours = nn.Conv1d(LETTER, LETTER, 5, padding=2)
        self.spans = nn.Conv1d(LETTER, width, SPAN, stride=SPAN)
        self.positions = nn.Parameter(torch.empty(self.labels.shape[0] // SPAN, width))
        self.layers = nn.ModuleList()
        for _ in range(depth):
            wider, narrower = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
            self.layers.append(nn.Sequential(nn.LayerNorm(width), SelfAttention(width, heads=1)))
            self.layers.append(nn.Sequential(nn.LayerNorm(width), wider, nn.GELU(), narrower))
        self.last = nn.Linear(width, width)
        for weight in (self.positions, self.last.weight):
            nn.init.normal_(weight, std=0.02)
        nn.init.zeros_(self.last.bias)

    def forward(self, labels: Tensor | None, count: int) -> Condition:
        """labels (B, bytes) uint8, or None for `count` empty ones -> (B, D), (B, L, D)."""
        letters = self.letters(self.known(labels, count).long()).mT  # (B, LETTER, bytes)
        letters = letters + nn.functional.silu(self.neighbours(letters))
        tokens = self.spans(letters).mT + self.positions  # (B, L, D)
        for layer in self.layers:
            tokens = tokens + layer(tokens)
        tokens = self.last(tokens)
        return Condition(tokens.mean(1), tokens)
