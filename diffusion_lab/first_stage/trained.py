"""First stages from trained networks: of `diffusion-lab train-autoencoder`, and of `diffusers`."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusion_lab.common import hashing, messages
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.messages import say
from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import Range, above, either, numbers, optional, ranges
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.data import EncodedImages, ImageData
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.first_stage.autoencoder.base import pad_to_multiple
from diffusion_lab.first_stage.autoencoder.saving import OF_OTHER_CONTENT
from diffusion_lab.first_stage.base import Latents, Shape


class TrainedAutoencoder(Latents):
    """The autoencoder of the run folder `run`, scaled by the latents of its training images.

    A diffusion run saves the file and its `sha256`. Raises ValueError for a file that is missing,
    of another kind or image shape, or not the one that a run was trained with.
    """

    kinds: tuple[str, ...]  # accepted kinds of autoencoders

    def __init__(
        self, image_shape: Shape, run: str, sha256: str | None, cache: bool, cache_dir: str
    ):
        self.path = Path(run) / saving.FIRST_STAGE_FILE
        network, self.trained, self.content = saving.load_autoencoder(self.path)
        self.sha256 = hashing.of_bytes(self.content)
        if self.trained.kind not in self.kinds:
            raise ValueError(
                f"run={run} is a {self.trained.kind} autoencoder, but this first stage takes "
                f"{' or '.join(self.kinds)}; choose the first stage for its kind"
            )
        if sha256 is not None and sha256 != self.sha256:
            raise ValueError(
                f"{self.path} is not the first stage that this run was trained with: its sha256 "
                f"begins with {self.sha256[:12]}, not with {sha256[:12]}; restore the file"
            )
        if tuple(image_shape) != tuple(self.trained.image_shape):
            raise ValueError(
                f"{self.path} was trained on images of shape {tuple(self.trained.image_shape)}, "
                f"but these have {tuple(image_shape)}; train a first stage on these data"
            )
        super().__init__(image_shape, network.latent_shape, network, cache, cache_dir)
        self.factor = network.factor
        self.shift, self.scale = (
            torch.tensor(numbers, dtype=torch.float32)[:, None, None]
            for numbers in (self.trained.latent_mean, self.trained.latent_std)
        )
        if not (self.scale > 0).all():
            raise ValueError(
                f"{self.path} has a channel that is the same for all images; train it longer, or "
                "with fewer latent channels"
            )

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        data.images_fingerprint = on_rank_zero(lambda: data.images_fingerprint)
        if data.images_fingerprint != self.trained.data:
            say(
                f"Advice: {self.path} was trained on other images of this shape: its latents may "
                "have a different scale here, and its rFID does not apply to these images"
            )
        return super().prepare(data, device)

    def facts(self) -> dict[str, object]:
        return {"sha256": self.sha256}

    def reconstruction_metrics(self, data: ImageData) -> dict[str, float]:
        return self.trained.metrics if self.trained.data == data.images_fingerprint else {}

    def copy_into(self, folder: Path) -> None:
        write_atomically(folder / saving.FIRST_STAGE_FILE, self.content)


class TrainedKL(TrainedAutoencoder):
    """Latents of `train-autoencoder autoencoder=kl` or `vae`, drawn from the posterior."""

    kinds = ("kl",)


class TrainedVQ(TrainedAutoencoder):
    """Latents of `train-autoencoder autoencoder=vq` or `fsq`, before they are quantised.

    Its codes, (B, h, w) whole numbers below `num_codes`, are for models of sequences.
    """

    kinds = ("vq", "fsq")

    @property
    def num_codes(self) -> int:
        """The number of values that a code has."""
        return self.network.codes

    @torch.no_grad()
    def codes(self, moments: Tensor) -> Tensor:
        """Moments (B, c, h, w) -> codes (B, h, w) int64."""
        self.network.to(moments.device)
        return self.network.assign(self.mean(moments))[1].long()

    @torch.no_grad()
    def from_codes(self, codes: Tensor) -> Tensor:
        """Codes (B, h, w) int64 -> images uint8 (B, C, H, W), in the caller's precision."""
        self.network.to(codes.device)
        return to_uint8(require_finite(self.network.decode_quantised(self.network.vectors(codes))))


# the supported classes, and how each encodes images to moments
MOMENTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "AutoencoderKL": lambda network, images: network.encode(images).latent_dist.parameters,
    "AutoencoderTiny": lambda network, images: network.encode(images).latents,
}
COPY_FOLDER = "first_stage"  # name of the copy in a run folder
PROBE = 64  # side of a probe image that shows the downsampling factor
MEASURED = 5000  # most training images whose latents are measured
WORDS = Range("config, measured", lambda value: value in ("config", "measured"))
SCALES = numbers("a list of numbers above 0", lambda value: all(0 < n < math.inf for n in value))
SCALE = either(WORDS, either(above(0), SCALES))
SHIFT = numbers("a list of numbers", lambda value: all(map(math.isfinite, value)))


