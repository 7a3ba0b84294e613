"""The metrics of a run in training: FID and its companions, of the averaged weights."""

from abc import abstractmethod
from typing import cast

import lightning
import torch
from torch import Tensor

from diffusion_lab.common.images import to_float, to_uint8
from diffusion_lab.common.messages import progress_bar
from diffusion_lab.common.ranges import optional, ranges, whole
from diffusion_lab.compute.distributed import rank_and_world, shard
from diffusion_lab.first_stage.autoencoder import Autoencoder
from diffusion_lab.pipeline import evaluate
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights
from diffusion_lab.training.module import data_of, module_of

KEPT = ("fid", "kid")  # of reconstructions; coverage and the like are of models that generate


class Evaluation(Periodic):
    """Measures every `every_n_steps` steps (null: never) and at the end of a run."""

    at_end = True

    @abstractmethod
    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        """The metrics by name, on every rank, of the weights that the module has."""

    def run(self, trainer: lightning.Trainer) -> None:
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            results = self.measure(trainer)
        module_of(trainer).context.results = results
        for logger in trainer.loggers:
            logger.log_metrics(results, step=trainer.global_step)


class SampleEvaluation(Evaluation):
    """FID and its companions of samples, `batch_size` of them drawn at once."""

    @ranges(every_n_steps=optional(whole(1)), batch_size=whole(1), seed=whole(0))
    def __init__(self, every_n_steps: int | None = None, batch_size: int = 256, seed: int = 0):
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.seed = seed

    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        run, data = module_of(trainer).context, data_of(trainer)
        return evaluate(run.sampling(), run.measuring(), data, self.batch_size, self.seed)


class ReconstructionEvaluation(Evaluation):
    """rFID and rKID of test images, as an autoencoder returns them."""

    @ranges(every_n_steps=optional(whole(1)), batch_size=whole(1))
    def __init__(self, every_n_steps: int | None = None, batch_size: int = 256):
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size

    @torch.inference_mode()
    def measure(self, trainer: lightning.Trainer) -> dict[str, float]:
        data, prepared = data_of(trainer), module_of(trainer).context.measuring()
        autoencoder = cast(Autoencoder, trainer.lightning_module.autoencoder)
        chosen, observe = prepared.metrics.test_ids(data), prepared.metrics.observer
        ids = shard(len(chosen), *rank_and_world())
        batches = data.padded(data.test_images()[chosen[ids]]).split(self.batch_size)
        observed = []
        with progress_bar("Reconstructing test images", len(batches)) as advance:
            for images in batches:
                back = reconstruct(autoencoder, images)
                observed.append(observe(data.to_native(back)))
                advance()
        results = prepared.compute(observe.gather(observed, ids), data.test_labels()[chosen])
        return {f"r{name}": value for name, value in results.items() if name.startswith(KEPT)}


def reconstruct(autoencoder: Autoencoder, images: Tensor) -> Tensor:
    """The reconstructions of images uint8 (B, C, H, W), uint8, on the autoencoder's device."""
    images = to_float(images.to(next(autoencoder.parameters()).device))
    return to_uint8(autoencoder.decode(autoencoder.mean(autoencoder.moments(images))))
