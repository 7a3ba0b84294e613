"""Draws how a few samples come out of noise (`samples/denoising_*.png`)."""

from typing import Annotated

import lightning
import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.common.ranges import Count, Seed, settings, whole
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.training.callbacks.evaluation import Grid
from diffusion_lab.training.callbacks.periodic import Checked, require_diffusion
from diffusion_lab.training.module import TrainedModule, data_of, module_of

MOST_KEPT = 8  # calls for each column


@settings
class DenoisingGrid(Grid, Checked):
    """Draws two rows for each of `samples` samples, from noise on the left to the image.

    The upper row has noisy images x / sqrt(alpha^2 + sigma^2) on the sampler's way, and the lower
    one the model's estimates of x0 for them. They are of `columns - 1` of the sampler's calls,
    evenly spaced, and the last column is the sample.
    """

    name = "denoising"
    file = "denoising"
    columns: Annotated[int, whole(2)] = 10
    samples: Count = 4
    seed: Seed = 0

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        require_diffusion(module, "callbacks.denoising")

    def run(self, trainer: lightning.Trainer) -> None:
        if max(data_of(trainer).native_shape[1:]) > 1:  # points in the plane make no strip
            super().run(trainer)

    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        pipeline = module_of(trainer).context.denoising()
        strips = denoising(pipeline, range(self.samples), self.seed, self.columns)
        return strips, f"samples of seed {self.seed} out of noise, each above estimates of them"


def denoising(pipeline: Pipeline, ids: range, seed: int, columns: int) -> Tensor:
    """The strips of samples `ids`, uint8 (2 x samples, columns, C, H, W); fewer for few calls.

    Of many calls every second, fourth, ... is kept, so that memory does not grow with them.
    """
    calls: list[tuple[Tensor, Tensor]] = []  # of the model: x of unit scale and x0, (B, c, h, w)
    count, every = 0, 1

    def see(noisy: Tensor, estimates: Tensor) -> None:
        nonlocal count, every
        if count % every == 0:
            calls.append((noisy, estimates))
        count += 1
        if len(calls) == MOST_KEPT * columns:
            del calls[1::2]
            every *= 2

    images = pipeline.watched(see)(ids, seed)
    places = torch.linspace(0, len(calls) - 1, columns - 1).round().long().unique().tolist()
    with torch.inference_mode():
        rows = [
            torch.stack([*(pipeline.first_stage.decode(calls[i][row]) for i in places), images], 1)
            for row in (0, 1)
        ]  # (B, columns, C, H, W) each
    return torch.stack(rows, 1).flatten(0, 1)
