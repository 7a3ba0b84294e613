"""Features of timm's vision transformers, whose weights are downloaded or read from a file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_lab.common import hashing
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor


class TimmTransformer(FeatureExtractor):
    """The output of a timm model for an image; `weights_path` is a file, or None to download.

    `model` is timm's name. The file may be timm's or the authors' (.pth or .safetensors); its
    checksum is in the features' name.
    """

    kind: str  # in the features' name
    listed: str  # timm's names of such models, as a pattern
    size: int  # pixels a side
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    clamped: bool  # whether resizing stays within the range of pixels
    options: ClassVar[dict[str, Any]] = {}  # of timm's model

    def __init__(self, model: str, weights_path: str | None):
        self.model = model
        self.weights_path = weights_path
        self.name = f"{self.kind}-{model}"

    def build(self) -> tuple[nn.Module, str]:
        import timm

        options = dict(self.options)
        if self.weights_path is not None:
            path = Path(self.weights_path)
            if not path.is_file():
                raise ExtractorUnavailable(f"weights_path={path} does not exist")
            refuse_code(path)
            options["pretrained_cfg_overlay"] = {"file": str(path)}
        elif self.model not in timm.list_pretrained():
            known = ", ".join(timm.list_pretrained(self.listed))
            raise ExtractorUnavailable(f"model={self.model} is not one of timm's models: {known}")
        try:
            network: Any = timm.create_model(self.model, pretrained=True, **options)
        except Exception as error:  # the hub, the connection and the file raise errors of all kinds
            reason = str(error).strip().splitlines()[0]
            raise ExtractorUnavailable(
                f"the weights of {self.model} could not be loaded ({reason}); download "
                f"https://huggingface.co/timm/{self.model} elsewhere and set "
                "weights_path to its model.safetensors"
            ) from error
        # the checksum of the numbers alone: the file format and the type do not matter
        checksum = hashing.of_tensors({k: v.float() for k, v in network.state_dict().items()})
        self.map_channels = network.num_features
        self.dim = network.num_classes or network.num_features
        self.name = f"{self.kind}-{self.model}-{checksum[:8]}"
        pixels = NormalisedPixels(self.size, self.mean, self.std, self.clamped)
        return nn.Sequential(pixels, network), checksum

    def map_of(self, pixels: Tensor) -> Tensor:
        normalise, network = self.network
        tokens = network.forward_features(normalise(pixels))[:, network.num_prefix_tokens :]
        return tokens.mT.unflatten(2, network.patch_embed.grid_size)


def refuse_code(path: Path) -> None:
    """Raises ExtractorUnavailable for a pickle of more than tensors: timm might run its code."""
    if path.suffix == ".safetensors":
        return
    try:
        torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of all kinds
        raise ExtractorUnavailable(
            f"weights_path={path} contains more than weights; use a .safetensors file"
        ) from error


class NormalisedPixels(nn.Module):
    """Resizes and normalises uint8 (B, 3, H, W) to float32 (B, 3, size, size)."""

    mean: Tensor  # (3, 1, 1), like std
    std: Tensor

    def __init__(self, size: int, mean: Sequence[float], std: Sequence[float], clamped: bool):
        super().__init__()
        self.size, self.clamped = size, clamped
        for name, value in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        size = (self.size, self.size)
        x = functional.interpolate(images.float(), size, mode="bicubic", antialias=True)
        x = x.clamp(0, 255) if self.clamped else x
        return (x / 255 - self.mean) / self.std


class CLIP(TimmTransformer):
    """CLIP's embedding (arXiv:2103.00020), on whose directions MMD is CMMD (arXiv:2401.09603).

    CMMD uses ViT-L/14 at 336. OpenAI's weights need the models that timm calls quickgelu.
    """

    kind, listed = "clip", "vit*_clip_quickgelu_336*"
    size, clamped = 336, False
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    preprocessing = f"antialiased bicubic {size}x{size}, CLIP's mean and std"
    options: ClassVar[dict] = {"img_size": size}


class DINOv2(TimmTransformer):
    """DINOv2's class token (arXiv:2304.07193), which judges models more fairly than Inception's.

    The comparison in arXiv:2306.04675, whose FD-DINOv2 is the Frechet distance of these features,
    uses vit_large_patch14_dinov2 at 224 pixels.
    """

    kind, listed = "dinov2", "*patch14_dinov2*"
    size, clamped = 224, True
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in training
    preprocessing = f"antialiased bicubic {size}x{size}, ImageNet's mean and std"
    options: ClassVar[dict] = {"num_classes": 0, "img_size": size}
