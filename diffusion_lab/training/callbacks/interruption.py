"""Ends a run in order on Ctrl-C or SIGTERM: finishes the step and saves everything.

In a SLURM job, SIGUSR1 and SIGUSR2 do the same. SLURM sends one of these before the job's time is
up, and SIGTERM when another job preempts it; after any of the three the job is requeued.
"""

import signal
import time
from typing import Any, Self

import lightning
from lightning.pytorch.callbacks import Callback

from diffusion_lab.common.messages import say
from diffusion_lab.compute import launch, slurm
from diffusion_lab.training.callbacks.periodic import stepped, validates
from diffusion_lab.training.module import VOTES

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
        self._since = time.monotonic()
        self._previous: dict[int, Any] = {}  # previous handlers by signal number

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self.began = True
        self._install()

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
        self._install()
        if self.requested:
            raise KeyboardInterrupt

    def _install(self) -> None:
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
                vote = trainer.strategy.reduce_boolean_decision
                self.requeue = vote(self.requeue, all=False)
                trainer.should_stop = True
                if not validates(trainer):
                    # if asked to stop, Lightning would validate first, before anything is saved
                    trainer.limit_val_batches = 0

    def asked(self, trainer: lightning.Trainer) -> bool:
        """Whether any rank is asked to stop; all ranks must call it."""
        return trainer.strategy.reduce_boolean_decision(self.requested, all=False)

    def _due(self, trainer: lightning.Trainer) -> bool:
        """Whether the ranks vote after this step, which makes GPUs wait; all ranks agree on it."""
        if trainer.world_size == 1:
            return True
        if trainer.global_step % VOTES:
            return self._slow
        before, self._since = self._since, time.monotonic()
        long = self._since - before > SECONDS_BETWEEN_VOTES
        self._slow = trainer.strategy.reduce_boolean_decision(long, all=False)
        return True
