"""The disk that a run takes: checkpoints, snapshots of averages, and features."""

from diffusion_lab.estimate.run_cost import averages_bytes, optimizer_bytes, shares
from diffusion_lab.families.diffusion.task import DiffusionTask
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.training.callbacks import Checkpoint, PosthocEMA

IN_PLACE = 3  # checkpoints at once: the last, the one before it, and a new one being written
STATISTICS = 8  # bytes of a number of a mean or covariance


def checkpoint_bytes(task: DiffusionTask) -> int:
    """The bytes of a checkpoint: weights, their averages, and the optimiser's state."""
    weights = shares(task.module.state_dict().values(), 1)
    return weights + averages_bytes(task, 1) + optimizer_bytes(task.module, 1)


def checkpoints_at_once(task: DiffusionTask, steps: int) -> int:
    """The most checkpoints that are on disk at once in a run of `steps` steps."""
    return IN_PLACE + kept_steps(task, steps) if task.callback(Checkpoint) else 0


def kept_steps(task: DiffusionTask, steps: int) -> int:
    """The number of checkpoints of single steps that a run keeps beside the last."""
    saving = task.callback(Checkpoint)
    if saving is None:
        return 0
    every = saving.keep_every_n_steps
    return ((steps - 1) // every if every else 0) + (saving.top_k if saving.best else 0)


def snapshot_bytes(task: DiffusionTask) -> int:
    """The bytes that the snapshots of averages take."""
    posthoc = task.callback(PosthocEMA)
    parameters = sum(p.numel() for p in task.module.network.parameters())
    return posthoc.bytes_of(parameters) if posthoc else 0


def features_bytes(metrics: GenerativeMetrics | None, images: int | None) -> int | None:
    """The bytes of the reference's features, of their mean and of a root of their covariance.

    None if the number of training images is not known.
    """
    if metrics is None:
        return 0
    if images is None:
        return None
    count, dim = min(images, metrics.reference_size or images), metrics.extractor.dim
    mapped = metrics.extractor.spatial_dim
    moments = sum(each * (1 + min(each, count)) for each in (dim, mapped))
    return 4 * count * dim + STATISTICS * moments
