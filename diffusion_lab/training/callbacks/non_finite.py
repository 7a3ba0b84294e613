"""Counts steps whose loss or gradient is not finite, and investigates when they persist."""

from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import lightning
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from diffusion_lab.common.files import replacing
from diffusion_lab.common.messages import TrainingStopped, say
from diffusion_lab.common.ranges import settings, whole
from diffusion_lab.compute.distributed import of_all_ranks, on_rank_zero
from diffusion_lab.diffusion.objective import Objective, TimeSampler
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.files import NON_FINITE
from diffusion_lab.training.callbacks.checkpoint import Checkpoint
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.callbacks.weight_averaging import EMA, PosthocEMA, restore_trained
from diffusion_lab.training.module import module_of


@dataclass
class BadStepCounts:
    """The numbers of bad steps and of rollbacks in a run."""

    skipped: int = 0
    row: int = 0  # consecutive bad steps up to now
    logged: int = 0  # `skipped` when it was last logged
    rollbacks: int = 0


@settings
class NonFinite(Callback):
    """Counts bad steps (`training.bad_steps`); `patience` of them in a row end the run.

    So do fewer if there were no others. On a GPU they are counted at the steps that are logged, as
    asking is waiting, so a row may be longer.

    Before that, the run is rolled back `max_rollbacks` times: weights, averages and optimiser
    return to the last checkpoint, but the data continue, as the same data would fail again. Every
    layer is watched during the last step of a row; its images, noise levels and losses, as far as
    the family has them, are written to `non_finite/` in the run folder, with the name of the first
    layer with non-finite values.
    """

    patience: Annotated[int, whole(2)] = 20
    max_rollbacks: Annotated[int, whole(0)] = 0

    def __post_init__(self) -> None:
        self.counts = BadStepCounts()
        self._watch: Watch | None = None
        self._unread: list[tuple[int, Tensor]] = []  # steps, and whether each was bad

    def state_dict(self) -> dict[str, int]:
        self._read()
        return asdict(self.counts)

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.counts = BadStepCounts(**state)

    def on_fit_end(self, trainer, pl_module) -> None:
        self._read()
        skipped = self.counts.skipped
        pl_module.context.summary["skipped_steps"] = skipped
        if 0 < skipped == trainer.global_step:
            raise TrainingStopped(
                f"no step changed the weights: each of {skipped} was skipped, as its loss or a "
                "gradient was not finite; try a lower optimizer.lr, or trainer.precision=32-true, "
                "in a new run",
                final=True,
            )

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if self.counts.row >= self.patience - 1:
            self._watch = self._watch or Watch(pl_module)
            self._watch.open(batch)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer) -> None:
        if self._watch:
            self._watch.look_at_gradients()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if not stepped(trainer, batch_idx):
            return
        counts, watch, self._watch = self.counts, self._watch, None
        if watch:
            watch.close()
        bad_steps = pl_module.bad_steps
        self._unread.append((trainer.global_step, bad_steps.bad))
        due = trainer.global_step % trainer.log_every_n_steps == 0
        if due or watch or bad_steps.bad.is_cpu:
            self._read()
        if counts.row >= self.patience and watch:  # `watch` was opened when this step began
            self._end_row(trainer, watch)
        if counts.skipped > counts.logged and due:
            counts.logged = counts.skipped
            pl_module.record({"train/skipped_steps": counts.skipped})

    def _read(self) -> None:
        """Counts the bad steps among the ones not yet read; waits for a GPU."""
        unread, self._unread, counts = self._unread, [], self.counts
        flags = torch.stack([bad for _, bad in unread]).tolist() if unread else []
        for (step, _), bad in zip(unread, flags, strict=True):
            if bad and not counts.skipped:
                say(
                    f"Step {step} is skipped: its loss or gradient is not finite. Further ones are "
                    "counted in train/skipped_steps."
                )
            counts.skipped += bad
            counts.row = counts.row + 1 if bad else 0

    def _end_row(self, trainer: lightning.Trainer, watch: "Watch") -> None:
        """Saves what `watch` found, then rolls the run back or raises TrainingStopped."""
        row, self.counts.row = self.counts.row, 0
        step, folder = trainer.global_step, module_of(trainer).context.folder
        path = folder / NON_FINITE / f"step_{step:07d}_rank{trainer.global_rank}.pt"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as file:
                torch.save({"step": step, "found": watch.found, "batches": watch.batches}, file)
            kept = f"are in {path.parent}"
        except OSError as error:  # must neither stop the run nor leave other ranks waiting
            kept = f"could not be written to {path.parent} ({error.strerror})"
        found = next((each for each in of_all_ranks(watch.found) if each), "was in no layer")
        reason = (
            f"the loss or a gradient was not finite in {row} consecutive steps, the last of them "
            f"step {step}: the first such value {found}; the batch and what is known of it {kept}"
        )
        callbacks = trainer.callbacks  # type: ignore[attr-defined]
        savers = [each for each in callbacks if isinstance(each, Checkpoint)]
        for saver in savers:
            saver.wait()  # for one that a thread still writes
        saved = on_rank_zero(lambda: checkpoints.exists(folder))
        if self.counts.rollbacks >= self.max_rollbacks or not saved:
            most = max(self.max_rollbacks, self.counts.rollbacks + 1)
            sooner = (
                "" if saved or not savers else " with a smaller callbacks.checkpoint.every_n_steps"
            )
            raise TrainingStopped(
                f"{reason}; try a lower optimizer.lr, or trainer.precision=32-true, or "
                f"callbacks.non_finite.max_rollbacks={most}{sooner}"
            )
        self.counts.rollbacks += 1
        say(f"{reason[0].upper()}{reason[1:]}. The weights are reset to the last checkpoint.")
        roll_back(trainer, on_rank_zero(lambda: checkpoints.newest_intact(folder)))


