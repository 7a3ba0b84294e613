"""One training run, from a composed configuration to a folder with pictures and a summary.

`train` starts the processes of a run (`launch_ranks`), or trains in this one: `prepare` builds
everything and reads the data, `fit` works in the run folder.
"""

import errno
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path

import lightning
import torch
from lightning.pytorch.callbacks import LambdaCallback
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.assembly.objects import facts_of_data, read_data
from diffusion_lab.assembly.sentences import own_places
from diffusion_lab.common.formats import duration
from diffusion_lab.common.messages import TrainingStopped, UserError, say
from diffusion_lab.common.ranges import FOLDER, optional, whole
from diffusion_lab.compute import launch, slurm
from diffusion_lab.compute.batch import BatchLayout, solve_batch
from diffusion_lab.compute.device import (
    CHOICES,
    PRODUCTS,
    PeakMemory,
    float32_products,
    mode_of,
    pays,
)
from diffusion_lab.compute.distributed import (
    SECONDS_TO_BE_ENDED_IN,
    another_ended,
    on_rank_zero,
    rank_and_world,
)
from diffusion_lab.compute.started import in_launched_process
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.files import METRICS
from diffusion_lab.runs.folder import (
    check_new,
    create,
    reopen,
    save_config,
    unfinished,
    write_summary,
)
from diffusion_lab.runs.progress import ERROR, failure_noted, locked, reason_of, seconds_in
from diffusion_lab.training.callbacks import Interruption, Periodic
from diffusion_lab.training.logger import Clock, JSONLines, build_loggers, check_loggers
from diffusion_lab.training.module import ENDLESS, RunContext
from diffusion_lab.training.summary import (
    first_stage_seconds,
    git_commit,
    metrics_of,
    say_result,
    summarise,
)
from diffusion_lab.training.task import Task, build_task
from diffusion_lab.training.trainer import TRAINER, build_trainer, check_trainer, quiet_lightning

# errors in reading or writing a file that the program did not cause
DISK_TROUBLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE}
COMPILERS = ("torch._inductor", "torch._dynamo")  # modules of torch.compile's errors
NO_SUCH_PLACE = (PermissionError, NotADirectoryError, IsADirectoryError)


def resume_command(command: str, folder: Path) -> str:
    """The command line that resumes a run."""
    return shlex.join(["diffusion-lab", command, f"resume={folder}"])


@contextmanager
def explaining_failures(command: str, folder: Path | None) -> Iterator[None]:
    """Turns failures that the program did not cause into a UserError that says how to resume.

    Where a second Ctrl-C ends training at once, it says so, too, and raises KeyboardInterrupt.
    `folder` is the run's, None if only the launched processes know it. If all ranks stop for the
    same reason (TrainingStopped), only the first says so.
    """
    try:
        yield
        return
    except (KeyboardInterrupt, SystemExit) as end:  # Lightning turns the first into the second
        say(f"Stopped at once; {remedy(command, folder)}")
        raise KeyboardInterrupt from end
    except TrainingStopped as error:
        reason = str(error)
        if rank_and_world()[0] != 0:
            sys.exit(2)
        if error.final:
            raise UserError(f"training stopped: {reason}") from error
    except (ConnectionError, EOFError) as error:  # also if a process that loads data dies
        reason = f"a process that loads data died: {str(error) or type(error).__name__}"
    except OSError as error:
        if error.errno not in DISK_TROUBLE and not isinstance(error, NO_SUCH_PLACE):
            raise
        reason = f"{error.filename or 'a file'} could not be read or written ({error.strerror})"
    except torch.OutOfMemoryError as error:
        raise UserError(
            "the device's memory is full; write a smaller micro_batch_size, or "
            f"activation_checkpointing=true, and {remedy(command, folder)}"
        ) from error
    except Exception as error:
        compiling = [e for e in chain_of(error) if type(e).__module__.startswith(COMPILERS)]
        if compiling:
            raise UserError(
                f"the network could not be compiled ({str(compiling[-1]).splitlines()[0]}); write "
                "compile=false, or install a C compiler and Python's headers"
            ) from error
        # torch raises this in a signal's handler, so in the middle of other code, which may then
        # raise another error
        died = [str(each) for each in chain_of(error) if "DataLoader worker" in str(each)]
        if died:
            reason = f"a process that loads data died: {died[0].splitlines()[0]}"
        elif another_ended(error):
            # the launcher ends this process too, and reports which one failed first
            time.sleep(SECONDS_TO_BE_ENDED_IN)
            reason = "another process of this run ended, or did not answer"
        else:
            raise
    raise UserError(f"training stopped: {reason.rstrip('. ')}; {remedy(command, folder)}")


