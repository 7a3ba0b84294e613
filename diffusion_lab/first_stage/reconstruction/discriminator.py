"""The adversary of a first stage."""

from typing import Annotated

from diffusion_lab.backbone.discriminator import Discriminator
from diffusion_lab.common.ranges import above, ranges, whole


class PatchDiscriminator(Discriminator):
    """A discriminator that is silent before step `start`.

    After that `weight` multiplies its adaptive weight.
    """

    @ranges()
    def __init__(
        self,
        image_channels: int,
        channels: int,
        layers: int,
        weight: Annotated[float, above(0).as_in(0.5)],
        start: Annotated[int, whole(0).as_in(2000)],
    ):
        super().__init__(image_channels, channels, layers)
        self.weight = weight
        self.start = start
