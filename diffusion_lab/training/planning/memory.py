"""The bytes that a GPU of a run holds, of rank 0, whose shares are the largest."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.messages import UserError
from diffusion_lab.data.loader import FREE_MEMORY_SHARE
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.families.diffusion.task import DiffusionTask
from diffusion_lab.first_stage.latents import Latents
from diffusion_lab.training.callbacks import EMA, PosthocEMA
from diffusion_lab.training.module import TrainedModule
from diffusion_lab.training.planning.run_elsewhere import RunElsewhere


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one GPU by what they are for; `activations` are those of a micro-batch."""

    parameters: int
    gradients: int
    buckets: int  # DDP's copy of the gradients, which it sends
    optimizer: int
    averages: int
    gathered: int  # of FSDP: the layers that are whole at one time
    first_stage: int
    images: int
    activations: int

    @property
    def total(self) -> int:
        return sum(asdict(self).values())


def memory_of(run: RunElsewhere) -> RankMemory:
    """The bytes of a run's GPU; raises UserError for an optimiser that cannot be counted."""
    module, world = run.task.module, run.world if run.sharded else 1
    gradients = shares(module.trained_parameters(), world)
    stage = module.first_stage
    return RankMemory(
        parameters=shares(module.parameters(), world) + shares(module.buffers(), 1),
        gradients=gradients,
        buckets=gradients if run.world > 1 and not run.sharded else 0,
        optimizer=optimizer_bytes(module, world),
        averages=averages_bytes(run.task, world),
        gathered=gathered_bytes(module) if run.sharded else 0,
        first_stage=shares(stage.network.parameters(), 1) if isinstance(stage, Latents) else 0,
        images=images_bytes(run),
        activations=run.activations.of(run.batch.micro_batch),
    )


def averages_bytes(task: DiffusionTask, world: int) -> int:
    """The bytes of all averages of the weights."""
    whole, network = (
        shares(each.parameters(), world) for each in (task.module, task.module.network)
    )
    ema, posthoc = (each and len(each.lengths) for each in map(task.callback, (EMA, PosthocEMA)))
    return (ema or 0) * whole + (posthoc or 0) * network


def shares(tensors: Iterable[Tensor], world: int) -> int:
    """The bytes of rank 0's shares of tensors, which are divided by rows."""
    return sum(share(tensor, world) for tensor in tensors)


def share(tensor: Tensor, world: int) -> int:
    """The bytes of rank 0's share of a tensor."""
    if tensor.ndim == 0 or not tensor.numel():
        return tensor.nbytes
    rows = -(-len(tensor) // world)
    return rows * (tensor.nbytes // len(tensor))


def optimizer_bytes(module: TrainedModule, world: int) -> int:
    """The bytes of an optimiser's state after a step on "meta"."""
    optimizer = module.optimizer()
    for group in optimizer.param_groups:
        if "fused" in group:
            group["fused"] = False  # a kernel that "meta" has not
        for parameter in group["params"]:
            parameter.grad = torch.empty_like(parameter)
    try:
        optimizer.step()
    except (RuntimeError, NotImplementedError, TypeError) as error:
        raise UserError(
            f"the state of {type(optimizer).__name__} cannot be counted without its numbers "
            f"({str(error).splitlines()[0]}); plan with optimizer=adamw, which keeps two numbers "
            "for each parameter"
        ) from error
    finally:
        optimizer.zero_grad()
    state = [value for each in optimizer.state.values() for value in each.values()]
    return shares((value for value in state if isinstance(value, Tensor)), world)


def gathered_bytes(module: DiffusionModule) -> int:
    """The bytes that FSDP gathers at most: what is outside of layers, and two layers.

    The one that is computed and the next are whole at a time, with their gradients.
    """
    sizes = [shares(layer.parameters(), 1) for layer in layers_of(module.denoiser.backbone)]
    outside = shares(module.trained_parameters(), 1) - sum(sizes)
    return 2 * (outside + 2 * max(sizes, default=0))


def images_bytes(run: RunElsewhere) -> int:
    """The bytes of the training images, where they are kept on the GPU."""
    size, choice = run.stored_bytes, run.cfg.data.on_device
    if size is None or choice is False:
        return 0
    return size if choice is True or size < FREE_MEMORY_SHARE * run.gpu.memory else 0
