"""First stages turn uint8 images into the float tensors of about unit scale to be diffused.

Latents are those of a frozen network. An image is encoded to moments, the distribution of its
latents; the cache holds moments, so that each training step draws new latents.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.common.images import require_finite, to_float, to_uint8
from diffusion_lab.common.messages import say, track
from diffusion_lab.common.ranges import PATH, flag, ranges
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.data import EncodedImages, ImageData
from diffusion_lab.data.loader import Rows
from diffusion_lab.data.store import Allocate, StoredValues, in_memory, stored_by_ranks

Shape = tuple[int, int, int]


class FirstStage(ABC):
    """The space in which diffusion happens; it is frozen, and no part of the trained model.

    It is built for images of one shape; `latent_shape` is the (c, h, w) that is diffused.
    """

    cache = False  # whether the training images are encoded once, before training
    data_std = 1.0  # std of the diffused tensors, where no other number is configured
    factor = 1  # how many pixels wide and high a latent is
    of_pixels = False  # whether the images themselves are diffused, in [-1, 1]

    def __init__(self, image_shape: Shape, latent_shape: Shape):
        self.image_shape = tuple(image_shape)
        self.latent_shape = tuple(latent_shape)

    @abstractmethod
    def encode(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) uint8 -> (B, c, h, w) float32 of about unit scale."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) float -> (B, C, H, W) uint8."""

    def moments(self, images: Tensor) -> Tensor:
        """Encodes images (B, C, H, W) uint8 to what `draw` draws from, (B, ., h, w) float32."""
        return self.encode(images)

    def draw(self, moments: Tensor) -> Tensor:
        """Draws the latents of a training step, (B, c, h, w) float32, from moments (B, ., h, w)."""
        return moments

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        """Measures the loaded data, and encodes them if `cache` is set; called on all ranks."""
        return None

    def facts(self) -> dict[str, object]:
        """Returns constructor arguments for a run to save, which are known after `prepare`."""
        return {}

    def reconstruction_metrics(self, data: ImageData) -> dict[str, float]:
        """Metrics (rFID, ...) of this data's reconstructed test images, if they were measured.

        The data must have been read.
        """
        return {}

    def copy_into(self, folder: Path) -> None:
        """Copies the files that reopen the first stage into a run folder; called on rank 0."""
        return None


class Pixels(FirstStage):
    """Diffuses the pixels themselves, in [-1, 1]."""

    of_pixels = True
    data_std = 0.5  # the std of CIFAR-10

    def __init__(self, image_shape: Shape):
        super().__init__(image_shape, image_shape)

    def encode(self, images: Tensor) -> Tensor:
        """uint8 in [0, 255] -> float32 in [-1, 1]."""
        return to_float(images)

    def decode(self, latents: Tensor) -> Tensor:
        """float in [-1, 1] -> uint8, rounded and clipped."""
        return to_uint8(latents)


BATCH = 256  # small images that are encoded at once
PIXELS = BATCH * 64 * 64  # of images that are encoded at once


def at_once(shape: tuple[int, ...]) -> int:
    """How many images of a shape (C, H, W) are encoded at once: BATCH, or a part of it.

    A part, so that ranks, which encode multiples of BATCH, have the batches of a single one.
    """
    *_, height, width = shape
    count = BATCH
    while count > 1 and count * height * width > PIXELS:
        count //= 2
    return count


