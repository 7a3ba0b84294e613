"""Image data that fit into memory: facts, the uint8 tensors themselves, and loaders over them."""

from functools import cached_property
from typing import Annotated, Any

import lightning
import torch
from lightning.pytorch import Trainer
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.images import crop_to, pad_to
from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import Flag, Range, optional, settings, share, whole
from diffusion_lab.data.loader import (
    EncodedImages,
    HeldOutLoader,
    ImageBatch,
    MomentBatch,
    TensorLoader,
)
from diffusion_lab.data.source.base import DataSource, Split
from diffusion_lab.data.subsets import subset

ON_DEVICE = Range("auto, true or false", lambda v: isinstance(v, bool) or v == "auto")
FREE_MEMORY_SHARE = 0.1  # of a GPU's free memory, the most that images take if on_device is auto


@settings
class ImageDataModule(lightning.LightningDataModule):
    """The images of a source, as a model trains on them and metrics compare with them.

    Training uses the training split of `source`, or the part given by `fraction` or `per_class`;
    metrics always compare with the whole split. The held-out denoising loss uses the first
    `validation_size` images of the test split. `pad` is the height and width that the model sees.
    """

    source: DataSource
    pad: Annotated[int | None, optional(whole(1).as_in(32))] = None
    flip: Flag = False
    on_device: Annotated[bool | str, ON_DEVICE] = "auto"
    validation_size: Annotated[int, whole(1).as_in(1000)] = 1000
    fraction: Annotated[float | None, optional(share().as_in(0.1))] = None
    per_class: Annotated[int | None, optional(whole(1).as_in(50))] = None
    subset_seed: Annotated[int, whole(0)] = 0

    def __post_init__(self) -> None:
        super().__init__()
        if self.fraction is not None and self.per_class is not None:
            raise ValueError(
                f"fraction={self.fraction} and per_class={self.per_class} both set the size of the "
                "subset; set one of them to null"
            )
        if self.pad is not None and self.pad < (side := max(self.native_shape[1:])):
            raise ValueError(
                f"pad={self.pad} is smaller than the images; use {side} or more, or null"
            )
        self.encoded: EncodedImages | None = None  # replaces the images in training, if set

    @property
    def native_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) of the images before padding."""
        return self.source.native_shape

    @property
    def class_names(self) -> tuple[str, ...]:
        """The names of the classes, in the order of their labels."""
        return self.source.class_names

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """The (C, H, W) that the model sees, with padding."""
        return (self.native_shape[0], self.pad, self.pad) if self.pad else self.native_shape

    @property
    def num_classes(self) -> int:
        """The number of classes; labels are 0, ..., num_classes - 1."""
        return len(self.class_names)

    def reference_images(self) -> Tensor:
        """The whole training split, which metrics compare with: uint8 (M, C, H, W), native size."""
        return self._splits[0].images

    def reference_labels(self) -> Tensor:
        """The labels of `reference_images`, int64 (M,)."""
        return self._splits[0].labels

    def train_images(self) -> Tensor:
        """The training images, all of the split or the subset: uint8 (N, C, H, W), native size."""
        return self._trained_on.images

    def train_labels(self) -> Tensor:
        """The labels of `train_images`, int64 (N,)."""
        return self._trained_on.labels

    def test_images(self) -> Tensor:
        """The test images, uint8 (N, C, H, W), native size."""
        return self._splits[1].images

    def test_labels(self) -> Tensor:
        """The labels of `test_images`, int64 (N,)."""
        return self._splits[1].labels

    @cached_property
    def fingerprint(self) -> str:
        """The sha256 of all images and labels, in the subset or not: equal only for equal data."""
        return hashing.of_tensors(part for split in self._splits for part in split)

    @cached_property
    def images_fingerprint(self) -> str:
        """The sha256 of all images, without their labels."""
        return hashing.of_tensors(split.images for split in self._splits)

    def to_native(self, images: Tensor) -> Tensor:
        """Crops generated images (B, C, H, W) to the data's own size; a no-op without padding."""
        return crop_to(images, *self.native_shape[1:])

    def padded(self, images: Tensor) -> Tensor:
        """Pads images (N, C, H, W) of native size to the size that the model sees."""
        return pad_to(images, self.pad) if self.pad else images

    def require_test_images(self, count: int, argument: str) -> None:
        """Raises ValueError, naming `argument`, if there are fewer than `count` test images."""
        if count > len(self.test_images()):
            raise ValueError(
                f"{argument}={count} is more than the {len(self.test_images())} test images; use a "
                "smaller number"
            )

    def held_out(self, count: int) -> Split:
        """The first `count` test images, padded, and their labels."""
        return Split(self.padded(self.test_images()[:count]), self.test_labels()[:count])

    def trained_on(self, count: int) -> Split:
        """A fixed random choice of `count` training images, padded but unflipped, with labels."""
        # not the first, which may all be of one class
        index = random_places(len(self.train_images()), count)
        return Split(self.padded(self.train_images()[index]), self.train_labels()[index])

    def prepare_data(self) -> None:
        """Fetches or finds the files of the source; raises DataError."""
        self.source.prepare()

    def setup(self, stage: str) -> None:
        """Loads all images and takes the subset, so that no error in the data comes later."""
        _ = self._trained_on
        if self.source.sizes_vary:
            self.validation_size = min(self.validation_size, len(self.test_images()))

    def check_splits(self) -> None:
        """Raises ValueError unless both splits have the shapes and types that `Split` states."""
        self.source.check(self._splits)

    @property
    def micro_batch(self) -> int:
        """The number of images in a rank's forward pass: global batch / (accumulation x ranks)."""
        trainer = self.attached_trainer
        batch_size = self.trained_module.batch_size
        micro_batch, rest = divmod(batch_size, trainer.accumulate_grad_batches * trainer.world_size)
        if rest:
            raise ValueError(
                f"{trainer.accumulate_grad_batches} micro-batches on each of {trainer.world_size} "
                f"ranks cannot evenly share a global batch of {batch_size}"
            )
        return micro_batch

    @property
    def attached_trainer(self) -> Trainer:
        """Lightning's trainer, which asks for the loaders."""
        assert self.trainer is not None, "loaders are a trainer's"
        return self.trainer

    @property
    def trained_module(self) -> Any:
        """The module that is trained, which knows its global batch and its seed."""
        return self.attached_trainer.lightning_module

    def train_dataloader(self) -> TensorLoader:
        """Returns the endless training stream, starting after the samples of earlier steps."""
        trainer, module = self.attached_trainer, self.trained_module
        device, encoded = trainer.strategy.root_device, self.encoded
        images = self.padded(self.train_images()) if encoded is None else encoded.moments
        mirrored = None if encoded is None else encoded.mirrored
        kept = [images] if mirrored is None else [images, mirrored]
        if self.on_device is True or (self.on_device == "auto" and _fits(kept, device)):
            images, *kept = [each.to(device) for each in kept]
            mirrored = kept[0] if kept else None
        return TensorLoader(
            images,
            self.train_labels(),
            self.micro_batch,
            module.seed,
            flip=self.flip,
            rank=trainer.global_rank,
            world=trainer.world_size,
            # a function, as a checkpoint may be restored, or a new epoch begin, in between
            samples_seen=lambda: trainer.global_step * module.batch_size,
            device=device,
            mirrored=mirrored,
            batch_type=ImageBatch if encoded is None else MomentBatch,
        )

    def val_dataloader(self) -> HeldOutLoader:
        """Loads (images, labels, ids) of held-out images; an id is an index into the test split."""
        return HeldOutLoader(
            *self.held_out(self.validation_size),
            self.micro_batch,
            rank=self.attached_trainer.global_rank,
            world=self.attached_trainer.world_size,
        )

    @cached_property
    def _splits(self) -> tuple[Split, Split]:
        return self.source.load()

    @cached_property
    def _trained_on(self) -> Split:
        whole = self._splits[0]
        index = subset(whole.labels, self.fraction, self.per_class, self.subset_seed)
        return whole if index is None else Split(whole.images[index], whole.labels[index])


def _fits(tensors: list[Tensor], device: torch.device) -> bool:
    """Whether the tensors leave enough of an accelerator's memory to the model."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return sum(each.nbytes for each in tensors) < FREE_MEMORY_SHARE * free
