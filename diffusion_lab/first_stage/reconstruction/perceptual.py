"""Distances between features of a frozen network (LPIPS, arXiv:1801.03924).

B batch, C channels of the images, which are in [-1, 1].
"""

from abc import ABC, abstractmethod
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_lab.common.ranges import Positive, one_of, settings, whole
from diffusion_lab.metrics.extractor.efficientnet_lite0 import fold_batch_norm, pretrained


@settings
class Perceptual(ABC):
    """A distance (B,) between images (B, C, H, W) and others, with gradients to the images alone.

    It is not an nn.Module, so a module that holds one does not train, copy or save it.
    """

    weight: Positive

    def __post_init__(self) -> None:
        self.judge: Any = self.build().requires_grad_(False).eval()

    @abstractmethod
    def build(self) -> nn.Module:
        """Builds the network; raises ValueError if its weights are not available."""

    @abstractmethod
    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        """The distances (B,) between images (B, 3, H, W)."""

    def __call__(self, images: Tensor, others: Tensor) -> Tensor:
        self.judge.to(images.device)
        return self.distance(*(each.expand(-1, 3, -1, -1) for each in (images, others)))

    def __deepcopy__(self, memo: dict) -> "Perceptual":
        return self


@settings
class EfficientNetDistance(Perceptual):
    """The distance after EfficientNet-Lite0's first four stages, for images of side `size`.

    The network needs no download.
    """

    size: Annotated[int, whole(1).as_in(32)]

    def build(self) -> nn.Module:
        network = fold_batch_norm(pretrained(0))
        stem = nn.Sequential(network.conv_stem, network.bn1, network.blocks[0])
        return nn.ModuleList([stem, *network.blocks[1:4]])

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        x = torch.cat([images, others])
        if x.shape[-2:] != (self.size, self.size):
            x = functional.interpolate(x, (self.size, self.size), mode="bilinear", antialias=True)
        x = x.contiguous(memory_format=torch.channels_last)
        total = x.new_zeros(len(images))
        for stage in self.judge:
            x = stage(x)
            first, second = functional.normalize(x.float(), dim=1).chunk(2)
            total = total + (first - second).square().sum(1).mean((1, 2))
        return total / len(self.judge)


@settings
class LPIPS(Perceptual):
    """LPIPS of `network`, vgg, alex or squeeze, weighted by human judgements; it is downloaded."""

    network: Annotated[str, one_of("vgg", "alex", "squeeze")]

    def build(self) -> nn.Module:
        from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

        try:
            name = cast(Literal["vgg", "alex", "squeeze"], self.network)
            return LearnedPerceptualImagePatchSimilarity(name).net
        except (OSError, ImportError) as error:  # offline, or a missing package
            raise ValueError(
                f"the weights of LPIPS are not available ({error}); choose efficientnet_lite0, "
                "which needs no download"
            ) from error

    def distance(self, images: Tensor, others: Tensor) -> Tensor:
        return self.judge(images, others).flatten(1).sum(1)
