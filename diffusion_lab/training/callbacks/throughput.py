"""Shows training as it goes: losses, norms, rates and speed, by operator, and in the terminal."""

import math
import statistics
import time
from pathlib import Path
from typing import Annotated

import lightning
import torch
from lightning.pytorch.callbacks import Callback, RichProgressBar, Timer
from omegaconf import DictConfig
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import profile, schedule

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import duration, markdown_table, percent
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Count, settings, whole
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.training.callbacks.periodic import Checked, require_diffusion, stepped
from diffusion_lab.training.module import ENDLESS, OBSERVED, TrainedModule, module_of

# checkpoint keys
OPEN_WINDOW = "losses_since_the_last_row"
NORMS = "gradient_norms_since_the_last_row"


class Throughput(Callback):
    """Logs a row every `log_every_n_steps` steps, over all ranks and the steps since the last row.

    The loss and the gradient's norm, before clipping, are means over the steps that were not
    skipped, including those before a resume; the largest norm is logged, too. Images/s is by the
    run's clock, which grids and evaluation stop, without validation. The other values that a
    module's training_step returns are logged for the last step, on rank 0. Values in the context's
    `row`, which earlier callbacks put there, become part of the row.
    """

    phase = 1  # once others have put their values into the row

    def __init__(self) -> None:
        self._loss = torch.zeros(())  # sum over this step's micro-batches
        # loss and gradient norm of each step since the last row
        self._window: list[tuple[Tensor, Tensor]] = []
        self._rates: dict[str, float] = {}  # of each group of parameters
        self._start = 0.0

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        # only now is the module on its training device
        device = pl_module.device
        self._window = [(loss.to(device), norm.to(device)) for loss, norm in self._window]
        self._open_window(pl_module)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        groups = enumerate(trainer.optimizers[0].param_groups)
        self._rates = {f"train/lr_group{i}" if i else "train/lr": each["lr"] for i, each in groups}

    def on_validation_start(self, trainer, pl_module) -> None:
        self._start -= pl_module.context.clock.seconds()

    def on_validation_end(self, trainer, pl_module) -> None:
        self._start += pl_module.context.clock.seconds()

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[OPEN_WINDOW], checkpoint[NORMS] = self._taken(trainer)

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        if OPEN_WINDOW in checkpoint:  # else the run was without this callback before
            norms = torch.as_tensor(checkpoint[NORMS])
            self._window = list(zip(checkpoint[OPEN_WINDOW], norms, strict=True))

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        self._loss = self._loss + outputs["loss"].detach()  # a micro-batch's share of the mean
        if not stepped(trainer, batch_idx):
            return
        self._window.append((self._loss, pl_module.gradient_norm))
        self._loss = torch.zeros(())
        self._steps += 1
        if trainer.global_step % trainer.log_every_n_steps:
            return
        losses, norms = self._taken(trainer)
        means = {"train/loss": losses.mean().item()} if len(losses) else {}
        if norms:
            means |= {"train/grad_norm": statistics.fmean(norms), "train/grad_norm_max": max(norms)}
        # a GPU has caught up by now, as item() waits for it
        seconds = pl_module.context.clock.seconds() - self._start
        parts = {k: float(each) for k, each in outputs.items() if k not in ("loss", OBSERVED)}
        speed = {"train/images_per_second": self._steps * pl_module.batch_size / seconds}
        pl_module.record(parts | means | self._rates | speed | pl_module.context.row)
        pl_module.context.row.clear()
        self._window.clear()
        self._open_window(pl_module)

    def _taken(self, trainer: lightning.Trainer) -> tuple[Tensor, list[float]]:
        """The losses (n,), over all ranks, and norms of the n steps that were not skipped."""
        if not self._window:
            return torch.empty(0), []
        losses, norms = map(torch.stack, zip(*self._window, strict=True))
        losses = trainer.strategy.reduce(losses, reduce_op="mean").cpu()
        norms = norms.cpu()
        good = norms.isfinite()
        return losses[good], norms[good].tolist()

    def _open_window(self, pl_module) -> None:
        self._steps = 0
        self._start = pl_module.context.clock.seconds()


LEVELS = 10  # losses are reported by level: at t = 0.05, 0.15, ..., 0.95
LEVELS_WINDOW = "losses_by_level_since_the_last_row"  # checkpoint key


