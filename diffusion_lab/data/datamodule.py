"""Lightning's data module: the loaders over image data."""

from functools import partial
from typing import Any

import lightning
from lightning.pytorch import Trainer

from diffusion_lab.common.ranges import settings
from diffusion_lab.data.images import ImageData
from diffusion_lab.data.loader import LabelledRows, PassLoader, TensorLoader


@settings
class ImageDataModule(ImageData, lightning.LightningDataModule):
    """Image data with the loaders of a training, as Lightning's trainer asks for them."""

    def __post_init__(self) -> None:
        lightning.LightningDataModule.__init__(self)
        super().__post_init__()

    @property
    def micro_batch(self) -> int:
        """The images in a rank's forward pass: global batch / (accumulation x ranks)."""
        trainer, module = self.attached
        parts = trainer.accumulate_grad_batches * trainer.world_size
        micro, rest = divmod(module.batch_size, parts)
        if rest:
            raise ValueError(
                f"{trainer.accumulate_grad_batches} micro-batches on each of {trainer.world_size} "
                f"ranks cannot evenly share a global batch of {module.batch_size}"
            )
        return micro

    @property
    def attached(self) -> tuple[Trainer, Any]:
        """Lightning's trainer, which asks for the loaders, and the module that it trains."""
        assert self.trainer is not None, "loaders are a trainer's"
        return self.trainer, self.trainer.lightning_module

    def train_dataloader(self) -> TensorLoader:
        """Returns the endless training stream, starting after the samples of earlier steps."""
        trainer, module = self.attached
        stream = partial(
            TensorLoader,
            batch_size=self.micro_batch,
            seed=module.seed,
            rank=trainer.global_rank,
            world=trainer.world_size,
            # a function, as a checkpoint may be restored, or a new epoch begin, in between
            samples_seen=lambda: trainer.global_step * module.batch_size,
            device=trainer.strategy.root_device,
            on_device=self.on_device,
            period=module.batch_size if self.repeats_batch else None,
        )
        if self.encoded is not None:
            return self.encoded.stream(stream, self.train_labels(), self.flip)
        return stream(*self._splits[0], flip=self.flip, chosen=self._chosen, pad=self.pad)

    def val_dataloader(self) -> PassLoader:
        """Loads (images, labels, ids) of `validated_on`; an id is a place among its images."""
        return self._pass(self.validated_on())

    def test_dataloader(self) -> PassLoader:
        """Loads (images, labels, ids) of `tested_on`; an id is a place among its images."""
        return self._pass(self.tested_on())

    def _pass(self, split: LabelledRows) -> PassLoader:
        trainer, _ = self.attached
        return PassLoader(*split, self.micro_batch, trainer.global_rank, trainer.world_size)
