"""The base class of LightningModules, and the context that a run's callbacks share."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, cast

import lightning
import torch
from lightning.pytorch.callbacks import Callback, Timer
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.assembly.parameter_groups import OptimizerFactory, build_optimizer, for_training
from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import mix_seed, seed_device
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.compute.sharding import FSDP, laid_out_as, shard_parameters, unsharded
from diffusion_lab.data.datamodule import ImageDataModule
from diffusion_lab.metrics.generative import PreparedMetrics
from diffusion_lab.metrics.metric import number
from diffusion_lab.runs import migrate
from diffusion_lab.training.bad_steps import BadSteps
from diffusion_lab.training.logger import Clock, JSONLines

TRAINING = 0x747261696E  # keeps these draws apart from others of the same seed
ENDLESS = 1_000_000_000  # steps, of a run that the clock ends
VOTES = 10  # steps between two votes of the ranks, which make GPUs wait
OBSERVED = "observed"  # of what a step returns: times and losses of its images, for callbacks
VALIDATION = "validation"  # checkpoint key: the step of the last validation, and its metrics


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
        lr_schedule = instantiate(cfg, "lr_schedule")
        return cls(build_optimizer(cfg), lr_schedule, cfg.batch_size, cfg.seed)


@dataclass
class RunContext:
    """The objects that a run's callbacks share, set before training, and the results they leave.

    A callback is constructed from its settings alone, and reads everything else here in its hooks.
    """

    folder: Path
    clock: Clock
    memory: PeakMemory
    rows: JSONLines
    prepared_metrics: PreparedMetrics | None = None  # None: nothing is evaluated
    pipeline: Generator | None = None  # None: the run draws no samples

    results: dict[str, float] = field(default_factory=dict)  # metrics of the latest evaluation
    measured_at: int | None = None  # the step of `results`
    measured_by: Callback | None = None  # the callback that made `results`
    # metrics of the final weights by other numbers of sampling steps
    at_other_steps: dict[int, dict[str, float]] = field(default_factory=dict)
    latest_grid: Path | None = None
    row: dict[str, float] = field(default_factory=dict)  # more values of Throughput's next row
    summary: dict[str, object] = field(default_factory=dict)  # more entries of summary.json

    def sampling(self) -> Generator:
        """The pipeline, for a callback that draws samples."""
        if self.pipeline is None:
            raise UserError("this run trains an autoencoder, so its callbacks draw no samples")
        return self.pipeline


class TrainedModule(lightning.LightningModule, ABC):
    """Optimises `trained_parameters`; `training.train` sets `context`, which callbacks share."""

    shown: ClassVar[str]  # the validation metric in the progress bar, without val/
    returns: ClassVar[frozenset[str]] = frozenset()  # what steps return, by name, for callbacks
    context: RunContext
    _players: list[list[nn.Parameter]] | None = None  # that are clipped, from step 1 on
    _spent: float | None = None  # the share of a time limit, as the ranks know it

    def __init__(self, optimization: Optimization):
        super().__init__()
        self.optimizer_factory = optimization.optimizer
        self.lr_schedule = optimization.lr_schedule
        self.batch_size = optimization.batch_size
        self.seed = optimization.seed
        self.validation_metrics: dict[str, float] = {}
        self.test_metrics: dict[str, float] = {}
        self.validated_step = -1
        self.bad_steps = BadSteps()
        self.gradient_norm = torch.zeros(())  # of the last step, before clipping

    def trained_parameters(self) -> list[nn.Parameter]:
        """The parameters that the optimiser changes: all that take a gradient."""
        return [each for each in self.parameters() if each.requires_grad]

    def players(self) -> list[list[nn.Parameter]]:
        """The trained parameters, in sets that are clipped apart: none changes another's step."""
        return [self.trained_parameters()]

    @property
    def network(self) -> nn.Module:
        """The part that is used after training, and whose parameters are counted."""
        return self

    def hidden_matrices(self) -> list[nn.Parameter]:
        """The matrices that are at neither end of a network; none if a module names no network."""
        return []

    def configure_model(self) -> None:
        """Shards the modules, if the strategy is FSDP: the network's layers, then what is left."""
        if self.device_mesh is None:
            return
        mesh, strategy = self.device_mesh["data_parallel"], cast(FSDP, self.trainer.strategy)
        for layer in layers_of(getattr(self.network, "backbone", self.network)):
            shard_parameters(layer, mesh, strategy.layers_policy)
        for part in self.children():
            shard_parameters(part, mesh)

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
            if isinstance(callback, Timer):
                done = max(done, self._time_spent(callback))
        return min(1.0, done)

    def _time_spent(self, timer: Timer) -> float:
        """The share of a time limit that is spent, by the clock of the first rank."""
        step = self.trainer.global_step
        # the ranks' clocks differ, and so would their learning rates; asking makes GPUs wait
        if self._spent is None or self.trainer.world_size == 1 or step % VOTES == 0:
            elapsed = timer.time_elapsed("train")
            share = elapsed / (elapsed + (timer.time_remaining("train") or 0.0))
            self._spent = self.trainer.strategy.broadcast(share)
        return self._spent

    def seed_share(self, batch_idx: int) -> tuple[int, int]:
        """Seeds a micro-batch's draws; returns its index in the step, and how many a step has.

        A step's randomness (augmentation, levels, noise, dropout) is a function of the seed and of
        the micro-batch's place in the run, so a resumed run draws what an unbroken one does.
        """
        trainer, accumulate = self.trainer, self.trainer.accumulate_grad_batches
        shares = accumulate * trainer.world_size
        share = batch_idx % accumulate * trainer.world_size + trainer.global_rank
        seed = mix_seed(self.seed, TRAINING, trainer.global_step * shares + share)
        seed_device(seed, self.device)
        return share, shares

    @abstractmethod
    def metrics_of_pass(self, split: str) -> dict[str, Tensor | float]:
        """The metrics of a pass over all validation or test images, named `<split>/...`."""

    def on_validation_epoch_end(self) -> None:
        self.validation_metrics = self.record(self.metrics_of_pass("val"))
        self.validated_step = self.trainer.global_step
        shown = f"val/{self.shown}"
        self.log(shown, self.validation_metrics[shown], prog_bar=True, logger=False)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: tuple[Tensor, Tensor, Tensor], batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.test_metrics = self.record(self.metrics_of_pass("test"))

    def record(self, row: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Writes values of the current step to all loggers; returns them as plain numbers."""
        numbers = {name: number(name, value) for name, value in row.items()}
        for logger in self.loggers:  # Lightning would label them with the step before
            logger.log_metrics(numbers, step=self.trainer.global_step)
        return numbers

    def on_save_checkpoint(self, checkpoint: dict) -> None:
        """Saves the validation metrics, which are not measured twice for the same weights."""
        checkpoint[VALIDATION] = (self.validated_step, self.validation_metrics)

    def on_load_checkpoint(self, checkpoint: dict) -> None:
        migrate.checkpoint(checkpoint)
        self.validated_step, self.validation_metrics = checkpoint[VALIDATION]

    def on_train_start(self) -> None:
        self.lay_out_state()
        self.set_rates()

    def set_rates(self) -> None:
        """Sets the learning rates of this step, and of the run's length as it is now.

        An optimiser that is restored has those of its checkpoint: the end of a run that was
        shorter, or a step before a rollback.
        """
        for config in self.trainer.lr_scheduler_configs:
            schedule = cast(LambdaLR, config.scheduler)
            factor = schedule.lr_lambdas[0](schedule.last_epoch)
            for group, rate in zip(schedule.optimizer.param_groups, schedule.base_lrs, strict=True):
                group["lr"] = rate * factor

    def lay_out_state(self) -> None:
        """Lays out the optimiser's state, as of another device's run, as the weights are."""
        for optimizer in self.trainer.optimizers:
            for parameter, state in optimizer.state.items():
                for name, value in state.items():
                    if getattr(value, "shape", None) == parameter.shape:
                        state[name] = laid_out_as(value, parameter)

    def on_train_batch_start(self, batch: object, batch_idx: int) -> None:
        """Tells the optimiser and `bad_steps` that a step begins, at its first micro-batch."""
        for optimizer in self.trainer.optimizers:
            for_training(optimizer, True)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.bad_steps.begin(self)

    def backward(self, loss: Tensor) -> None:
        super().backward(self.bad_steps.poisoned(loss))

    def configure_gradient_clipping(
        self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None
    ) -> None:
        """Clips the gradient's norm over all parameters, and skips the step if it is bad.

        The norm stays on the device: to read it is to wait for a GPU.
        """
        largest = gradient_clip_val or math.inf
        # over all shards; a scaler of float16 has been undone before
        if self._players is None:  # walking over all modules takes longer than a small step
            self._players = [each for each in self.players() if each]
        norms = [unsharded(nn.utils.clip_grad_norm_(each, largest)) for each in self._players]
        # the norm of no gradients is on the CPU
        self.gradient_norm = torch.stack([each.to(self.device) for each in norms]).norm()
        self.bad_steps.settle(self.gradient_norm, None if self.trainer.scaler else optimizer)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Takes a step, after which all but training sees the weights that count."""
        super().optimizer_step(*args, **kwargs)
        for each in self.trainer.optimizers:
            for_training(each, False)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimiser, and a learning-rate schedule in images seen rather than steps."""
        optimizer = self.optimizer()
        if self.trainer.scaler is not None:
            unfuse(optimizer)
        schedule = LambdaLR(
            optimizer,
            # step + 1: an update counts the images of its own batch
            lambda step: self.lr_schedule((step + 1) * self.batch_size, self.progress),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def unfuse(optimizer: Optimizer) -> None:
    """Leaves the scale of float16's gradients to the scaler: a fused step undoes it too late."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            group["fused"] = False
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]


class OneNumberModule(TrainedModule):
    """Validates by the mean of the one number `shown`, over images or parts of them."""

    def on_validation_epoch_start(self) -> None:
        self.sums = torch.zeros(2, device=self.device)  # sum and count of the numbers

    def add(self, values: Tensor) -> None:
        """Counts the numbers of a batch, of any shape."""
        self.sums += torch.stack([values.sum(), values.new_tensor(values.numel())])

    def metrics_of_pass(self, split: str) -> dict[str, Tensor | float]:
        total, count = self.trainer.strategy.reduce(self.sums, reduce_op="sum")
        return {f"{split}/{self.shown}": total / count}


def module_of(trainer: lightning.Trainer) -> TrainedModule:
    """The module that a trainer trains."""
    return cast(TrainedModule, trainer.lightning_module)


def data_of(trainer: lightning.Trainer) -> ImageDataModule:
    """The data that a trainer trains on."""
    return trainer.datamodule  # type: ignore[attr-defined]
