"""Callbacks that end a run: in order on Ctrl-C or SIGTERM, or as nothing is to be expected of it.

In a SLURM job, SIGUSR1 and SIGUSR2 stop a run, too. SLURM sends one of these before the job's time
is up, and SIGTERM when another job preempts it; after any of the three the job is requeued.
"""

import json
import math
import signal
import statistics
import time
from pathlib import Path
from typing import Annotated, Any, Self

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig

from diffusion_lab.common.files import read_rows, write_atomically
from diffusion_lab.common.messages import TrainingStopped, UserError, say
from diffusion_lab.common.ranges import Count, inside, settings, whole
from diffusion_lab.compute import launch, slurm
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero
from diffusion_lab.metrics.quantity import higher_is_better
from diffusion_lab.runs.files import COLLAPSED, METRICS
from diffusion_lab.training.callbacks.periodic import Checked, stepped, validates
from diffusion_lab.training.module import VOTES, TrainedModule, module_of

SIGNALS = (signal.SIGINT, signal.SIGTERM)
JOB_SIGNALS = tuple(  # sbatch sends USR1, submitit USR2; Windows has neither
    getattr(signal, name) for name in ("SIGTERM", "SIGUSR1", "SIGUSR2") if hasattr(signal, name)
)
SECONDS_BETWEEN_VOTES = 10.0  # if so many steps take longer, the ranks vote after each


class Interruption(Callback):
    """Stops training after the current step; a second Ctrl-C stops it at once.

    The handler only sets a flag: a checkpoint written inside it could collide with another rank's
    all-reduce. The ranks vote after a step, so all stop at the same one. Once training has ended
    and is saved, `at_once` lets a signal stop a rank immediately. As a context manager it puts
    back the handlers that were there before, its own and Lightning's.
    """

    def __init__(self) -> None:
        self.requested = False
        self.requeue = False
        self.began = False  # whether the first step was reached, after a checkpoint was restored
        self._under_way = False  # whether a step was taken
        self._in_job = False  # whether this is a SLURM job
        self._typed = False  # whether Ctrl-C was pressed
        self._at_once = False
        self._slow = False  # whether the ranks vote after each step
        self._heard = False  # whether all ranks know that one is asked to stop
        self._since = time.monotonic()
        self._previous: dict[int, Any] = {}  # previous handlers by signal number

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self.began = True
        if self._heard:  # in an evaluation, which is made up for at this step alone
            self._stop(trainer)

    def __enter__(self) -> Self:
        self._previous = {number: signal.getsignal(number) for number in (*SIGNALS, *JOB_SIGNALS)}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) is not handler:
                signal.signal(number, handler)

    def at_once(self) -> None:
        """From now on a signal raises KeyboardInterrupt, even one that came just before."""
        self._at_once = True
        self.install()
        if self.requested:
            raise KeyboardInterrupt

    def install(self, *_: object) -> None:
        """Takes the place of Lightning's handlers, once they are there."""
        self._in_job = slurm.started_by_srun()
        for number in {*SIGNALS, *JOB_SIGNALS} if self._in_job else SIGNALS:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: object) -> None:
        again, self.requested = self.requested, True
        if self._in_job and number in JOB_SIGNALS:
            self.requeue = True
            say(f"SLURM has sent {signal.Signals(number).name}: stopping soon.")
        elif again and (self._typed or number == signal.SIGINT):
            # the second Ctrl-C reaches the processes of torchrun as SIGTERM
            raise KeyboardInterrupt
        elif not again and not self._at_once:
            say("Stopping after this step; press Ctrl-C again to stop at once and lose it.")
        self._typed = self._typed or number == signal.SIGINT
        if self._at_once and not again:
            raise KeyboardInterrupt

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self._under_way:
            self._under_way = True
            launch.expect_steps()
        if stepped(trainer, batch_idx) and self._due(trainer):
            self.requested = self.asked(trainer)
            if self.requested:
                self._stop(trainer)
                if not validates(trainer):
                    # if asked to stop, Lightning would validate first, before anything is saved
                    trainer.limit_val_batches = 0

    def _stop(self, trainer: lightning.Trainer) -> None:
        self.requested = trainer.should_stop = True
        self.requeue = trainer.strategy.reduce_boolean_decision(self.requeue, all=False)

    def asked(self, trainer: lightning.Trainer) -> bool:
        """Whether any rank is asked to stop; all ranks must call it."""
        self._heard = trainer.strategy.reduce_boolean_decision(self.requested, all=False)
        return self._heard

    def _due(self, trainer: lightning.Trainer) -> bool:
        """Whether the ranks vote after this step, which makes GPUs wait; all ranks agree on it."""
        # an evaluation that was stopped is made up for at this step alone
        if trainer.world_size == 1 or self._heard:
            return True
        if trainer.global_step % VOTES:
            return self._slow
        before, self._since = self._since, time.monotonic()
        long = self._since - before > SECONDS_BETWEEN_VOTES
        self._slow = trainer.strategy.reduce_boolean_decision(long, all=False)
        return True


