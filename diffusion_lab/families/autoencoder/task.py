"""How an autoencoder is trained: its LightningModule, and the task of a configuration."""

import math
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, cast

import lightning
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.optim import Optimizer
from torchmetrics.functional.image import structural_similarity_index_measure

from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.assembly.parameter_groups import inner_matrices
from diffusion_lab.backbone.base import compile_network
from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.messages import UserError, say, track
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.sharding import sharded
from diffusion_lab.data import ImageBatch, ImageData
from diffusion_lab.first_stage.autoencoder import Autoencoder, VQAutoencoder, saving
from diffusion_lab.first_stage.base import at_once
from diffusion_lab.first_stage.reconstruction import ReconstructionLoss
from diffusion_lab.metrics.quantity import ON_REQUEST
from diffusion_lab.training.module import Optimization, TrainedModule, data_of
from diffusion_lab.training.task import Task, build_datamodule, checked_parts

SSIM_WINDOW = 11  # pixels, as published; smaller images have no SSIM
BEST_PSNR = 100.0  # dB, for an exact reconstruction instead of infinity


class AutoencoderModule(TrainedModule):
    """Trains autoencoder and discriminator together, on gradients of one loss, by one optimiser."""

    shown = "psnr"

    def __init__(
        self, autoencoder: Autoencoder, loss: ReconstructionLoss, optimization: Optimization
    ):
        super().__init__(optimization)
        self.autoencoder = autoencoder
        self.loss = loss

    def players(self) -> list[list[nn.Parameter]]:
        return [list(self.autoencoder.parameters()), list(self.loss.parameters())]

    @property
    def network(self) -> Autoencoder:
        return self.autoencoder

    def hidden_matrices(self) -> list[nn.Parameter]:
        parts: list[nn.Sequential] = [self.autoencoder.encoder, self.autoencoder.decoder]
        if self.loss.discriminator is not None:
            parts.append(self.loss.discriminator.layers)
        return [weight for part in parts for weight in inner_matrices(part, (part[0], part[-1]))]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the loss, (), and its parts, for images (b, C, H, W) uint8 and labels."""
        self.seed_share(batch_idx)
        images = to_float(batch[0])
        last = self.autoencoder.decoder[-1]  # the convolution that makes the image
        weight, step = last.get_parameter("weight"), self.trainer.global_step
        with self.kept_buffers():
            outputs, bottleneck = self.autoencoder(images)
            loss, parts = self.loss(images, outputs, bottleneck, weight, step)
        return {"loss": loss} | {f"train/{name}": value.detach() for name, value in parts.items()}

    def backward(self, loss: Tensor) -> None:
        with self.kept_buffers():
            super().backward(loss)

    def kept_buffers(self) -> AbstractContextManager:
        """Makes code that is compiled in this block keep its buffers for a second backward pass.

        A discriminator's weight comes from gradients through a graph that the step still needs.
        """
        return functorch.patch(donated_buffer=self.loss.discriminator is None)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.loss.drop_discriminator_gradients(self.trainer.global_step)

    def on_validation_epoch_start(self) -> None:
        self.sums: list[Tensor] = []

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        """Adds up the metrics and moments of validation or test images."""
        images = batch[0]
        moments = self.autoencoder.moments(to_float(images))
        latents = self.autoencoder.mean(moments)
        back = to_uint8(self.autoencoder.decode(latents))
        # padding is easy to reconstruct, and no part of an image
        native = [data_of(self.trainer).to_native(each) for each in (images, back)]
        sums = [
            torch.stack([torch.tensor(float(len(images)), device=self.device), *quality(*native)]),
            latents.double().sum((0, 2, 3)),
            (latents.double().square() + self.autoencoder.variance(moments)).sum((0, 2, 3)),
            self.autoencoder.statistics(moments),
        ]
        sums = [each.double() for each in sums]
        self.sums = [a + b for a, b in zip(self.sums, sums, strict=True)] if self.sums else sums

    def metrics_of_pass(self, split: str) -> dict[str, Tensor | float]:
        reduced = [self.trainer.strategy.reduce(each, reduce_op="sum") for each in self.sums]
        (count, psnr, ssim), first, second, observed = reduced
        count = count.item()
        metrics: dict[str, Tensor | float] = {f"{split}/psnr": psnr.item() / count}
        if not ssim.isnan():
            metrics[f"{split}/ssim"] = ssim.item() / count
        bottleneck = self.autoencoder.metrics(observed, round(count))
        metrics |= {f"{split}/{name}": value for name, value in bottleneck.items()}
        mean, std = moments_of(first, second, count * math.prod(self.autoencoder.latent_shape[1:]))
        for channel, (m, s) in enumerate(zip(mean.tolist(), std.tolist(), strict=True)):
            metrics |= {f"{split}_latent/mean{channel}": m, f"{split}_latent/std{channel}": s}
        return metrics


def quality(images: Tensor, back: Tensor) -> tuple[Tensor, Tensor]:
    """PSNR in dB and SSIM of reconstructions, summed over images, () each; uint8 (B, C, H, W).

    SSIM is NaN for images that are smaller than its window.
    """
    images, back = images.float(), back.float()
    error = (images - back).square().flatten(1).mean(1)
    psnr = (10 * torch.log10(255**2 / error)).clamp(max=BEST_PSNR).sum()
    if min(images.shape[-2:]) < SSIM_WINDOW:
        return psnr, psnr.new_full((), torch.nan)
    ssim = structural_similarity_index_measure(back, images, data_range=255.0, reduction="sum")
    return psnr, cast(Tensor, ssim)


def moments_of(first: Tensor, second: Tensor, count: float) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation by channel, (c,), of `count` values from their power sums."""
    mean = first / count
    return mean, (second / count - mean.square()).clamp(min=0).sqrt()


