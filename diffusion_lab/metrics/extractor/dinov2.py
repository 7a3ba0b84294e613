"""DINOv2 features (arXiv:2304.07193), which judge diffusion models more fairly than Inception's.

The comparison is in arXiv:2306.04675, whose FD-DINOv2 is the Frechet distance of these features.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from diffusion_lab.common import hashing
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable, FeatureExtractor

SIZE = 224  # pixels, as in arXiv:2306.04675
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in training


class DINOv2(FeatureExtractor):
    """The class token of a timm model; its weights are downloaded, or read from `weights_path`.

    `model` is timm's name: the published comparison uses vit_large_patch14_dinov2. The file may be
    timm's or DINOv2's own (.pth or .safetensors); its checksum is in the features' name.
    """

    preprocessing = f"antialiased bicubic {SIZE}x{SIZE}, ImageNet's mean and std"

    def __init__(self, model: str, weights_path: str | None):
        self.model = model
        self.weights_path = weights_path
        self.name = f"dinov2-{model}"

    def build(self) -> tuple[nn.Module, str]:
        """Returns timm's network and the checksum of its weights."""
        import timm

        options: dict[str, Any] = {"num_classes": 0, "img_size": SIZE}
        if self.weights_path is not None:
            path = Path(self.weights_path)
            if not path.is_file():
                raise ExtractorUnavailable(f"weights_path={path} does not exist")
            refuse_code(path)
            options["pretrained_cfg_overlay"] = {"file": str(path)}
        elif self.model not in timm.list_pretrained():
            known = ", ".join(timm.list_pretrained("*patch14_dinov2*"))
            raise ExtractorUnavailable(
                f"model={self.model} is not one of timm's DINOv2 models: {known}"
            )
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
        self.dim = self.map_channels = network.num_features
        self.name = f"dinov2-{self.model}-{checksum[:8]}"
        return nn.Sequential(ImageNetNormalised(), network), checksum

    def map_of(self, pixels: Tensor) -> Tensor:
        parts: Any = self.network
        network = parts[1]
        tokens = network.forward_features(parts[0](pixels))[:, network.num_prefix_tokens :]
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


class ImageNetNormalised(nn.Module):
    """Resizes and normalises uint8 (B, 3, H, W) to float32 (B, 3, 224, 224)."""

    mean: Tensor  # (3, 1, 1), like std
    std: Tensor

    def __init__(self):
        super().__init__()
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(name, torch.tensor(value)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        x = functional.interpolate(
            images.float(), (SIZE, SIZE), mode="bicubic", antialias=True
        ).clamp(0, 255)
        return (x / 255 - self.mean) / self.std