@settings
class MedianPruning(Callback):
    """Stops a run whose best value is worse than the other runs' median at as many images.

    This is Optuna's MedianPruner on the metrics.jsonl files of the neighbouring run folders, so it
    needs only a shared disk. `metric` is measured by validation; lower is better but for what is
    known to be better if higher, such as val/psnr. A run that validated at other numbers of images
    (another batch size) counts with its last earlier value.
    The first `startup_runs` runs, and the first `startup_steps` steps of each, are never stopped.
    A run that was stopped is not trained on when it is resumed, as for its final metrics.
    """

    metric: str = "val/loss"
    startup_runs: Count = 5
    startup_steps: Annotated[int, whole(0)] = 0

    def __post_init__(self) -> None:
        self.pruned = False

    @property
    def state_key(self) -> str:  # of each metric, as a checkpoint holds one state of a key
        return self._generate_state_key(metric=self.metric)

    def state_dict(self) -> dict[str, bool]:
        return {"pruned": self.pruned}

    def load_state_dict(self, state_dict: dict[str, bool]) -> None:
        self.pruned = state_dict["pruned"]

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        if self.pruned:
            say(
                "This run was pruned; to train it further, write callbacks.pruning=null and a "
                "larger trainer.max_steps"
            )
            self._end(trainer)

    def _end(self, trainer: lightning.Trainer) -> None:
        self.pruned = trainer.should_stop = True
        module_of(trainer).context.summary["pruned"] = True

    def on_validation_end(self, trainer: lightning.Trainer, pl_module) -> None:
        step = trainer.global_step
        if trainer.state.fn != "fit" or not self.startup_steps <= step < trainer.max_steps:
            return
        images, folder = pl_module.images_seen, pl_module.context.folder
        hopeless = trainer.is_global_zero and self.hopeless(folder, images)
        if trainer.strategy.reduce_boolean_decision(hopeless, all=False):
            self._end(trainer)

    def hopeless(self, folder: Path, images: int) -> bool:
        """Whether a run's best value within `images` is worse than the other runs' median there."""
        own = [value for at, value in self.values(folder).items() if at <= images]
        if not own:
            raise UserError(
                f"callbacks.pruning.metric={self.metric} is not measured by validations; write "
                "callbacks.pruning.metric=val/loss"
            )
        folders = (path.parent for path in folder.parent.glob(f"*/{METRICS}"))
        others = [self.values(each) for each in folders if each != folder]
        there = [
            values[max(at for at in values if at <= images)]
            for values in others
            if values and min(values) <= images <= max(values)
        ]
        if len(there) < self.startup_runs:
            return False
        best, median = min(own), statistics.median(there)
        if best <= median:
            return False
        say(
            f"Pruned after {images:,} images: {self.metric} {self.sign * best:.4g} is worse than "
            f"the median of {len(there)} other runs, {self.sign * median:.4g}"
        )
        return True

    @property
    def sign(self) -> int:
        """-1 if higher values of `metric` are better, else 1."""
        return -1 if higher_is_better(self.metric) else 1

    def values(self, folder: Path) -> dict[int, float]:
        """The values of `metric`, with its sign, in a run folder by training images seen."""
        rows = read_rows(folder / METRICS)
        return {  # what is not finite is worse than anything
            row["images"]: self.sign * row[self.metric]
            if math.isfinite(row[self.metric])
            else math.inf
            for row in rows
            if {"images", self.metric} <= {*row}
        }


DIVERSITY = "train/diversity"  # how much samples of a label vary, relative to its images


@settings
class Collapse(Callback, Checked):
    """Ends a run whose samples of a label vary less than `least` times as much as its images.

    It looks whenever losses are logged, and ends the run after `patience` such looks in a row. A
    batch in which no two images have one label shows nothing, and is passed over.
    """

    least: Annotated[float, inside(0, 1)] = 0.05
    patience: Count = 20

    def __post_init__(self) -> None:
        self.row = 0  # looks in a row at samples that are alike

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        if DIVERSITY not in module.returns:
            raise UserError("callbacks.collapse watches a GAN, and this run is none; leave it out")

    def state_dict(self) -> dict[str, int]:
        return {"row": self.row}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.row = state["row"]

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        due = trainer.global_step % trainer.log_every_n_steps == 0
        if not (due and stepped(trainer, batch_idx)) or pl_module.bad_steps.skipped:
            return
        every = of_all_ranks(outputs[DIVERSITY].item())
        found = [each for each in every if math.isfinite(each)]
        if not found:
            return
        mean = sum(found) / len(found)
        self.row = self.row + 1 if mean < self.least else 0
        if self.row >= self.patience:
            record = json.dumps({"step": trainer.global_step, DIVERSITY: mean})
            path = module_of(trainer).context.folder / COLLAPSED
            on_rank_zero(lambda: write_atomically(path, record))
            raise TrainingStopped(
                f"the generator's samples of a label are alike: up to step {trainer.global_step} "
                f"they vary {mean:.1%} as much as images; try a larger objective.gamma, or a lower "
                "optimizer.lr, in a new run",
                final=True,
            )
