"""Training progress: a Rich bar on a terminal, a line now and then in a log file."""

import time

from lightning.pytorch.callbacks import Callback, RichProgressBar

from diffusion_lab.common.messages import say
from diffusion_lab.training.callbacks.periodic import stepped

SECONDS_BETWEEN_LINES = 30.0


class ProgressBar(RichProgressBar):
    """Lightning's bar, without the epoch: a run here is a number of steps."""

    def _get_train_description(self, current_epoch: int) -> str:
        return "Training"

    def get_metrics(self, trainer, pl_module) -> dict:
        metrics = super().get_metrics(trainer, pl_module)
        metrics.pop("v_num", None)
        return metrics


class ProgressLines(Callback):
    """Prints the progress of the run every half minute."""

    def __init__(self) -> None:
        self._started = self._said = 0.0

    def on_train_start(self, trainer, pl_module) -> None:
        self._started = self._said = time.monotonic()

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx) -> None:
        now = time.monotonic()
        if stepped(trainer, batch_idx) and now - self._said > SECONDS_BETWEEN_LINES:
            self._said = now
            say(
                f"step {trainer.global_step}/{trainer.max_steps}  {now - self._started:.0f} s  "
                f"loss {float(trainer.callback_metrics['train/loss']):.4f}"
            )
