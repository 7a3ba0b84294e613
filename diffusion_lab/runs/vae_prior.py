"""Images from a VAE's prior: z ~ N(0, 1), decoded (arXiv:1312.6114)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.images import to_uint8
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.compute.device import autocast, pick_device, pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.first_stage.autoencoder import Autoencoder, files
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.opening import OpenRun, loaded_metrics, move_data, open_run
from diffusion_lab.runs.weights import identity, require_unchanged

# of a channel's latents from N(0, 1), where a VAE's prior still makes images; VAEs are off by 0.1
# and 1.3, latent diffusion's weakly held autoencoders by 2 and 4
FARTHEST_MEAN, FARTHEST_STD = 0.5, 2.0


@dataclass(frozen=True)
class Prior:
    """Draws as a `Pipeline` does, in one step and without labels."""

    autoencoder: Autoencoder
    device: torch.device
    conditional = False
    steps = 1

    def labels(self, ids: Sequence[int]) -> None:
        """There are none."""
        return None

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[int],
        seed: int = 0,
        labels: None = None,
        on_step: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); sample i is fixed by `seed` and i alone."""
        latents = SampleNoise(seed, ids, self.device)(self.autoencoder.latent_shape)
        images = to_uint8(self.autoencoder.decode(latents))
        on_step()
        return images


@dataclass(frozen=True)
class OpenAutoencoder:
    """The run of an autoencoder with a prior, ready to be drawn from, as an `OpenRun` is."""

    saved: DictConfig
    datamodule: ImageDataModule  # unread
    autoencoder: Autoencoder
    device: torch.device
    precision: str
    weights: dict[str, object]  # which they are
    first_stage_figures: dict[str, float]  # of reconstructed test images

    @property
    def autocast(self) -> torch.autocast:
        """The block in which the decoder is asked."""
        return autocast(self.precision, self.device)

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        """The metrics that `cfg.metrics` says, loaded, to be prepared."""
        return loaded_metrics(cfg, False, self.datamodule, self.device)

    def pipeline(self, cfg: DictConfig) -> Prior:
        """The prior; there is nothing to choose."""
        return Prior(self.autoencoder, self.device)


def open_generator(cfg: DictConfig) -> OpenRun | OpenAutoencoder:
    """The run `cfg.run`: a diffusion model, or an autoencoder whose prior is drawn from.

    Raises UserError for what is missing, damaged, without a prior or impossible on this machine.
    """
    saved = load_config(cfg.run)
    if "autoencoder" not in saved:
        return open_run(cfg)
    if cfg.data_root:
        move_data(saved.data, cfg.data_root)
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    weights = identity(cfg.run)
    with errors_at(cfg, ""):
        autoencoder, facts, _ = files.load(Path(cfg.run) / files.FILE)
    require_unchanged(cfg.run, weights)
    if not autoencoder.has_prior:
        raise UserError(
            f"{cfg.run} is a {type(autoencoder).__name__} autoencoder, which has no prior to draw "
            "from; diffuse in its latents by `diffusion-lab train first_stage=vq "
            f"first_stage.run={cfg.run}`"
        )
    mean = max(abs(mean) for mean in facts.latent_mean)
    std = max(max(std, 1 / max(std, 1e-9)) for std in facts.latent_std)
    if mean > FARTHEST_MEAN or std > FARTHEST_STD:
        raise UserError(
            f"the latents of {cfg.run} are not N(0, 1), so that its prior decodes to noise (a "
            f"channel's mean is {mean:.2g} off, a standard deviation {std:.2g} times off); "
            "train with autoencoder=vae reconstruction=likelihood, or diffuse in its latents by "
            f"`diffusion-lab train first_stage=kl first_stage.run={cfg.run}`"
        )
    datamodule = build_datamodule(saved)
    return OpenAutoencoder(
        saved, datamodule, autoencoder.to(device), device, precision, weights, facts.figures
    )
