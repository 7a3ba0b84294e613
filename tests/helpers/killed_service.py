"""A callback that kills the background process that W&B starts for a run."""

import os
import signal
import subprocess

from lightning.pytorch.callbacks import Callback

from diffusion_lab.common.messages import say


class KilledService(Callback):
    """Kills W&B's process before the third step, if this process has started it."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == 2:
            mine = ["pgrep", "-P", str(os.getpid()), "wandb"]
            found = subprocess.run(mine, capture_output=True, text=True).stdout.split()
            for process in found:
                os.kill(int(process), signal.SIGKILL)
            say(f"killed {len(found)} service")
