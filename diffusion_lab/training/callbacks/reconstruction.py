"""What an autoencoder makes of test images: pictures in training, and their FID."""

from pathlib import Path

import lightning
import torch
from torch import Tensor

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.progress import progress_bar
from diffusion_lab.compute.distributed import rank_and_world, shard
from diffusion_lab.first_stage.autoencoder import Autoencoder
from diffusion_lab.metrics import PreparedMetrics
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.sample_grid import publish
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights

KEPT = ("fid", "kid")  # of reconstructions; coverage and the like are of models that generate


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """What comes back of images uint8 (B, C, H, W), uint8, on the autoencoder's device."""
    images = to_float(images.to(next(autoencoder.parameters()).device))
    return to_uint8(autoencoder.decode(autoencoder.mean(autoencoder.moments(images))))


class ReconstructionGrid(Periodic):
    """Writes `samples/step_*.png`: rows of held-out images, below each what came back of it."""

    def __init__(self, folder: Path, every_n_steps: int | None = 1000, columns: int = 10):
        self.folder = folder
        self.every_n_steps = every_n_steps
        self.columns = columns
        self.latest: Path | None = None

    @torch.inference_mode()
    def run(self, trainer: lightning.Trainer) -> None:
        data = trainer.datamodule
        count = min(4 * self.columns, data.validation_size)
        images = data.held_out(count, "callbacks.sample_grid.columns").images
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            back = reconstruct(trainer.lightning_module.autoencoder, images).cpu()
        rows = zip(images.split(self.columns), back.split(self.columns), strict=True)
        white = images.new_full((-count % self.columns, *images.shape[1:]), 255)
        picture = torch.cat([part for row in rows for part in pad_row(row, white, self.columns)])
        self.latest = publish(
            trainer,
            picture,
            self.columns,
            self.folder,
            "reconstructions",
            "rows of held-out images, below each what came back of it",
        )


def pad_row(row: tuple[Tensor, Tensor], white: Tensor, columns: int) -> list[Tensor]:
    """Images and reconstructions, each filled up to `columns`."""
    return [torch.cat([part, white[: columns - len(part)]]) for part in row]


class ReconstructionEvaluation(Periodic):
    """rFID and rKID: of reconstructed test images, those that the floor beside is of."""

    def __init__(
        self, metrics: PreparedMetrics, every_n_steps: int | None = None, batch_size: int = 256
    ):
        self.metrics = metrics
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.results: dict[str, float] = {}

    @torch.inference_mode()
    def run(self, trainer: lightning.Trainer) -> None:
        data, observe = trainer.datamodule, self.metrics.metrics.observer
        chosen = self.metrics.metrics.test_ids(data)
        ids = shard(len(chosen), *rank_and_world())
        images = data.padded(data.test_images()[chosen[ids]])
        observed = []
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            parts = images.split(self.batch_size)
            with progress_bar("Reconstructing test images", len(parts)) as advance:
                for part in parts:
                    back = reconstruct(trainer.lightning_module.autoencoder, part)
                    observed.append(observe(data.to_native(back)))
                    advance()
        figures = self.metrics.compute(observe.gather(observed, ids), data.test_labels()[chosen])
        self.results = {
            f"r{name}": value for name, value in figures.items() if name.startswith(KEPT)
        }
        for logger in trainer.loggers:
            logger.log_metrics(self.results, step=trainer.global_step)
