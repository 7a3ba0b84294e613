"""DINOv2 features (arXiv:2304.07193), which judge diffusion models more fairly than Inception's.

The comparison is in arXiv:2306.04675, whose FD-DINOv2 is the Frechet distance of these features.
"""

from typing import ClassVar

from diffusion_lab.metrics.extractor.timm_transformer import TimmTransformer


class DINOv2(TimmTransformer):
    """The class token; the published comparison uses vit_large_patch14_dinov2 at 224 pixels."""

    kind, listed = "dinov2", "*patch14_dinov2*"
    size, clamped = 224, True
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ImageNet's, as in training
    preprocessing = f"antialiased bicubic {size}x{size}, ImageNet's mean and std"
    options: ClassVar[dict] = {"num_classes": 0, "img_size": size}
