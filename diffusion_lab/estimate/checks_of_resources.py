"""Checks of doctor: the images and their labels, and the machine's time, memory and disk."""

import hashlib
import math
import os
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.assembly.costs import Memory
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.formats import some
from diffusion_lab.common.images import ENLARGED
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageData
from diffusion_lab.data.loader import Rows
from diffusion_lab.estimate.run_cost import Duration, disk_of
from diffusion_lab.families.diffusion.task import DiffusionTask

NARROW = 128  # grey values: images that span fewer have lost a bit, or were scaled twice
BATCH = 256  # images that are looked at together
MANY = 0.01  # share of a split: fewer blank images or copies change no metric
UNEVEN = 3  # ratio of class sizes from which the larger class is learned visibly better
DAY = 24 * 3600.0
LONG_DAYS, VERY_LONG_DAYS = 1, 7
# evaluation above this share of a run's time is reported, unless it takes only a few minutes
EVALUATION_SHARE, EVALUATION_SECONDS = 0.5, 300.0
FULL = 0.8  # share of free memory; the backward pass needs some beyond the estimate


class Remark(NamedTuple):
    """A status and a sentence; a check without one has found nothing wrong."""

    status: str
    message: str


advice = partial(Remark, "advice")  # something could be better
warning = partial(Remark, "warning")  # something spoils results
error = partial(Remark, "error")  # the run fails, or is worthless


def grey_values(sample: Tensor) -> Iterator[Remark]:
    """Checks that pixels range from 0 to 255 and are not floats that were cast to bytes."""
    values = sample.unique().tolist()
    low, high = values[0], values[-1]
    if low == high:
        yield error(f"every pixel has the grey value {low}; look at how the images are read")
    elif set(values) <= {0, 1, 255} and 1 in values:
        # a cast turns -1 into 255; masks of 0 and 255 alone are fine
        yield error(
            f"the images contain only the grey values {', '.join(map(str, values))}, like floats "
            "that were cast to bytes; scale them to 0..255 before the cast"
        )
    elif high - low < NARROW:
        yield warning(
            f"grey values lie between {low} and {high} in a sample of {len(sample)} images, "
            "but networks and metrics take 0 as black and 255 as white; stretch them when they "
            "are read"
        )


def blank_images(data: ImageData) -> Iterator[Remark]:
    """Looks for images without any contrast."""
    images, blank = data.train_rows(), 0
    for batch in images.batches(BATCH):
        low, high = batch.flatten(1).aminmax(dim=1)
        blank += int((low == high).sum())
    if blank > MANY * len(images) and data.native_shape[1:] != (1, 1):  # one pixel has none
        yield warning(
            f"{blank} of {len(images)} training images have a single grey value, and the model "
            "will generate such images; remove them from the data"
        )


def channels(cfg: DictConfig, sample: Tensor) -> Iterator[Remark]:
    """Looks for colour images that are grey."""
    if sample.shape[1] == 3 and bool((sample == sample[:, :1]).all()):
        remedy = (
            "write data.source.channels=1"
            if "channels" in cfg.data.source
            else "read them with one channel, native_shape=(1, H, W)"
        )
        yield advice(
            f"all three channels of {len(sample)} sampled images are equal, so one is enough and "
            f"trains faster; {remedy}"
        )


def classes(cfg: DictConfig, data: ImageData) -> Iterator[Remark]:
    """Checks that every label names a class, and that classes are of similar size."""
    count, names = data.num_classes, data.class_names
    for split, labels in (("training", data.train_labels()), ("test", data.test_labels())):
        if count and not 0 <= int(labels.min()) <= int(labels.max()) < count:
            yield error(
                f"{split} labels go from {labels.min()} to {labels.max()}, but there are {count} "
                f"classes, 0 to {count - 1} (label {count} would silently mean no class); number "
                "the labels from 0, or list all classes in class_names"
            )
            return
    if count < 2:
        return
    sizes = data.train_labels().bincount(minlength=count)
    empty = [names[label] for label in (sizes == 0).nonzero().flatten().tolist()]
    if empty:
        yield warning(
            f"{some(empty)} {'has' if len(empty) == 1 else 'have'} no training images, but samples "
            "of every class are drawn; remove such classes from class_names, or add images"
        )
    smallest, largest = int(sizes[sizes > 0].min()), int(sizes.max())
    if largest > UNEVEN * smallest:
        evenly = f"write data.per_class={smallest}, or " if "per_class" in cfg.data else ""
        yield warning(
            f"class sizes differ by a factor of {largest / smallest:.1f} "
            f"({names[int(sizes.argmax())]}: {largest}, the smallest: {smallest}): rare classes "
            "are learned less well, and samples are drawn evenly, unlike the reference of the FID; "
            f"{evenly}balance the data"
        )


def duplicates(data: ImageData) -> Iterator[Remark]:
    """Looks for training images that occur more than once."""
    images = digests(data.train_rows())
    copies = len(images) - len(set(images))
    if copies > MANY * len(images):
        yield warning(
            f"{copies} of {len(images)} training images are exact copies of others, and repeated "
            "images are memorised first; remove them from the data"
        )


