"""Lightning's Trainer as every run configures it."""

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.profilers import PassThroughProfiler
from omegaconf import DictConfig, ListConfig

from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.common.messages import UserError, console
from diffusion_lab.common.ranges import Range, at_least, flag, one_of, optional, whole
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.device import pick_precision
from diffusion_lab.compute.sharding import DDP
from diffusion_lab.runs.progress import LIMIT, seconds_in
from diffusion_lab.training.callbacks.checkpoint import AtomicCheckpointIO, Resumption
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.callbacks.throughput import ProgressBar, ProgressLines
from diffusion_lab.training.module import VOTES


def is_time(value: object) -> bool:
    """Whether a value is a time limit above 0."""
    if not isinstance(value, DictConfig) and not LIMIT.fullmatch(str(value)):
        return False
    try:
        return seconds_in(value) > 0  # type: ignore[arg-type]
    except TypeError:  # an unknown unit, or no number
        return False


TRAINER = {
    "trainer.max_steps": whole(1),
    "trainer.max_time": Range(
        "a time such as 5min or 2h, DD:HH:MM:SS in quotes, numbers such as {minutes: 5}, or null",
        lambda value: value is None or is_time(value),
    ),
    "trainer.log_every_n_steps": whole(1),
    "trainer.benchmark": optional(flag()),  # earlier runs lack it
    "trainer.gradient_clip_val": optional(at_least(0)),
    # Lightning's other precisions make weights that do not fit the float32 inputs of networks
    "trainer.precision": one_of("auto", "32-true", "bf16-mixed", "16-mixed"),
}
# keys of Lightning's Trainer that a run sets itself, and what to write instead
OWN = {
    "accumulate_grad_batches": "micro_batch_size",
    **dict.fromkeys(("limit_train_batches", "max_epochs"), "trainer.max_steps"),
    **dict.fromkeys(("val_check_interval", "check_val_every_n_epoch"), "validate_every_n_steps"),
    **dict.fromkeys(("limit_val_batches", "limit_test_batches"), "data.validate_on"),
    **dict.fromkeys(("num_sanity_val_steps", "enable_model_summary", "enable_progress_bar"), ""),
    "enable_checkpointing": "callbacks.checkpoint",
    **{"overfit_batches": "+debug=overfit", "fast_dev_run": "+debug=fast"},
    "gradient_clip_algorithm": "trainer.gradient_clip_val, which limits the norm",
    **{"plugins": "", "logger": "logger", "callbacks": "callbacks"},
}
STEP_HOOKS = [
    *("on_train_batch_start", "on_train_batch_end", "on_before_zero_grad"),
    *("on_before_backward", "on_after_backward", "on_before_optimizer_step"),
]


def build_trainer(
    cfg: DictConfig,
    layout: BatchLayout,
    device: torch.device,
    callbacks: Sequence[Callback],
    **instead: object,
) -> lightning.Trainer:
    """Builds a Trainer for an endless stream of micro-batches, cut at `trainer.max_steps`.

    Raises UserError for settings that it would not follow.
    """
    for key in cfg.trainer.keys() & OWN.keys():
        other = OWN[key] and f", or write {OWN[key]}"
        raise UserError(f"trainer.{key} is set by the run itself; leave it out{other}")
    progress = ProgressBar() if console.is_terminal else ProgressLines()
    listed, (devices, nodes) = cfg.trainer.devices, launch.processes(cfg.trainer)
    defaults = {
        "precision": pick_precision(cfg.trainer.precision, device),
        "accumulate_grad_batches": layout.accumulate,
        "limit_train_batches": cfg.trainer.max_steps * layout.accumulate,
        "val_check_interval": cfg.validate_every_n_steps * layout.accumulate,
        "check_val_every_n_epoch": None,
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "enable_checkpointing": False,
        "enable_model_summary": False,
        "enable_progress_bar": console.is_terminal,
        "devices": [*listed] if isinstance(listed, ListConfig) else devices,
        "num_nodes": nodes,
        # each process tries for itself, and may choose another kernel
        "benchmark": cfg.trainer.get("benchmark", True) and not cfg.trainer.get("deterministic"),
        "plugins": [AtomicCheckpointIO(), launch.cluster()],
        "logger": False,
        "callbacks": [*callbacks, Resumption(), progress],
    }
    if layout.world > 1 and cfg.trainer.strategy in ("auto", "ddp"):
        defaults["strategy"] = DDP()
    try:
        with quiet_lightning(), errors_at(cfg, "trainer"):
            if limit := cfg.trainer.max_time:  # Lightning would make a timer of its own
                timer = TimeLimit(timedelta(seconds=seconds_in(limit)))
                defaults |= {"max_time": None, "callbacks": [*defaults["callbacks"], timer]}
            trainer = instantiate(cfg, "trainer", **(defaults | instead))
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error
    quicken(trainer)
    return trainer


def quicken(trainer: lightning.Trainer) -> None:
    """Leaves out what Lightning does at each micro-batch in vain."""
    profiler: Any = trainer.profiler  # type: ignore[attr-defined]
    if type(profiler) is PassThroughProfiler:  # it would enter a generator each time
        nothing = nullcontext()
        vars(profiler)["profile"] = lambda action_name: nothing
    loop: Any = trainer.fit_loop.epoch_loop
    # all ranks would wait for one another, to hear of a signal that does not come: `Interruption`
    # has taken the place of Lightning's handler
    loop._broadcast_sigterm_tensor = lambda: None
    # it would inspect the signature of `training_step`
    loop._build_kwargs = lambda kwargs, batch, batch_idx: (
        kwargs | {"batch": batch, "batch_idx": batch_idx}
    )
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        for hook in STEP_HOOKS:
            if getattr(type(callback), hook) is getattr(Callback, hook):
                setattr(callback, hook, None)  # Lightning calls what can be called


class TimeLimit(Timer):
    """Lightning's timer, which ends a run after a whole step, not after a micro-batch within it.

    It compares the ranks' clocks at the steps at which they vote alone.
    """

    state_key = Timer.__qualname__

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        votes = trainer.world_size == 1 or trainer.global_step % VOTES == 0
        if stepped(trainer, batch_idx) and votes:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)


def steps_in_time(max_time: Any, steps: int, seconds: float) -> int:
    """The steps that `trainer.max_time` allows of a run whose `steps` would take `seconds`."""
    if not max_time or seconds <= (limit := seconds_in(max_time)):
        return steps
    return max(1, int(steps * limit / seconds))


def check_trainer(cfg: DictConfig, layout: BatchLayout) -> None:
    """Raises Lightning's errors about `cfg.trainer`, by building its Trainer on the CPU."""
    build_trainer(cfg, layout, torch.device("cpu"), [], accelerator="cpu", devices=1, num_nodes=1)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Silences advice that does not apply: the data is one tensor, needs no workers and resumes."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    hints = (
        ".*does not have many workers.*",
        ".*your dataloader is not resumable.*",
        ".*`srun` command is available.*",
        ".*is smaller than the logging interval.*",
        ".*It is recommended to use `self.log.*",  # values are reduced by hand
        ".*isinstance.treespec, LeafSpec.*",
        "`broadcast_buffers` is deprecated",  # what replaces it came with PyTorch 2.13
        "torch.distributed is disabled, unavailable or uninitialized",  # shards of one process
        "Grad strides do not match bucket view",  # of 1 x 1 kernels, whose strides mean nothing
    )
    with warnings.catch_warnings():
        for hint in hints:
            warnings.filterwarnings("ignore", hint)
        yield
