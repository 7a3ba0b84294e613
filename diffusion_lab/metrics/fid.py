"""The Fréchet distance of features, of all images (FID) and of each class."""

import torch
from torch import Tensor

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.metrics.distances import frechet, frechet_of_halves, frechets_of
from diffusion_lab.metrics.metric import LOWER, ImageSet, Metric, Quantity


class FID(Metric):
    """FID (arXiv:1706.08500), its standard deviation over samples, and FID-infinity.

    Both come from `half_splits` random halvings of the samples: the standard deviation is rather
    too large, and FID-infinity is valid for several times more samples than features only.
    """

    meaning = "Fréchet distance of features to training images"
    infinity = "FID, extrapolated to infinitely many samples"
    quantities = (
        Quantity("fid", "FID", meaning, LOWER),
        Quantity("fid_infinity", "FID-infinity", infinity, LOWER, judged=False),
    )

    @ranges(half_splits=whole(0))
    def __init__(self, half_splits: int = 5):
        self.half_splits = half_splits

    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        fid = frechet(generated.statistics, reference.statistics)
        if not self.half_splits or len(generated) < 4:
            return {"fid": fid}
        halves = frechet_of_halves(generated.features, reference.statistics, self.half_splits)
        deviation = halves.std(correction=0).item()
        return {"fid": fid, "fid_std": deviation, "fid_infinity": 2 * fid - halves.mean().item()}


class ClassFID(Metric):
    """The FID of the images of each class: fid_class3/<extractor>/train6k-500.

    A class with fewer than 2 images on a side has none.
    """

    meaning = "Fréchet distance of features to training images of a class"
    quantities = (Quantity("fid_class", "FID of class", meaning, LOWER, judged=False),)
    needs_labels = by_class = True

    def measure(self, generated: ImageSet, reference: ImageSet) -> dict[str, float]:
        """The FID of images that are all of one class."""
        return {"fid_class": frechets_of(reference.features, [generated.features])[0]}

    def results(
        self, generated: ImageSet, reference: ImageSet, suffix: str = ""
    ) -> dict[str, float]:
        values = {}
        for label in reference.required_labels.unique().tolist():
            ours, real = generated.of_class(label), reference.of_class(label)
            if min(len(ours), len(real)) >= 2:
                name = f"fid_class{label}{suffix}/{self.protocol(ours, real)}"
                values[name] = self.measure(ours, real)["fid_class"]
        return values


def first_of_each(labels: Tensor, count: int) -> Tensor:
    """Whether an image is among the first `count` of its class, (n,) bool, by labels (n,)."""
    first = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        first[(labels == label).nonzero()[:count, 0]] = True
    return first
