"""The kinds of labels: classes, attributes, numbers and captions, and all that is done to them.

Labels are a tensor with one label for each image; what they mean stands here alone. The null label
of classifier-free guidance (arXiv:2207.12598) stands for no label.
"""

import math
from collections.abc import Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from diffusion_lab.common.images import most_rows
from diffusion_lab.common.randomness import random_places

EXAMPLES = 1000  # training labels that a model keeps, to draw samples of
ENDS = (0.05, 0.95)  # quantiles of the labels of a grid's first and last row
LARGEST = torch.finfo(torch.float32).max  # networks see numbers as float32
LONGEST = 128  # bytes of a caption in UTF-8
TEXT = "text"  # the size of labels that are captions


class Labels(nn.Module):
    """The labels of images; `classes` is their number if they are classes, else 0.

    It is a module, as some kinds save with a model what they learn of its training labels.
    """

    classes = 0
    size: int | str = 0  # how many numbers a label is, or TEXT; 0 for classes
    dtype: ClassVar[torch.dtype]
    shape: tuple[int, ...] = ()  # of one label
    null_value: float  # of the null label, everywhere

    def tensor(self, given: Sequence[Any]) -> Tensor:
        """Labels as data sources list them -> (N, *shape)."""
        return torch.tensor(given, dtype=self.dtype).reshape(-1, *self.shape)

    def parse(self, given: Sequence[Any]) -> Tensor:
        """Labels as people write them -> (N, *shape); raises ValueError for wrong ones."""
        raise NotImplementedError

    def caption(self, label: Tensor) -> str:
        """A label in words."""
        raise NotImplementedError

    def check(self, labels: Tensor) -> None:
        """Raises ValueError for labels of the right type and shape that mean nothing."""

    def learn(self, labels: Tensor) -> None:
        """Takes from training labels (N, *shape) what a model must know to draw samples."""

    def in_turn(self, ids: Sequence[int]) -> Tensor:
        """The labels of samples `ids`, always the same ones."""
        raise NotImplementedError

    def grid(self, columns: int) -> Tensor:
        """The labels of the rows of a picture of samples in some columns."""
        raise NotImplementedError

    def blank(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Labels (count, *shape) whose values do not matter."""
        return torch.zeros(count, *self.shape, dtype=self.dtype, device=device)

    def null(self, count: int, device: torch.device | str = "cpu") -> Tensor:
        """Null labels (count, *shape)."""
        shape = (count, *self.shape)
        return torch.full(shape, self.null_value, dtype=self.dtype, device=device)

    def is_null(self, labels: Tensor) -> Tensor:
        """Whether each label is the null label, bool (B,)."""
        return (labels == self.null_value).reshape(len(labels), -1).all(1)

    def drop(self, labels: Tensor, dropped: Tensor) -> Tensor:
        """Replaces the labels at which `dropped`, bool (B,), is true by the null label."""
        return labels.masked_fill(dropped.reshape(-1, *[1] * len(self.shape)), self.null_value)


class Classes(Labels):
    """The classes 0, 1, ... with these names, int64; none for images without labels."""

    dtype = torch.int64

    def __init__(self, names: Sequence[str]):
        super().__init__()
        self.names = tuple(names)
        self.classes = self.null_value = len(self.names)

    @classmethod
    def numbered(cls, count: int) -> "Classes":
        """So many classes, named by their numbers."""
        return cls(list(map(str, range(count))))

    def parse(self, given: Sequence[Any]) -> Tensor:
        """Classes by their numbers, or by their names in capitals or not."""
        last, known = self.classes - 1, [name.lower() for name in self.names]
        numbers = [
            known.index(each.lower()) if isinstance(each, str) and each.lower() in known else each
            for each in given
        ]
        if not numbers or any(type(each) is not int or not 0 <= each <= last for each in numbers):
            some = f", or names such as {self.names[0]}" if self.names else ""
            raise ValueError(f"must be classes between 0 and {last}{some}")
        return self.tensor(numbers)

    def caption(self, label: Tensor) -> str:
        return self.names[int(label)]

    def check(self, labels: Tensor) -> None:
        if not 0 <= labels.min() <= labels.max() < max(1, self.classes):
            raise ValueError(
                f"are {labels.min()} to {labels.max()}, and it has {self.classes} class_names; a "
                "label is a place among them"
            )

    def in_turn(self, ids: Sequence[int]) -> Tensor:
        return self.tensor([i % self.classes for i in ids])

    def grid(self, columns: int) -> Tensor:
        """All classes, or every second, third, ... of more than fit into a picture."""
        return torch.arange(0, self.classes, -(-self.classes // most_rows(columns)) or 1)


class AttributeClasses(Classes):
    """Classes of several attributes: with sizes (m, n), class i has the values i // n and i % n.

    Raises ValueError if the product of the sizes is not the number of classes.
    """

    def __init__(self, names: Sequence[str], sizes: Sequence[int]):
        super().__init__(names)
        self.sizes = list(sizes)
        if math.prod(self.sizes) != self.classes:
            raise ValueError(
                f"sizes={self.sizes} makes {math.prod(self.sizes)} labels, but this data set has "
                f"{self.classes}; write sizes whose product is {self.classes}"
            )

    def values(self, labels: Tensor) -> list[Tensor]:
        """The value (B,) of each attribute; that of the null label is the attribute's size."""
        step, values = self.classes, []
        for size in self.sizes:
            step //= size
            values.append(torch.where(self.is_null(labels), size, labels // step % size))
        return values


class Exemplary(Labels):
    """Labels too many to go through, so a model keeps examples of those of its training."""

    examples: Tensor  # (EXAMPLES, *shape)

    def learn(self, labels: Tensor) -> None:
        chosen = random_places(len(labels), min(EXAMPLES, len(labels)))
        repeated = labels[chosen].repeat(-(-EXAMPLES // len(chosen)), *[1] * len(self.shape))
        self.examples.copy_(repeated[:EXAMPLES])

    def in_turn(self, ids: Sequence[int]) -> Tensor:
        return self.examples.cpu()[[i % EXAMPLES for i in ids]]

    def grid(self, columns: int) -> Tensor:
        return self.in_turn(range(columns))


class Numbers(Exemplary):
    """Labels of `size` numbers each, float32, with the mean and deviation of training labels."""

    dtype = torch.float32
    null_value = math.nan
    mean: Tensor  # (size,)
    std: Tensor  # (size,)

    size: int

    def __init__(self, size: int):
        super().__init__()
        self.size, self.shape = size, (size,)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("std", torch.ones(size))
        self.register_buffer("examples", torch.zeros(EXAMPLES, size))

    def parse(self, given: Sequence[Any]) -> Tensor:
        """Numbers, or lists of `size` numbers, of which one may stand alone."""
        if self.size > 1 and not any(isinstance(label, list) for label in given):
            given = [given]
        rows = [label if isinstance(label, list) else [label] for label in given]
        numeric = all(map(is_number, chain(*rows)))
        if not rows or not numeric or any(len(row) != self.size for row in rows):
            several = f"{self.size} numbers or lists of them"
            wanted = "a number or a list of them" if self.size == 1 else several
            raise ValueError(
                f"must be {wanted} of at most {LARGEST:.4g}, as the labels of the data are"
            )
        return self.tensor(rows)

    def caption(self, label: Tensor) -> str:
        return ",".join(f"{number:.3g}" for number in label.tolist())

    def learn(self, labels: Tensor) -> None:
        super().learn(labels)
        self.mean.copy_(labels.mean(0))
        std = labels.std(0, correction=0)
        self.std.copy_(torch.where(std > 0, std, 1.0))

    def grid(self, columns: int) -> Tensor:
        """One number goes from its 5 % to its 95 % quantile; of more, examples are taken."""
        if self.size > 1:
            return super().grid(columns)
        return self.examples.cpu().quantile(torch.linspace(*ENDS, columns), dim=0)

    def is_null(self, labels: Tensor) -> Tensor:
        return labels.isnan().any(1)


class Captions(Exemplary):
    """Texts of up to LONGEST bytes in UTF-8, uint8, filled up with zeros; the null one is empty."""

    dtype = torch.uint8
    shape = (LONGEST,)
    size = TEXT
    null_value = 0

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("examples", torch.zeros(EXAMPLES, LONGEST, dtype=torch.uint8))

    def tensor(self, given: Sequence[Any]) -> Tensor:
        return super().tensor([list(str(text).encode().ljust(LONGEST, b"\0")) for text in given])

    def parse(self, given: Sequence[Any]) -> Tensor:
        if not given or not all(isinstance(text, str) and is_caption(text) for text in given):
            raise ValueError(f"must be captions of 1 to {LONGEST} bytes in quotes")
        return self.tensor(given)

    def caption(self, label: Tensor) -> str:
        return bytes(label.tolist()).rstrip(b"\0").decode(errors="replace")

    def grid(self, columns: int) -> Tensor:
        """The first different examples."""
        different = list(dict.fromkeys(map(self.caption, self.examples.cpu())))
        return self.tensor(different[:columns])


def labels_of(size: int | str, names: Sequence[str]) -> Labels:
    """Labels of a size, or classes with these names if it is 0."""
    if size == TEXT:
        return Captions()
    return Numbers(int(size)) if size else Classes(names)


def is_caption(text: str) -> bool:
    """Whether a text can be a caption; half of an emoji cannot."""
    try:
        return 0 < len(text.strip("\0").encode()) <= LONGEST
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Whether a part of a label is a finite number, as float32, too."""
    # a whole number may be too large for a float; no comparison with NaN is true
    return type(value) in (int, float) and abs(value) <= LARGEST
