"""CLIP's embeddings of images (arXiv:2103.00020), on whose directions MMD is CMMD."""

from typing import ClassVar

from diffusion_lab.metrics.extractor.timm_transformer import TimmTransformer


class CLIP(TimmTransformer):
    """The embedding that is compared with texts; CMMD (arXiv:2401.09603) uses ViT-L/14 at 336.

    OpenAI's weights need the models that timm calls quickgelu.
    """

    kind, listed = "clip", "vit*_clip_quickgelu_336*"
    size, clamped = 336, False
    mean, std = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # CLIP's
    preprocessing = f"antialiased bicubic {size}x{size}, CLIP's mean and std"
    options: ClassVar[dict] = {"img_size": size}
