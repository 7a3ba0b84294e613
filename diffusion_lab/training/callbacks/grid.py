"""Pictures in training, always of the same samples or test images: `samples/step_*.png`."""

from abc import abstractmethod
from typing import ClassVar, cast

import lightning
import torch
from torch import Tensor

from diffusion_lab.common.images import as_pil, save_png
from diffusion_lab.common.ranges import optional, ranges, whole
from diffusion_lab.first_stage.autoencoder import Autoencoder
from diffusion_lab.pipeline import draw_rows
from diffusion_lab.runs import SAMPLES
from diffusion_lab.training.callbacks.evaluation import reconstruct
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights
from diffusion_lab.training.logger import WandB
from diffusion_lab.training.logger.samples_table import chosen
from diffusion_lab.training.module import data_of, module_of


class Grid(Periodic):
    """Draws a picture of `columns` images a row every `every_n_steps` steps and at a run's end."""

    at_end = True
    name: ClassVar[str]  # of the picture in W&B
    columns: int

    @abstractmethod
    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        """Images (N, C, H, W) in reading order, on every rank, and a caption of what they are."""

    def run(self, trainer: lightning.Trainer) -> None:
        module, step = module_of(trainer), trainer.global_step
        images, caption = self.draw(trainer)
        path = module.context.folder / SAMPLES / f"step_{step:07d}.png"
        module.context.latest_grid = path
        if not trainer.is_global_zero:
            return
        save_png(data_of(trainer).source.picture(images, self.columns), path)
        for logger in trainer.loggers:
            if isinstance(logger, WandB):
                seen = f"step {step}, {module.images_seen:,} images seen"
                logger.log_grid(self.name, path, f"{seen}: {caption}", step)
                self.log_images(logger, images, trainer)

    def log_images(self, logger: WandB, images: Tensor, trainer: lightning.Trainer) -> None:
        """Logs single images besides the picture, on rank 0."""
        return None


class SampleGrid(Grid):
    """Samples of one seed: a row a class where the model is conditional, else a square."""

    name = "samples"

    @ranges(every_n_steps=optional(whole(1)), columns=whole(1), seed=whole(0))
    def __init__(self, every_n_steps: int | None = 1000, columns: int = 10, seed: int = 0):
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.seed = seed

    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        pipeline = module_of(trainer).context.sampling()
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            images = draw_rows(pipeline, self.columns, self.seed)
        rows = "a row a class" if pipeline.conditional else "without classes"
        return images, f"samples of seed {self.seed}, {rows}"

    def log_images(self, logger: WandB, images: Tensor, trainer: lightning.Trainer) -> None:
        data, pipeline = data_of(trainer), module_of(trainer).context.sampling()
        names = data.class_names if pipeline.conditional else None
        samples = [
            (
                as_pil(data.source.picture(images[i : i + 1], 1)),
                names[i // self.columns] if names else None,
                i,
                self.seed,
            )
            for i in chosen(len(images), self.columns)
        ]
        logger.log_samples(samples, trainer.global_step)


class ReconstructionGrid(Grid):
    """Rows of test images, below each what an autoencoder makes of it."""

    name = "reconstructions"

    @ranges(every_n_steps=optional(whole(1)), columns=whole(1))
    def __init__(self, every_n_steps: int | None = 1000, columns: int = 10):
        self.every_n_steps = every_n_steps
        self.columns = columns

    @torch.inference_mode()
    def draw(self, trainer: lightning.Trainer) -> tuple[Tensor, str]:
        data = data_of(trainer)
        autoencoder = cast(Autoencoder, trainer.lightning_module.autoencoder)
        count = min(4 * self.columns, data.validation_size)
        images = data.held_out(count).images
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            back = reconstruct(autoencoder, images).cpu()
        white = images.new_full((-count % self.columns, *images.shape[1:]), 255)
        rows = [torch.cat([each, white]).split(self.columns) for each in (images, back)]
        picture = torch.cat([row for pair in zip(*rows, strict=True) for row in pair])
        return picture, "rows of held-out images, below each what came back of it"
