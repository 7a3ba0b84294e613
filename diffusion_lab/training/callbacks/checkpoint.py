"""Saves checkpoints during training, and prepares a run to resume from one."""

import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import field
from pathlib import Path
from typing import Annotated, Any

import lightning
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.device_mesh import DeviceMesh

from diffusion_lab.common.messages import TrainingStopped, say
from diffusion_lab.common.ranges import Count, Flag, one_of, optional, settings
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.compute.sharding import kept_sharded
from diffusion_lab.metrics.quantity import OF_SAMPLES, VALIDATION, higher_is_better
from diffusion_lab.runs import checkpoints
from diffusion_lab.training.callbacks.periodic import Interval, Periodic, validates
from diffusion_lab.training.callbacks.weight_averaging import restore_trained
from diffusion_lab.training.module import module_of

# checkpoint keys: number of logged rows; seconds of training, and seconds that do not count
ROWS, TIMES = "rows_of_metrics", "seconds"
# the metrics that can rank checkpoints: of validations, and of samples
RANKING = [*VALIDATION, *(q.name for q in OF_SAMPLES if q.judged)]


@settings
class Checkpoint(Periodic):
    """Writes `last.ckpt` every `every_n_steps` steps and when training ends or is stopped.

    The callback runs after all others of its step, so a resumed run has nothing to catch up on. A
    checkpoint that cannot be written is reported and skipped; only the last raises TrainingStopped.

    If `sharded`, each rank writes its share of the tensors to a folder beside the file, and none
    holds all of them.

    With `background`, training goes on as soon as the state has been copied to main memory, and a
    thread writes it, one at a time; training waits for the last.

    Those of every `keep_every_n_steps` steps are kept, and the `top_k` that are best by the metric
    `best` of validation images, whenever it is measured.
    """

    phase = 2  # last, as a resumed run does not repeat its step
    at_end = True
    every_n_steps: Interval = 1000
    sharded: Flag = False
    background: Flag = False
    keep_every_n_steps: Interval = None
    best: Annotated[str | None, optional(one_of(*RANKING))] = None
    top_k: Count = 1
    pending: Future | None = field(init=False, default=None)  # that is being written

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        # the metrics of a resumed step may have been measured only now, as a stop came before
        folder, step = module_of(trainer).context.folder, trainer.global_step
        known = step in checkpoints.ranked(folder, self.best)
        if measured_now(trainer, self.best) is not None and not known:
            self.keeper(trainer)()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not validates(trainer):  # else on_validation_end saves, after this hook
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def due(self, trainer: lightning.Trainer) -> bool:
        wanted = super().due(trainer) or self.keeps(trainer)
        # weights that give non-finite losses are useless to roll back to
        return wanted and not module_of(trainer).bad_steps.skipped

    def on_validation_end(self, trainer: lightning.Trainer, pl_module) -> None:
        if trainer.state.fn == "fit" and validates(trainer) and self.due(trainer):
            self.timed_run(trainer)

    def on_train_epoch_end(self, trainer: lightning.Trainer, pl_module) -> None:
        # not on_train_end: by then the averaged weights have replaced the trained ones
        self.wait()
        failure = self.writer(trainer)()
        if failure := on_rank_zero(lambda: failure):
            raise TrainingStopped(
                f"the checkpoint of step {trainer.global_step} could not be written ({failure}); "
                "free disk space"
            )

    def on_exception(self, trainer: lightning.Trainer, pl_module, exception) -> None:
        self.wait()  # before the run's lock is gone

    def at_the_end(self, trainer: lightning.Trainer) -> None:
        self.keeper(trainer)()  # its metrics are known only now

    def keeps(self, trainer: lightning.Trainer) -> bool:
        """Whether the checkpoint of this step is kept, unless it is the last step."""
        step = trainer.global_step
        if step == trainer.max_steps:
            return False
        if self.lasting(step):
            return True
        measured = measured_now(trainer, self.best) is not None  # on every rank
        return measured and on_rank_zero(lambda: step in self.ranking(trainer))

    def lasting(self, step: int) -> bool:
        """Whether a step's checkpoint is a milestone."""
        return self.keep_every_n_steps is not None and step % self.keep_every_n_steps == 0

    def ranking(self, trainer: lightning.Trainer) -> dict[int, float]:
        """The values of `best` at the best steps, this one included if it is; the best one first.

        Empty if `best` was not measured at this step, or is not finite.
        """
        value = measured_now(trainer, self.best)
        if self.best is None or value is None or not math.isfinite(value):
            return {}
        folder = module_of(trainer).context.folder
        values = checkpoints.ranked(folder, self.best) | {trainer.global_step: value}
        higher = bool(higher_is_better(self.best))
        better_first = sorted(values, key=values.__getitem__, reverse=higher)
        return {step: values[step] for step in better_first[: self.top_k]}

    def keeper(self, trainer: lightning.Trainer) -> Callable[[], None]:
        """Returns what keeps this step's checkpoint if it is a milestone or one of the best."""
        folder, step = module_of(trainer).context.folder, trainer.global_step
        ranking = self.ranking(trainer) if trainer.is_global_zero else {}

        def keep() -> None:
            try:
                if self.lasting(step) or step in ranking:
                    checkpoints.keep(folder, step)
                if step in ranking:
                    checkpoints.rank(folder, str(self.best), ranking, self.lasting)
            except OSError as error:
                say(
                    f"The checkpoint of step {step} could not be kept ({error.strerror}); training "
                    "continues"
                )

        return keep if trainer.is_global_zero else lambda: None

    def writer(self, trainer: lightning.Trainer) -> Callable[[], str | None]:
        """Returns what writes the state of now to `last.ckpt` and says why that failed, or None."""
        run, first = module_of(trainer).context.folder, trainer.is_global_zero
        with kept_sharded() if self.sharded else nullcontext():
            content = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        if self.sharded:
            content, tensors = checkpoints.take_apart(content)
            folder = on_rank_zero(lambda: checkpoints.new_shards(run, trainer.global_step))
            begun = checkpoints.begin_shards(folder, tensors) if self.background else None
        elif self.background and first:
            words, tensors = checkpoints.take_apart(content)
            copies = {place: each.detach().to("cpu", copy=True) for place, each in tensors.items()}
            content = checkpoints.put_together(words, copies)

        def write() -> str | None:
            try:
                if self.sharded:
                    begun.result() if begun else checkpoints.write_shards(folder, tensors)
                if self.sharded and first:
                    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
                    content[checkpoints.SHARDS] = {"folder": folder.name, "sizes": sizes}
                if first:
                    checkpoints.save(content, run / checkpoints.LAST)
                if self.sharded and first:
                    checkpoints.drop_shards(run)
            except (OSError, CheckpointException) as error:
                return getattr(error, "strerror", None) or str(error).splitlines()[0]
            return None

        return write

    def run(self, trainer: lightning.Trainer) -> None:
        self.wait()  # for the one before, which may be in the ranking
        step, keep, write = trainer.global_step, self.keeper(trainer), self.writer(trainer)

        def finish() -> None:
            if failure := write():
                say(
                    f"The checkpoint of step {step} could not be written ({failure}); training "
                    "continues, and earlier checkpoints are kept"
                )
            else:
                keep()

        if not self.background:
            return finish()
        thread = ThreadPoolExecutor(1)
        self.pending = thread.submit(finish)
        thread.shutdown(wait=False)

    def wait(self) -> None:
        """Waits until no checkpoint is being written."""
        if self.pending is not None:
            self.pending.result()
            self.pending = None


def measured_now(trainer: lightning.Trainer, name: str | None) -> float | None:
    """The value of a metric for the weights of this step, on every rank; None if not measured."""
    module, step = module_of(trainer), trainer.global_step
    if name in VALIDATION:
        return module.validation_metrics.get(name) if module.validated_step == step else None
    results = module.context.results if module.context.measured_at == step else {}
    return next((value for key, value in results.items() if key.split("/")[0] == name), None)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a file next to the target and renames it, so a kill never leaves half a checkpoint.

    Lightning moves one from $TMPDIR, which may be a copy that a kill leaves unfinished.
    """

    mesh: DeviceMesh | None = None  # over which a rank reads its rows of tensors in shards

    def save_checkpoint(self, checkpoint: dict, path: str | Path, storage_options=None) -> None:
        checkpoints.save(checkpoint, Path(path))

    def load_checkpoint(self, path: str | Path, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return checkpoints.read(Path(path), self.mesh)


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
