"""The base class of LightningModules: steps and learning rate by images, clipping, seeds."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import lightning
import torch
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.build.parameter_groups import OptimizerFactory, build_optimizer, check_sharding
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import mix_seed
from diffusion_lab.compute.sharding import whole
from diffusion_lab.data import ImageDataModule
from diffusion_lab.training.bad_steps import BadSteps
from diffusion_lab.training.context import RunContext

TRAINING = 0x747261696E  # keeps these draws apart from others of the same seed
HELD_OUT = "held_out"  # checkpoint key: the step of the last validation, and its metrics


@dataclass(frozen=True)
class Optimization:
    """The settings of optimisation; `batch_size` is global: micro-batch x accumulation x ranks."""

    optimizer: OptimizerFactory
    lr_schedule: Callable[[int, float], float]
    batch_size: int
    seed: int = 0

    @classmethod
    def configured(cls, cfg: DictConfig) -> "Optimization":
        """The optimisation that a configuration describes."""
        check_sharding(cfg)
        lr_schedule = instantiate(cfg, "lr_schedule")
        return cls(build_optimizer(cfg), lr_schedule, cfg.batch_size, cfg.seed)


class TrainedModule(lightning.LightningModule, ABC):
    """Optimises `trained_parameters`.

    `training.train` sets `context`, which holds the objects that callbacks share.
    """

    context: RunContext

    def __init__(self, optimization: Optimization):
        super().__init__()
        self.optimizer_factory = optimization.optimizer
        self.lr_schedule = optimization.lr_schedule
        self.batch_size = optimization.batch_size
        self.seed = optimization.seed
        self.held_out_metrics: dict[str, float] = {}
        self.validated_step = -1
        self.bad_steps = BadSteps()

    @abstractmethod
    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes."""

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices that are at neither end of a network; none if a module names no network."""
        return []

    def optimizer(self) -> Optimizer:
        """Makes the optimiser, with its groups of parameters."""
        return self.optimizer_factory(self, self.trained_parameters(), self.hidden_matrices())

    @property
    def images_seen(self) -> int:
        """The number of training images behind the current weights, over all ranks."""
        return self.trainer.global_step * self.batch_size

    @property
    def progress(self) -> float:
        """The share of the run that is done, in [0, 1]: of steps or time limit, the larger one."""
        trainer = self.trainer
        done = trainer.global_step / trainer.max_steps if trainer.max_steps > 0 else 0.0
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, lightning.pytorch.callbacks.Timer):
                elapsed = callback.time_elapsed("train")
                done = max(done, elapsed / (elapsed + (callback.time_remaining("train") or 0.0)))
                # the ranks' clocks differ, and so would their learning rates
                done = trainer.strategy.broadcast(done)
        return min(1.0, done)

    def seed_share(self, batch_idx: int) -> tuple[int, int]:
        """Seeds a micro-batch's draws; returns its index in the step, and how many a step has.

        A step's randomness (augmentation, levels, noise, dropout) is a function of the seed and of
        the micro-batch's place in the run, so a resumed run draws what an unbroken one does.
        """
        trainer, accumulate = self.trainer, self.trainer.accumulate_grad_batches
        shares = accumulate * trainer.world_size
        share = batch_idx % accumulate * trainer.world_size + trainer.global_rank
        torch.manual_seed(mix_seed(self.seed, TRAINING, trainer.global_step * shares + share))
        return share, shares

    def report_held_out(self, metrics: dict[str, Tensor | float], shown: str) -> None:
        """Stores and logs validation metrics; `shown` names the one for the progress bar."""
        self.held_out_metrics = {name: float(value) for name, value in metrics.items()}
        self.validated_step = self.trainer.global_step
        self.log(shown, self.held_out_metrics[shown], prog_bar=True, logger=False)
        for logger in self.loggers:  # Lightning would label them with the step before
            logger.log_metrics(self.held_out_metrics, step=self.validated_step)

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Saves the held-out metrics, which are not measured twice for the same weights."""
        checkpoint[HELD_OUT] = (self.validated_step, self.held_out_metrics)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        """Restores the held-out metrics that `on_save_checkpoint` saved.

        Raises UserError if the optimiser had other groups of parameters.
        """
        self.validated_step, self.held_out_metrics = checkpoint[HELD_OUT]
        (saved,) = checkpoint["optimizer_states"]
        groups = saved["param_groups"], self.optimizer().param_groups
        before, now = ([len(group["params"]) for group in each] for each in groups)
        if before != now:
            raise UserError(
                "the checkpoint was written by a version whose optimizer.weight_decay was for all "
                "parameters, and now it is for matrices; resume the run with that version"
            )

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Tells `bad_steps` that a step begins, at its first micro-batch."""
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.bad_steps.begin(self)

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of a micro-batch."""
        super().backward(self.bad_steps.poisoned(loss))

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips the gradient's norm over all parameters, and skips the step if it is bad."""
        scaler, largest = self.trainer.scaler, gradient_clip_val or math.inf
        if scaler is not None:
            # refuses fused optimisers, which undo the scaling too late; bf16 has no scaler
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            largest = math.inf
        norm = whole(self.clip_norms(largest))  # over all shards
        self.bad_steps.settle(self, norm, has_scaler=scaler is not None)

    def clip_norms(self, largest: float) -> Tensor:
        """Clips the gradient norm of the trained parameters; returns the norm before, ()."""
        return nn.utils.clip_grad_norm_(self.trained_parameters(), largest)

    def check_optimizer(self) -> None:
        """Raises the optimiser's errors about its settings, all of which its constructor finds.

        The optimiser that trains is made later, when parameters may be sharded over the ranks.
        """
        self.optimizer()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser, and a learning-rate schedule in images seen rather than steps."""
        optimizer = self.optimizer()
        schedule = LambdaLR(
            optimizer,
            # step + 1: an update counts the images of its own batch
            lambda step: self.lr_schedule((step + 1) * self.batch_size, self.progress),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def module_of(trainer: lightning.Trainer) -> TrainedModule:
    """The module that a trainer trains."""
    return cast(TrainedModule, trainer.lightning_module)


def data_of(trainer: lightning.Trainer) -> ImageDataModule:
    """The data that a trainer trains on."""
    return trainer.datamodule  # type: ignore[attr-defined]
