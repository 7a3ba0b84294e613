"""Choices of images that are the same on every machine: for validation, and subsets to train on."""

import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.ranges import Range

MOST_KEPT, SHARE_KEPT = 5000, 10  # auto: at most 5,000 validation images, and at most one in 10
VALIDATION_SIZE = Range(
    "auto, a whole number of at least 0 or null",
    lambda value: value in ("auto", None) or (type(value) is int and value >= 0),
    5000,
)


def validation_and_rest(labels: Tensor, size: int | str | None) -> tuple[Tensor, Tensor]:
    """The indices of the validation images, stratified, and those of all others, sorted.

    The images have labels (N,) int64. `size` is a number, "auto" for 5,000 or for a tenth of the
    images if that is less, or None for none. The choice depends on nothing but the labels and
    `size`, and a smaller one lies inside a larger one. Raises ValueError if no image remains.
    """
    images = len(labels)
    kept = min(MOST_KEPT, images // SHARE_KEPT) if size == "auto" else int(size or 0)
    if kept >= images:
        raise ValueError(
            f"validation_size={kept} leaves none of {images} training images to train on; write "
            "a smaller number, or auto for a tenth of them or 5,000, whichever is less"
        )
    order = stratified(labels, "validation") if kept else torch.arange(images)
    return order[:kept], order[kept:].sort().values


def stratified(labels: Tensor, name: str) -> Tensor:
    """Orders images with labels (N,) int64: their indices (N,), random but fixed by `name`.

    Among the first n of them each class has its share of all images, as nearly as possible.
    """
    hashes = [hashing.of_text(f"{name}/{i}") for i in range(len(labels))]
    places: dict[int, tuple[float, str]] = {}
    for label in labels.unique().tolist():
        index = (labels == label).nonzero().flatten().tolist()
        for rank, i in enumerate(sorted(index, key=hashes.__getitem__)):
            # shuffles images of equal rank, whose classes would otherwise alternate
            places[i] = ((rank + 0.5) / len(index), hashes[i][::-1])
    return torch.tensor(sorted(places, key=places.__getitem__))


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
                f"per_class={per_class} is more than the {len(index)} images of label {label} to "
                f"train on; use at most {labels.bincount()[labels.unique()].min()}"
            )
        chosen += sorted(index, key=lambda i: hashing.of_text(f"{seed}/{i}"))[:count]
    return torch.tensor(sorted(chosen))
