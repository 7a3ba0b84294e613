"""FID and its companions in training, from the averaged weights."""

import lightning

from diffusion_lab.metrics import PreparedMetrics
from diffusion_lab.pipeline import Pipeline, evaluate
from diffusion_lab.training.callbacks.periodic import Periodic
from diffusion_lab.training.callbacks.weight_averaging import averaged_weights


class Evaluation(Periodic):
    """Evaluates every `every_n_steps` steps (null: never); the end of a run does so too."""

    def __init__(
        self,
        pipeline: Pipeline,
        metrics: PreparedMetrics,
        every_n_steps: int | None = None,
        batch_size: int = 256,
        seed: int = 0,
    ):
        self.pipeline = pipeline
        self.metrics = metrics
        self.every_n_steps = every_n_steps
        self.batch_size = batch_size
        self.seed = seed
        self.results: dict[str, float] = {}

    def run(self, trainer: lightning.Trainer) -> None:
        with averaged_weights(trainer), trainer.precision_plugin.forward_context():
            self.results = evaluate(
                self.pipeline, self.metrics, trainer.datamodule, self.batch_size, self.seed
            )
        for logger in trainer.loggers:
            logger.log_metrics(self.results, step=trainer.global_step)