class HubVAE(Latents):
    """A pretrained autoencoder; `path` is on the Hugging Face hub, or a `save_pretrained` folder.

    `scale` multiplies the latents: config takes the network's own factor and shift, a number, or a
    list with one for each channel, is used as given, and measured is one over the standard
    deviation over training images. `shift`, if given, is subtracted before. A run saves
    the scale, the `sha256` of weights and settings, and a copy of both. Images of one channel are
    repeated to three, and decoded ones averaged. Raises ValueError if the network is not available.
    """

    @ranges(scale=SCALE, shift=optional(SHIFT))
    def __init__(
        self,
        image_shape: Shape,
        path: str,
        scale: str | float | Sequence[float],
        sha256: str | None,
        cache: bool,
        cache_dir: str,
        shift: Sequence[float] | None = None,
    ):
        if image_shape[0] not in (1, 3):
            raise ValueError(f"images must have 1 or 3 channels, not {image_shape[0]}")
        network, self.settings = pretrained(path)
        if (channels := network.config.in_channels) != 3:
            raise ValueError(
                f"path={path} takes images of {channels} channels, not of 3, to which grey ones "
                "are repeated; give another autoencoder"
            )
        self.moments_of = MOMENTS[self.settings["_class_name"]]
        self.sha256 = digest(network, self.settings)
        if sha256 is not None and sha256 != self.sha256:
            raise ValueError(
                f"path={path} does not have the weights and settings that this run was trained "
                f"with: its sha256 begins with {self.sha256[:12]}, not with {sha256[:12]}; restore "
                "the files"
            )
        self.given, self.scale, self.shift = scale, 1.0, 0.0
        if scale == "config":
            self.scale = 1 / network.config.scaling_factor
            self.shift = getattr(network.config, "shift_factor", None) or 0.0
        elif isinstance(scale, Sequence) and not isinstance(scale, str):
            self.scale = 1 / per_channel("scale", scale, network.config.latent_channels)
        elif not isinstance(scale, str):
            self.scale = 1 / scale
        if shift is not None:
            self.shift = per_channel("shift", shift, network.config.latent_channels)
        with torch.no_grad():
            probe = self.moments_of(network, torch.zeros(1, 3, PROBE, PROBE))
        self.factor = PROBE // probe.shape[-1]
        sides = (-(-side // self.factor) for side in image_shape[1:])
        latent_shape = (network.config.latent_channels, *sides)
        super().__init__(image_shape, latent_shape, network, cache, cache_dir)

    def encoder(self, images: Tensor) -> Tensor:
        images = pad_to_multiple(images.expand(-1, 3, -1, -1), self.factor)
        return self.moments_of(self.network, images)

    def decoder(self, latents: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        images = self.network.decode(latents).sample[..., :height, :width].float()
        return images if channels == 3 else images.mean(1, keepdim=True)

    def mean(self, moments: Tensor) -> Tensor:
        return moments[:, : self.latent_shape[0]]

    def variance(self, moments: Tensor) -> Tensor:
        """Returns the variance of `sample`."""
        mean = self.mean(moments)
        if mean.shape == moments.shape:  # the moments are the latents
            return torch.zeros_like(mean)
        return moments[:, mean.shape[1] :].clamp(-30, 20).exp()

    def sample(self, moments: Tensor) -> Tensor:
        mean = self.mean(moments)
        return mean + self.variance(moments).sqrt() * torch.randn_like(mean)

    def prepare(self, data: ImageData, device: torch.device) -> EncodedImages | None:
        encoded = super().prepare(data, device)
        say("Advice: the rFID of this first stage, a lower limit for the FID, was not measured")
        if self.given == "measured":
            if encoded is None:
                images = data.trained_on(MEASURED).images
                moments = torch.cat([self.moments(part.to(device)) for part in images.split(64)])
            else:  # the same images, already encoded
                moments = encoded.moments[random_places(len(encoded.moments), MEASURED)]
            shift, _ = self._numbers(moments.device)
            mean = self.mean(moments).double() - shift
            self.scale = (mean.var(correction=0) + self.variance(moments).mean()).sqrt().item()
            self.given = 1 / self.scale
        return encoded

    def facts(self) -> dict[str, object]:
        return {"sha256": self.sha256, "scale": self.given}

    def copy_into(self, folder: Path) -> None:
        self.network.save_pretrained(folder / COPY_FOLDER)
        # as it was read: a newer diffusers would add settings, which change the sha256
        settings = json.dumps(self.settings, indent=2)
        write_atomically(folder / COPY_FOLDER / "config.json", settings)


def per_channel(name: str, values: Sequence[float], channels: int) -> Tensor:
    """The values of channels, (c, 1, 1); raises ValueError for another number of them."""
    if len(values) != channels:
        raise ValueError(
            f"{name}={[*values]} must have a number for each of the {channels} channels of latents"
        )
    return torch.tensor([*values]).view(-1, 1, 1)


def pretrained(path: str) -> tuple[Any, dict[str, Any]]:
    """Loads the autoencoder `path` and its config.json; a ValueError says what to do instead."""
    diffusers = messages.package("diffusers", "diffusers", "this first stage")
    try:
        settings = diffusers.AutoencoderKL.load_config(path)
        if (name := str(settings["_class_name"])) in MOMENTS:
            # the older format is a pickle, which can run any code; low memory needs another
            # package, of whose absence diffusers would warn
            kept = {"use_safetensors": True, "low_cpu_mem_usage": False}
            return getattr(diffusers, name).from_pretrained(path, **kept), settings
    except (OSError, *OF_OTHER_CONTENT) as error:
        where = (
            "is damaged"
            if Path(path).is_dir()
            else "is not a folder, and cannot be fetched from the hub"
        )
        raise ValueError(
            f"path={path} {where}; give the folder of an autoencoder that "
            "diffusers saved as safetensors, or try again with a network"
        ) from error
    raise ValueError(f"path={path} is a {name}, not one of {', '.join(MOMENTS)}")


def digest(network: nn.Module, settings: dict[str, object]) -> str:
    """Hashes all weights, their names, and the settings without diffusers' own notes, by sha256."""
    lasting = {key: value for key, value in settings.items() if key[0] != "_"}
    weights = hashing.of_tensors(network.state_dict())
    return hashing.of_text(json.dumps(lasting, sort_keys=True) + weights)
