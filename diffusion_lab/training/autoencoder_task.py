"""Training a first stage: as `training` does, but for what is built and what is left behind."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch._functorch import config as functorch

from diffusion_lab import runs
from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.images import to_float
from diffusion_lab.common.progress import progress_bar, say
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageDataModule
from diffusion_lab.first_stage.autoencoder import Autoencoder, files
from diffusion_lab.runs import checkpoints
from diffusion_lab.training.autoencoder_module import AutoencoderModule, moments_of
from diffusion_lab.training.task import Task, try_out, watchers

BATCH = 256  # images whose latents are measured at once


@dataclass(frozen=True)
class AutoencoderTask(Task):
    """Those of an autoencoder."""

    command: ClassVar[str] = "train-autoencoder"

    settings: dict[str, object]  # of the autoencoder's constructor

    @property
    def network(self) -> nn.Module:
        return self.module.autoencoder

    def compile(self) -> None:
        if self.module.loss.discriminator is not None:
            # the adversary's weight takes gradients of a graph that the step still needs
            functorch.donated_buffer = False
        for part in (self.module.autoencoder.encoder, self.module.autoencoder.decoder):
            part.compile(dynamic=False)  # Inductor fails on channels last of sizes that vary

    def prepare(self, cfg: DictConfig, device: torch.device) -> None:
        images = len(self.datamodule.test_images())
        if self.metrics is not None and self.metrics.num_samples > images:
            raise UserError(
                f"metrics.num_samples={self.metrics.num_samples} is more than the {images} test "
                f"images, whose reconstructions are measured; write metrics.num_samples={images}"
            )

    def facts(self, folder: Path) -> dict[str, dict]:
        return {
            "checkpoint": {"folder": folder / checkpoints.FOLDER},
            "sample_grid": {"folder": folder / runs.SAMPLES},
            "evaluation": {"metrics": self.prepared},
            "pruning": {"folder": folder},
        }

    def finish(self, folder: Path, results: dict[str, float], device: torch.device) -> None:
        autoencoder, data = self.module.autoencoder, self.datamodule
        mean, std = latent_moments(autoencoder, data, device)
        facts = files.Facts(
            kind=type(autoencoder).__name__,
            settings=self.settings,
            image_shape=list(data.image_shape),
            latent_mean=mean,
            latent_std=std,
            data=data.images_fingerprint,
            figures=results,
        )
        files.save(autoencoder, facts, folder / files.FILE)
        bottleneck = {name: value for name, value in results.items() if name.startswith("val/")}
        for name, value in bottleneck.items():
            say(f"{name.removeprefix('val/')} {value:.4g} of {data.validation_size} test images")
        say(f"First stage: {folder / files.FILE}")


def build_autoencoder_task(
    cfg: DictConfig, layout: BatchLayout, device: str = "cpu"
) -> AutoencoderTask:
    """Builds what the configuration names; raises UserError for what cannot work."""
    if isinstance(cfg.trainer.strategy, DictConfig):
        raise UserError("trainer=fsdp shares out diffusion models only; use trainer=ddp")
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    shape = datamodule.image_shape
    with errors_at(cfg, "reconstruction"):
        settings = OmegaConf.to_container(cfg.autoencoder, resolve=True)
        settings = {key: value for key, value in settings.items() if not key.startswith("_")}
        module = AutoencoderModule(
            instantiate(cfg, "autoencoder")(image_shape=shape),
            instantiate(cfg, "reconstruction")(image_channels=shape[0]),
            instantiate(cfg, "optimizer"),
            instantiate(cfg, "lr_schedule"),
            cfg.batch_size,
            cfg.seed,
        )
        module.loss.check(shape)
        try_out(cfg, layout, module)
        datamodule.set_batch(cfg.batch_size, layout.micro_batch, cfg.seed)
        metrics = instantiate(cfg, "metrics") if cfg.callbacks.get("evaluation") else None
        if metrics is not None:
            with errors_at(cfg, "metrics"):
                metrics.check(datamodule.num_classes > 0, datamodule.num_classes)
        return AutoencoderTask(datamodule, module, metrics, *watchers(cfg), settings)


@torch.inference_mode()
def latent_moments(
    autoencoder: Autoencoder, data: ImageDataModule, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the training images' latents, by channel, as sampled."""
    autoencoder.to(device).eval()
    images = data.padded(data.train_images())
    first = second = 0.0
    batches = images.split(BATCH)
    with progress_bar("Measuring the latents", len(batches)) as advance:
        for batch in batches:
            moments = autoencoder.moments(to_float(batch.to(device)))
            latents = autoencoder.mean(moments).double()
            first = first + latents.sum((0, 2, 3))
            second = second + (latents.square() + autoencoder.spread(moments)).sum((0, 2, 3))
            advance()
    mean, std = moments_of(first, second, len(images) * latents[0, 0].numel())
    return mean.tolist(), std.tolist()
