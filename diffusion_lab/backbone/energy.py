"""An energy: the gradient of a scalar network, so that a score is the gradient of a density."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from diffusion_lab.backbone.base import Size, ends_of
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.edm2 import EDM2UNet
from diffusion_lab.common import forward_mode


class Energy(nn.Module):
    """d/dx of the scalar sum(x f(x)), where f is another backbone (as in arXiv:2302.11552).

    `network` makes f. Raises ValueError unless f has as many output as input channels, and for
    EDM2's U-Net.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: Size,
        network: Callable[..., nn.Module],
    ):
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(
                "an energy has a gradient of its input's shape, so self_conditioning, which adds "
                "channels, must be false, and no variance can be learned"
            )
        self.network: Any = network(
            in_channels=in_channels, out_channels=out_channels, image_size=image_size
        )
        if isinstance(self.network, EDM2UNet):
            raise ValueError(
                "network preserves magnitudes (EDM2), which its gradient does not; choose another, "
                "such as unet_small"
            )
        self.condition_width = self.network.condition_width
        self.embeds_labels = getattr(self.network, "embeds_labels", False)

    @property
    def ends(self) -> list[nn.Module]:
        return ends_of(self.network)

    def potential(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """The scalar of each sample x (B, C, H, W), (B,): large where the density is."""
        return (x * self.network(x, noise, condition)).flatten(1).sum(1)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        return forward_mode.gradient(lambda y: self.potential(y, noise, condition).sum(), x)
