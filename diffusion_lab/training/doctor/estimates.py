"""How long a run takes on this device and what memory it needs, from a few measured steps."""

from dataclasses import dataclass

import torch
from lightning.pytorch.callbacks import Timer
from omegaconf import DictConfig

from diffusion_lab.compute.batch import BatchLayout
from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.source import decoding
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.profiling.timing import Bench, median_seconds
from diffusion_lab.training.callbacks import Evaluation, Grid
from diffusion_lab.training.callbacks.configured import configured
from diffusion_lab.training.diffusion_task import DiffusionTask

TIMED_STEPS = 3
FEATURE_IMAGES = 64  # a batch, as in the metrics
STATE_BYTES = 20  # of a parameter in float32: weight, gradient, Adam's two moments, average


@dataclass(frozen=True)
class StepTimes:
    """Seconds on one device."""

    step: float  # forward, backward and optimiser on a micro-batch
    call: float  # of the network, an image
    features: float  # of the metrics' networks, an image


@dataclass(frozen=True)
class Plan:
    """The steps that a run will take, and its seconds; drawing is None where it is not known."""

    steps: int
    training: float  # with the held-out loss
    drawing: float | None  # of grids and of samples for the metrics
    features: float  # with those of the reference, which are kept for the next run

    @property
    def evaluation(self) -> float:
        """Seconds that training does not take."""
        return (self.drawing or 0.0) + self.features


def measure(bench: Bench, compile: bool | str, metrics: GenerativeMetrics | None) -> StepTimes:
    """Times steps, compiled as in training: activations are to be weighed before."""
    bench.compile(compile)
    device, count = bench.device, len(bench.images)
    (step,) = median_seconds([bench.train], device, TIMED_STEPS)
    (call,) = median_seconds([bench.call], device, TIMED_STEPS)
    features = 0.0
    if metrics is not None:
        images = bench.images[torch.arange(FEATURE_IMAGES, device=device) % count]
        (features,) = median_seconds([lambda: metrics.observer(images)], device, TIMED_STEPS)
    return StepTimes(step, call / count, features / FEATURE_IMAGES)


def plan(
    cfg: DictConfig,
    task: DiffusionTask,
    data: ImageDataModule,
    batch: BatchLayout,
    seconds: StepTimes,
    calls: int | None,
) -> Plan:
    """The run's time; `calls` of the network make an image, None where that is not known."""
    full = cfg.trainer.max_steps
    conditional = task.module.denoiser.conditioning.conditional
    grid, evaluation = configured(cfg, Grid), configured(cfg, Evaluation)
    grid_images = grid.columns * (data.num_classes if conditional else grid.columns) if grid else 0
    samples = task.metrics.num_samples if task.metrics else 0
    real = 0
    if task.metrics:
        reference = len(data.reference_images())
        real = min(task.metrics.reference_size or reference, reference)
        real += min(samples, len(data.test_images()))

    def at(steps: int) -> Plan:
        def times(every: int | None) -> int:
            return 1 + ((steps - 1) // every if every else 0)  # the end of a run is one of them

        held_out = times(cfg.validate_every_n_steps) * data.validation_size
        measured = times(evaluation.every_n_steps) * samples if evaluation else 0
        drawn = measured + (times(grid.every_n_steps) * grid_images if grid else 0)
        training = steps * batch.accumulate * seconds.step + held_out * seconds.call / batch.world
        return Plan(
            steps,
            training,
            None if calls is None else drawn * calls * seconds.call / batch.world,
            (measured + real) * seconds.features / batch.world,
        )

    whole = at(full)
    if cfg.trainer.max_time is None:
        return whole
    # grids and held-out losses count against the limit; the last figures come after it
    limit = Timer(cfg.trainer.max_time).time_remaining()
    if limit is None or whole.training <= limit:
        return whole
    return at(max(1, int(full * limit / whole.training)))


def memory_needed(params: int, image_bytes: float, micro_batch: int) -> float:
    """Bytes that a step of training holds: what belongs to the network, and to its images."""
    return STATE_BYTES * params + image_bytes * micro_batch


def free_memory(device: torch.device) -> int | None:
    """Bytes free on the device; None where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return decoding.free_memory()
