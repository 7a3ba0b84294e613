"""Less data: nested, stratified subsets of a training split, the same on every machine."""

import hashlib

import torch
from torch import Tensor

from diffusion_lab.common.errors import UserError, is_number, is_whole, require


def subset(
    labels: Tensor, fraction: float | None, per_class: int | None, seed: int
) -> Tensor | None:
    """Sorted indices of a part of the images, labels (N,) int64; None for all of them.

    `fraction` of each class, rounded and never nothing, or `per_class` images of each. A smaller
    subset lies inside a larger one of the same seed. Raises UserError where a class has too few.
    """
    if fraction in (None, 1) and per_class is None:
        return None
    chosen = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten().tolist()
        count = per_class if per_class is not None else max(1, round(fraction * len(index)))
        if count > len(index):
            raise UserError(
                f"data.per_class={per_class} is more than the {len(index)} training images of "
                f"label {label}; use at most {labels.bincount()[labels.unique()].min()}"
            )
        chosen += sorted(index, key=lambda i: place(seed, i))[:count]
    return torch.tensor(sorted(chosen))


def place(seed: int, index: int) -> bytes:
    """Where image `index` stands in the order that subsets are taken from."""
    # a hash: no generator of random numbers is promised to be the same in every version
    return hashlib.sha256(f"{seed}/{index}".encode()).digest()


def check_subset(fraction: float | None, per_class: int | None, seed: int) -> None:
    """Raises UserError for sizes, or a seed, that mean nothing."""
    if fraction is not None and per_class is not None:
        raise UserError(
            f"data.fraction={fraction} and data.per_class={per_class} are two sizes of one subset; "
            "leave one of them null"
        )
    require(
        fraction is None or (is_number(fraction) and 0 < fraction <= 1),
        "data.fraction",
        fraction,
        "a number above 0 and at most 1, or null for all",
        0.1,
    )
    require(
        per_class is None or is_whole(per_class, 1),
        "data.per_class",
        per_class,
        "a whole number of at least 1, or null for all",
        50,
    )
    require(is_whole(seed, 0), "data.subset_seed", seed, "a whole number of at least 0")
