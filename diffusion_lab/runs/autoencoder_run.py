"""The runs of autoencoders, whose prior is sampled from where they are VAEs."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.errors import UserError
from diffusion_lab.first_stage.autoencoder import Autoencoder, saving
from diffusion_lab.runs.open_run import OpenRun
from diffusion_lab.runs.vae_prior import Prior

# Largest deviation of a latent channel's mean and standard deviation from N(0, 1) at which samples
# of the prior are still images. Measured: VAEs are off by 0.1 and 1.3 times, the weakly regularised
# autoencoders of latent diffusion by 2 and 4 times.
FARTHEST_MEAN, FARTHEST_STD = 0.5, 2.0


@dataclass(frozen=True)
class AutoencoderRun(OpenRun):
    """The open run of an autoencoder with a prior."""

    command: ClassVar[str] = "train-autoencoder"
    summary_is_of_samples: ClassVar[bool] = False
    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")

    autoencoder: Autoencoder
    facts: saving.AutoencoderFacts

    @classmethod
    def load(
        cls,
        folder: Path,
        saved: DictConfig,
        device: torch.device,
        precision: str,
        weights: dict[str, object],
    ) -> Self:
        with errors_at(saved, ""):
            autoencoder, facts, _ = saving.load_autoencoder(folder / saving.FIRST_STAGE_FILE)
        require_prior(folder, autoencoder, facts)
        data = build_datamodule(saved)
        return cls(saved, data, device, precision, weights, autoencoder.to(device), facts)

    @classmethod
    def weights_to_export(
        cls, folder: Path, saved: DictConfig, kind: str
    ) -> tuple[dict[str, Tensor], int]:
        raise UserError(
            f"{folder} is an autoencoder; its {saving.FIRST_STAGE_FILE} is what there is to give "
            "away"
        )

    @classmethod
    def is_complete(cls, folder: Path) -> bool:
        return (folder / saving.FIRST_STAGE_FILE).is_file()

    @property
    def conditional(self) -> bool:
        return False

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        return self.facts.metrics

    def pipeline(self, cfg: DictConfig) -> Prior:
        return Prior(self.autoencoder, self.device)


def require_prior(folder: Path, autoencoder: Autoencoder, facts: saving.AutoencoderFacts) -> None:
    """Raises UserError for an autoencoder without a prior, or whose latents are not N(0, 1)."""
    if not autoencoder.has_prior:
        raise UserError(
            f"{folder} is a {autoencoder.kind} autoencoder, which has no prior to draw "
            "from; diffuse in its latents by `diffusion-lab train first_stage=vq "
            f"first_stage.run={folder}`"
        )
    mean = max(abs(mean) for mean in facts.latent_mean)
    std = max(max(std, 1 / max(std, 1e-9)) for std in facts.latent_std)
    if mean > FARTHEST_MEAN or std > FARTHEST_STD:
        raise UserError(
            f"the latents of {folder} are not N(0, 1), so that its prior decodes to noise (a "
            f"channel's mean is {mean:.2g} off, a standard deviation {std:.2g} times off); "
            "train with autoencoder=vae reconstruction=likelihood, or diffuse in its latents by "
            f"`diffusion-lab train first_stage=kl first_stage.run={folder}`"
        )
