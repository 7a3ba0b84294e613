"""Data modules whose settings, and those of their source, are given together."""

import inspect

from diffusion_lab.data import DataSource, ImageDataModule

OF_THE_MODULE = set(inspect.signature(ImageDataModule).parameters) - {"source"}


def data_of(source: type[DataSource], *arguments: object, **settings: object) -> ImageDataModule:
    """The data module of this source; settings that the module has are its own."""
    own = {key: settings.pop(key) for key in OF_THE_MODULE & settings.keys()}
    return ImageDataModule(source(*arguments, **settings), **own)
