"""An adversary that judges patches of an image (PatchGAN, arXiv:1611.07004)."""

from torch import Tensor, nn

from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.common.ranges import above, ranges, whole
from diffusion_lab.first_stage.autoencoder.base import MULTIPLE_OF_4


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) -> judgements of overlapping patches (B, 1, h, w), above 0: real.

    `layers` convolutions halve the image; their width begins with `channels` and doubles. The
    discriminator is silent before step `start`; after that `weight` multiplies its adaptive weight.
    """

    @ranges(
        channels=MULTIPLE_OF_4,
        layers=whole(1).as_in(2),
        weight=above(0).as_in(0.5),
        start=whole(0).as_in(2000),
    )
    def __init__(self, image_channels: int, channels: int, layers: int, weight: float, start: int):
        super().__init__()
        self.weight = weight
        self.start = start
        parts = [nn.Conv2d(image_channels, channels, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for layer in range(layers):
            width, stride = channels * 2**layer, 1 if layer == layers - 1 else 2
            parts += [
                nn.Conv2d(width, 2 * width, 4 if stride == 2 else 3, stride, padding=1),
                GroupNorm(2 * width),
                nn.LeakyReLU(0.2),
            ]
        self.layers = nn.Sequential(*parts, nn.Conv2d(2 * width, 1, 3, padding=1))

    def forward(self, images: Tensor) -> Tensor:
        return self.layers(images).float()
