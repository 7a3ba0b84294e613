"""Whether this machine has the time, the memory and the disk for a run."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.backbone.macs import Cost
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageDataModule
from diffusion_lab.training.callbacks import Grid
from diffusion_lab.training.callbacks.configured import configured
from diffusion_lab.training.diffusion_task import DiffusionTask
from diffusion_lab.training.doctor.estimates import Plan
from diffusion_lab.training.doctor.finding import ADVICE, ERROR, SKIPPED, WARNING, Remark
from diffusion_lab.training.doctor.stages import Length, Memory

DAY = 24 * 3600.0
LONG_DAYS, VERY_LONG_DAYS = 1, 7
# of a run's time, from where on it is the evaluation that is paid for; nobody minds a few minutes
EVALUATION_SHARE, EVALUATION_SECONDS = 0.5, 300.0
FULL = 0.8  # of free memory; the backward pass needs a little beside what it is given
CHECKPOINT_BYTES = 4 * 4  # of a parameter: weight, average, Adam's two moments, in float32
COPIES = 3  # of a checkpoint: the last, the one before it, and the new one while it is written
GRID_SCALE = 2  # a grid is drawn so many times larger
UNMEASURED = "not measured: speed=false, no such precision outside of training, or no memory for it"


def time(cfg: DictConfig, task: DiffusionTask, plan: Plan | None) -> Iterator[Remark]:
    """A run that ends, and that trains more than it measures."""
    steps = cfg.trainer.max_steps
    if plan is None:
        yield SKIPPED, UNMEASURED
        return
    total = plan.training + plan.evaluation
    if plan.training > LONG_DAYS * DAY:
        fewer = max(1, int(plan.steps * LONG_DAYS * DAY / plan.training))
        yield (
            WARNING if plan.training > VERY_LONG_DAYS * DAY else ADVICE,
            f"trainer.max_steps={steps} takes about {plan.training / DAY:.1f} days on this "
            f"device; trainer.max_steps={fewer} would take one",
        )
    if plan.evaluation > max(EVALUATION_SHARE * total, EVALUATION_SECONDS) and task.metrics:
        yield (
            ADVICE,
            f"evaluation and grids take {plan.evaluation / total:.0%} of the time; write fewer "
            "metrics.num_samples or sampler.steps, or a smaller metrics.reference_size",
        )


def memory(memory: Memory | None, batch: BatchLayout) -> Iterator[Remark]:
    """A micro-batch that fits."""
    if memory is None:
        yield SKIPPED, UNMEASURED
        return
    needed, image, free = memory
    micro = batch.micro_batch
    if needed <= FULL * free:
        return
    share = micro * batch.accumulate
    room = FULL * free - (needed - image * micro)
    fitting = [n for n in range(1, micro) if share % n == 0 and n * image <= room]
    remedy = f"micro_batch_size={fitting[-1]}" if fitting else "a smaller backbone"
    yield (
        ERROR if needed > free else WARNING,
        f"training needs about {needed / 1e9:.1f} GB, {image * micro / 1e9:.1f} of them for "
        f"{micro} images at once, and {free / 1e9:.1f} GB are free; write {remedy}",
    )


def disk(
    cfg: DictConfig, cost: Cost, length: Length, datamodule: ImageDataModule
) -> Iterator[Remark]:
    """Room for checkpoints and pictures, and folders that can be written to."""
    run_dir = Path(cfg.run_dir or OUTPUTS)
    place = existing(run_dir)
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield ERROR, f"{run_dir} cannot be made, as {place} cannot be written to; write run_dir=..."
        return
    checkpoints = COPIES * CHECKPOINT_BYTES * cost.params
    needed, free = checkpoints + grid_bytes(cfg, length, datamodule), shutil.disk_usage(place).free
    if needed > free:
        yield (
            ERROR,
            f"the run writes about {needed / 1e9:.1f} GB, {checkpoints / 1e9:.1f} of them for "
            f"checkpoints, and {free / 1e9:.1f} GB are free at {place}; write run_dir=... "
            "elsewhere",
        )


def cache(task: DiffusionTask) -> Iterator[Remark]:
    """A folder that keeps the reference's features."""
    metrics = task.metrics
    if metrics is None:
        return
    place = existing(metrics.cache_dir)
    if not place.is_dir() or not os.access(place, os.W_OK):
        yield (
            ADVICE,
            f"{metrics.cache_dir} cannot be written to, so that every run computes the features "
            "of the training images anew; write metrics.cache_dir=... or another data.source.root",
        )


def existing(path: Path) -> Path:
    """The folder, or the nearest one above it that is there."""
    return next(place for place in (path, *path.absolute().parents) if place.exists())


def grid_bytes(cfg: DictConfig, length: Length, datamodule: ImageDataModule) -> int:
    """Bytes of all pictures, at most: PNG only makes them smaller."""
    grid, shape = configured(cfg, Grid), datamodule.image_shape
    if not grid:
        return 0
    rows = max(grid.columns, datamodule.num_classes)
    pictures = 1 + (length.steps // grid.every_n_steps if grid.every_n_steps else 0)
    channels, height, width = shape
    return pictures * rows * grid.columns * channels * height * width * GRID_SCALE**2


CHECKS = (time, memory, disk, cache)