@contextmanager
def restoring(checkpoint: Path | None, interruption: Interruption) -> Iterator[None]:
    """Turns an error before the first step of a resumed run into a UserError on its checkpoint."""
    try:
        yield
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        told = isinstance(error, UserError | torch.OutOfMemoryError) or another_ended(error)
        if checkpoint is None or interruption.began or told:
            raise
        raise UserError(
            f"{checkpoint} does not fit this run ({reason_of(error).rstrip(': ')}), as if it were "
            "of another run or program; put the run's own in its place, or train the run again"
        ) from error


def chain_of(error: BaseException | None) -> Iterator[BaseException]:
    """Yields an error, and the errors during whose handling it was raised."""
    while error is not None:
        yield error
        error = error.__context__


def remedy(command: str, folder: Path | None) -> str:
    """The advice on how to continue a run that stopped."""
    if folder and not checkpoints.exists(folder):
        return "nothing was saved yet, so start again"
    resume = resume_command(command, folder or Path("FOLDER"))
    return f"resume from the last checkpoint with {resume}"


ALLOWED = {
    "name": FOLDER,
    **CHOICES,
    **TRAINER,
    "matmul_precision": PRODUCTS,
    "batch_size": whole(1),
    "micro_batch_size": optional(whole(1)),
    "seed": whole(0, 2**32 - 1),
    "validate_every_n_steps": whole(1),
}


class Outcome(Enum):
    """How a training command ended: at the run's end, or before it, with everything saved."""

    FINISHED = "finished"
    STOPPED = "stopped"
    REQUEUED = "requeued"  # like STOPPED, but SLURM starts the job again


@dataclass(frozen=True)
class Prepared:
    """A run that is built and has read its data; nothing is written yet."""

    cfg: DictConfig  # completed by facts found in the data
    task: Task
    layout: BatchLayout
    device: torch.device
    metrics: PreparedMetrics | None
    trainer: lightning.Trainer
    interruption: Interruption


def train(cfg: DictConfig, overrides: list[str]) -> Outcome:
    """Trains the model that a configuration describes.

    Everything that can be refused is refused before anything is written. `overrides` are the
    command line's, for the processes of a run on several devices.
    """
    git_commit()  # that of the code which trains, for the summary
    check_settings(cfg)
    devices, nodes = launch.processes(cfg.trainer)
    layout = solve_batch(cfg.batch_size, devices * nodes, cfg.micro_batch_size)
    if layout.world > 1 and not in_launched_process():
        return launch_ranks(cfg, layout, overrides)
    with float32_products(cfg.get("matmul_precision")), Interruption() as interruption:
        return fit(prepare(cfg, layout, interruption), overrides)


def check_settings(cfg: DictConfig) -> None:
    """Raises UserError for a value that no part of the run checks itself."""
    check_keys(cfg, ALLOWED)
    check_loggers(cfg)
    if not cfg.resume:
        check_new(cfg)


def launch_ranks(cfg: DictConfig, layout: BatchLayout, overrides: list[str]) -> Outcome:
    """Trains in one process per device, after finding errors here, before any process starts."""
    devices, nodes = launch.processes(cfg.trainer)
    if nodes > 1:
        raise UserError(
            f"trainer.num_nodes={nodes} needs processes on each node; start them with srun, "
            "torchrun or hydra/launcher=slurm"
        )
    task = build_task(cfg, device="meta")
    check_trainer(cfg, layout)
    task.check_callbacks(layout, cfg.trainer)
    with errors_at(cfg, "data.source"):
        task.datamodule.prepare_data()
    if task.metrics is not None:
        with errors_at(cfg, "metrics"):
            task.metrics.load(task.datamodule, "cpu")
    folder = cfg.resume or cfg.run_dir
    with explaining_failures(task.command, Path(folder) if folder else None):
        ended = launch.run_on_all_devices(task.command, [*own_places(), *overrides], devices)
    return Outcome.FINISHED if ended else Outcome.STOPPED