class LevelLosses(Callback, Checked):
    """Adds `train_by_level/*` to each row of Throughput: the mean loss in each tenth of t.

    It covers what `train/loss` does: all ranks, and the steps since the last row that were not
    skipped. Losses are those of training, without importance weights and learned uncertainty.
    """

    def __init__(self) -> None:
        self._sums = torch.zeros(LEVELS, 2)  # sum and number of the losses since the last row
        self._step = torch.zeros(LEVELS, 2)  # those of this step's micro-batches

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        require_diffusion(module, "callbacks.level_losses")

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        # only now is the module on its training device
        self._sums = self._sums.to(pl_module.device)
        self._step = torch.zeros_like(self._sums)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        t, losses = outputs[OBSERVED]
        self._step += sums_by_level(bins_of(t).to(losses.device), losses)
        if not stepped(trainer, batch_idx):
            return
        self._sums += self._step.masked_fill(pl_module.bad_steps.bad, 0)
        self._step = torch.zeros_like(self._sums)
        if trainer.global_step % trainer.log_every_n_steps == 0:
            means = means_by_level("train", self._reduced(trainer).cpu())  # waits for a GPU once
            pl_module.context.row |= {name: float(mean) for name, mean in means.items()}
            self._sums = torch.zeros_like(self._sums)

    def on_save_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        checkpoint[LEVELS_WINDOW] = self._reduced(trainer).cpu()

    def on_load_checkpoint(self, trainer, pl_module, checkpoint: dict) -> None:
        known = LEVELS_WINDOW in checkpoint  # else the run was without this callback before
        if known and trainer.is_global_zero:  # the sums of all ranks, so one rank takes them
            self._sums = checkpoint[LEVELS_WINDOW].clone()

    def _reduced(self, trainer: lightning.Trainer) -> Tensor:
        """The sums over all ranks, (LEVELS, 2)."""
        return trainer.strategy.reduce(self._sums.clone(), reduce_op="sum")


def bins_of(t: Tensor) -> Tensor:
    """The tenth of (0, 1] that each t (B,) is in: 0 for t in (0, 0.1], and so on, (B,) int64."""
    return (t * LEVELS).ceil().long().sub(1).clamp(0, LEVELS - 1)


def sums_by_level(bins: Tensor, losses: Tensor) -> Tensor:
    """The sum and the number of losses (B,) in each of the LEVELS bins (B,), (LEVELS, 2)."""
    sums = torch.zeros(LEVELS, 2, device=losses.device)
    return sums.index_add_(0, bins, torch.stack([losses, torch.ones_like(losses)], 1))


def means_by_level(split: str, sums: Tensor) -> dict[str, Tensor | float]:
    """The mean loss at each level that has any, by name, from `sums_by_level` (LEVELS, 2)."""
    total, count = sums.unbind(1)
    return {
        f"{split}_by_level/t{(index + 0.5) / LEVELS:.2f}": total[index] / count[index]
        for index in count.nonzero().flatten().tolist()
    }


FOLDER = "profile"  # inside the run folder
WARM_UP = 1  # steps that the profiler itself needs


@settings
class OperatorProfile(Callback, Checked):
    """Records `steps` optimiser steps, once `skip` steps and one of warm-up have been trained.

    `profile/trace_rank*.json` opens in Perfetto (ui.perfetto.dev) or chrome://tracing, and
    `profile/operators_rank*.md` lists the operators that take most time of their own. Rank 0 prints
    the first `rows` of them. Recording makes steps slower.
    """

    skip: Annotated[int, whole(0)] = 5
    steps: Count = 3
    rows: Count = 12

    def __post_init__(self) -> None:
        self._profiler: profile | None = None

    def check(self, module: TrainedModule, layout: BatchLayout, trainer: DictConfig) -> None:
        if (least := self.skip + WARM_UP + self.steps) > trainer.max_steps:
            raise UserError(
                f"trainer.max_steps={trainer.max_steps} ends before the steps to profile; write "
                f"trainer.max_steps={least}, or a smaller callbacks.operator_profile.skip"
            )

    def on_train_start(self, trainer: lightning.Trainer, pl_module) -> None:
        self._profiler = profile(
            schedule=schedule(wait=self.skip, warmup=WARM_UP, active=self.steps, repeat=1),
            on_trace_ready=lambda recorded: self._write(trainer, recorded),
            acc_events=True,  # of its only cycle; else it warns
        )
        self._profiler.start()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if self._profiler and stepped(trainer, batch_idx):
            self._profiler.step()

    def on_train_end(self, trainer, pl_module, exception: BaseException | None = None) -> None:
        if self._profiler:  # of which a process has only one
            self._profiler.stop()
            self._profiler = None

    on_exception = on_train_end

    def _write(self, trainer: lightning.Trainer, recorded: profile) -> None:
        folder: Path = module_of(trainer).context.folder / FOLDER
        folder.mkdir(exist_ok=True)
        rank = trainer.global_rank
        trace = folder / f"trace_rank{rank}.json"
        recorded.export_chrome_trace(str(trace))
        lines = operators(recorded, trainer.strategy.root_device.type == "cuda", self.steps)
        table = markdown_table(["operator", "calls", "ms", "share"], lines)
        write_atomically(folder / f"operators_rank{rank}.md", table)
        if trainer.is_global_zero:
            say(f"Trace for ui.perfetto.dev: {trace}")
            say("Operators by their own time in a step:")
            for line in table.splitlines()[: 2 + self.rows]:
                say(line)


