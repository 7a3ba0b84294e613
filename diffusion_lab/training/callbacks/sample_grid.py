"""Pictures in training: always the same samples, one row a class when conditional."""

from pathlib import Path

import lightning
from torch import Tensor

from diffusion_lab.common.images import as_pil, save_png
from diffusion_lab.data import ImageDataModule
from diffusion_lab.pipeline import Pipeline, draw_rows
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights
from diffusion_lab.training.logger import WandB
from diffusion_lab.training.logger.samples_table import Sample, chosen


class SampleGrid(Periodic):
    """Writes `samples/step_*.png` every `every_n_steps` steps; the end of a run draws one too."""

    def __init__(
        self,
        pipeline: Pipeline,
        folder: Path,
        every_n_steps: int | None = 1000,
        columns: int = 10,
        seed: int = 0,
    ):
        self.pipeline = pipeline
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.seed = seed
        self.latest: Path | None = None

    def run(self, trainer: lightning.Trainer) -> None:
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            images = draw_rows(self.pipeline, self.columns, self.seed)
        rows = "a row a class" if self.pipeline.conditional else "without classes"
        what = f"samples of seed {self.seed}, {rows}"
        self.latest = publish(trainer, images, self.columns, self.folder, "samples", what)
        for logger in wandb_loggers(trainer):
            logger.log_samples(self._table(images, trainer.datamodule), trainer.global_step)

    def _table(self, images: Tensor, data: ImageDataModule) -> list[Sample]:
        names = data.class_names if self.pipeline.conditional else None
        return [
            Sample(
                as_pil(data.source.picture(images[i : i + 1], 1)),
                names[i // self.columns] if names else None,
                i,
                self.seed,
            )
            for i in chosen(len(images), self.columns)
        ]


def wandb_loggers(trainer: lightning.Trainer) -> list[WandB]:
    """Those that log pictures; on rank 0 alone."""
    loggers = trainer.loggers if trainer.is_global_zero else []
    return [logger for logger in loggers if isinstance(logger, WandB)]


def publish(
    trainer: lightning.Trainer, images: Tensor, columns: int, folder: Path, name: str, what: str
) -> Path:
    """Writes images (N, C, H, W) as one picture of this step, on rank 0, and to W&B as `name`.

    `what` is said below it, after the step.
    """
    step = trainer.global_step
    path = folder / f"step_{step:07d}.png"
    if trainer.is_global_zero:
        save_png(trainer.datamodule.source.picture(images, columns), path)
    seen = trainer.lightning_module.images_seen
    for logger in wandb_loggers(trainer):
        logger.log_grid(name, path, f"step {step}, {seen:,} images seen: {what}", step)
    return path
