"""Averaged weights: exponential moving averages whose lengths are given in images."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import lightning
from lightning.pytorch.callbacks import Callback

from diffusion_lab.common.ranges import above, optional, ranges, whole_list
from diffusion_lab.compute.sharding import gathered
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.checkpoints import AVERAGES, TRAINED
from diffusion_lab.training.average import WeightAverage
from diffusion_lab.training.callbacks.periodic import stepped


class EMA(Callback):
    """Exponential moving averages of the weights; the batch size does not change a half-life.

    Validation, tests, pictures and metrics use the average of `half_life_images`, and the module
    holds it after training. `also` lists the half-lives of more averages, all in images.
    Early on a half-life is `ramp` times the images seen, so that the initial weights are
    forgotten; `ramp: null` switches this off. (As in EDM, arXiv:2206.00364.)
    A checkpoint's `averages` holds all averages by half-life, its `state_dict` the evaluated one,
    and `current_model_state` the trained weights, which `restore_trained` puts into the module.
    (Lightning's WeightAveraging copies the whole module, and cannot copy a sharded one.)
    """

    phase = -1  # a checkpoint, picture or metric of a step uses the average after that step

    @ranges(half_life_images=above(0), also=whole_list(1), ramp=optional(above(0)))
    def __init__(
        self,
        half_life_images: int = 500_000,
        also: Sequence[int] = (),
        ramp: float | None = 0.05,
    ):
        self.lengths = {name_of(each): each for each in (half_life_images, *also)}
        if len(self.lengths) <= len(also):
            raise ValueError(
                f"also={list(also)} must not repeat a half-life, nor half_life_images="
                f"{half_life_images}; leave it out"
            )
        self.half_life_images = half_life_images
        self.ramp = ramp
        self.evaluated = name_of(half_life_images)
        self._averages: dict[str, WeightAverage] = {}  # by half-life
        self._latest_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        for name in self.lengths:
            if name not in self._averages:
                self._averages[name] = WeightAverage(pl_module)
            self._averages[name].follow()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not stepped(trainer, batch_idx) or pl_module.bad_steps.skipped:
            return  # nothing new to average
        for name, average in self._averages.items():
            half_life = self.lengths[name]
            if self.ramp is not None:
                half_life = min(half_life, self.ramp * pl_module.images_seen)
            decay = 0.5 ** (pl_module.batch_size / half_life) if half_life else 0.0
            # an average begins with the weights after the first step
            average.update(1 - decay if self._latest_step else 1.0)
        self._latest_step = trainer.global_step

    def on_train_end(self, trainer, pl_module) -> None:
        if average := self._averages.get(self.evaluated):  # none if it came after all steps
            average.copy_into_parameters()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        self._swap()

    def on_validation_epoch_end(self, trainer, pl_module) -> None:
        self._swap()

    def on_test_epoch_start(self, trainer, pl_module) -> None:
        # again: a run that was stopped in its final tests has no more training to end
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, int]:
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._latest_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[TRAINED] = checkpoint["state_dict"]
        averages = {name: average.whole() for name, average in self._averages.items()}
        checkpoint[AVERAGES] = averages
        # the same tensors, which a file holds once
        checkpoint["state_dict"] = checkpoint["state_dict"] | averages.get(self.evaluated, {})

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if TRAINED not in checkpoint:  # the run had no average before
            return
        kept = checkpoint[AVERAGES]
        # an average of another length begins with the one that the module holds
        self._averages = {self.evaluated: WeightAverage(pl_module, kept.get(self.evaluated))}
        for name in self.lengths.keys() & kept.keys():
            self._averages[name] = WeightAverage(pl_module, kept[name])

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Puts the averaged weights into the module for this block."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        if self._averages:  # empty before training
            self._averages[self.evaluated].swap()


def restore_trained(trainer: lightning.Trainer, checkpoint: dict) -> None:
    """Loads a checkpoint's trained weights into the module, if it also holds averaged ones."""
    if TRAINED in checkpoint:
        trainer.strategy.load_model_state_dict({"state_dict": checkpoint[TRAINED]})


@contextmanager
def averaged_weights(trainer: lightning.Trainer) -> Iterator[None]:
    """Puts the module into eval mode and its precision, with averaged weights if it has any."""
    module = trainer.lightning_module
    training = module.training
    module.eval()
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    average = next((c for c in callbacks if isinstance(c, EMA)), None)
    swapped = average.swapped() if average else nullcontext()
    try:
        with swapped, gathered(module), trainer.precision_plugin.forward_context():
            yield
    finally:
        module.train(training)
