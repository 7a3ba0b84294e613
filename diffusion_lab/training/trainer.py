"""Lightning's Trainer as every run has it."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import lightning
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig, ListConfig

from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.common.errors import UserError
from diffusion_lab.common.progress import console
from diffusion_lab.compute import launch
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.device import pick_precision
from diffusion_lab.training.callbacks import Interruption
from diffusion_lab.training.callbacks.checkpoint import AtomicCheckpointIO, Resumption
from diffusion_lab.training.callbacks.progress import progress_callback
from diffusion_lab.training.logger import JSONLines


def housekeeping(rows: JSONLines) -> list[Callback]:
    """What every run has, whatever is configured."""
    return [Resumption(rows), Interruption(), progress_callback()]


def build_trainer(
    cfg: DictConfig, layout: BatchLayout, device: torch.device, **facts: object
) -> lightning.Trainer:
    """Lightning's Trainer: an endless stream of micro-batches, cut at `trainer.max_steps`."""
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
        "plugins": [AtomicCheckpointIO(), launch.cluster()],
        "logger": False,
    }
    try:
        return instantiate(cfg, "trainer", **(defaults | facts))
    except MisconfigurationException as error:
        raise UserError(f"trainer: {error}") from error


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
        ".*It is recommended to use `self.log.*",  # reduced by hand
        ".*isinstance.treespec, LeafSpec.*",
    )
    with warnings.catch_warnings():
        for hint in hints:
            warnings.filterwarnings("ignore", hint)
        yield
