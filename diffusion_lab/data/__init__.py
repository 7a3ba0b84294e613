"""Data sets, each one uint8 tensor per split."""

from diffusion_lab.data.images import ImageData
from diffusion_lab.data.loader import Batch, EncodedImages, ImageBatch, MomentBatch, PairBatch
from diffusion_lab.data.source import DataError, DataSource, Split


def __getattr__(name: str) -> type:
    if name == "ImageDataModule":  # imports Lightning
        from diffusion_lab.data.datamodule import ImageDataModule

        return ImageDataModule
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
