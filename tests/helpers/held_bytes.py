"""The bytes that real runs and passes hold, by what they are for."""

from collections.abc import Callable, Iterable
from pathlib import Path

from lightning.pytorch.callbacks import Callback
from torch import Tensor

from diffusion_lab.common.files import write_json
from diffusion_lab.compute.sharding import local
from diffusion_lab.estimate.run_cost import KeptTensors
from diffusion_lab.training.callbacks import EMA, PosthocEMA


def held(tensors) -> int:
    return sum(local(tensor).nbytes for tensor in tensors)


def saved_bytes(forward: Callable[[], Tensor], parameters: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of `forward`, parameters aside."""
    with (kept := KeptTensors()):
        forward()
    return kept.bytes(parameters)


class HeldBytes(Callback):
    """Writes rank<n>.json into `folder` after each step."""

    def __init__(self, folder: str):
        self.folder, self.bytes = Path(folder), {}

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        self.kept = KeptTensors()
        self.kept.__enter__()

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        self.kept.__exit__(None, None, None)
        self.bytes["activations"] = self.kept.bytes(map(local, pl_module.parameters()))

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        grads = [p.grad for p in pl_module.parameters() if p.grad is not None]
        # where DDP's are views, its buckets may hold more
        whole = {g.untyped_storage()._cdata: g.untyped_storage() for g in map(local, grads)}
        self.bytes["gradients"] = sum(each.nbytes() for each in whole.values())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        state = [v for each in trainer.optimizers[0].state.values() for v in each.values()]
        averages = [
            share
            for callback in trainer.callbacks
            if isinstance(callback, EMA | PosthocEMA)
            for average in callback._averages.values()
            for share in average._shares
        ]
        self.bytes |= {
            "parameters": held([*pl_module.parameters(), *pl_module.buffers()]),
            "optimizer": held(value for value in state if isinstance(value, Tensor)),
            "averages": held(averages),
        }
        self.folder.mkdir(exist_ok=True)
        write_json(self.folder / f"rank{trainer.global_rank}.json", self.bytes)