def overlap(data: ImageData) -> Iterator[Remark]:
    """Looks for validation and test images that are also trained on."""
    known, tests = set(digests(data.train_rows())), data.test_images()
    sides = {"validation": data.validation_rows(), "test": Rows(tests, torch.arange(len(tests)))}
    for side, images in sides.items():
        shared = sum(digest in known for digest in digests(images))
        if shared > MANY * len(images):
            too_low = "loss is" if side == "validation" else "loss and the FID of real images are"
            yield warning(
                f"{shared} of {len(images)} {side} images are also training images, so their "
                f"{too_low} too low; remove the copies, or split the data again"
            )


def digests(images: Rows) -> list[bytes]:
    """Checksums of images, uint8 (C, H, W); none of single pixels, some of which must be equal."""
    if images.images.shape[2:] == (1, 1):
        return []
    return [
        hashlib.blake2b(row, digest_size=16).digest()
        for batch in images.batches(BATCH)
        for row in batch.flatten(1).numpy()
    ]


def time(cfg: DictConfig, task: DiffusionTask, run: Duration, features: float) -> Iterator[Remark]:
    """Checks that a run does not take days, and that it trains more than it evaluates."""
    evaluation = (run.sampling or 0.0) + features
    training = run.training + run.validation
    if training > LONG_DAYS * DAY:
        fewer = max(1, int(run.steps * LONG_DAYS * DAY / training))
        yield (warning if training > VERY_LONG_DAYS * DAY else advice)(
            f"trainer.max_steps={cfg.trainer.max_steps} takes about {training / DAY:.1f} days on "
            f"this device; trainer.max_steps={fewer} would take one"
        )
    total = training + evaluation
    if evaluation > max(EVALUATION_SHARE * total, EVALUATION_SECONDS) and task.metrics:
        yield advice(
            f"evaluation and grids take {evaluation / total:.0%} of the time; reduce "
            "metrics.num_samples, sampler.steps or metrics.reference_size"
        )


def memory(layout: BatchLayout, memory: Memory, free: int) -> Iterator[Remark]:
    """Checks that a micro-batch fits into the free memory."""
    needed, micro = memory.total, layout.micro_batch
    if needed <= FULL * free:
        return
    share = micro * layout.accumulate
    room = FULL * free - (needed - memory.activations)
    fitting = [
        n for n in range(1, micro) if share % n == 0 and n * memory.activations <= room * micro
    ]
    remedy = f"micro_batch_size={fitting[-1]}" if fitting else "a smaller backbone"
    yield (error if needed > free else warning)(
        f"training needs about {needed / 1e9:.1f} GB, {memory.activations / 1e9:.1f} of them for "
        f"{micro} images at once, but {free / 1e9:.1f} GB are free; write {remedy}"
    )


def disk(cfg: DictConfig, task: DiffusionTask, steps: int) -> Iterator[Remark]:
    """Checks that the run folder can be made, with room for checkpoints and pictures."""
    run_dir = Path(cfg.run_dir or OUTPUTS)
    place, writable = existing(run_dir)
    if not writable:
        yield error(
            f"{run_dir} cannot be created, as {place} cannot be written to; write run_dir=..."
        )
        return
    try:
        taken = disk_of(task, steps)
    except UserError:  # an optimiser whose state cannot be counted without its numbers
        return
    checkpoints, snapshots = taken["checkpoints"], taken["snapshots"]
    # an upper bound, as PNG compresses
    grids = task.grid_images(steps) * math.prod(task.datamodule.image_shape) * ENLARGED**2
    needed, free = checkpoints + snapshots + grids, shutil.disk_usage(place).free
    if needed > free:
        yield error(
            f"the run writes about {needed / 1e9:.1f} GB, {checkpoints / 1e9:.1f} of them for "
            f"checkpoints and {snapshots / 1e9:.1f} for callbacks.posthoc_ema.snapshots, but "
            f"{free / 1e9:.1f} GB are free at {place}; write run_dir=... for another disk"
        )


def cache(task: DiffusionTask) -> Iterator[Remark]:
    """Checks that the folder that caches the reference's features can be written to."""
    metrics = task.metrics
    if metrics is not None and not existing(Path(metrics.cache_dir))[1]:
        yield advice(
            f"{metrics.cache_dir} cannot be written to, so every run computes the features of the "
            "training images again; write metrics.cache_dir=... or another data.source.root"
        )


def existing(path: Path) -> tuple[Path, bool]:
    """Returns the path or its nearest existing parent, and whether that is a writable folder."""
    place = next(place for place in (path, *path.absolute().parents) if place.exists())
    return place, place.is_dir() and os.access(place, os.W_OK)


OF_IMAGES = (grey_values, blank_images, channels, classes, duplicates, overlap)
OF_MACHINE = (time, memory, disk, cache)
