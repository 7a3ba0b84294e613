"""Data sets, each one uint8 tensor per split."""

from diffusion_lab.data.datamodule import ImageDataModule
from diffusion_lab.data.loader import Batch, EncodedImages, ImageBatch, MomentBatch, PairBatch
from diffusion_lab.data.source import DataError, DataSource, Split
