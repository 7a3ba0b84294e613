"""Saves checkpoints during training, and prepares a run to resume from one."""

from pathlib import Path
from typing import cast

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO

from diffusion_lab.common.messages import TrainingStopped, say
from diffusion_lab.common.ranges import settings
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.runs import checkpoints
from diffusion_lab.training.callbacks.periodic import Interval, Periodic, validates
from diffusion_lab.training.callbacks.weight_averaging import restore_trained
from diffusion_lab.training.module import module_of

# checkpoint keys: number of logged rows; seconds of training, and seconds that do not count
ROWS, TIMES = "rows_of_metrics", "seconds"


@settings
class Checkpoint(Periodic):
    """Writes `last.ckpt` every `every_n_steps` steps and when training ends or is stopped.

    The callback runs after all others of its step, so a resumed run has nothing to catch up on. A
    checkpoint that cannot be written is reported and skipped; only the last raises TrainingStopped.
    """

    every_n_steps: Interval = 1000

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not validates(trainer):  # else on_validation_end saves, after this hook
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def due(self, trainer: lightning.Trainer) -> bool:
        # weights that give non-finite losses are useless to roll back to
        return super().due(trainer) and not module_of(trainer).bad_steps.skipped

    def on_validation_end(self, trainer: lightning.Trainer, pl_module) -> None:
        if trainer.state.fn == "fit" and validates(trainer) and self.due(trainer):
            self.timed_run(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module) -> None:
        # not on_train_end: by then the averaged weights have replaced the trained ones
        failure = self.save(trainer)
        if failure := on_rank_zero(lambda: failure):
            raise TrainingStopped(
                f"the checkpoint of step {trainer.global_step} could not be written ({failure}); "
                "free disk space"
            )

    @staticmethod
    def save(trainer: lightning.Trainer) -> str | None:
        """Writes `last.ckpt`; returns, on the rank that writes, why that failed, or None."""
        trainer.save_checkpoint(module_of(trainer).context.folder / checkpoints.LAST)
        return cast(AtomicCheckpointIO, trainer.strategy.checkpoint_io).failure

    def run(self, trainer: lightning.Trainer) -> None:
        if failure := self.save(trainer):
            say(
                f"The checkpoint of step {trainer.global_step} could not be written ({failure}); "
                "training continues, and earlier checkpoints are kept"
            )


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file next to the target and renames it, so a kill never leaves half a checkpoint.

    Lightning moves a temporary file from $TMPDIR; across file systems the move is a copy, and a
    kill during the copy destroys the previous checkpoint. `failure` says why the last write failed:
    an exception on the one rank that writes would leave the others waiting.
    """

    failure: str | None = None

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        self.failure = None
        try:
            checkpoints.save(checkpoint, Path(path))
        except OSError as error:
            self.failure = error.strerror or str(error)


class Resumption(Callback):
    """Adapts a checkpoint to the run that resumes from it, and cuts metrics.jsonl back to it."""

    def on_save_checkpoint(self, trainer: lightning.Trainer, pl_module, checkpoint: dict) -> None:
        rows, clock = pl_module.context.rows, pl_module.context.clock
        checkpoint[ROWS] = rows.count
        checkpoint[TIMES] = [clock.seconds(), clock.left_out]

    def on_load_checkpoint(self, trainer: lightning.Trainer, pl_module, checkpoint: dict) -> None:
        """Converts the saved counts of micro-batches to this run's ranks and accumulation."""
        pl_module.context.rows.truncate(checkpoint[ROWS])
        pl_module.context.clock.continue_from(*checkpoint[TIMES])
        restore_trained(trainer, checkpoint)
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        if not checkpoint["global_step"]:
            return
        before = progress["total"]["processed"] // checkpoint["global_step"]  # per step
        now = trainer.accumulate_grad_batches
        for counts in (progress["total"], progress["current"]):
            # the batch during which the checkpoint was saved is processed but not yet completed
            within = counts["processed"] - counts["completed"]
            done = counts["processed"] // before * now
            counts.update(ready=done, started=done, processed=done, completed=done - within)
