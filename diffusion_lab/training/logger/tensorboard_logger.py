"""TensorBoard's event files in a run folder."""

from pathlib import Path

import numpy as np
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import package
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.run_logger import Row, RunLogger, numbers_of

FOLDER = "tensorboard"  # in the run folder


class TensorBoard(RunLogger, TensorBoardLogger):
    """Event files in the run folder; a resumed run hides what came after its checkpoint."""

    title = "TensorBoard"

    def __init__(self, run_dir: Path, clock: Clock, config: dict, resumed_from: int):
        RunLogger.__init__(self, run_dir, clock, config, resumed_from)
        TensorBoardLogger.__init__(
            self,
            save_dir=str(run_dir),
            name="",
            version=FOLDER,
            default_hp_metric=False,
            purge_step=resumed_from + 1,  # TensorBoard drops this and later steps of older files
        )

    @classmethod
    def require(cls) -> None:
        package("tensorboard", "tensorboard", "logger=tensorboard")

    def open(self) -> str:
        settings = {key: plain(value) for key, value in flat(self.config).items()}
        self.log_session(settings)
        return f"TensorBoard: tensorboard --logdir {OUTPUTS}"

    def log_session(self, settings: Row) -> None:
        """Writes the hyperparameters of the HParams page.

        Lightning's own method also declares which of them exist, by the first run that
        TensorBoard finds; runs of another backbone would lack theirs.
        """
        from torch.utils.tensorboard.summary import hparams

        _, session, _ = hparams(settings, {})
        self.experiment._get_file_writer().add_summary(session)
        self.experiment.flush()

    def write(self, row: Row, step: int) -> None:
        TensorBoardLogger.log_metrics(self, row, step)
        self.experiment.flush()

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        with Image.open(path) as image:
            pixels = np.asarray(image.convert("RGB"))  # (H, W, 3)
        self.experiment.add_image(name, pixels, step, dataformats="HWC")
        self.experiment.flush()

    def close(self, summary: Row | None) -> None:
        if summary:
            TensorBoardLogger.log_metrics(self, numbers_of(summary), summary["steps"])
        self.experiment.close()


def plain(value: object) -> bool | float | str:
    """A setting as TensorBoard can show it."""
    return value if isinstance(value, bool | int | float | str) else str(value)