def prepare(cfg: DictConfig, layout: BatchLayout, interruption: Interruption) -> Prepared:
    """Builds a run and reads its data; raises UserError for what cannot work."""
    device = launch.device_of_process(cfg.trainer)
    launch.join_process_group(device)
    task = build_task(cfg)
    data, cfg = task.datamodule, cfg.copy()
    first = LambdaCallback(on_train_start=interruption.install)  # others may evaluate in theirs
    trainer = build_trainer(cfg, layout, device, [first, *task.callbacks, interruption])
    task.check_callbacks(layout, cfg.trainer)
    read_data(cfg, data)
    task.check_validation(cfg, data)
    trainer.limit_val_batches = float(len(data.validated_on().labels) >= layout.world)
    trainer.limit_test_batches = float(len(data.tested_on().labels) >= layout.world)
    data.fingerprint = on_rank_zero(lambda: data.fingerprint)  # reads all images
    found = facts_of_data(cfg, data) | task.prepare(device)
    if (seconds := first_stage_seconds(cfg, Path(cfg.resume or ""))) is not None:
        found["first_stage_seconds"] = seconds  # a run that is killed has no summary to keep it
    metrics = None
    if task.metrics is not None:
        with errors_at(cfg, "metrics"):
            task.metrics.reference_split(data)  # raises if there are no such images
            task.metrics.load(data, device)
            metrics = PreparedMetrics.of(task.metrics, data)
    for key, value in found.items():
        OmegaConf.update(cfg, key, value, force_add=True)  # earlier runs lack some
    return Prepared(cfg, task, layout, device, metrics, trainer, interruption)


def fit(prepared: Prepared, overrides: list[str]) -> Outcome:
    """Trains in a run folder, new or resumed, and leaves the results there."""
    cfg, task, interruption = prepared.cfg, prepared.task, prepared.interruption
    if not (cfg.resume or cfg.run_dir) and (before := unfinished(cfg.name)):
        say(f"{before} is unfinished. To resume it instead of starting a new run, write:")
        say(f"  {resume_command(task.command, before)}")
    folder = Path(cfg.resume) if cfg.resume else create(cfg, task.command, overrides)
    with locked(folder), failure_noted(folder), explaining_failures(task.command, folder):
        checkpoint = on_rank_zero(lambda: open_folder(cfg, task, folder))
        save_config(folder, cfg)
        say(f"Run folder: {folder}")
        data = task.datamodule
        counts = map(len, (data.train_labels(), data.validation_labels(), data.test_labels()))
        say("Images: {:,} for training, {:,} for validation, {:,} for tests".format(*counts))
        say(f"Batch: {prepared.layout}")
        say(f"Network: {network_and_length(prepared)}")
        for line in task.advice():
            say(f"Advice: {line}")
        run_training(prepared, folder, checkpoint)
        if not interruption.requested:
            say_result(task, prepared.trainer)
            return Outcome.FINISHED
        saved = checkpoints.exists(folder)  # not with callbacks.checkpoint=null
        kept = "everything" if saved else "nothing"
        say(f"Stopped at step {prepared.trainer.global_step}; {kept} is saved.")
        if interruption.requeue:
            # without waiting for other ranks: they may have stopped at different collective calls
            if not (refusal := slurm.requeue() if rank_and_world()[0] == 0 else ""):
                say("The job was requeued and will resume from here.")
                return Outcome.REQUEUED
            say(f"The job could not be requeued: {refusal}")
        if saved:
            say("Resume with:")
            say(f"  {resume_command(task.command, folder)}")
        return Outcome.STOPPED


