"""Images that are not here, such as an imported network's: only their shape is known."""

from collections.abc import Sequence
from typing import Annotated

from diffusion_lab.common.ranges import IMAGE_SHAPE, ranges, whole
from diffusion_lab.data.source.base import LABEL_SIZE, DataSource, Split
from diffusion_lab.data.source.verified_files import DataError


class Absent(DataSource):
    """The facts of images of `image_shape` (C, H, W) in `num_classes` classes, without images.

    `label_size` is how many numbers a label is, or text; 0 for classes.
    """

    @ranges()
    def __init__(
        self,
        image_shape: Annotated[Sequence[int], IMAGE_SHAPE],
        num_classes: Annotated[int, whole(0)],
        label_size: Annotated[int | str, LABEL_SIZE] = 0,
    ):
        channels, height, width = image_shape
        self.native_shape = (channels, height, width)
        self.class_names = tuple(map(str, range(num_classes)))
        self.values_per_label = label_size

    def prepare(self) -> None:
        """Raises DataError, which says how a network is imported with its images."""
        raise DataError(
            "the images of this network are not known, so nothing can be compared with them; "
            "import it with data=... of the same size and classes"
        )

    def load(self) -> tuple[Split, Split]:
        raise NotImplementedError("`prepare` has raised")
