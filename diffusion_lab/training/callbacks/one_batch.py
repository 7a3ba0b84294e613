"""Trains on one batch over and over, for `+debug=overfit`."""

from lightning.pytorch.callbacks import Callback

from diffusion_lab.training.module import data_of


class OneBatch(Callback):
    """Takes the images of the first step in every step; noise and levels are drawn anew.

    A model that cannot learn a few images will not learn many. (Lightning's overfit_batches makes
    an epoch of each batch, and a run here is one epoch.)
    """

    def setup(self, trainer, pl_module, stage: str) -> None:
        data_of(trainer).repeats_batch = True
