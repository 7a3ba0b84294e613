"""Builds data modules from one set of settings for the module and its source."""

import inspect

from diffusion_lab.data import DataSource, ImageDataModule

OF_THE_MODULE = set(inspect.signature(ImageDataModule).parameters) - {"source"}


def data_of(source: type[DataSource], *arguments: object, **settings: object) -> ImageDataModule:
    """Builds a data module; `settings` that it does not have itself go to its source.

    Without a `validation_size` all images of the training split are trained on.
    """
    own = {key: settings.pop(key) for key in OF_THE_MODULE & settings.keys()}
    return ImageDataModule(source(*arguments, **settings), **{"validation_size": 0} | own)
