"""The memory, the disk and the seconds that a training run takes."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.optim import Optimizer

from diffusion_lab.assembly.costs import Memory, RunCost
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.messages import UserError
from diffusion_lab.estimate.activations import Operations
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.families.diffusion.task import DiffusionTask
from diffusion_lab.first_stage.base import Latents
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.callbacks import EMA, Checkpoint, PosthocEMA
from diffusion_lab.training.callbacks.periodic import times
from diffusion_lab.training.module import TrainedModule
from diffusion_lab.training.trainer import steps_in_time

IN_PLACE = 3  # checkpoints at once: the last, the one before it, and a new one being written
BESIDE_OPTIMIZER = 35  # operations of clipping and of one average, counted in runs
STATISTICS = 8  # bytes of a number of a mean or covariance
META = torch.library.Library("aten", "IMPL")  # kernels that PyTorch's "meta" has not
for name in ("_fused_adamw_", "_fused_sgd_"):
    META.impl(name, lambda *arguments, **named: None, "Meta")


def memory_of(
    task: DiffusionTask, activations: int, world: int = 1, sharded: bool = False, images: int = 0
) -> Memory:
    """The bytes of a device; raises UserError for an optimiser that cannot be counted."""
    sharded = sharded and world > 1
    module, shared = task.module, world if sharded else 1
    gradients = shares(module.trained_parameters(), shared)
    stage, groups = module.first_stage, module.optimizer().param_groups
    return Memory(
        parameters=shares(module.parameters(), shared) + shares(module.buffers(), 1),
        gradients=gradients,
        optimizer=optimizer_bytes(module, shared),
        # without fusing, a step makes a root of a moment for all parameters at once
        temporary=gradients if any(group.get("fused") is False for group in groups) else 0,
        averages=averages_bytes(task, shared),
        gathered=gathered_bytes(module) if sharded else 0,
        first_stage=shares(stage.network.parameters(), 1) if isinstance(stage, Latents) else 0,
        images=images,
        activations=activations,
    )


def shares(tensors: Iterable[Tensor], world: int) -> int:
    """The bytes of rank 0's shares of tensors, which are divided by rows."""
    return sum(
        -(-len(each) // world) * (each.nbytes // len(each))
        if each.ndim and each.numel()
        else each.nbytes
        for each in tensors
    )


def averages_bytes(task: DiffusionTask, world: int) -> int:
    """The bytes of all averages of the weights."""
    whole, network = (
        shares(each.parameters(), world) for each in (task.module, task.module.network)
    )
    ema, posthoc = (each and len(each.lengths) for each in map(task.callback, (EMA, PosthocEMA)))
    return (ema or 0) * whole + (posthoc or 0) * network


def optimizer_bytes(module: TrainedModule, world: int) -> int:
    """The bytes of an optimiser's state after a step on "meta"."""
    state = [value for each in stepped(module)[0].state.values() for value in each.values()]
    return shares((value for value in state if isinstance(value, Tensor)), world)


def stepped(module: TrainedModule) -> tuple[Optimizer, int]:
    """An optimiser after its first steps on "meta", and the operations of an update on a GPU."""
    optimizer = module.optimizer()
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False  # a kernel that "meta" has not
        if "foreach" in group:
            group["foreach"] = True  # a GPU's choice
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()  # makes the state
        with Operations() as operations:
            optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"the state of {type(optimizer).__name__} cannot be counted without its numbers "
            f"({str(error).splitlines()[0]}); plan with optimizer=adamw, which keeps two numbers "
            "for each parameter"
        ) from error
    finally:
        optimizer.zero_grad()
    return optimizer, operations.count + BESIDE_OPTIMIZER


def gathered_bytes(module: DiffusionModule) -> int:
    """The bytes that FSDP gathers at most: what is outside of layers, and two layers."""
    # the one that is computed and the next are whole at a time, with their gradients
    sizes = [shares(layer.parameters(), 1) for layer in layers_of(module.denoiser.backbone)]
    outside = shares(module.trained_parameters(), 1) - sum(sizes)
    return 2 * (outside + 2 * max(sizes, default=0))


def disk_of(task: DiffusionTask, steps: int) -> dict[str, int]:
    """Bytes of the disk that a run of `steps` steps takes: `checkpoints` at most, and `snapshots`.

    A `checkpoint` has weights, their averages and the optimiser's state. `kept` is the number of
    checkpoints of single steps beside the last. Raises UserError for an optimiser that cannot be
    counted.
    """
    saving, kept = task.callback(Checkpoint), 0
    if saving is not None:
        every = saving.keep_every_n_steps
        kept = ((steps - 1) // every if every else 0) + (saving.top_k if saving.best else 0)
    weights = shares(task.module.state_dict().values(), 1)
    checkpoint = weights + averages_bytes(task, 1) + optimizer_bytes(task.module, 1)
    return {
        "checkpoint": checkpoint,
        "checkpoints": (IN_PLACE + kept) * checkpoint if saving else 0,
        "kept": kept,
        "snapshots": snapshot_bytes(task),
    }


def snapshot_bytes(task: DiffusionTask) -> int:
    """The bytes that the snapshots of averages take."""
    posthoc = task.callback(PosthocEMA)
    parameters = sum(p.numel() for p in task.module.network.parameters())
    return posthoc.bytes_of(parameters) if posthoc else 0


def features_bytes(metrics: GenerativeMetrics | None, images: int | None) -> int | None:
    """The bytes of the reference's features and of their moments; None for unknown `images`."""
    if metrics is None:
        return 0
    if images is None:
        return None
    count, dim = min(images, metrics.reference_size or images), metrics.extractor.dim
    mapped = metrics.extractor.spatial_dim
    moments = sum(each * (1 + min(each, count)) for each in (dim, mapped))
    return 4 * count * dim + STATISTICS * moments


@dataclass(frozen=True)
class Duration:
    """The steps of a run that its time limit allows, and the seconds of all it does.

    `sampling` is None if the sampler's number of network calls is not known.
    """

    steps: int
    training: float
    validation: float
    sampling: float | None  # of samples for metrics and of grids, without decoding and features

    @property
    def seconds(self) -> float:
        """The seconds of what is known."""
        return self.training + self.validation + (self.sampling or 0.0)


def duration_of(cfg: DictConfig, task: DiffusionTask, cost: RunCost, validated: int) -> Duration:
    """The time of a run that validates so many images, or of what its time limit allows."""
    step, call = cost.step, cost.call
    assert step is not None
    assert call is not None

    def lasting(steps: int) -> Duration:
        drawn = task.measured_images(steps) + task.grid_images(steps)
        sampling = None if cost.calls is None else drawn * cost.calls * call
        validations = times(steps, cfg.validate_every_n_steps)
        return Duration(steps, steps * step, validations * validated * call, sampling)

    whole = lasting(cfg.trainer.max_steps)
    counting = whole.training + whole.validation  # metrics and grids stop the clock
    return lasting(steps_in_time(cfg.trainer.max_time, whole.steps, counting))
