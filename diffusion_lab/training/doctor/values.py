"""The figures of a planned run, and the data that they are of."""

from dataclasses import dataclass

import torch

from diffusion_lab.common.messages import UserError
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics


@dataclass(frozen=True)
class Memory:
    """Bytes that training needs on a device, of these an image's, and those free."""

    needed: float
    per_image: float
    free: float


@dataclass(frozen=True)
class StepTimes:
    """Seconds on one device."""

    step: float  # forward, backward and optimiser on a micro-batch
    call: float  # of the network, an image
    features: float  # of the metrics' networks, an image


@dataclass(frozen=True)
class Plan:
    """The steps that a run will take, and its seconds; drawing is None where it is not known."""

    steps: int
    training: float  # with the held-out loss
    drawing: float | None  # of grids and of samples for the metrics
    features: float  # with those of the reference, which are kept for the next run

    @property
    def evaluation(self) -> float:
        """Seconds that training does not take."""
        return (self.drawing or 0.0) + self.features


def times(steps: int, every: int | None) -> int:
    """How often in a run something is done that is done at its end too."""
    return 1 + ((steps - 1) // every if every else 0)


def reference_size(metrics: GenerativeMetrics, data: ImageDataModule) -> int:
    """The number of real images that samples are compared with."""
    there = len(data.reference_images())
    return min(metrics.reference_size or there, there)


def check_splits(datamodule: ImageDataModule) -> None:
    """Raises UserError unless both splits are as `DataSource` says they are."""
    name, shape = type(datamodule.source).__name__, datamodule.native_shape
    for split, images, labels in (
        ("training", datamodule.reference_images(), datamodule.reference_labels()),
        ("test", datamodule.test_images(), datamodule.test_labels()),
    ):
        if images.dtype != torch.uint8 or tuple(images.shape[1:]) != tuple(shape):
            raise UserError(
                f"the {split} images of {name} are {images.dtype} {tuple(images.shape)}; `load` "
                f"must give uint8 (N, {', '.join(map(str, shape))}), with 0 black and 255 white"
            )
        if len(images) == 0:
            raise UserError(f"{name} has no {split} images; `load` must give both splits")
        if labels.dtype != torch.int64 or len(labels) != len(images):
            raise UserError(
                f"the {split} labels of {name} are {labels.dtype} {tuple(labels.shape)}; `load` "
                f"must give int64 ({len(images)},), a label an image"
            )
