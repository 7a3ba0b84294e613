"""A data set that needs no file: bars whose place is the class, with noise."""

import torch

from diffusion_lab.data.datamodule import ImageDataModule, Split


class TinyData(ImageDataModule):
    """64 training and 32 test images, 1 x 8 x 8, four classes."""

    native_shape = (1, 8, 8)
    class_names = ("first", "second", "third", "fourth")

    def __init__(
        self,
        root: str = "data",
        pad: int | None = None,
        flip: bool = False,
        on_device: bool | str = "auto",
        validation_size: int = 20,
        fraction: float | None = None,
        per_class: int | None = None,
        subset_seed: int = 0,
    ):
        super().__init__(pad, flip, on_device, validation_size, fraction, per_class, subset_seed)

    def load(self) -> tuple[Split, Split]:
        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.arange(count) % 4
            images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
            for image, label in zip(images, labels, strict=True):
                image[:, :, 2 * label : 2 * label + 2] += 180
            return Split(images.to(torch.uint8), labels)

        return split(64, 0), split(32, 1)
