"""Shards parameters over the ranks (FSDP2), for models that one device cannot hold."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_map


class FSDP(ModelParallelStrategy):
    """Keeps on each rank its share of parameters, gradients and optimiser state.

    A checkpoint is complete, in a single file like in any other run: it opens on one device, and
    resumes on any number of ranks, sharded or not. (Lightning's own FSDP refuses a CPU.)
    """

    def __init__(self) -> None:
        super().__init__(save_distributed_checkpoint=False)

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
        """The whole state of the module on every rank, on the CPU."""
        return tree_map(whole, self.module_here.state_dict())

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The whole state of the optimiser on every rank, on the CPU, as in a single process."""
        return tree_map(whole, optimizer.state_dict())

    def load_checkpoint(self, checkpoint_path, weights_only: bool | None = None) -> dict[str, Any]:
        """Loads the whole checkpoint on every rank."""
        return ParallelStrategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Loads this rank's share of a whole state into the module."""
        own, whole_state = self.module_here.state_dict(), checkpoint["state_dict"]
        state = {name: shared_as(value, own.get(name)) for name, value in whole_state.items()}
        self.module_here.load_state_dict(state, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Loads this rank's share of the optimisers' whole states."""
        for optimizer, whole_state in zip(
            self.optimizers, checkpoint["optimizer_states"], strict=True
        ):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            ids = [i for group in whole_state["param_groups"] for i in group["params"]]
            moments = {
                i: {key: shared_as(value, p) for key, value in whole_state["state"][i].items()}
                for i, p in zip(ids, parameters, strict=True)
                if i in whole_state["state"]
            }
            optimizer.load_state_dict({**whole_state, "state": moments})


def sharded(trainer: DictConfig) -> bool:
    """Whether these settings of a trainer shard a model: FSDP's strategy alone is an object."""
    return isinstance(trainer.strategy, DictConfig)


def shard_parameters(module: nn.Module, mesh: DeviceMesh) -> None:
    """Shards a module's parameters over a mesh; a second call does nothing."""
    if isinstance(module, FSDPModule) or not any(True for _ in module.parameters()):
        return
    # also for the root, which FSDP2 would leave whole after validation, where averages are swapped
    fully_shard(module, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(module: nn.Module) -> Iterator[None]:
    """Gives every rank all parameters inside this block, where a rank may call the module alone.

    Outside of it, all ranks must call the module together.
    """
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


def whole(value: Any) -> Any:
    """Gathers a sharded tensor on the CPU; returns anything else unchanged."""
    if not isinstance(value, DTensor):
        return value
    return cast(DTensor, value.detach()).full_tensor().cpu()
