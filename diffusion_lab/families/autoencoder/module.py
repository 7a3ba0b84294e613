"""The LightningModule of a first stage: any autoencoder, trained on any reconstruction loss."""

import math
from contextlib import AbstractContextManager
from typing import cast

import torch
from torch import Tensor, nn
from torch._functorch import config as functorch
from torch.optim import Optimizer
from torchmetrics.functional.image import structural_similarity_index_measure

from diffusion_lab.build.parameter_groups import inner_matrices
from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.data import ImageBatch
from diffusion_lab.first_stage.autoencoder import Autoencoder
from diffusion_lab.first_stage.reconstruction import ReconstructionLoss
from diffusion_lab.training.module import Optimization, TrainedModule, data_of

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

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters of the autoencoder and of its loss (the discriminator's)."""
        return [*self.autoencoder.parameters(), *self.loss.parameters()]

    def players(self) -> list[list[nn.Parameter]]:
        """The parameters of the autoencoder, and those of the discriminator, if there is one."""
        return [list(self.autoencoder.parameters()), list(self.loss.parameters())]

    @property
    def network(self) -> Autoencoder:
        """The autoencoder."""
        return self.autoencoder

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices of encoder, decoder and discriminator without the first and last layers."""
        parts: list[nn.Sequential] = [self.autoencoder.encoder, self.autoencoder.decoder]
        if self.loss.discriminator is not None:
            parts.append(self.loss.discriminator.layers)
        return [weight for part in parts for weight in inner_matrices(part, (part[0], part[-1]))]

    def training_step(self, batch: ImageBatch, batch_idx: int) -> dict[str, Tensor]:
        """Returns the loss, (), and its parts, for images (b, C, H, W) uint8 and labels."""
        self.seed_share(batch_idx)
        images = to_float(batch[0])
        weight, step = self.autoencoder.decoder.last_weight, self.trainer.global_step
        with self.kept_buffers():
            outputs, bottleneck = self.autoencoder(images)
            loss, parts = self.loss(images, outputs, bottleneck, weight, step)
        self.log("train/loss", loss, prog_bar=True, logger=False)  # for the progress bar
        return {"loss": loss} | {f"train/{name}": value.detach() for name, value in parts.items()}

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch."""
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
