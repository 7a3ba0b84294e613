"""The task of training an autoencoder, which is saved as a first stage."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import lightning
import torch
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.images import to_float
from diffusion_lab.common.messages import UserError, say, track
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoencoder.module import AutoencoderModule, moments_of
from diffusion_lab.first_stage.autoencoder import Autoencoder, VQAutoencoder, saving
from diffusion_lab.training.module import Optimization
from diffusion_lab.training.task import Task, checked_parts

BATCH = 256  # images whose latents are measured at once


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(Task):
    """Trains an autoencoder, and saves it as a first stage."""

    command: ClassVar[str] = "train-autoencoder"

    module: AutoencoderModule

    settings: dict[str, object]  # arguments of the autoencoder's constructor

    def check_callbacks(self, layout: BatchLayout, trainer: DictConfig) -> None:
        super().check_callbacks(layout, trainer)
        if layout.accumulate > 1 and isinstance(self.module.autoencoder, VQAutoencoder):
            raise UserError(
                f"micro_batch_size={layout.micro_batch} changes what autoencoder=vq learns, whose "
                "codebook moves with each micro-batch; write micro_batch_size=null and a smaller "
                "batch_size, or autoencoder=fsq"
            )

    def compile(self) -> None:
        for part in (self.module.autoencoder.encoder, self.module.autoencoder.decoder):
            part.compile(dynamic=False)  # Inductor fails on channels last with dynamic sizes

    def prepare(self, device: torch.device) -> dict[str, object]:
        if self.metrics is not None and self.metrics.reference == "validation":
            raise UserError(
                "metrics.reference=validation is for samples, and an autoencoder's metrics are of "
                "reconstructed test images; write metrics.reference=train, and choose an "
                "autoencoder by val/psnr"
            )
        images = len(self.datamodule.test_images())
        if self.metrics is not None and self.metrics.num_samples > images:
            raise UserError(
                f"metrics.num_samples={self.metrics.num_samples} is more than the {images} test "
                f"images to reconstruct; write metrics.num_samples={images}"
            )
        return {}

    def finish(self, folder: Path, results: dict[str, float], device: torch.device) -> None:
        autoencoder, data = self.module.autoencoder, self.datamodule
        with self.module.context.clock.stopped():
            mean, std = latent_moments(autoencoder, data, device)
        facts = saving.AutoencoderFacts(
            kind=autoencoder.kind,
            settings=self.settings,
            image_shape=list(data.image_shape),
            latent_mean=mean,
            latent_std=std,
            data=data.images_fingerprint,
            metrics=results,
        )
        saving.save_autoencoder(autoencoder, facts, folder / saving.FIRST_STAGE_FILE)
        count = len(data.tested_on().labels)
        for name, value in results.items():
            if name.startswith("test/"):
                say(f"{name.removeprefix('test/')} {value:.4g} on {count} test images")
        say(f"First stage: {folder / saving.FIRST_STAGE_FILE}")


def build_task(cfg: DictConfig, device: str = "cpu") -> AutoencoderTask:
    """Builds the task that a configuration describes; raises UserError for what cannot work.

    It is built on the CPU whatever the `device`, as FSQ reads values of its tensors.
    """
    if sharded(cfg.trainer):
        raise UserError("trainer=fsdp shards diffusion models only; use trainer=ddp")
    for key in ("classifier", "patch", "mmd", "fld", "real_or_drawn", "per_class", "extra"):
        if cfg.metrics and cfg.metrics.get(key):
            raise UserError(
                f"metrics.{key} is for generated images, and reconstructions have FID and KID "
                "alone; leave it out"
            )
    lightning.seed_everything(cfg.seed, verbose=False)
    datamodule = build_datamodule(cfg)
    shape = datamodule.image_shape
    with errors_at(cfg, "reconstruction"):
        given = cast(dict, OmegaConf.to_container(cfg.autoencoder, resolve=True))
        settings = {key: value for key, value in given.items() if not key.startswith("_")}
        module = AutoencoderModule(
            instantiate(cfg, "autoencoder")(image_shape=shape),
            instantiate(cfg, "reconstruction")(image_channels=shape[0]),
            Optimization.configured(cfg),
        )
        module.loss.check(shape)
        return AutoencoderTask(settings=settings, **checked_parts(cfg, datamodule, module))


@torch.inference_mode()
def latent_moments(
    autoencoder: Autoencoder, data: ImageDataModule, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel, of latents sampled for the training images."""
    autoencoder.to(device).eval()
    images = data.train_rows(padded=True)
    first = second = torch.zeros(())
    for ids in track(torch.arange(len(images)).split(BATCH), "Measuring the latents"):
        moments = autoencoder.moments(to_float(images[ids].to(device)))
        latents = autoencoder.mean(moments).double()
        first = first + latents.sum((0, 2, 3))
        second = second + (latents.square() + autoencoder.variance(moments)).sum((0, 2, 3))
    mean, std = moments_of(first, second, len(images) * latents[0, 0].numel())
    return mean.tolist(), std.tolist()
