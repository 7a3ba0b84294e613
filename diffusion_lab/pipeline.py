"""The sampling call, from seeds and labels to uint8 images, and the evaluation of its samples."""

import copy
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.common.messages import UserError, progress_bar, say
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.compute.distributed import gather_shards, rank_and_world, shard
from diffusion_lab.data import ImageDataModule
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import DenoiseFn
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.noise import NoiseLevel, add_noise
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.sampler.runge_kutta import ToleranceError
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.metrics import PreparedMetrics
from diffusion_lab.metrics.extractor import Classifier


class Generator(ABC):
    """Draws samples by ids and a seed; by default in one step and without classes."""

    @property
    def conditional(self) -> bool:
        """Whether samples are drawn by class."""
        return False

    @property
    def steps(self) -> int:
        """The number of steps in which samples are drawn."""
        return 1

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        """The class of each sample, (B,) int64; None for an unconditional model."""
        return None

    @abstractmethod
    def __call__(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); `on_step` is called after each step."""


@dataclass(frozen=True)
class Pipeline(Generator):
    """A denoiser with everything else that sampling needs.

    Sample i is fixed by `seed` and i alone: its label comes in turn, and its noise does not depend
    on the batch size or on the rank that draws it.
    """

    denoiser: Denoiser
    schedule: NoiseSchedule
    sampler: Sampler
    guidance: Guidance
    first_stage: FirstStage
    num_classes: int
    weak: Denoiser | None = None  # the denoiser of guidance.weak_run
    classifier: Classifier | None = None  # the one that guides

    @property
    def conditional(self) -> bool:
        return bool(self.denoiser.conditioning.conditional or self.guidance.by_classifier)

    @property
    def steps(self) -> int:
        return self.sampler.steps

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        """The classes in turn, (B,) int64, numbers of training images, (B, K), or None."""
        if not self.conditional:
            return None
        if self.num_classes:
            return torch.tensor([i % self.num_classes for i in ids])
        return self.denoiser.conditioning.typical(ids)

    def row_labels(self, rows: int) -> Tensor | None:
        """The labels of a grid's rows: all classes, or `rows` labels that are numbers, or None."""
        if self.conditional and not self.num_classes:
            return self.denoiser.conditioning.spread(rows)
        return self.labels(range(self.num_classes))

    @torch.inference_mode()
    def __call__(
        self,
        ids: Sequence[int],
        seed: int = 0,
        labels: Tensor | None = None,
        on_step: Callable[[], None] = lambda: None,
        constrain: Callable[[DenoiseFn], DenoiseFn] = lambda denoise: denoise,
    ) -> Tensor:
        """Draws samples `ids`, uint8 (B, C, H, W); `labels` (B,) replaces the cycling classes.

        `on_step` is called after each step of the sampler, and `constrain` wraps the function that
        the sampler calls to denoise, as inpainting does. The caller sets autocast.
        """
        noise = SampleNoise(seed, ids, self.device)
        denoise = constrain(self.bound(self.labels(ids) if labels is None else labels))
        start = noise(self.denoiser.image_shape)
        return self._decoded(
            lambda: self.sampler(denoise, start, self.schedule, noise.randn_like, on_step)
        )

    @torch.inference_mode()
    def renew(
        self, images: Tensor, labels: Tensor, level: NoiseLevel, ids: Sequence[int], seed: int = 0
    ) -> Tensor:
        """Noises images, uint8 (B, C, H, W), to a scalar level, and lets the sampler denoise them.

        Returns uint8 (B, C, H, W). `labels` (B,) int64 are ignored by an unconditional model. The
        noise of an image depends on `seed` and its id alone. The caller sets autocast.
        """
        noise = SampleNoise(seed, ids, self.device)
        x0 = self.first_stage.encode(images.to(self.device))
        denoise = self.bound(labels if self.conditional else None)
        x = add_noise(x0, noise(x0.shape[1:]), level)
        return self._decoded(
            lambda: self.sampler.finish(denoise, x, level, self.schedule, noise.randn_like)
        )

    @torch.inference_mode()
    def pairs(
        self, ids: Sequence[int], seed: int = 0, on_step: Callable[[], None] = lambda: None
    ) -> Tensor:
        """Draws samples `ids` before they are decoded, and their noise: (B, 2c, h, w) float32.

        Raises UserError for a sampler that adds noise on the way: its noise has no one sample.
        """

        def refuse(x: Tensor) -> Tensor:
            raise UserError(
                f"{type(self.sampler).__name__} adds fresh noise on its way, so its samples do not "
                "follow from their noise; train the teacher with another sampler, such as unipc"
            )

        noise = SampleNoise(seed, ids, self.device)(self.denoiser.image_shape)
        denoise = self.bound(self.labels(ids))
        samples = self.sampler(denoise, noise, self.schedule, refuse, on_step)
        return torch.cat([samples, noise], 1)

    @property
    def device(self) -> torch.device:
        """The device of the denoiser."""
        return next(self.denoiser.parameters()).device

    def bound(self, labels: Tensor | None) -> DenoiseFn:
        """The function that the sampler calls, for these labels (B,) or none."""
        labels = None if labels is None else labels.to(self.device)
        weak = None if self.weak is None else self.weak.to(self.device)
        classify = self.classifier.log_probability if self.classifier else None
        return self.guidance.bind(self.denoiser, labels, weak, classify)

    def _decoded(self, walk: Callable[[], Tensor]) -> Tensor:
        """The images, uint8 (B, C, H, W), at the end of a sampler's walk."""
        try:
            x = walk()
        except ToleranceError as error:  # known only while sampling
            raise UserError(str(error)) from error
        if bad := len(x) - int(x.flatten(1).isfinite().all(1).sum()):
            say(f"{bad} of {len(x)} samples are not finite: the model or its sampler diverged")
        return self.first_stage.decode(x)


