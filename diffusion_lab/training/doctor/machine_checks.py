"""Whether this machine has the time, the memory and the disk for a run."""

import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.images import ENLARGED
from diffusion_lab.common.messages import UserError
from diffusion_lab.training.doctor.finding import Remark, advice, error, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun
from diffusion_lab.training.planning.disk import (
    checkpoint_bytes,
    checkpoints_at_once,
    snapshot_bytes,
)

DAY = 24 * 3600.0
LONG_DAYS, VERY_LONG_DAYS = 1, 7
# evaluation above this share of a run's time is reported, unless it takes only a few minutes
EVALUATION_SHARE, EVALUATION_SECONDS = 0.5, 300.0
FULL = 0.8  # share of free memory; the backward pass needs some beyond the estimate


def time(run: PlannedRun) -> Iterator[Remark]:
    """Checks that a run does not take days, and that it trains more than it evaluates."""
    steps, plan = run.cfg.trainer.max_steps, run.plan
    evaluation = (plan.drawing or 0.0) + plan.features
    if plan.training > LONG_DAYS * DAY:
        fewer = max(1, int(plan.steps * LONG_DAYS * DAY / plan.training))
        yield (warning if plan.training > VERY_LONG_DAYS * DAY else advice)(
            f"trainer.max_steps={steps} takes about {plan.training / DAY:.1f} days on this "
            f"device; trainer.max_steps={fewer} would take one"
        )
    total = plan.training + evaluation
    if evaluation > max(EVALUATION_SHARE * total, EVALUATION_SECONDS) and run.task.metrics:
        yield advice(
            f"evaluation and grids take {evaluation / total:.0%} of the time; reduce "
            "metrics.num_samples, sampler.steps or metrics.reference_size"
        )


def memory(run: PlannedRun) -> Iterator[Remark]:
    """Checks that a micro-batch fits into the free memory."""
    needed, image, free = run.memory
    micro = run.batch.micro_batch
    if needed <= FULL * free:
        return
    share = micro * run.batch.accumulate
    room = FULL * free - (needed - image * micro)
    fitting = [n for n in range(1, micro) if share % n == 0 and n * image <= room]
    remedy = f"micro_batch_size={fitting[-1]}" if fitting else "a smaller backbone"
    yield (error if needed > free else warning)(
        f"training needs about {needed / 1e9:.1f} GB, {image * micro / 1e9:.1f} of them for "
        f"{micro} images at once, but {free / 1e9:.1f} GB are free; write {remedy}"
    )


def disk(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the run folder can be made, with room for checkpoints and pictures."""
    run_dir = Path(run.cfg.run_dir or OUTPUTS)
    place, writable = existing(run_dir)
    if not writable:
        yield error(
            f"{run_dir} cannot be created, as {place} cannot be written to; write run_dir=..."
        )
        return
    try:
        checkpoints = checkpoints_at_once(run.task, run.steps) * checkpoint_bytes(run.task)
    except UserError:  # an optimiser whose state cannot be counted without its numbers
        return
    snapshots = snapshot_bytes(run.task)
    # an upper bound, as PNG compresses
    grids = run.task.grid_images(run.steps) * math.prod(run.datamodule.image_shape) * ENLARGED**2
    needed, free = checkpoints + snapshots + grids, shutil.disk_usage(place).free
    if needed > free:
        yield error(
            f"the run writes about {needed / 1e9:.1f} GB, {checkpoints / 1e9:.1f} of them for "
            f"checkpoints and {snapshots / 1e9:.1f} for callbacks.posthoc_ema.snapshots, but "
            f"{free / 1e9:.1f} GB are free at {place}; write run_dir=... for another disk"
        )


def cache(run: PlannedRun) -> Iterator[Remark]:
    """Checks that the folder that caches the reference's features can be written to."""
    metrics = run.task.metrics
    if metrics is not None and not existing(Path(metrics.cache_dir))[1]:
        yield advice(
            f"{metrics.cache_dir} cannot be written to, so every run computes the features of the "
            "training images again; write metrics.cache_dir=... or another data.source.root"
        )


def existing(path: Path) -> tuple[Path, bool]:
    """Returns the path or its nearest existing parent, and whether that is a writable folder."""
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    return place, place.is_dir() and os.access(place, os.W_OK)


CHECKS = (time, memory, disk, cache)
