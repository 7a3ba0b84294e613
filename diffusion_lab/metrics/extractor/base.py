"""Feature extractors: uint8 images -> the vectors that image distances compare."""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.compute.device import float32_products
from diffusion_lab.data import ImageData

FEATURES, SPATIAL = "features", "spatial"  # the names of an extractor's outputs
# images per step: on a CPU more of them do not fit the cache and take 1.5 times as long
CPU_BATCH, GPU_BATCH = 16, 64


class ExtractorUnavailable(ValueError):
    """The error for an extractor that cannot be used; its message says what to do."""


class FeatureExtractor(ABC):
    """A frozen network, uint8 (B, C, H, W) -> (B, D) float32; one channel is tiled to `channels`.

    An extractor is not an nn.Module, so that a model that holds one does not train, copy or save it
    or switch it to training mode. `load` must be called before the first use.
    """

    name: str  # the name in the names of metrics
    dim: int  # D
    spatial_dim = 0  # numbers of a map of the image; the network returns them after the features
    channels: int = 3  # channels of the network's input
    map_channels = 0  # E of `feature_map`, known once loaded; 0: it has none
    preprocessing: str  # transform of the pixels, in words; part of the fingerprint
    fingerprint: str  # checksum of weights and preprocessing, known once loaded
    device = torch.device("cpu")
    network: Any  # built by `load`

    @abstractmethod
    def build(self) -> tuple[nn.Module, str]:
        """Returns the network and the sha256 of its weights; raises ExtractorUnavailable.

        The network is uint8 (B, channels, H, W) -> (B, D + spatial_dim).
        """

    def load(self, device: torch.device | str) -> None:
        """Builds the network on `device`; raises ExtractorUnavailable."""
        network, weights = self.build()
        self.network = network.requires_grad_(False).eval()
        self.to(device)
        content = f"{type(self).__name__}\n{weights}\n{self.preprocessing}"
        self.fingerprint = hashing.of_text(content)

    @property
    def compares_on(self) -> torch.device:
        """The device on which features are compared: a GPU, else the CPU, for want of float64."""
        return self.device if self.device.type == "cuda" else torch.device("cpu")

    def to(self, device: torch.device | str) -> None:
        """Moves the network, once it is loaded."""
        self.device = torch.device(device)
        self.network.to(self.device)

    def check(self, source: ImageData) -> None:
        """Raises ExtractorUnavailable if the network cannot take this source's images."""
        if source.native_shape[0] not in (1, self.channels):
            raise ExtractorUnavailable(
                f"{self.name} takes images with 1 or {self.channels} channels, but the data have "
                f"{source.native_shape[0]}; choose another extractor, or turn the evaluation off"
            )

    def __call__(self, images: Tensor) -> Tensor:
        """Computes features (B, D), float32 on the extractor's device, of images on any device."""
        return self.outputs(images)[FEATURES]

    @torch.no_grad()
    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Computes the features (B, D) of images and, if there is one, the map (B, spatial_dim)."""
        possible = sorted({1, self.channels})
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in possible:
            raise ValueError(
                f"{self.name} takes features of uint8 images (B, C, H, W) with "
                f"C = {' or '.join(map(str, possible))}, not of {images.dtype} "
                f"{tuple(images.shape)}"
            )
        images = images.to(self.device).expand(-1, self.channels, -1, -1)
        with self.in_float32():
            rows = torch.cat([self.network(part).float() for part in self._parts(images)])
        features, spatial = rows.split([self.dim, rows.shape[1] - self.dim], dim=1)
        return {FEATURES: features} | ({SPATIAL: spatial} if self.spatial_dim else {})

    @torch.no_grad()
    def feature_map(self, images: Tensor) -> Tensor:
        """Computes features by place, (B, E, h, w), of images (B, C, H, W) float in [-1, 1]."""
        pixels = ((images.to(self.device) + 1) * 127.5).expand(-1, self.channels, -1, -1)
        with self.in_float32():
            return torch.cat([self.map_of(part) for part in self._parts(pixels)])

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images in batches of a size that suits the device."""
        return images.split(CPU_BATCH if self.device.type == "cpu" else GPU_BATCH)

    def map_of(self, pixels: Tensor) -> Tensor:
        """The features (B, E, h, w) of pixels (B, channels, H, W) float in [0, 255]."""
        raise NotImplementedError(f"{self.name} has no features by place")

    @contextlib.contextmanager
    def in_float32(self) -> Iterator[None]:
        """A context in which networks compute in float32, whatever a run around it has set.

        Samples are measured under autocast and real images outside of it.
        """
        # in bf16 1000 images have a distance of 3.9 to themselves, and TF32 rounds too
        with torch.autocast(self.device.type, enabled=False), float32_products("highest"):
            yield

    def logits(self, features: Tensor) -> Tensor | None:
        """The logits (n, K) of the network's classes from features (n, D); None without classes."""
        return None

    def __deepcopy__(self, memo: dict) -> "FeatureExtractor":
        return self  # frozen, so that a copied callback or model may share it
