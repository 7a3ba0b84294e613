"""Losses of a layer beside the objective's: it learns what a frozen network sees, or to disperse.

B batch, N places, D channels of the layer, E channels of the frozen network's features.
"""

from abc import abstractmethod
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.ranges import Count, Fraction, Positive, one_of, optional, ranges, whole
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.metrics.extractor.base import FeatureExtractor

TINY = 1e-6  # added to a deviation that may be 0
Layer = Annotated[int | None, optional(whole(0))]
Stop = Annotated[int | None, optional(whole(1))]


class LayerLoss(nn.Module):
    """A loss of a layer of the denoiser's backbone, until `stop_images` images were seen.

    `layer` counts the layers from 0; None is the one in the middle. Raises ValueError if there is
    no such layer.
    """

    logged: ClassVar[str]  # the name of what `forward` returns
    extractor: FeatureExtractor | None = None  # a frozen network that is asked, if one is

    def __init__(
        self, denoiser: Denoiser, layer: int | None, weight: float, stop_images: int | None
    ):
        super().__init__()
        self.weight, self.stop_images = weight, stop_images
        self.backbone: list[Any] = [denoiser.backbone]  # listed, as its weights are not this one's
        self._seen: Tensor | None = None
        chosen_layer(denoiser.backbone, layer).register_forward_hook(self._look)

    def _look(self, layer: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        """Keeps the layer's output in a training step; other calls take no gradient."""
        if torch.is_grad_enabled():
            # an encoder's level of diffusers also returns what it skips to the decoder
            self._seen = output if isinstance(output, Tensor) else output[0]

    def _taken(self) -> Tensor:
        """The layer's last output, which is used up."""
        seen, self._seen = self._seen, None
        assert seen is not None, "the denoiser is called before"
        return seen

    def active(self, images_seen: int) -> bool:
        """Whether the loss counts after so many images."""
        return self.stop_images is None or images_seen < self.stop_images

    @abstractmethod
    def forward(self, images: Tensor | None) -> Tensor:
        """The value that is logged, (), for the clean images (B, C, H, W) in [-1, 1].

        The denoiser has been called on their noisy versions just before. Without images it is 0,
        and so are gradients, as DDP wants one for each parameter.
        """

    def loss(self, value: Tensor) -> Tensor:
        """The loss (), not yet weighted, of a value that `forward` returned."""
        return value


class Dispersive(LayerLoss):
    """log mean exp(-|z_i - z_j|^2 / temperature) of all pairs in a batch (arXiv:2506.09027).

    z is the layer's whole output for an image, and |z|^2 its mean square. Pairs are those of one
    device and micro-batch, each image with itself included.
    """

    logged = "train/dispersion"

    @ranges()
    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        layer: Layer,
        weight: Positive,
        temperature: Positive,
        stop_images: Stop,
    ):
        super().__init__(denoiser, layer, weight, stop_images)
        self.temperature = temperature

    def forward(self, images: Tensor | None) -> Tensor:
        z = self._taken().flatten(1).float()  # (B, places x D)
        if images is None:
            return 0 * z[:1].mean()
        near = torch.exp(F.pdist(z).square() / (-self.temperature * z.shape[1]))
        return ((2 * near.sum() + len(z)) / len(z) ** 2).log()  # each pair counts twice


class Alignment(LayerLoss):
    """How similar a layer's output is to features of the clean image (REPA, arXiv:2410.06940).

    The projector, an `mlp` of `width` or a 3 x 3 `convolution`, maps the layer's output to the
    features' channels, and features are interpolated to the layer's places. `centred` is the share
    of each image's mean over its places that is taken away from them, before they are divided by
    their deviation; 0 leaves them as they are. A convolution and centred features are
    arXiv:2512.10794's. The loss is 1 - cosine, and arXiv:2505.16792 advises to stop it. Raises
    ValueError if the layer's output has no places, or the frozen network no features by place.
    """

    logged = "train/alignment"
    extractor: FeatureExtractor

    @ranges()
    def __init__(
        self,
        denoiser: Denoiser,
        schedule: NoiseSchedule,
        extractor: FeatureExtractor,
        layer: Layer,
        weight: Positive,
        width: Count,
        stop_images: Stop,
        projector: Annotated[str, one_of("mlp", "convolution")] = "mlp",
        centred: Fraction = 0.0,
    ):
        super().__init__(denoiser, layer, weight, stop_images)
        self.extractor, self.centred = extractor, centred
        with torch.random.fork_rng(devices=[]):  # loading draws weights that it replaces
            extractor.load("cpu")
        if not extractor.map_channels:
            raise ValueError(
                f"{extractor.name} has no features by place to align with; write "
                "alignment=efficientnet_lite0 or dinov2"
            )
        channels = self._tried(denoiser, schedule)
        if projector == "mlp":
            first, second = nn.Linear(channels, width), nn.Linear(width, width)
            last = nn.Linear(width, extractor.map_channels)
            self.projector = nn.Sequential(first, nn.SiLU(), second, nn.SiLU(), last)
        else:
            kernel = nn.Conv2d(channels, extractor.map_channels, 3, padding=1)
            self.projector = nn.Sequential(kernel)

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
        seen = self._taken()
        if seen.ndim == 4:
            return seen.flatten(2).mT, (seen.shape[2], seen.shape[3])
        (backbone,) = self.backbone
        rows, count = backbone.rows, backbone.tokens  # other tokens come before the patches'
        return seen[:, -count:], (rows, count // rows)

    def forward(self, images: Tensor | None) -> Tensor:
        places, grid = self._places()
        if images is None:
            return 0 * self._projected(places[:1].detach(), grid).mean()
        features = self.extractor.feature_map(images)
        if self.centred:
            deviation, mean = torch.std_mean(features, (2, 3), keepdim=True)
            features = (features - self.centred * mean) / (deviation + TINY)
        features = F.interpolate(features, grid, mode="bilinear")
        projected = self._projected(places, grid)
        return F.cosine_similarity(projected, features.flatten(2).mT, dim=-1).mean()

    def _projected(self, places: Tensor, grid: tuple[int, int]) -> Tensor:
        """The layer's output (B, N, D) as features (B, N, E) float32."""
        if isinstance(self.projector[0], nn.Linear):
            return self.projector(places).float()
        return self.projector(places.mT.unflatten(2, grid)).flatten(2).mT.float()

    def loss(self, value: Tensor) -> Tensor:
        return 1 - value


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
    if number in getattr(backbone, "short", ()):
        raise ValueError(
            f"layer {number} sees some of the patches alone, as backbone.routed={backbone.routed}; "
            "choose another layer, or write backbone.routed=0"
        )
    return layers[number]
