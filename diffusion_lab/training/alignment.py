"""Representation alignment (REPA, arXiv:2410.06940): a layer learns what a frozen network sees.

B batch, N places, D channels of the layer, E channels of the frozen network's features.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.ranges import Count, Positive, optional, ranges, whole
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.metrics.extractor.base import FeatureExtractor

ALIGNED = "train/alignment"  # the metric, in [-1, 1]


class Alignment(nn.Module):
    """How similar a layer of the denoiser's backbone is to features of the clean image.

    An MLP of `width` maps the layer's output to the features' channels, and features are
    interpolated to the layer's places. The loss is `weight` (1 - cosine), until `stop_images`
    images were seen, as arXiv:2505.16792 advises. `layer` counts the layers from 0; None is the one
    in the middle. Raises ValueError if there is no such layer, if its output has no places, or if
    the frozen network has no features by place.
    """

    @ranges()
    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        extractor: FeatureExtractor,
        layer: Annotated[int | None, optional(whole(0))],
        weight: Positive,
        width: Count,
        stop_images: Annotated[int | None, optional(whole(1))],
    ):
        super().__init__()
        self.extractor, self.weight, self.stop_images = extractor, weight, stop_images
        self.backbone: list[Any] = [
            denoiser.backbone
        ]  # in a list, as its weights are not this one's
        self._seen: Tensor | None = None
        chosen_layer(denoiser.backbone, layer).register_forward_hook(self._look)
        with torch.random.fork_rng(devices=[]):  # loading draws weights that it replaces
            extractor.load("cpu")
        if not extractor.map_channels:
            raise ValueError(
                f"{extractor.name} has no features by place to align with; write "
                "alignment=efficientnet_lite0 or dinov2"
            )
        channels = self._tried(denoiser, schedule)
        self.projector = nn.Sequential(
            nn.Linear(channels, width),
            nn.SiLU(),
            nn.Linear(width, width),
            nn.SiLU(),
            nn.Linear(width, extractor.map_channels),
        )

    def _look(self, layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        """Keeps the layer's output in a training step; other calls take no gradient."""
        if torch.is_grad_enabled():
            # an encoder's level of diffusers also returns what it skips to the decoder
            self._seen = output if isinstance(output, Tensor) else output[0]

    @torch.enable_grad()
    def _tried(self, denoiser: Denoiser, schedule: NoiseSchedule) -> int:
        """The layer's channels, found by a call of the denoiser."""
        x = torch.zeros(1, *denoiser.image_shape, device=next(denoiser.parameters()).device)
        was_training = denoiser.training
        denoiser.eval()  # an image of zeros is no part of a network's statistics
        denoiser(x, schedule(torch.full((1,), 0.5)))
        denoiser.train(was_training)
        (backbone,), seen = self.backbone, self._seen
        if seen is None or not (seen.ndim == 4 or (seen.ndim == 3 and hasattr(backbone, "tokens"))):
            raise ValueError(
                f"a layer of {type(backbone).__name__} has no pixels or patches to align; write "
                "alignment=none"
            )
        return self._places()[0].shape[-1]

    def _places(self) -> tuple[Tensor, tuple[int, int]]:
        """The layer's last output as (B, N, D), and its rows and columns; it is used up."""
        seen, self._seen = self._seen, None
        assert seen is not None, "the denoiser is called before"
        if seen.ndim == 4:
            return seen.flatten(2).mT, (seen.shape[2], seen.shape[3])
        (backbone,) = self.backbone
        rows, count = backbone.rows, backbone.tokens  # other tokens come before the patches'
        return seen[:, -count:], (rows, count // rows)

    def active(self, images_seen: int) -> bool:
        """Whether the loss counts after so many images."""
        return self.stop_images is None or images_seen < self.stop_images

    def forward(self, images: Tensor | None) -> Tensor:
        """The mean cosine similarity, (), for the clean images (B, C, H, W) in [-1, 1].

        The denoiser has been called on their noisy versions just before. Without images it is 0,
        and so are gradients, as DDP wants one for each parameter.
        """
        places, grid = self._places()
        if images is None:
            return 0 * self.projector(places[:1, :1].detach()).float().mean()
        features = F.interpolate(self.extractor.feature_map(images), grid, mode="bilinear")
        projected = self.projector(places).float()  # (B, N, E)
        return F.cosine_similarity(projected, features.flatten(2).mT, dim=-1).mean()


def chosen_layer(backbone: nn.Module, layer: int | None) -> nn.Module:
    """The layer of this number, or the one in the middle; ValueError if there is none."""
    layers, name = layers_of(backbone), type(backbone).__name__
    if not layers:
        raise ValueError(
            f"alignment needs a backbone with a property `layers`, and {name} has none; write "
            "alignment=none"
        )
    number = len(layers) // 2 if layer is None else layer
    if number >= len(layers):
        raise ValueError(
            f"layer={layer} must be below {len(layers)}, the number of layers of {name}"
        )
    return layers[number]
