"""Checks of the images and their labels, whatever is trained on them."""

import hashlib
from collections.abc import Iterator

import torch

from diffusion_lab.common.formats import some
from diffusion_lab.data.rows import Rows
from diffusion_lab.training.doctor.finding import Remark, advice, error, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun

NARROW = 128  # grey values: images that span fewer have lost a bit, or were scaled twice
BATCH = 256  # images that are looked at together
MANY = 0.01  # share of a split: fewer blank images or copies change no metric
UNEVEN = 3  # ratio of class sizes from which the larger class is learned visibly better


def grey_values(run: PlannedRun) -> Iterator[Remark]:
    """Checks that pixels range from 0 to 255 and are not floats that were cast to bytes."""
    values = run.sample.unique().tolist()
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
            f"grey values lie between {low} and {high} in a sample of {len(run.sample)} images, "
            "but networks and metrics take 0 as black and 255 as white; stretch them when they "
            "are read"
        )


def blank_images(run: PlannedRun) -> Iterator[Remark]:
    """Looks for images without any contrast."""
    images, blank = run.data.train_rows(), 0
    for batch in images.batches(BATCH):
        low, high = batch.flatten(1).aminmax(dim=1)
        blank += int((low == high).sum())
    if blank > MANY * len(images) and run.data.native_shape[1:] != (1, 1):  # one pixel has none
        yield warning(
            f"{blank} of {len(images)} training images have a single grey value, and the model "
            "will generate such images; remove them from the data"
        )


def channels(run: PlannedRun) -> Iterator[Remark]:
    """Looks for colour images that are grey."""
    images = run.sample
    if images.shape[1] == 3 and bool((images == images[:, :1]).all()):
        remedy = (
            "write data.source.channels=1"
            if "channels" in run.cfg.data.source
            else "read them with one channel, native_shape=(1, H, W)"
        )
        yield advice(
            f"all three channels of {len(images)} sampled images are equal, so one is enough and "
            f"trains faster; {remedy}"
        )


def classes(run: PlannedRun) -> Iterator[Remark]:
    """Checks that every label names a class, and that classes are of similar size."""
    data = run.data
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
        evenly = f"write data.per_class={smallest}, or " if "per_class" in run.cfg.data else ""
        yield warning(
            f"class sizes differ by a factor of {largest / smallest:.1f} "
            f"({names[int(sizes.argmax())]}: {largest}, the smallest: {smallest}): rare classes "
            "are learned less well, and samples are drawn evenly, unlike the reference of the FID; "
            f"{evenly}balance the data"
        )


def duplicates(run: PlannedRun) -> Iterator[Remark]:
    """Looks for training images that occur more than once."""
    images = digests(run.data.train_rows())
    copies = len(images) - len(set(images))
    if copies > MANY * len(images):
        yield warning(
            f"{copies} of {len(images)} training images are exact copies of others, and repeated "
            "images are memorised first; remove them from the data"
        )


def overlap(run: PlannedRun) -> Iterator[Remark]:
    """Looks for validation and test images that are also trained on."""
    known, tests = set(digests(run.data.train_rows())), run.data.test_images()
    sides = {
        "validation": run.data.validation_rows(),
        "test": Rows(tests, torch.arange(len(tests))),
    }
    for side, images in sides.items():
        shared = sum(digest in known for digest in digests(images))
        if shared > MANY * len(images):
            too_low = "loss is" if side == "validation" else "loss and the FID of real images are"
            yield warning(
                f"{shared} of {len(images)} {side} images are also training images, so their "
                f"{too_low} too low; remove the copies, or split the data again"
            )


def digests(images: Rows) -> list[bytes]:
    """Returns a checksum of each image, uint8 (C, H, W): equal only if the images are.

    Images of one pixel (C, 1, 1) get none: there are only 256^C, so some are bound to be equal.
    """
    if images.images.shape[2:] == (1, 1):
        return []
    return [
        hashlib.blake2b(row, digest_size=16).digest()
        for batch in images.batches(BATCH)
        for row in batch.flatten(1).numpy()
    ]


CHECKS = (grey_values, blank_images, channels, classes, duplicates, overlap)
