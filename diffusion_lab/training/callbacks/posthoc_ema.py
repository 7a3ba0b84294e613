"""Snapshots of two averages of the weights, of which `average` makes any other after training."""

from typing import Annotated

import lightning
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from diffusion_lab.common.formats import amount, joined
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import one_of, settings, whole
from diffusion_lab.compute.sharding import whole as gathered
from diffusion_lab.diffusion.power_average import decay, gamma_of
from diffusion_lab.runs.checkpoints import SNAPSHOT
from diffusion_lab.runs.snapshots import BUFFERS, DTYPES, FOLDER, LENGTHS, drop_after, save
from diffusion_lab.training.average import WeightAverage
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.module import module_of


@settings
class PosthocEMA(Callback):
    """Writes `snapshots` snapshots of power-function averages, evenly over a run; 0: none.

    Evenly means by steps, or by time in a run that its time limit ends. (EDM2, arXiv:2312.02696.)
    The averages are exact integrals over their profiles: during a skipped step, and during steps
    that a rollback undoes, the weights stood still. A checkpoint holds the averages of its step, so
    that a resumed run goes on with them, and drops the snapshots of later steps. A snapshot that
    cannot be written is reported and left out.
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
            drop_after(pl_module.context.folder, trainer.global_step)
        if not self.snapshots:
            return
        for length in self.lengths:
            if length not in self._averages:
                self._averages[length] = WeightAverage(pl_module.network)
            self._averages[length].follow()
        self._passed = self._due(pl_module)
        size = self.bytes_of(sum(p.numel() for p in pl_module.network.parameters()))
        say(
            f"Snapshots: {self.snapshots} of {len(LENGTHS)} averages in {self.dtype}, about "
            f"{amount(size)}B in all, go to {pl_module.context.folder / FOLDER}"
        )

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
        """Takes up the averages of a checkpoint, of a run that is resumed or rolled back.

        Raises UserError if the checkpoint has averages of other lengths, as of another version.
        """
        step, found = checkpoint["global_step"], checkpoint.get(SNAPSHOT)
        known = {name.partition("/")[0] for name in found or ()}
        if found and (missing := [str(each) for each in self.lengths if str(each) not in known]):
            raise UserError(
                f"the checkpoint of step {step} has no averages of length {joined(missing)}, as "
                "another version wrote it; resume with that version, or with "
                "callbacks.posthoc_ema.snapshots=0"
            )
        if trainer.is_global_zero:
            drop_after(pl_module.context.folder, step)
        if self.snapshots and found:
            self._step = step
            for length in self.lengths:
                names = (f"{length}/{name}" for name, _ in pl_module.network.named_parameters())
                state = {name.partition("/")[2]: found[name] for name in names}
                self._averages[length] = WeightAverage(pl_module.network, state)

    def _due(self, pl_module) -> int:
        """The number of snapshots that are due up to this step."""
        return int(self.snapshots * pl_module.progress)

    def _snapshot(self, pl_module) -> dict[str, Tensor]:
        """The whole snapshot of this step, on every rank (see runs/snapshots.py)."""
        averages = {
            f"{length}/{name}": value
            for length, average in self._averages.items()
            for name, value in average.whole().items()
        }
        network = pl_module.network
        known = dict(network.named_parameters())
        others = {k: v for k, v in network.state_dict().items() if k not in known}
        return averages | {
            f"{BUFFERS}/{name}": gathered(value).detach().cpu().clone()
            for name, value in others.items()
        }

    def _write(self, trainer: lightning.Trainer) -> None:
        module, step = module_of(trainer), trainer.global_step
        tensors = self._snapshot(module)
        if not trainer.is_global_zero:
            return
        try:
            save(module.context.folder, step, tensors, self.dtype)
        except OSError as error:  # an exception on one rank would leave the others waiting
            say(
                f"The snapshot of step {step} could not be written ({error.strerror}); training "
                "goes on without it"
            )
