"""A family of models of a user's own: every pixel is a Gaussian number, with nothing shared."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.data import ImageBatch, ImageDataModule
from diffusion_lab.pipeline import Generator
from diffusion_lab.runs.opened import NetworkRun
from diffusion_lab.training.module import OneNumberModule, Optimization
from diffusion_lab.training.task import Task, checked_parts


class Pixels(nn.Module):
    """The mean and the log of the standard deviation of each pixel."""

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.mean, self.log_std = (nn.Parameter(torch.zeros(shape)) for _ in range(2))

    def nats(self, images: Tensor) -> Tensor:
        """The negative log-likelihood of images (B, C, H, W) without its constant, (B,)."""
        off = (to_float(images) - self.mean) / self.log_std.exp()
        return (off.square() / 2 + self.log_std).flatten(1).sum(1)


class PixelModule(OneNumberModule):
    shown = "nats"

    def __init__(self, model: Pixels, optimization: Optimization):
        super().__init__(optimization)
        self.model = model

    def trained_parameters(self) -> list[nn.Parameter]:
        return list(self.model.parameters())

    @property
    def network(self) -> Pixels:
        return self.model

    def training_step(self, batch: ImageBatch, batch_idx: int) -> Tensor:
        self.seed_share(batch_idx)
        loss = self.model.nats(batch.images).mean()
        self.log("train/loss", loss, logger=False)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.add(self.model.nats(batch[0]))


@dataclass(frozen=True)
class PixelSamples(Generator):
    model: Pixels

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        noise = SampleNoise(seed, ids, self.model.mean.device)(tuple(self.model.mean.shape))
        on_step()
        return to_uint8(self.model.mean + self.model.log_std.exp() * noise)


class PixelRun(NetworkRun):
    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "a model of pixels"
    conditional = False

    @classmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[Pixels, None]:
        return Pixels(datamodule.image_shape), None

    def pipeline(self, cfg: DictConfig) -> PixelSamples:
        return PixelSamples(self.model)


class PixelTask(Task):
    def compile(self) -> None:
        pass


RUN = PixelRun


def build_task(cfg: DictConfig, device: str = "cpu") -> PixelTask:
    lightning.seed_everything(cfg.seed, verbose=False)
    data = build_datamodule(cfg)
    model = Pixels(data.image_shape)
    module = PixelModule(model, Optimization.configured(cfg))
    return PixelTask(**checked_parts(cfg, data, module, PixelSamples(model)))
