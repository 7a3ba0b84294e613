"""A data set that needs no file: noisy bars whose position is the class."""

import torch

from diffusion_lab.data import DataSource, ImageData, Split


class TinyData(DataSource):
    """A source of 84 training and 32 test images, 1 x 8 x 8, in four classes."""

    native_shape = (1, 8, 8)
    class_names = ("first", "second", "third", "fourth")

    def __init__(self, root: str = "data"):
        self.root = root

    def load(self) -> tuple[Split, Split]:
        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.arange(count) % 4
            images = torch.randint(0, 60, (count, 1, 8, 8), generator=generator)
            for image, label in zip(images, labels, strict=True):
                image[:, :, 2 * label : 2 * label + 2] += 180
            return Split(images.to(torch.uint8), labels)

        return split(84, 0), split(32, 1)


class TinyFloats(TinyData):
    """The same with images of floats in [0, 1], which no source may return."""

    def load(self) -> tuple[Split, Split]:
        training, test = super().load()
        return Split(training.images / 255, training.labels), Split(test.images / 255, test.labels)


class TinyShades(DataSource):
    """A source of 200 training and 40 test images, 1 x 4 x 4, whose label is a tenth of their grey.

    With `size` 2 the label has the grey's distance to white, too.
    """

    native_shape = (1, 4, 4)
    class_names = ()

    def __init__(self, root: str = "data", size: int = 1):
        self.values_per_label = size

    def load(self) -> tuple[Split, Split]:
        def split(count: int) -> Split:
            greys = torch.linspace(40, 215, count).round()
            labels = torch.stack([greys / 10, 255 - greys], 1)[:, : self.values_per_label]
            return Split(greys.to(torch.uint8)[:, None, None, None].expand(-1, 1, 4, 4), labels)

        return split(200), split(40)


def tiny_data(**settings: object) -> ImageData:
    """The data module of the tiny data: 64 images to train on and 20 validation images."""
    from diffusion_lab.data import ImageDataModule  # a run of this data draws without Lightning

    return ImageDataModule(TinyData(), **{"validation_size": 20} | settings)
