"""Averages of the weights during training, kept next to them and sharded in the same way."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Annotated, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from diffusion_lab.common.formats import amount
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import above, one_of, optional, settings, whole, whole_list
from diffusion_lab.compute.sharding import gathered, local, shared_as, to_save
from diffusion_lab.diffusion.power_average import decay, gamma_of
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.checkpoints import AVERAGES, SNAPSHOT, TRAINED
from diffusion_lab.runs.weights import (
    BUFFERS,
    DTYPES,
    LENGTHS,
    SNAPSHOTS,
    drop_snapshots_after,
    save_snapshot,
)
from diffusion_lab.training.bad_steps import move_towards
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.module import module_of


class WeightAverage:
    """An average of the parameters of a module; each rank holds its share of it.

    It begins as `state`, unsharded tensors by name, or else as the current parameters.
    """

    def __init__(self, module: nn.Module, state: Mapping[str, Tensor] | None = None):
        self._parameters = dict(module.named_parameters())
        begin = self._parameters if state is None else state
        self._shares = [  # in the layout of the parameters, as fused kernels ask for
            torch.empty_like(own).copy_(local(shared_as(begin[name], self._parameters[name])))
            for name, own in zip(self._parameters, self._own(), strict=True)
        ]

    def follow(self) -> None:
        """Moves the average to the device of the parameters, once they have been moved."""
        places = (parameter.device for parameter in self._parameters.values())
        self._shares = [share.to(place) for share, place in zip(self._shares, places, strict=True)]

    def update(self, weight: float, found_inf: Tensor | None = None) -> None:
        """Moves the average towards the parameters: by `weight`, in [0, 1], of the way.

        It stays where it is if `found_inf`, () on the parameters' device, is 1.
        """
        move_towards(self._shares, self._own(), weight, found_inf)

    def copy_into_parameters(self) -> None:
        """Replaces the parameters by the average."""
        torch._foreach_copy_(self._own(), self._shares)

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """Exchanges the parameters and the average for this block."""
        self.swap()
        try:
            yield
        finally:
            self.swap()

    def swap(self) -> None:
        """Exchanges the parameters and the average."""
        kept = [parameter.clone() for parameter in self._own()]
        self.copy_into_parameters()
        torch._foreach_copy_(self._shares, kept)

    def to_save(self) -> dict[str, Tensor]:
        """A copy of the average for a checkpoint, by names of parameters, on every rank."""
        with self.swapped():
            # copied: the parameters themselves are about to change again
            return {
                name: to_save(parameter.detach())
                if isinstance(parameter, DTensor)
                else parameter.detach().to("cpu", copy=True)
                for name, parameter in self._parameters.items()
            }

    def _own(self) -> list[Tensor]:
        """This rank's share of each parameter, as a view."""
        return [local(parameter) for parameter in self._parameters.values()]


def follow(averages: dict[Any, WeightAverage], names: Iterable[Any], module: nn.Module) -> None:
    """Begins the averages that are missing, and moves all to the device of the parameters."""
    for name in names:
        if name not in averages:
            averages[name] = WeightAverage(module)
        averages[name].follow()


