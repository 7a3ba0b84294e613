"""First stages that others trained: the autoencoders of `diffusers`."""

import importlib
import json
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusion_lab.common import hashing
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.progress import say
from diffusion_lab.common.randomness import random_places
from diffusion_lab.data import ImageDataModule
from diffusion_lab.first_stage.autoencoder.network import pad_to_multiple
from diffusion_lab.first_stage.latents import Latents

CLASSES = ("AutoencoderKL", "AutoencoderTiny")
FOLDER = "first_stage"  # of a run's copy
PROBE = 64  # side of an image by which the factor is seen
MEASURED = 5000  # training images whose latents are measured at most


class HubVAE(Latents):
    """`path` is a name on the Hugging Face hub, or a folder that `save_pretrained` made.

    `scale` is what latents are multiplied by: config takes the network's own factor and shift, a
    number is that, and measured becomes one over the standard deviation over training images. A run
    keeps it with `sha256`, that of weights and settings, and a copy of both. Images of one channel
    are tiled to three, and what comes back is averaged. Raises ValueError for what cannot be had.
    """

    def __init__(
        self, path: str, scale: str | float, sha256: str | None, cache: bool, cache_dir: str
    ):
        path = str(path)  # a folder 2024 is a number to Hydra
        network, self.settings = pretrained(path)
        super().__init__(network, cache, cache_dir)
        self.sha256 = digest(network, self.settings)
        if sha256 not in (None, self.sha256):
            raise ValueError(
                f"first_stage.path={path} has other weights or settings now than this run was "
                f"trained with: its sha256 begins with {self.sha256[:12]}, not with "
                f"{sha256[:12]}; put the files back"
            )
        self.measures = scale == "measured"
        config = self.network.config
        if scale == "config":
            self.scale = 1 / config.scaling_factor
            self.shift = getattr(config, "shift_factor", None) or 0.0
        elif self.measures or (isinstance(scale, float | int) and scale > 0):
            self.scale, self.shift = 1.0 if self.measures else 1 / scale, 0.0
        else:
            raise ValueError(f"first_stage.scale={scale} must be config, measured or a number")
        self.given = scale
        self.factor = 1
        with torch.no_grad():
            latents = self.mean(self.encoder(torch.zeros(1, 3, PROBE, PROBE)))
        self.factor = PROBE // latents.shape[-1]
        self.channels = latents.shape[1]

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        self.image_shape = tuple(image_shape)
        if image_shape[0] not in (1, 3):
            raise ValueError(
                f"first_stage=hub_vae takes images of 1 or 3 channels, not {image_shape[0]}"
            )
        return (self.channels, *(-(-side // self.factor) for side in image_shape[1:]))

    def encoder(self, images: Tensor) -> Tensor:
        images = pad_to_multiple(images.expand(-1, 3, -1, -1), self.factor)
        if type(self.network).__name__ == "AutoencoderTiny":
            return self.network.encode(images).latents
        return self.network.encode(images).latent_dist.parameters

    def decoder(self, latents: Tensor) -> Tensor:
        channels, height, width = self.image_shape
        images = self.network.decode(latents).sample[..., :height, :width].float()
        return images if channels == 3 else images.mean(1, keepdim=True)

    def mean(self, moments: Tensor) -> Tensor:
        return moments[:, : self.network.config.latent_channels]

    def spread(self, moments: Tensor) -> Tensor:
        """The variance of `sample`."""
        mean = self.mean(moments)
        if mean.shape == moments.shape:  # AutoencoderTiny's are certain
            return torch.zeros_like(mean)
        return moments[:, mean.shape[1] :].clamp(-30, 20).exp()

    def sample(self, moments: Tensor) -> Tensor:
        mean = self.mean(moments)
        return mean + self.spread(moments).sqrt() * torch.randn_like(mean)

    def prepare(self, data: ImageDataModule, device: torch.device) -> None:
        super().prepare(data, device)
        say("Advice: this first stage's rFID, beyond which no FID comes, was not measured")
        if self.measures:
            if data.moments is None:
                images = data.trained_on(MEASURED).images
                moments = torch.cat([self.moments(part.to(device)) for part in images.split(64)])
            else:  # of the same images
                moments = data.moments[random_places(len(data.moments), MEASURED)]
            mean = self.mean(moments).double()
            self.scale = (mean.var(correction=0) + self.spread(moments).mean()).sqrt().item()
            self.given = 1 / self.scale

    def facts(self) -> dict[str, object]:
        return {"sha256": self.sha256, "scale": self.given}

    def keep(self, folder: Path) -> None:
        self.network.save_pretrained(folder / FOLDER)
        # as it was read: without what a newer diffusers adds, which would change the sha256
        write_atomically(folder / FOLDER / "config.json", json.dumps(self.settings, indent=2))


def pretrained(path: str) -> tuple[nn.Module, dict[str, object]]:
    """The autoencoder called `path`, and its config.json; raises ValueError, with what to do."""
    try:
        diffusers = importlib.import_module("diffusers")
    except ImportError as error:
        raise ValueError(
            "first_stage=hub_vae needs diffusers; run `pip install 'diffusion-lab[diffusers]'`"
        ) from error
    try:
        settings = diffusers.AutoencoderKL.load_config(path)
        name = settings["_class_name"]
        if name not in CLASSES:
            raise ValueError(
                f"first_stage.path={path} is a {name}, not one of {', '.join(CLASSES)}"
            )
        # the older format is a pickle, which could be anything
        return getattr(diffusers, name).from_pretrained(path, use_safetensors=True), settings
    except (OSError, KeyError, json.JSONDecodeError) as error:
        where = (
            "is damaged"
            if Path(path).is_dir()
            else "is no folder, and cannot be fetched from the hub"
        )
        raise ValueError(
            f"first_stage.path={path} {where}; give the folder of an autoencoder that "
            "diffusers saved as safetensors, or try again with a network"
        ) from error


def digest(network: nn.Module, settings: dict[str, object]) -> str:
    """sha256 of all weights and their names, and of the settings that are not diffusers' notes."""
    lasting = {key: value for key, value in settings.items() if key[0] != "_"}
    weights = hashing.of_tensors(network.state_dict())
    return hashing.of_text(json.dumps(lasting, sort_keys=True) + weights)