def roll_back(trainer: lightning.Trainer, path: Path) -> None:
    """Gives weights, averages, optimiser and scaler the values of a checkpoint."""
    strategy = trainer.strategy
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint)
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    averages = [each for each in callbacks if isinstance(each, EMA | PosthocEMA)]
    for each in averages:
        each.on_load_checkpoint(trainer, trainer.lightning_module, checkpoint)
    restore_trained(trainer, checkpoint)
    for each in averages:
        each.begin(trainer.lightning_module)
    strategy.load_optimizer_state_dict(checkpoint)
    module_of(trainer).lay_out_state()
    module_of(trainer).set_rates()
    precision = trainer.precision_plugin
    if state := checkpoint.get(type(precision).__qualname__):
        precision.load_state_dict(state)


class Watch:
    """Watches one step of a module, layer by layer, forward and backward, which is slow.

    `found` says where values were first not finite, or is None. `batches` holds the images,
    labels, t, logsnr and losses of each micro-batch.
    """

    def __init__(self, module: nn.Module):
        self.module = module
        self.found: str | None = None
        self.batches: list[dict[str, object]] = []
        self._reached: str | None = None  # last layer that a finite gradient reached
        # compiled code calls no hooks
        torch.compiler.set_stance("force_eager")
        self._hooks = [
            layer.register_forward_hook(partial(self._see, name))
            for name, layer in module.named_modules()
        ]

    def open(self, batch: tuple[Tensor, ...]) -> None:
        """Starts the record of a micro-batch, and checks the micro-batch itself."""
        self._reached = None
        self.batches.append({"batch": [part.cpu() for part in batch]})
        if not all(is_finite(part) for part in batch):
            self._find("is the batch itself")

    def close(self) -> None:
        """Removes the hooks at the end of the step."""
        for hook in self._hooks:
            hook.remove()
        torch.compiler.set_stance("default")

    def look_at_gradients(self) -> None:
        """Checks parameter gradients: they may overflow where all activations were finite."""
        for name, parameter in self.module.named_parameters():
            if parameter.grad is not None and not is_finite(parameter.grad):
                self._find(f"is the gradient of {name}")

    def _find(self, where: str) -> None:
        self.found = self.found or where

    def _see(self, name: str, layer: nn.Module, inputs: tuple, output: Any) -> None:
        if not self.module.training or not self.batches:
            return
        known = self.batches[-1]
        if isinstance(layer, TimeSampler):
            level = output[0]
            known |= {"t": level.t.detach().cpu(), "logsnr": level.logsnr.detach().cpu()}
        if isinstance(layer, Objective):
            known["losses"] = output.minimised.detach().cpu()
        for tensor in tensors(output):
            if not is_finite(tensor):
                # non-finite inputs that came from no layer were made by the module around this one
                made_here = all(is_finite(each) for each in tensors(inputs))
                self._find(f"is the output of {name if made_here else name.rpartition('.')[0]}")
            if tensor.requires_grad:
                tensor.register_hook(partial(self._see_gradient, name))

    def _see_gradient(self, name: str, gradient: Tensor) -> None:
        if is_finite(gradient):
            self._reached = name
        else:
            self._find(f"is the gradient that {self._reached or 'the loss'} passes on to {name}")


def is_finite(tensor: Tensor) -> bool:
    """Whether all values of a tensor are finite; waits for a GPU."""
    return not tensor.is_floating_point() or bool(tensor.isfinite().all())


def tensors(value: object) -> list[Tensor]:
    """The tensors in a value: itself, or those in tuples, lists and dictionaries."""
    return [each for each in tree_leaves(value) if isinstance(each, Tensor)]
