"""What the figures of a run will be worth."""

from collections.abc import Iterator

from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.training.diffusion_task import DiffusionTask
from diffusion_lab.training.doctor.finding import ADVICE, WARNING, Remark

MOST_SAMPLES = 50_000  # the literature's count
FEW_PER_CLASS = 100  # samples, below which a class's FID is mostly bias


def evaluation(task: DiffusionTask, datamodule: ImageDataModule) -> Iterator[Remark]:
    """Figures at all, where images can have them."""
    if task.metrics is None and datamodule.native_shape[0] in (1, 3):
        yield (
            ADVICE,
            "no FID or KID is measured; leave out callbacks.evaluation=null, or run "
            "`diffusion-lab evaluate run=...` afterwards",
        )


def extractor(metrics: GenerativeMetrics | None) -> Iterator[Remark]:
    """The metrics' networks are here and fit the data, or their stage is refused."""
    yield from ()


def sample_counts(task: DiffusionTask, data: ImageDataModule) -> Iterator[Remark]:
    """Enough images for the distance, and as many on both sides of a comparison."""
    metrics = task.metrics
    if metrics is None:
        return
    samples, width = metrics.num_samples, metrics.extractor.dim
    reference = min(metrics.reference_size or len(data.reference_images()),
                    len(data.reference_images()))  # fmt: skip
    if reference < width:
        yield (
            WARNING,
            f"the reference has {reference} images for {width} features, so that its covariance "
            "is singular; write metrics.reference_size=null, or read KID where the data have no "
            "more",
        )
    if samples <= width:
        yield (
            ADVICE,
            f"metrics.num_samples={samples} makes a singular covariance of {width} features, and "
            f"FID is mostly bias; read KID, or write metrics.num_samples={4 * width}",
        )
    if samples > MOST_SAMPLES:
        yield (
            ADVICE,
            f"metrics.num_samples={samples} is more than any published figure's; write "
            f"metrics.num_samples={MOST_SAMPLES}",
        )
    if samples > (test := len(data.test_images())):
        yield (
            ADVICE,
            f"metrics.num_samples={samples} is more than the {test} test images, so that the "
            f"floor is of fewer images than the figure and is too high; write "
            f"metrics.num_samples={test} to compare them",
        )


def class_counts(task: DiffusionTask, datamodule: ImageDataModule) -> Iterator[Remark]:
    """Enough samples of each class for its own FID."""
    metrics, classes = task.metrics, datamodule.num_classes
    if metrics is not None and metrics.per_class and metrics.num_samples < FEW_PER_CLASS * classes:
        yield (
            WARNING,
            f"metrics.per_class=true compares {metrics.num_samples // classes} samples of each "
            f"class, too few for a FID; write metrics.num_samples={FEW_PER_CLASS * classes} or "
            "more",
        )


CHECKS = (evaluation, extractor, sample_counts, class_counts)
