"""Measures metrics and draws pictures (`samples/*.png`) during training, with averaged weights."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from typing import Annotated, ClassVar, cast

import lightning
import torch
from hydra.utils import get_class
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.pipeline import Generator, Pipeline, draw_rows, with_steps
from diffusion_lab.assembly.pipeline.evaluation import Evaluated, EvaluationStopped, evaluate
from diffusion_lab.common.images import (
    NotDrawn,
    as_pil,
    require_finite,
    save_png,
    to_float,
    to_uint8,
)
from diffusion_lab.common.messages import say, track
from diffusion_lab.common.ranges import Count, Seed, optional, settings, whole, whole_list
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.distributed import failing_together, rank_and_world, shard
from diffusion_lab.data import ImageData
from diffusion_lab.first_stage.autoencoder import Autoencoder
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.runs.files import SAMPLES
from diffusion_lab.training.callbacks.periodic import Checked, Interval, Periodic, require_diffusion
from diffusion_lab.training.callbacks.stopping import Interruption
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights
from diffusion_lab.training.logger import RunLogger, WandB, chosen
from diffusion_lab.training.module import TrainedModule, data_of, module_of

KEPT = ("fid", "kid")  # metrics of reconstructions; others, as coverage, are of generated images


@contextmanager
def going_on_without(what: str) -> Iterator[None]:
    """Says why there is no such picture or metric, and lets training continue, on NotDrawn."""
    try:
        yield
    except NotDrawn as error:
        say(f"No {what}: {error}")


@settings
class Evaluation(Periodic):
    """Measures metrics every `every_n_steps` steps (null: never) and at the end of a run.

    Images are generated or reconstructed `batch_size` at a time. If the run is asked to stop in the
    meantime, its metrics of this step are measured when it is resumed.
    """

    at_end = True
    every_n_steps: Interval = None
    batch_size: Count = 256

    def __post_init__(self) -> None:
        self._left: int | None = None  # the step whose metrics are still to be measured

    def state_dict(self) -> dict[str, int | None]:
        return {"left": self._left}

    def load_state_dict(self, state_dict: dict[str, int | None]) -> None:
        self._left = state_dict["left"]

    def on_train_start(self, trainer, pl_module) -> None:
        if self._left == trainer.global_step:
            self.timed_run(trainer)

    @abstractmethod
    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        """Returns the metrics of the module's current weights by name, on every rank."""

    def run(self, trainer: lightning.Trainer) -> None:
        results: dict[str, float] = {}
        self._left = None
        try:
            step = f"metrics of step {trainer.global_step}"
            with going_on_without(step), averaged_weights(trainer):
                results = self.measure(trainer)
        except EvaluationStopped:
            self._left = trainer.global_step
            return
        context = module_of(trainer).context
        context.results, context.measured_by = results, self
        context.measured_at = trainer.global_step
        module_of(trainer).record(results)


@settings
class SampleEvaluation(Evaluation):
    """Measures FID and the other configured metrics on samples drawn with `seed`.

    At the end of a run it measures samples drawn in each of `also_steps` steps, too.
    """

    seed: Seed = 0
    also_steps: Annotated[list[int] | None, optional(whole_list(1))] = None

    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        context = module_of(trainer).context
        metrics, context.summary["sampling_seconds"] = self.measured_by(trainer, context.sampling())
        return metrics

    def measured_by(self, trainer: lightning.Trainer, pipeline: Generator) -> Evaluated:
        """The metrics of the samples of a pipeline, and their seconds."""
        prepared = prepared_for(trainer)
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        own = [each for each in callbacks if isinstance(each, Interruption)]
        stop = partial(own[0].asked, trainer) if own else (lambda: False)
        return evaluate(pipeline, prepared, data_of(trainer), self.batch_size, self.seed, stop)

    def at_the_end(self, trainer: lightning.Trainer) -> None:
        super().at_the_end(trainer)
        context = module_of(trainer).context
        for steps in self.also_steps or ():
            pipeline = cast(Pipeline, context.sampling())  # as `checked_parts` has made sure
            pipeline = replace(pipeline, sampler=with_steps(pipeline.sampler, steps))
            with (
                context.clock.stopped(),
                context.memory.stopped(),
                going_on_without(f"metrics in {steps} steps"),
                averaged_weights(trainer),
            ):
                context.at_other_steps[steps] = self.measured_by(trainer, pipeline).metrics


class ReconstructionEvaluation(Evaluation):
    """Measures rFID and rKID of an autoencoder's reconstructions of test images."""

    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        autoencoder, prepared = trained_autoencoder(trainer), prepared_for(trainer)
        return reconstruction_metrics(autoencoder, data_of(trainer), prepared, self.batch_size)


@torch.inference_mode()
def reconstruction_metrics(
    autoencoder: Autoencoder, data: ImageData, prepared: PreparedMetrics, batch_size: int
) -> dict[str, float]:
    """The metrics of test images reconstructed by an autoencoder, by name, on every rank."""
    chosen, observe = prepared.metrics.test_ids(data), prepared.metrics.observer
    ids = shard(len(chosen), *rank_and_world())
    batches = data.padded(data.test_images()[chosen[ids]]).split(batch_size)
    with failing_together(NotDrawn):
        observed = [
            observe(data.to_native(reconstruct(autoencoder, images)))
            for images in track(batches, "Reconstructing test images")
        ]
    results = prepared.compute(observe.gather(observed), data.test_labels()[chosen])
    return {f"r{name}": value for name, value in results.items() if name.startswith(KEPT)}


