"""How a model is on several ranks: a copy on each (DDP), or shards of its parameters (FSDP2)."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, ParallelStrategy
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map

from diffusion_lab.common.ranges import flag, ranges

WHOLE = MixedPrecisionPolicy()
_kept_sharded = False  # whether `to_save` leaves tensors as they are


class DDP(DDPStrategy):
    """Keeps a copy of the model on each rank, and averages the gradients.

    Unlike Lightning's, it sends no buffers before each pass, as all ranks compute the same, and
    gradients are views of what is sent. A `static_graph` has the same parameters in each step.
    """

    @ranges(broadcast_buffers=flag(), gradient_as_bucket_view=flag(), static_graph=flag())
    def __init__(
        self,
        broadcast_buffers: bool = False,
        gradient_as_bucket_view: bool = True,
        static_graph: bool = False,
    ):
        super().__init__(
            broadcast_buffers=broadcast_buffers,
            gradient_as_bucket_view=gradient_as_bucket_view,
            static_graph=static_graph,
        )


class FSDP(ModelParallelStrategy):
    """Keeps on each rank its share of parameters, gradients and optimiser state.

    A checkpoint is that of any other run: it opens on one device, and resumes on any number of
    ranks, sharded or not. (Lightning's own FSDP refuses a CPU.)
    With `gather_bf16`, ranks send each other the parameters of layers in bf16, if that is what
    networks compute in; their shares, and gradients, are float32.
    """

    @ranges(gather_bf16=flag())
    def __init__(self, gather_bf16: bool = False):
        super().__init__(save_distributed_checkpoint=False)
        self.gather_bf16 = gather_bf16

    @property
    def layers_policy(self) -> MixedPrecisionPolicy:
        """The types of the layers' parameters while they are whole, and of their gradients."""
        if not self.gather_bf16 or self.precision_plugin.precision != "bf16-mixed":
            return WHOLE
        # inputs stay as they are: the labels of noise have too few values in bf16
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)

    def setup_environment(self) -> None:
        # Lightning's "auto" would split layers within a node
        self._data_parallel_size = self.num_nodes * self.num_processes
        self._tensor_parallel_size = 1
        super().setup_environment()

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        """Returns False, as `configure_model` shards the model before a checkpoint is restored."""
        return False

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Returns True, so that Lightning calls `load_optimizer_state_dict`."""
        return True

    @property
    def module_here(self) -> LightningModule:
        """The module that the strategy was given."""
        assert self.lightning_module is not None, "connect comes before"
        return self.lightning_module

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The whole state of the module on every rank, on the CPU, unless it is kept sharded."""
        return tree_map(to_save, self.module_here.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The state of the optimiser as in a single process, whole unless it is kept sharded."""
        return tree_map(to_save, optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads the whole checkpoint on every rank, or of one in shards this rank's rows."""
        self.checkpoint_io.mesh = self.device_mesh["data_parallel"]  # type: ignore[attr-defined]
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's share of a whole state into the module."""
        own, given = self.module_here.state_dict(), checkpoint["state_dict"].items()
        state = {name: shared_as(value, own.get(name)) for name, value in given}
        self.module_here.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's share of the optimisers' whole states."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            ids = [i for group in saved["param_groups"] for i in group["params"]]
            moments = {
                i: {key: shared_as(value, p) for key, value in saved["state"][i].items()}
                for i, p in zip(ids, parameters, strict=True)
                if i in saved["state"]
            }
            optimizer.load_state_dict({**saved, "state": moments})


def sharded(trainer: DictConfig) -> bool:
    """Whether these settings of a trainer shard a model."""
    strategy = trainer.strategy
    return isinstance(strategy, DictConfig) and strategy._target_.endswith(f".{FSDP.__name__}")


def strategy_options(trainer: DictConfig) -> list[str]:
    """The strategy of a trainer of several ranks, and the options of it that are on."""
    if isinstance(trainer.strategy, DictConfig):
        *_, name = trainer.strategy._target_.split(".")
        return [name, *(key for key, value in trainer.strategy.items() if value is True)]
    defaults = signature(DDP.__init__).parameters.values()
    return [DDP.__name__, *(each.name for each in defaults if each.default is True)]


def shard_parameters(
    module: nn.Module, mesh: DeviceMesh, policy: MixedPrecisionPolicy = WHOLE
) -> None:
    """Shards a module's parameters over a mesh; a second call does nothing."""
    if isinstance(module, FSDPModule) or not any(True for _ in module.parameters()):
        return
    # also for the root, which FSDP2 would leave whole after validation, where averages are swapped
    fully_shard(module, mesh=mesh, reshard_after_forward=True, mp_policy=policy)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gives every rank all parameters inside this block, where a rank may call the module alone."""
    shards = [part for part in module.modules() if isinstance(part, FSDPModule)]
    for part in shards:
        part.unshard()
        part.set_reshard_after_forward(False, recurse=False)
    try:
        yield
    finally:
        for part in shards:
            part.set_reshard_after_forward(True, recurse=False)
            part.reshard()


def local(tensor: Tensor) -> Tensor:
    """This rank's share of a parameter, as a view; all of it if the parameter is not sharded."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def shared_as(value: Any, like: Tensor | None) -> Any:
    """Shards a whole tensor like `like`, if that is sharded and of its shape; else returns it."""
    if not isinstance(like, DTensor) or getattr(value, "shape", None) != like.shape:
        return value
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements)


def laid_out_as(tensor: Tensor, like: Tensor) -> Tensor:
    """A tensor in the layout in memory of another of its shape, for kernels that do not look."""
    return tensor if tensor.stride() == like.stride() else torch.empty_like(like).copy_(tensor)


@contextmanager
def kept_sharded() -> Iterator[None]:
    """While open, `to_save` leaves tensors sharded."""
    global _kept_sharded
    _kept_sharded = True
    try:
        yield
    finally:
        _kept_sharded = False


def to_save(value: Any) -> Any:
    """A value for a checkpoint: a sharded tensor as a whole on the CPU, unless `kept_sharded`."""
    if isinstance(value, DTensor) and _kept_sharded:
        return value.detach().clone()
    return whole(value)


def whole(value: Any) -> Any:
    """A copy of a sharded tensor, gathered on the CPU; returns anything else unchanged."""
    # copied: on a mesh of one process the whole tensor is the shard itself
    return unsharded(value).to("cpu", copy=True) if isinstance(value, DTensor) else value


def unsharded(tensor: Tensor) -> Tensor:
    """Gathers a tensor on its device if it is sharded, without its gradient."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
