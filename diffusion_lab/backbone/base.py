"""What a backbone is: any network from noisy images and a noise label to an output of that size."""

from typing import Protocol

from torch import Tensor

from diffusion_lab.conditioning import Condition


class Backbone(Protocol):
    """The one thing that a network must do to be trained here.

    A backbone is configured as a factory: `Denoiser` calls it with the facts `in_channels`,
    `out_channels` and `image_size` (height, width), everything else is set in its YAML.
    """

    condition_width: int  # D of the vectors and tokens in a Condition

    def __call__(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W)."""
        ...
