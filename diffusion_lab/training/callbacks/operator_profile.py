"""Records a few steps with torch's profiler, for `+debug=profile`."""

from pathlib import Path
from typing import Annotated

import lightning
from lightning.pytorch.callbacks import Callback
from omegaconf import DictConfig
from torch.autograd import DeviceType
from torch.profiler import profile, schedule

from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import markdown_table, percent
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Count, settings, whole
from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.training.callbacks.checked import Checked
from diffusion_lab.training.callbacks.periodic import stepped
from diffusion_lab.training.module import TrainedModule, module_of

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

    def on_train_end(self, trainer, pl_module) -> None:
        self._stop()

    def on_exception(self, trainer, pl_module, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """Stops the profiler, of which a process has only one."""
        if self._profiler:
            self._profiler.stop()
            self._profiler = None

    def _write(self, trainer: lightning.Trainer, recorded: profile) -> None:
        folder: Path = module_of(trainer).context.folder / FOLDER
        folder.mkdir(exist_ok=True)
        rank = trainer.global_rank
        trace = folder / f"trace_rank{rank}.json"
        recorded.export_chrome_trace(str(trace))
        lines = operators(recorded, trainer.strategy.root_device.type == "cuda", self.steps)
        head = ["operator", "calls", "ms", "share"]
        table = markdown_table(head, lines)
        write_atomically(folder / f"operators_rank{rank}.md", table)
        if trainer.is_global_zero:
            say(f"Trace for ui.perfetto.dev: {trace}")
            say("Operators by their own time in a step:")
            for line in markdown_table(head, lines[: self.rows]).splitlines():
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
