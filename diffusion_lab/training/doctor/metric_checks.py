"""What the figures of a run will be worth."""

from collections.abc import Iterable, Iterator

from diffusion_lab.training.doctor.finding import Remark, advice, warning
from diffusion_lab.training.doctor.planned_run import PlannedRun
from diffusion_lab.training.doctor.values import reference_size

MOST_SAMPLES = 50_000  # the literature's count
FEW_PER_CLASS = 100  # samples, below which a class's FID is mostly bias


def evaluation(run: PlannedRun) -> Iterator[Remark]:
    """Figures at all, where images can have them."""
    if run.task.metrics is None and run.datamodule.native_shape[0] in (1, 3):
        yield advice(
            "no FID or KID is measured; leave out callbacks.evaluation=null, or run "
            "`diffusion-lab evaluate run=...` afterwards"
        )


def extractor(run: PlannedRun) -> Iterable[Remark]:
    """The metrics' networks are here and fit the data, or their stage is refused."""
    _ = run.metrics
    return ()


def sample_counts(run: PlannedRun) -> Iterator[Remark]:
    """Enough images for the distance, and as many on both sides of a comparison."""
    metrics, data = run.task.metrics, run.data
    if metrics is None:
        return
    samples, width = metrics.num_samples, metrics.extractor.dim
    reference, test = reference_size(metrics, data), len(data.test_images())
    if reference < width:
        yield warning(
            f"the reference has {reference} images for {width} features, so that its covariance "
            "is singular; write metrics.reference_size=null, or read KID where the data have no "
            "more"
        )
    if samples <= width:
        yield advice(
            f"metrics.num_samples={samples} makes a singular covariance of {width} features, and "
            f"FID is mostly bias; read KID, or write metrics.num_samples={4 * width}"
        )
    if samples > MOST_SAMPLES:
        yield advice(
            f"metrics.num_samples={samples} is more than any published figure's; write "
            f"metrics.num_samples={MOST_SAMPLES}"
        )
    if samples > test:
        yield advice(
            f"metrics.num_samples={samples} is more than the {test} test images, so that the "
            f"FID of real images is of fewer than the figure and is too high; write "
            f"metrics.num_samples={test} to compare them"
        )


def class_counts(run: PlannedRun) -> Iterator[Remark]:
    """Enough samples of each class for its own FID."""
    metrics, classes = run.task.metrics, run.datamodule.num_classes
    if metrics is not None and metrics.per_class and metrics.num_samples < FEW_PER_CLASS * classes:
        yield warning(
            f"metrics.per_class=true compares {metrics.num_samples // classes} samples of each "
            f"class, too few for a FID; write metrics.num_samples={FEW_PER_CLASS * classes} or "
            "more"
        )


CHECKS = (evaluation, extractor, sample_counts, class_counts)
