"""A data set that needs no file: noise in colours, of the size of the reference networks."""

import torch

from diffusion_lab.data import DataSource, Split


class Coloured(DataSource):
    """A source of 60 training and 20 test images, 3 x 16 x 16."""

    native_shape = (3, 16, 16)

    def __init__(self, classes: int = 5):
        self.class_names = tuple(f"class {i}" for i in range(classes))

    def load(self) -> tuple[Split, Split]:
        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            images = torch.randint(0, 256, (count, *self.native_shape), generator=generator)
            return Split(images.to(torch.uint8), torch.arange(count) % len(self.class_names))

        return split(60, 0), split(20, 1)