def network_and_length(prepared: Prepared) -> str:
    """The network, its parameters, the device, the precision, and how long it trains at most."""
    trainer, limit = prepared.trainer, prepared.cfg.trainer.max_time
    network = prepared.task.module.network
    count = sum(parameter.numel() for parameter in network.parameters())
    ends = [f"{trainer.max_steps:,} steps"] if trainer.max_steps < ENDLESS else []  # else a time
    ends += [f"{duration(seconds_in(limit))} of training"] if limit else []
    name = type(getattr(network, "backbone", network)).__name__
    place = f"on {prepared.device} in {trainer.precision}"
    return f"{name} of {count:,} parameters {place}; at most {' or '.join(ends)}"


def open_folder(cfg: DictConfig, task: Task, folder: Path) -> Path | None:
    """Returns the checkpoint to resume; saves a new run's dependencies and returns None."""
    (folder / ERROR).unlink(missing_ok=True)
    if cfg.resume:
        # a job that is requeued may have been ended before its first checkpoint
        checkpoint = checkpoints.resume_from(folder) if checkpoints.exists(folder) else None
        reopen(folder)
        return checkpoint
    check_new(cfg)  # again: another process may have been quicker
    task.save_dependencies(folder)
    return None


def run_training(prepared: Prepared, folder: Path, checkpoint: Path | None) -> None:
    """Trains, from a checkpoint if any, measures the final weights, and writes the summary."""
    cfg, task, trainer, device = prepared.cfg, prepared.task, prepared.trainer, prepared.device
    clock = Clock(cfg.batch_size)
    rows = JSONLines(folder / METRICS, clock)
    context = RunContext(folder, clock, PeakMemory(device), rows, prepared.metrics, task.pipeline)
    task.module.context = context
    if checkpoint is None:
        rows.truncate(0)  # a job that died before its first checkpoint may have left rows
    if pays(cfg.channels_last, device):
        task.module.to(memory_format=torch.channels_last)
    if pays(cfg.compile, device):
        task.compile(mode_of(cfg.compile))
    steps = checkpoints.step_in(checkpoint) if checkpoint else 0
    loggers, summary = build_loggers(cfg, folder, clock, steps), None
    try:
        for logger in loggers:
            with clock.stopped():  # reaching a server takes time
                say(logger.start() or "")
        # Lightning would open a broken one again
        trainer.loggers = [rows, *(logger for logger in loggers if not logger.broken)]
        with quiet_lightning():
            with restoring(checkpoint, prepared.interruption):
                trainer.fit(
                    task.module, datamodule=task.datamodule, ckpt_path=checkpoint, weights_only=True
                )
            peak = context.memory.bytes()  # before the final metrics, which do not count
            if not prepared.interruption.requested:
                finish(prepared)
        if trainer.is_global_zero:
            summary = summarise(cfg, task, trainer, not prepared.interruption.requested, peak)
            write_summary(folder, summary)
    finally:
        for logger in loggers:
            logger.finish(asdict(summary) if summary else None)


def finish(prepared: Prepared) -> None:
    """Measures the final weights, and writes the task's files.

    It runs after Lightning's `fit` and not inside, so a run that is killed or stopped here is
    finished when it is resumed.
    """
    task, trainer, interruption = prepared.task, prepared.trainer, prepared.interruption
    try:
        interruption.at_once()
        if task.module.validated_step != trainer.global_step:
            trainer.validate(task.module, datamodule=task.datamodule, verbose=False)
        with task.module.context.clock.stopped():
            trainer.test(task.module, datamodule=task.datamodule, verbose=False)
        task.module.to(prepared.device)  # Lightning has moved it off the device
        for callback in task.callbacks:
            if isinstance(callback, Periodic) and callback.at_end:
                callback.at_the_end(trainer)
        if trainer.is_global_zero:
            folder = task.module.context.folder
            task.finish(folder, metrics_of(task), prepared.device)
    except (KeyboardInterrupt, SystemExit):  # Lightning turns the first into the second
        if not interruption.requested:
            raise