@settings
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

    half_life_images: Annotated[int, above(0)] = 500_000
    also: Annotated[Sequence[int], whole_list(1)] = ()
    ramp: Annotated[float | None, optional(above(0))] = 0.05

    def __post_init__(self) -> None:
        self.lengths = {name_of(each): each for each in (self.half_life_images, *self.also)}
        if len(self.lengths) <= len(self.also):
            raise ValueError(
                f"also={list(self.also)} must not repeat a half-life, nor half_life_images="
                f"{self.half_life_images}; leave it out"
            )
        self.evaluated = name_of(self.half_life_images)
        self._averages: dict[str, WeightAverage] = {}  # by half-life
        self._latest_step = 0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self.begin(pl_module)

    def begin(self, module: nn.Module) -> None:
        """Begins the averages that no checkpoint had, with the weights as they are."""
        follow(self._averages, self.lengths, module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not stepped(trainer, batch_idx):
            return
        # a GPU is asked only until one step has been taken
        found_inf = pl_module.bad_steps.found_inf if self._latest_step else None
        if found_inf is None and pl_module.bad_steps.skipped:
            return  # nothing new to average
        for name, average in self._averages.items():
            half_life = self.lengths[name]
            if self.ramp is not None:
                half_life = min(half_life, self.ramp * pl_module.images_seen)
            decay = 0.5 ** (pl_module.batch_size / half_life) if half_life else 0.0
            # an average begins with the weights after the first step
            average.update(1 - decay if self._latest_step else 1.0, found_inf)
        self._latest_step = trainer.global_step

    @property
    def current(self) -> WeightAverage | None:
        """The average that is evaluated; None before training, or if it came after all steps."""
        return self._averages.get(self.evaluated)

    def on_train_end(self, trainer, pl_module) -> None:
        if self.current:
            self.current.copy_into_parameters()

    def on_validation_epoch_start(self, trainer, pl_module) -> None:
        if self.current:
            self.current.swap()

    on_validation_epoch_end = on_validation_epoch_start

    def on_test_epoch_start(self, trainer, pl_module) -> None:
        # again: a run that was stopped in its final tests has no more training to end
        self.on_train_end(trainer, pl_module)

    def state_dict(self) -> dict[str, int]:
        return {"latest_update_step": self._latest_step}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._latest_step = state_dict["latest_update_step"]

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[TRAINED] = checkpoint["state_dict"]
        averages = {name: average.to_save() for name, average in self._averages.items()}
        checkpoint[AVERAGES] = averages
        # the same tensors, which a file holds once
        checkpoint["state_dict"] = checkpoint["state_dict"] | averages.get(self.evaluated, {})

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        self._averages = {}
        if TRAINED not in checkpoint:  # the run had no average before
            return
        kept = checkpoint[AVERAGES]
        # an average of another length begins with the one that the module holds
        self._averages = {self.evaluated: WeightAverage(pl_module, kept.get(self.evaluated))}
        for name in self.lengths.keys() & kept.keys():
            self._averages[name] = WeightAverage(pl_module, kept[name])


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
    average = next((c.current for c in callbacks if isinstance(c, EMA)), None)
    try:
        with (
            average.swapped() if average else nullcontext(),
            gathered(module),
            trainer.precision_plugin.forward_context(),
        ):
            yield
    finally:
        module.train(training)


@settings
class PosthocEMA(Callback):
    """Writes `snapshots` snapshots of power-function averages, evenly over a run; 0: none.

    Evenly means by steps, or by time in a run that its time limit ends. (EDM2, arXiv:2312.02696.)
    The averages are exact integrals over their profiles: during a skipped step, and during steps
    that a rollback undoes, the weights stood still. A checkpoint holds the averages of its step, so
    that a resumed run goes on with them, and drops the snapshots of later steps. Those that a
    rollback drops are not taken again, as their steps have passed. A snapshot that cannot be
    written is reported and left out.
    """

    snapshots: Annotated[int, whole(0).as_in(32)] = 0
    dtype: Annotated[str, one_of(*DTYPES)] = "float32"

    def __post_init__(self) -> None:
        self.lengths = LENGTHS if self.snapshots else ()
        self._averages: dict[float, WeightAverage] = {}  # by length
        self._step = 0  # the step of the averages
        self._passed = 0  # snapshots that are due up to this step of the run

    def bytes_of(self, parameters: int) -> int:
        """The size of all snapshots of a network with so many parameters."""
        return self.snapshots * len(LENGTHS) * DTYPES[self.dtype].itemsize * parameters

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        if trainer.is_global_zero:
            drop_snapshots_after(pl_module.context.folder, trainer.global_step)
        if not self.snapshots:
            return
        self.begin(pl_module)
        self._passed = self._due(pl_module)
        size = self.bytes_of(sum(p.numel() for p in pl_module.network.parameters()))
        say(
            f"Snapshots: {self.snapshots} of {len(LENGTHS)} averages in {self.dtype}, about "
            f"{amount(size)}B in all, go to {pl_module.context.folder / SNAPSHOTS}"
        )

    def begin(self, module) -> None:
        """Begins the averages that no checkpoint had, with the weights as they are."""
        follow(self._averages, self.lengths, module.network)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self.snapshots or not stepped(trainer, batch_idx):
            return
        step = trainer.global_step
        for length, average in self._averages.items():
            average.update(1 - decay(gamma_of(length), self._step, step))
        self._step = step
        if self._due(pl_module) > self._passed:
            self._passed = self._due(pl_module)
            context = pl_module.context
            with context.clock.stopped(), context.memory.stopped():
                self._write(trainer)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if self._averages:
            checkpoint[SNAPSHOT] = self._snapshot(pl_module)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        """Takes up the averages of a checkpoint, of a run that is resumed or rolled back."""
        step, found = checkpoint["global_step"], checkpoint.get(SNAPSHOT)
        if trainer.is_global_zero:
            drop_snapshots_after(pl_module.context.folder, step)
        self._step, self._averages = (step if found else 0), {}
        if found:
            for length in self.lengths:
                names = (f"{length}/{name}" for name, _ in pl_module.network.named_parameters())
                state = {name.partition("/")[2]: found[name] for name in names}
                self._averages[length] = WeightAverage(pl_module.network, state)

    def _due(self, pl_module) -> int:
        """The number of snapshots that are due up to this step."""
        return int(self.snapshots * pl_module.progress)

    def _snapshot(self, pl_module) -> dict[str, Tensor]:
        """The snapshot of this step, on every rank (see runs/weights.py)."""
        averages = {
            f"{length}/{name}": value
            for length, average in self._averages.items()
            for name, value in average.to_save().items()
        }
        network = pl_module.network
        known = dict(network.named_parameters())
        others = {k: v for k, v in network.state_dict().items() if k not in known}
        return averages | {
            f"{BUFFERS}/{name}": to_save(value).detach().cpu().clone()
            for name, value in others.items()
        }

    def _write(self, trainer: lightning.Trainer) -> None:
        module, step = module_of(trainer), trainer.global_step
        tensors = self._snapshot(module)
        if not trainer.is_global_zero:
            return
        try:
            save_snapshot(module.context.folder, step, tensors, self.dtype)
        except OSError as error:  # an exception on one rank would leave the others waiting
            say(
                f"The snapshot of step {step} could not be written ({error.strerror}); training "
                "goes on without it"
            )
