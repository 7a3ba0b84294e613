"""Less data: nested, stratified subsets of a training split, the same on every machine."""

import torch
from torch import Tensor

from diffusion_lab.common import hashing


def subset(
    labels: Tensor, fraction: float | None, per_class: int | None, seed: int
) -> Tensor | None:
    """Returns sorted indices of a subset of images with labels (N,) int64; None means all images.

    The subset is `fraction` of each class (rounded, at least one image) or `per_class` images of
    each. A smaller subset lies inside a larger one of the same seed. Raises ValueError if a class
    has too few images.
    """
    if fraction in (None, 1) and per_class is None:
        return None
    # ordered by hashes: no random generator promises the same numbers in every version
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