def operators(recorded: profile, on_gpu: bool, steps: int) -> list[list[str]]:
    """Rows on the operators, the dearest first: name, calls, ms, and share; calls, ms by step."""
    events = [
        (each.self_device_time_total if on_gpu else each.self_cpu_time_total, each)
        for each in recorded.key_averages()
        if not each.key.startswith("ProfilerStep")  # the whole step
        # a GPU's kernels, and not also the operators that started them
        and (not on_gpu or (each.device_type == DeviceType.CUDA and not each.is_user_annotation))
    ]
    events.sort(key=lambda pair: -pair[0])
    total = sum(microseconds for microseconds, _ in events) or 1.0
    return [
        [
            f"`{event.key}`",
            f"{event.count / steps:g}",
            f"{microseconds / steps / 1000:.2f}",
            percent(100 * microseconds / total),
        ]
        for microseconds, event in events
    ]


SECONDS_BETWEEN_LINES = 30.0
SECONDS_BETWEEN_LOSSES = 1.0  # in the bar: reading one waits for a GPU


def loss_of(trainer: lightning.Trainer, outputs: dict[str, Tensor]) -> float:
    """The loss of a micro-batch, of which a step returns its share."""
    return float(outputs["loss"]) * trainer.accumulate_grad_batches


def left_of(trainer: lightning.Trainer, steps: int, seconds: float) -> float:
    """The seconds that are left after so many steps in `seconds`; a time limit may be nearer."""
    timers = (each for each in trainer.callbacks if isinstance(each, Timer))  # type: ignore[attr-defined]
    limits = [left for each in timers if (left := each.time_remaining()) is not None]
    if trainer.max_steps > 0 and steps:
        limits.append((trainer.max_steps - trainer.global_step) * seconds / steps)
    return max(0.0, min(limits, default=math.inf))


class ProgressBar(RichProgressBar):
    """Lightning's bar, without the epoch: a run here is a number of steps, or a time.

    Its total is the number of steps that are likely before the nearer of both ends the run.
    """

    _read, _loss = -math.inf, math.nan  # when a loss was read, and what it was
    _began = 0, 0.0  # the step and the time at which this training began

    def on_train_start(self, trainer, pl_module) -> None:
        self._began = trainer.global_step, time.monotonic()
        super().on_train_start(trainer, pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        if time.monotonic() - self._read > SECONDS_BETWEEN_LOSSES:
            self._read, self._loss = time.monotonic(), loss_of(trainer, outputs)
            self._set_total(trainer, batch_idx)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def _set_total(self, trainer: lightning.Trainer, batch_idx: int) -> None:
        steps, seconds = trainer.global_step - self._began[0], time.monotonic() - self._began[1]
        left, bar = left_of(trainer, steps, seconds), self.train_progress_bar_id
        if self.progress is not None and bar is not None and steps and left < math.inf:
            more = math.ceil(left / seconds * steps) * trainer.accumulate_grad_batches
            self.progress.update(bar, total=batch_idx + 1 + more)

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer, pl_module) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return {"train/loss": self._loss} | metrics


class ProgressLines(Callback):
    """Prints the progress of the run every half minute."""

    def on_train_start(self, trainer, pl_module) -> None:
        self._started = self._said = time.monotonic()
        self._first = trainer.global_step

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.monotonic()
        if stepped(trainer, batch_idx) and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            steps, seconds = trainer.global_step - self._first, now - self._started
            left = left_of(trainer, steps, seconds)
            total = f"/{trainer.max_steps}" if trainer.max_steps < ENDLESS else ""
            say(
                f"step {trainer.global_step}{total}  {duration(seconds)}, "
                f"{duration(left) if left < math.inf else '?'} left  "
                f"{steps * pl_module.batch_size / seconds:.0f} images/s  "
                f"loss {loss_of(trainer, outputs):.4f}"
            )