@settings
class Grid(Periodic):
    """Draws a picture, `columns` images per row, every `every_n_steps` steps and at a run's end."""

    at_end = True
    name: ClassVar[str]  # name of the picture in loggers
    file: ClassVar[str] = "step"  # starts the names of files in `samples/`
    every_n_steps: Interval = 1000
    columns: Count = 10

    @abstractmethod
    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        """Returns images (rows, columns, C, H, W) uint8, on every rank, and their caption."""

    def run(self, trainer: lightning.Trainer) -> None:
        module, step = module_of(trainer), trainer.global_step
        images = None
        with going_on_without(f"picture of step {step}"), averaged_weights(trainer):
            images, caption = self.draw(trainer)
        if images is None:
            return
        path = module.context.folder / SAMPLES / f"{self.file}_{step:07d}.png"
        if self.file == Grid.file:
            module.context.latest_grid = path
        if not trainer.is_global_zero:
            return
        columns, images = images.shape[1], images.flatten(0, 1)
        save_png(data_of(trainer).source.picture(images, columns), path)
        seen = f"step {step}, {module.images_seen:,} images seen"
        for logger in trainer.loggers:
            if isinstance(logger, RunLogger):
                logger.log_grid(self.name, path, f"{seen}: {caption}", step)
            if isinstance(logger, WandB):
                self.log_images(logger, images, trainer)

    def log_images(self, logger: WandB, images: Tensor, trainer: lightning.Trainer) -> None:
        """Logs some of the images (N, C, H, W) in addition to the picture, on rank 0."""


@settings
class SampleGrid(Grid):
    """Draws samples of one seed: one row per class if the model is conditional, else a square.

    Of more classes than fit into a picture (`common.images.MOST_ROWS`), evenly chosen ones.
    """

    name = "samples"
    seed: Seed = 0

    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        pipeline, kind = module_of(trainer).context.sampling(), data_of(trainer).labels
        labels, rows = pipeline.row_labels(self.columns), "without classes"
        if labels is not None and not kind.classes:
            rows = f"one row per label: {'; '.join(map(kind.caption, labels))}"
        elif labels is not None:
            first = ", ".join(map(str, labels.tolist()[:3]))
            shown = "" if len(labels) == kind.classes else f" {first}, ... of {kind.classes:,}"
            rows = f"one row per class{shown}"
        images = draw_rows(pipeline, self.columns, self.seed).unflatten(0, (-1, self.columns))
        return images, f"samples of seed {self.seed}, {rows}"

    def log_images(self, logger: WandB, images: Tensor, trainer: lightning.Trainer) -> None:
        data, pipeline = data_of(trainer), module_of(trainer).context.sampling()
        labels = pipeline.row_labels(self.columns)
        samples = []
        for i in chosen(len(images), self.columns):
            picture = as_pil(data.source.picture(images[i : i + 1], 1))
            name = None if labels is None else data.labels.caption(labels[i // self.columns])
            samples.append((picture, name, i, self.seed))
        logger.log_samples(samples, trainer.global_step)


class ReconstructionGrid(Grid):
    """Draws rows of test images, each followed by a row of their reconstructions."""

    name = "reconstructions"

    @torch.inference_mode()
    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        data = data_of(trainer)
        images = data.first_tests(4 * self.columns).images
        back = reconstruct(trained_autoencoder(trainer), images).cpu()
        white = images.new_full((-len(images) % self.columns, *images.shape[1:]), 255)
        rows = [torch.cat([each, white]).split(self.columns) for each in (images, back)]
        picture = torch.stack([row for pair in zip(*rows, strict=True) for row in pair])
        return picture, "rows of test images, each above its reconstructions"


def prepared_for(trainer: lightning.Trainer) -> PreparedMetrics:
    """The metrics of a run, which has some if a callback evaluates."""
    return cast(PreparedMetrics, module_of(trainer).context.prepared_metrics)


def trained_autoencoder(trainer: lightning.Trainer) -> Autoencoder:
    """The autoencoder that a trainer trains."""
    return cast(Autoencoder, trainer.lightning_module.autoencoder)


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """Reconstructs images (B, C, H, W), uint8 in and out, on the autoencoder's device."""
    images = to_float(images.to(next(autoencoder.parameters()).device))
    back = autoencoder.decode(autoencoder.mean(autoencoder.moments(images)))
    return to_uint8(require_finite(back))


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
        pipeline = cast(Pipeline, module_of(trainer).context.sampling())  # see `check`
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


def sampling_seed(cfg: DictConfig) -> int:
    """The seed of the samples by which a run was measured; 0 if none were."""
    evaluation = configured(cfg, SampleEvaluation)
    return evaluation.get("seed", 0) if evaluation else 0


def configured(cfg: DictConfig, kind: type[Callback]) -> DictConfig | None:
    """The settings of the first callback of a class, or None if a run has no such callback."""
    for node in filter(None, cfg.callbacks.values()):
        with suppress(Exception):  # a saved run may name a class that is not installed here
            if issubclass(get_class(node._target_), kind):
                return node
    return None
