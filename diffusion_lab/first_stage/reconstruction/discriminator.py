"""The adversary of a first stage."""

from diffusion_lab.backbone.discriminator import Discriminator
from diffusion_lab.common.ranges import Positive, Seed, ranges


class PatchDiscriminator(Discriminator):
    """A discriminator that is silent before step `start`.

    After that `weight` multiplies its adaptive weight.
    """

    @ranges()
    def __init__(
        self, image_channels: int, channels: int, layers: int, weight: Positive, start: Seed
    ):
        super().__init__(image_channels, channels, layers)
        self.weight = weight
        self.start = start