@dataclass(frozen=True, kw_only=True)
class AutoencoderTask(Task):
    """Trains an autoencoder, and saves it as a first stage."""

    command: ClassVar[str] = "train-autoencoder"

    module: AutoencoderModule

    settings: dict[str, object]  # arguments of the autoencoder's constructor

    @property
    def validations(self) -> list[str]:
        large = min(self.datamodule.native_shape[1:]) >= SSIM_WINDOW
        return [*super().validations, *(["val/ssim"] if large else [])]

    def check_callbacks(self, layout: BatchLayout, trainer: DictConfig) -> None:
        super().check_callbacks(layout, trainer)
        if layout.accumulate > 1 and isinstance(self.module.autoencoder, VQAutoencoder):
            raise UserError(
                f"micro_batch_size={layout.micro_batch} changes what autoencoder=vq learns, whose "
                "codebook moves with each micro-batch; write micro_batch_size=null and a smaller "
                "batch_size, or autoencoder=fsq"
            )

    def compile(self, mode: str | None) -> None:
        for part in (self.module.autoencoder.encoder, self.module.autoencoder.decoder):
            # Inductor fails on channels last with dynamic sizes
            compile_network(part, mode, dynamic=False)

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
    for key in ("classifier", "patch", *ON_REQUEST, "per_class", "extra"):
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
    autoencoder: Autoencoder, data: ImageData, device: torch.device
) -> tuple[list[float], list[float]]:
    """Mean and standard deviation, by channel, of latents sampled for the training images."""
    autoencoder.to(device).eval()
    images = data.train_rows(padded=True)
    first = second = torch.zeros(())
    batches = torch.arange(len(images)).split(at_once(data.image_shape))
    for ids in track(batches, "Measuring the latents"):
        moments = autoencoder.moments(to_float(images[ids].to(device)))
        latents = autoencoder.mean(moments).double()
        first = first + latents.sum((0, 2, 3))
        second = second + (latents.square() + autoencoder.variance(moments)).sum((0, 2, 3))
    mean, std = moments_of(first, second, len(images) * latents[0, 0].numel())
    return mean.tolist(), std.tolist()
