"""A discriminator of images, of a GAN or of a first stage (PatchGAN, arXiv:1611.07004)."""

import math
from collections.abc import Callable
from typing import Annotated, Any

from torch import Tensor, nn

from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.ranges import MULTIPLE_OF_4, Flag, ranges, whole


class Discriminator(nn.Module):
    """Images (B, C, H, W) -> judgements of overlapping patches (B, 1, h, w), above 0: real.

    `layers` convolutions follow the first, each of which doubles the `channels`, and all but the
    last of which halve the image, as the first does. Gradient penalties need `normalised=false`.
    With a `conditioning` of labels, the judgement of a place gets the product of its features with
    the label's vector (arXiv:1802.05637).
    """

    @ranges()
    def __init__(
        self,
        image_channels: int,
        channels: Annotated[int, MULTIPLE_OF_4],
        layers: Annotated[int, whole(1).as_in(2)],
        normalised: Flag = True,
        labels: Labels | None = None,
        conditioning: Callable[..., nn.Module] | None = None,
    ):
        super().__init__()
        parts: list[nn.Module] = [
            nn.Conv2d(image_channels, channels, 4, stride=2, padding=1),
            nn.LeakyReLU(0.2),
        ]
        for layer in range(layers):
            width, stride = channels * 2**layer, 1 if layer == layers - 1 else 2
            parts += [
                nn.Conv2d(width, 2 * width, 4 if stride == 2 else 3, stride, padding=1),
                *([GroupNorm(2 * width)] if normalised else []),
                nn.LeakyReLU(0.2),
            ]
        self.features = 2 * width
        self.layers = nn.Sequential(*parts, nn.Conv2d(self.features, 1, 3, padding=1))
        self.conditioning: Any = None
        if conditioning is not None:
            self.conditioning = conditioning(labels=labels, width=self.features)
        if not normalised:  # nothing else keeps the size of features from layer to layer
            for part in parts:
                if isinstance(part, nn.Conv2d):
                    nn.init.kaiming_normal_(part.weight, a=0.2)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Images (B, C, H, W), and labels (B,) of a conditional one -> (B, 1, h, w) float32."""
        features = self.layers[:-1](images)
        judged = self.layers[-1](features)
        if self.conditioning is not None:
            vector = self.conditioning(labels, len(images)).vector
            if vector is not None:
                product = features * vector[:, :, None, None] / math.sqrt(self.features)
                judged = judged + product.sum(1, keepdim=True)
        return judged.float()
