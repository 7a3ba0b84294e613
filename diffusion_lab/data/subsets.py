"""Less data: nested, stratified subsets of a training split, the same on every machine."""

import torch
from torch import Tensor

from diffusion_lab.common import hashing


def subset(
    labels: Tensor, fraction: float | None, per_class: int | None, seed: int
) -> Tensor | None:
    """Sorted indices of a part of the images, labels (N,) int64; None for all of them.

    `fraction` of each class, rounded and never nothing, or `per_class` images of each. A smaller
    subset lies inside a larger one of the same seed. Raises ValueError where a class has too few.
    """
    if fraction in (None, 1) and per_class is None:
        return None
    # ordered by hashes: no generator of random numbers is promised to be the same in every version
    chosen = []
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten().tolist()
        share = max(1, round((fraction or 1) * len(index)))
        count = share if per_class is None else per_class
        if count > len(index):
            raise ValueError(
                f"per_class={per_class} is more than the {len(index)} training images of "
                f"label {label}; use at most {labels.bincount()[labels.unique()].min()}"
            )
        chosen += sorted(index, key=lambda i: hashing.of_text(f"{seed}/{i}"))[:count]
    return torch.tensor(sorted(chosen))