class Latents(FirstStage):
    """A frozen network between images and latents, moved to the device of its input.

    The network has the methods of an `Autoencoder`, or a subclass replaces the calls of them.
    `sha256` identifies its weights; `shift` and `scale`, tensors (c, 1, 1) or numbers, scale
    latents z to (z - shift) / scale.
    """

    network: Any  # Any, as it has more methods than nn.Module
    sha256: str
    shift: Tensor | float
    scale: Tensor | float

    @ranges(cache=flag(), cache_dir=PATH)
    def __init__(
        self,
        image_shape: Shape,
        latent_shape: Shape,
        network: nn.Module,
        cache: bool,
        cache_dir: str,
    ):
        super().__init__(image_shape, latent_shape)
        # FirstStage is not an nn.Module, so its owner does not train, average or save the network
        self.network = network.requires_grad_(False).eval()
        self.cache = cache
        self.cache_dir = Path(cache_dir)

    def encoder(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) in [-1, 1] -> moments (B, ., h, w) float32."""
        return self.network.moments(images)

    def decoder(self, latents: Tensor) -> Tensor:
        """latents z (B, c, h, w) -> images (B, C, H, W) in [-1, 1]."""
        return self.network.decode(latents)

    def mean(self, moments: Tensor) -> Tensor:
        """Returns the latents z that represent an image."""
        return self.network.mean(moments)

    def sample(self, moments: Tensor) -> Tensor:
        """Draws latents z of an image from torch's generator."""
        return self.network.sample(moments)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """images (B, C, H, W) uint8 -> moments float32, computed in float32 even under autocast."""
        self.network.to(images.device)
        with torch.autocast(images.device.type, enabled=False):
            return self.encoder(to_float(images))

    def encode(self, images: Tensor) -> Tensor:
        return self.scaled(self.mean(self.moments(images)))

    @torch.no_grad()
    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, c, h, w) -> images uint8, rounded and clipped, in the caller's precision."""
        self.network.to(latents.device)
        return to_uint8(require_finite(self.decoder(self.restored(latents))))

    def draw(self, moments: Tensor) -> Tensor:
        return self.scaled(self.sample(moments))

    def scaled(self, latents: Tensor) -> Tensor:
        """Brings latents to mean 0 and standard deviation 1."""
        shift, scale = self._numbers(latents.device)
        return (latents - shift) / scale

    def restored(self, latents: Tensor) -> Tensor:
        """Undoes `scaled`."""
        shift, scale = self._numbers(latents.device)
        return latents * scale + shift

    def _numbers(self, device: torch.device) -> list[Tensor]:
        return [torch.as_tensor(each, device=device) for each in (self.shift, self.scale)]

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        """Encodes the training images if they are cached, also mirrored if the data are flipped."""
        if not self.cache:
            return None
        images = data.train_rows(padded=True)
        checksum = on_rank_zero(lambda: hashing.of_tensors(images.batches(BATCH)))
        mirrored = self.cached_moments(images, checksum, device, True) if data.flip else None
        return EncodedImages(self.cached_moments(images, checksum, device, False), mirrored)

    def cached_moments(
        self, images: Rows, checksum: str, device: torch.device, mirrored: bool
    ) -> Tensor:
        """Moments (N, ., h, w) of the training images, mirrored or not, computed once."""
        key = {"images": checksum, "first_stage": self.sha256, "mirrored": mirrored}

        def compute(rows: range, allocate: Allocate) -> StoredValues:
            what = f"latents of {len(rows):,} {'mirrored ' if mirrored else ''}training images"
            say(f"Computing {what} once, to be cached in {self.cache_dir}")
            moments = None
            ids_of_batches = torch.arange(rows.start, rows.stop).split(at_once(self.image_shape))
            for ids in track(ids_of_batches, what):
                part = images[ids].flip(-1) if mirrored else images[ids]
                encoded = self.moments(part.to(device)).cpu()
                if moments is None:
                    moments = allocate((len(rows), *encoded.shape[1:]), encoded.dtype)
                moments[ids - rows.start] = encoded
            assert moments is not None, "there are images to train on"
            return StoredValues(moments, {})

        name = f"moments-{len(images)}{'-mirrored' if mirrored else ''}"
        try:
            return stored_by_ranks(self.cache_dir, name, key, len(images), BATCH, compute).values
        except OSError as error:
            say(f"Latents could not be written, so they are kept in memory: {error}")
            return compute(range(len(images)), in_memory).values

    def __deepcopy__(self, memo: dict) -> "Latents":
        return self  # frozen, so that copies of the model, such as averaged weights, can share it
