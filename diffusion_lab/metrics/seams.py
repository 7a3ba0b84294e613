"""Seams: how much more images change across the edges of patches than inside them.

A network that writes each patch by itself leaves seams, which FID sees only in part.
"""

from diffusion_lab.common.ranges import ranges, whole
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.observer import EDGES
from diffusion_lab.metrics.quantity import named


class Seams(Metric):
    """The mean difference across the edges of patches over that inside of them.

    Real images have about 1; the value of test images stands beside it. Needs patches of at least 2
    pixels a side.
    """

    quantities = named("seams")
    needs_images = False

    @ranges(patch=whole(2))
    def __init__(self, patch: int):
        super().__init__()
        self.patch = patch

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        across, inside = generated.others[EDGES].mean(0).tolist()
        return {"seams": across / inside} if inside else {}

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        return f"{self.patch}px/{short_count(len(generated))}"
