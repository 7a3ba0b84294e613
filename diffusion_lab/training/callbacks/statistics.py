"""Logs norms of weights, gradients and updates by module, and the extremes of activations."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Count, Flag, settings
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.compute.sharding import sharded, whole
from diffusion_lab.training.callbacks.non_finite import tensors
from diffusion_lab.training.callbacks.periodic import Checked, Interval, stepped
from diffusion_lab.training.module import TrainedModule

KEPT = 0.9  # share of the earlier estimates in an average, at each new one


class GradientNoise:
    """Averages of tr(S) and |G|^2 over the steps that are measured; a single step says little."""

    def __init__(self) -> None:
        self.noise = self.signal = 0.0  # averages of tr(S) and |G|^2, up to a common factor

    def observe(self, part: float, batch: float, part_size: int, batch_size: int) -> None:
        """Adds a step by mean squared gradient norms of parts and of the batch; sizes in images."""
        noise = (part - batch) / (1 / part_size - 1 / batch_size)
        signal = (batch_size * batch - part_size * part) / (batch_size - part_size)
        self.noise = KEPT * self.noise + (1 - KEPT) * noise
        self.signal = KEPT * self.signal + (1 - KEPT) * signal

    @property
    def scale(self) -> float | None:
        """The noise scale in images; None where noise still hides the gradient."""
        return self.noise / self.signal if min(self.noise, self.signal) > 0 else None


@settings
class Statistics(Callback, Checked):
    """Looks at one step in `every_n_steps` (null: never), and changes nothing in it.

    A module is named by at most `depth` parts of its path, with the weights below it
    that no deeper named module has.

    | name | of the step, over all ranks and micro-batches |
    |---|---|
    | `train_weight_norm/<module>`, `train/weight_norm` | the weights after it |
    | `train_update_norm/<module>`, `train/update_norm` | how far they moved |
    | `train_grad_norm/<module>` | the gradient, before clipping |
    | `train_activation_max/<module>` | the largest magnitude in the module's outputs |
    | `train/noise_scale` | with `noise_scale`: the gradient noise scale (arXiv:1812.06162) |

    Skipped steps have none. It needs memory for a copy of the weights.
    """

    every_n_steps: Interval = None
    depth: Count = 3
    noise_scale: Flag = False

    def __post_init__(self) -> None:
        self._noise = GradientNoise()
        self._look: Look | None = None  # at the current step

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        if not self.noise_scale:
            return
        key = "callbacks.statistics.noise_scale=true"
        if not self.every_n_steps:
            raise UserError(
                f"{key} is measured at some steps; write callbacks.statistics.every_n_steps=100, "
                "or leave it out"
            )
        if sharded(trainer):
            raise UserError(
                f"{key} needs the gradients of parts of a batch, which trainer=fsdp shards; use "
                "trainer=ddp, or leave it out"
            )
        if layout.accumulate * layout.world == 1:
            size = layout.batch_size
            half = next((n for n in range(size // 2, 0, -1) if size % n == 0), 1)
            raise UserError(
                f"{key} compares parts of a batch, and this run takes all {size} "
                f"images at once; write micro_batch_size={half}, or leave it out"
            )

    def state_dict(self) -> dict[str, float]:
        return vars(self._noise).copy() if self.noise_scale else {}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        vars(self._noise).update(state_dict)

    def on_train_batch_start(self, trainer: lightning.Trainer, pl_module, batch, batch_idx) -> None:
        begins = batch_idx % trainer.accumulate_grad_batches == 0
        if begins and self.every_n_steps and not (trainer.global_step + 1) % self.every_n_steps:
            self._look = Look(pl_module, self.depth, self.noise_scale)

    def on_before_backward(self, trainer, pl_module, loss) -> None:
        if self._look:
            self._look.in_backward = True

    def on_after_backward(self, trainer, pl_module) -> None:
        if self._look:
            self._look.in_backward = False

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self._look:
            self._look.at_gradients()
            # of these gradients: after the step it may be another one
            self._look.scale = trainer.scaler.get_scale() if trainer.scaler else 1.0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not self._look or not stepped(trainer, batch_idx):
            return
        look, self._look = self._look, None
        look.close()
        if pl_module.bad_steps.skipped:
            return
        row = look.row(trainer)
        if self.noise_scale:
            accumulated, batch_size = trainer.accumulate_grad_batches, pl_module.batch_size
            # a micro-batch's gradient is divided by their number, and multiplied by the scale
            part = accumulated * trainer.strategy.reduce(look.squares, reduce_op="mean")
            squared = sum(norm**2 for norm in look.gradients.values())
            part_size = batch_size // (accumulated * trainer.world_size)
            self._noise.observe(float(part / look.scale**2), squared, part_size, batch_size)
            if self._noise.scale:
                row["train/noise_scale"] = self._noise.scale
        pl_module.record(row)


class Look:
    """A look at one step of a module, from its first micro-batch on."""

    def __init__(self, module: TrainedModule, depth: int, in_parts: bool):
        self.module = module
        self.weights = weights_of_parts(module, depth)
        self.gradients: dict[str, float] = {}  # norms by part of the module
        # squared gradient norms of this rank's micro-batches, before ranks share them
        self.squares = torch.zeros((), device=module.device)
        self.in_backward = False  # a loss may take gradients of its own, outside of that pass
        self._before: dict[str, list[Tensor]] = {}  # copies of the weights
        self._extremes: dict[str, Tensor] = {}
        self.scale = 1.0  # by which fp16's scaler has multiplied the gradients
        self._hooks = [
            module.get_submodule(path).register_forward_hook(partial(self._see, path))
            for path in self.weights
        ]
        for parameter in chain(*self.weights.values()) if in_parts else ():
            self._hooks.append(parameter.register_hook(self._add))

    def _see(self, path: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        for tensor in tensors(output):
            if layer.training and tensor.is_floating_point() and tensor.numel():
                largest = tensor.detach().abs().amax().float()
                known = self._extremes.get(path, largest)
                self._extremes[path] = torch.maximum(known, largest)

    def _add(self, gradient: Tensor) -> None:
        if self.in_backward:
            self.squares += gradient.detach().float().square().sum()

    def at_gradients(self) -> None:
        """Measures the gradients before they are clipped, and copies the weights."""
        grads = {path: [p.grad for p in part] for path, part in self.weights.items()}
        self.gradients = norms_of({k: [g for g in v if g is not None] for k, v in grads.items()})
        self._before = {path: [p.detach().clone() for p in w] for path, w in self.weights.items()}

    def close(self) -> None:
        """Removes all hooks."""
        for hook in self._hooks:
            hook.remove()

    def row(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The statistics at the end of the step, by name, on every rank."""
        now = {path: [p.detach() for p in part] for path, part in self.weights.items()}
        moved = {
            path: [new - old for new, old in zip(now[path], before, strict=True)]
            for path, before in self._before.items()
        }
        weights, updates = norms_of(now), norms_of(moved)
        # the norm of a vector is that of the norms of its parts
        row = {"train/weight_norm": math.hypot(*weights.values())}
        row |= {"train/update_norm": math.hypot(*updates.values())} | named("weight_norm", weights)
        row |= named("grad_norm", self.gradients) | named("update_norm", updates)
        # of all modules, as another rank may have called others
        unseen = torch.zeros((), device=self.module.device)
        largest = torch.stack([self._extremes.get(path, unseen) for path in self.weights])
        extremes = trainer.strategy.reduce(largest, reduce_op="max").tolist()
        seen = {path: value for path, value in zip(self.weights, extremes, strict=True) if value}
        return row | named("activation_max", seen)


def weights_of_parts(module: TrainedModule, depth: int) -> dict[str, list[nn.Parameter]]:
    """The trained parameters by the path of the part of the module that holds them.

    A path has at most `depth` names below the module's own parts, such as its denoiser.
    """
    trained = {id(parameter) for parameter in module.trained_parameters()}
    parts: dict[str, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if id(parameter) in trained:
            path = ".".join(name.split(".")[:-1][: depth + 1])
            parts.setdefault(path, []).append(parameter)
    return parts


def norms_of(parts: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """The norm of all tensors of each part that has any; sharded ones are taken together."""
    norms = {
        path: whole(nn.utils.get_total_norm(tensors)).float()
        for path, tensors in parts.items()
        if tensors
    }
    # stacked, so as to wait for a GPU once
    values = torch.stack([*norms.values()]).tolist() if norms else []
    return dict(zip(norms, values, strict=True))


def named(kind: str, values: Mapping[str, float]) -> dict[str, float]:
    """The values of parts under the names that are logged."""
    return {
        f"train_{kind}/{path.removeprefix('denoiser.')}": value for path, value in values.items()
    }
