"""The runs of autoencoders, and images from a VAE's prior: z ~ N(0, 1), decoded (arXiv:1312.6114).

The other autoencoders have no prior to sample from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.objects import build_images
from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.common.images import require_finite, to_uint8
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.first_stage.autoencoder import Autoencoder, saving
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.runs import averages, checkpoints
from diffusion_lab.runs.opened import OpenRun, say_left_out
from diffusion_lab.runs.weights import WeightsChoice

# Largest deviation of a latent channel's mean and standard deviation from N(0, 1) at which samples
# of the prior are still images. Measured: VAEs deviate by 0.1 and a factor of 1.3, the weakly
# regularised autoencoders of latent diffusion by 2 and a factor of 4.
FARTHEST_MEAN, FARTHEST_STD = 0.5, 2.0


@dataclass(frozen=True)
class Prior(Generator):
    """The prior of a VAE: draws images like a `Pipeline`, but in one step and without labels.

    Sample i is fixed by `seed` and i alone.
    """

    autoencoder: Autoencoder
    device: torch.device

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        latents = SampleNoise(seed, ids, self.device)(self.autoencoder.latent_shape)
        images = self.autoencoder.decode(latents)
        on_step()
        return to_uint8(require_finite(images))


@dataclass(frozen=True)
class AutoencoderRun(OpenRun):
    """The open run of an autoencoder with a prior."""

    command: ClassVar[str] = "train-autoencoder"
    results: ClassVar[tuple[str, ...]] = (saving.FIRST_STAGE_FILE,)
    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "an autoencoder"

    prior: Prior
    facts: saving.AutoencoderFacts
    conditional = True  # metrics of classes are left out, as samples of a prior have none

    @classmethod
    def load(cls, choice: WeightsChoice, saved: DictConfig, device: torch.device) -> dict[str, Any]:
        folder = choice.folder
        if choice.checkpoint is not None:
            raise UserError(
                f"{folder} is an autoencoder, which other commands open as it was at the end of "
                "its training; leave step out"
            )
        if choice.average is not None:
            folder = averages.find(folder, choice.average, checkpoints.step_of(folder))
        with errors_at(saved, ""):
            autoencoder, facts, _ = saving.load_autoencoder(folder / saving.FIRST_STAGE_FILE)
        require_prior(folder, autoencoder, facts)
        prior = Prior(autoencoder.to(device), device)
        return {"datamodule": build_images(saved), "prior": prior, "facts": facts}

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        return self.facts.metrics

    def pipeline(self, cfg: DictConfig) -> Prior:
        return self.prior

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        metrics = super().metrics(cfg)
        say_left_out(metrics, "samples of a prior have no classes")
        return metrics


RUN = AutoencoderRun


def require_prior(folder: Path, autoencoder: Autoencoder, facts: saving.AutoencoderFacts) -> None:
    """Raises UserError if the autoencoder has no prior or its latents are not N(0, 1)."""
    if not autoencoder.has_prior:
        raise UserError(
            f"{folder} is a {autoencoder.kind} autoencoder, which has no prior to sample from; "
            "train a diffusion model on its latents with `diffusion-lab train first_stage=vq "
            f"first_stage.run={folder}`"
        )
    mean = max(abs(mean) for mean in facts.latent_mean)
    std = max(max(std, 1 / max(std, 1e-9)) for std in facts.latent_std)
    if mean > FARTHEST_MEAN or std > FARTHEST_STD:
        raise UserError(
            f"the latents of {folder} are not N(0, 1), so samples from the prior would be noise "
            f"(a channel's mean is off by {mean:.2g}, a standard deviation by a factor of "
            f"{std:.2g}); train with autoencoder=vae reconstruction=likelihood, or train a "
            "diffusion model on the latents with `diffusion-lab train first_stage=kl "
            f"first_stage.run={folder}`"
        )