def with_steps(sampler: Sampler, steps: int) -> Sampler:
    """The sampler with another number of steps."""
    other = copy.copy(sampler)
    other.steps = steps
    return other


def draw(
    pipeline: Generator,
    ids: Sequence[int],
    batch_size: int,
    seed: int,
    labels: Tensor | None = None,
    description: str = "Drawing samples",
) -> Iterator[Tensor]:
    """Yields samples `ids` in batches, uint8 (b, C, H, W), with a progress bar over all steps."""
    starts = range(0, len(ids), batch_size)
    with progress_bar(description, len(starts) * pipeline.steps) as advance:
        for start in starts:
            chosen = slice(start, start + batch_size)
            wanted = None if labels is None else labels[chosen]
            yield pipeline(ids[chosen], seed, wanted, advance)


def draw_rows(pipeline: Pipeline, columns: int, seed: int, batch_size: int = 100) -> Tensor:
    """Draws samples for a grid, uint8 (N, C, H, W): one row per class, or a square without classes.

    A row has `columns` samples of one label. Every rank draws its share and returns all samples.
    """
    of_rows = pipeline.row_labels(columns)
    rows = columns if of_rows is None else len(of_rows)
    ids = shard(rows * columns, *rank_and_world())
    labels = None if of_rows is None else of_rows[[i // columns for i in ids]]
    images = draw(pipeline, ids, batch_size, seed, labels, "Drawing the grid")
    return gather_shards(list(images))


def evaluate(
    pipeline: Generator,
    prepared: PreparedMetrics,
    datamodule: ImageDataModule,
    batch_size: int,
    seed: int,
) -> dict[str, float]:
    """Draws the samples that the metrics need, a share on each rank, and returns the metrics.

    The caller sets autocast. Samples depend on `seed` and id alone, so any number of ranks and any
    batch size gives the same results, up to the network's rounding.
    """
    observe, count = prepared.metrics.observer, prepared.metrics.num_samples
    ids = shard(count, *rank_and_world())
    observed, clock = [], Stopwatch()
    for images in draw(pipeline, ids, batch_size, seed):
        if images.is_cuda:  # else the time of samples counts as features
            torch.cuda.synchronize(images.device)
        clock.lap("samples")
        observed.append(observe(datamodule.to_native(images)))
        clock.lap("features")
    results = prepared.compute(observe.gather(observed), pipeline.labels(range(count)))
    clock.lap("metrics")
    say(f"Evaluated {count:,} samples: {clock}")
    return results


class Stopwatch:
    """A stopwatch that adds up the wall-clock seconds spent on each activity."""

    def __init__(self):
        self.seconds: dict[str, float] = {}
        self.last = time.perf_counter()

    def lap(self, what: str) -> None:
        """Adds the time since the previous lap to the seconds of `what`."""
        now = time.perf_counter()
        self.seconds[what] = self.seconds.get(what, 0.0) + now - self.last
        self.last = now

    def __str__(self) -> str:
        return ", ".join(f"{value:.1f} s for {what}" for what, value in self.seconds.items())
