"""Compares generated images with training images, and test images too, as reference values."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Self

import torch
import torchmetrics
from torch import Tensor
from torchmetrics import MetricCollection

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import PATH, Flag, optional, settings, whole
from diffusion_lab.compute.distributed import cached, on_rank_zero
from diffusion_lab.data import ImageData, Split
from diffusion_lab.data.loader import LabelledRows
from diffusion_lab.metrics import built_in
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import FEATURES, FeatureExtractor
from diffusion_lab.metrics.likelihood_divergence import FLD
from diffusion_lab.metrics.metric import FromTorchmetrics, Metric, Values
from diffusion_lab.metrics.neighbours import Coverage
from diffusion_lab.metrics.observer import ImageSet, Observed, Observer, place_in_class, short_count
from diffusion_lab.metrics.quantity import (
    BESIDE,
    ON_REQUEST,
    REAL,
    Protocol,
    Quantity,
    quantity_of,
    with_fingerprint,
)
from diffusion_lab.metrics.reference import REFERENCE, reference_of

REFERENCE_SEED = 0  # the seed in `random_places`


@settings
class GenerativeMetrics:
    """The metrics of `num_samples` generated images: FID, KID, precision, recall, coverage, ...

    The reference is `reference_size` images, or all, of the training split ("train"), of the
    validation images, against which models are chosen, or of an .npz, which may have statistics
    instead. A value's name says what it depends on, as in `fid/<extractor>/train60k-5k` or
    `.../val5k-1k`: reference and number of samples.
    Each value has a reference value, `fid_real/...`: the same metric of equally many test images,
    or of all of them. `half_splits` is passed to `FID`; `per_class` adds the FID of each class;
    `classifier`, a file made by `diffusion-lab train-extractor`, adds the accuracy and the FID on
    its features; `patch` adds the seams between patches of that many pixels a side; `mmd`, `mind`,
    `fld` and `real_or_drawn` add the metrics of these names; `extra` holds metrics from outside the
    package, ours by kind or any of torchmetrics that look at images.
    """

    extractor: FeatureExtractor
    reference_size: Annotated[int | None, optional(whole(2))]
    num_samples: Annotated[int, whole(2)]
    cache_dir: Annotated[str, PATH]
    half_splits: Annotated[int, whole(0)] = 5
    per_class: Flag = False
    classifier: Annotated[str | None, optional(PATH)] = None
    patch: Annotated[int | None, optional(whole(2).as_in(4))] = None
    extra: Mapping[str, torchmetrics.Metric] | None = None
    reference: Annotated[str, REFERENCE] = "train"
    mmd: Flag = False
    mind: Flag = False
    fld: Flag = False
    real_or_drawn: Flag = False

    def __post_init__(self) -> None:
        reader = Classifier(self.classifier) if self.classifier else None
        if reader:
            reader.argument = "classifier"
        self.compared_with = reference_of(self.reference, self.per_class, self.fld)
        self.extra_metrics = [
            each if isinstance(each, Metric) else FromTorchmetrics(name, each)
            for name, each in (self.extra or {}).items()
        ]
        require_new_names(self.extra_quantities)
        of_images = any(isinstance(each, FromTorchmetrics) for each in self.extra_metrics)
        keep = of_images or self.real_or_drawn
        self.observer = Observer(self.extractor, reader, self.patch, keep)
        of_classifier = (reader,) if reader else None
        arguments: dict[type[Metric], tuple | None] = {  # None: not measured
            built_in.FID: (self.half_splits,),
            built_in.KID: (),
            built_in.MMD: () if self.mmd else None,
            built_in.MIND: () if self.mind else None,
            FLD: () if self.fld else None,
            Coverage: (),
            built_in.SpatialFID: () if self.extractor.spatial_dim else None,
            built_in.Seams: (self.patch,) if self.patch else None,
            built_in.RealOrDrawn: () if self.real_or_drawn else None,
            built_in.InceptionScore: (),
            built_in.ClassifierFID: of_classifier,
            built_in.Accuracy: of_classifier,
            built_in.ClassFID: () if self.per_class else None,
        }
        chosen = [kind(*given) for kind, given in arguments.items() if given is not None]
        self.metrics = chosen + self.extra_metrics

    @property
    def by_class(self) -> bool:
        """Whether any metric measures both samples and real images class by class."""
        return any(metric.by_class for metric in self.metrics)

    @property
    def extra_quantities(self) -> list[Quantity]:
        """The quantities of the metrics in `extra`, which are saved with the results."""
        return [quantity for metric in self.extra_metrics for quantity in metric.quantities]

    @property
    def extra_facts(self) -> list[dict[str, object]]:
        """The extra quantities as plain values."""
        return [asdict(quantity) for quantity in self.extra_quantities]

    def check(self, conditional: bool, num_classes: int) -> None:
        """Raises ValueError if a metric needs a conditional model, or more samples per class."""
        for metric in self.metrics:
            if metric.needs_labels and not conditional:
                raise ValueError(
                    f"{metric.quantities[0].title} needs samples of known classes; remove it from "
                    "the metrics, or train a class-conditional model"
                )
        if self.per_class and self.num_samples < 2 * num_classes:
            raise ValueError(
                f"per_class needs 2 samples of each of {num_classes} classes, more than the "
                f"{self.num_samples} in total"
            )

    def reference_split(self, source: ImageData) -> Split | LabelledRows:
        """The images that the reference is taken from; raises ValueError if there are none."""
        return self.compared_with.split(source)

    def test_ids(self, source: ImageData) -> Tensor:
        """The indices of the test images to measure: `num_samples`, or all if there are fewer."""
        return random_places(len(source.test_images()), self.num_samples)

    def load(self, source: ImageData, device: torch.device | str) -> None:
        """Loads the networks; raises ExtractorUnavailable, also if one does not fit the data."""
        self.observer.load(source, device)
        for metric in self.extra_metrics:
            metric.to(device)
        self.compared_with.check(self.extractor)

    def protocol_of(self, source: ImageData) -> Protocol:
        """The protocol of the measurement, known once the networks are loaded."""
        facts = self.reference_facts(source) | {"reference": self.compared_with.kind}
        return with_fingerprint(facts | {"num_samples": self.num_samples, "rounding": "uint8"})

    def reference_facts(self, source: ImageData) -> Protocol:
        """The part of the protocol that says what samples are compared with."""
        return {
            "extractor": self.extractor.name,
            "extractor_fingerprint": self.extractor.fingerprint,
            "data": source.fingerprint,
            "reference_images": len(self.reference_ids(source)),
            "reference_seed": REFERENCE_SEED,
            **self.compared_with.facts(source),
        }

    def reference_ids(self, source: ImageData) -> Tensor:
        """The places in `reference_split` of the images that samples are compared with."""
        return random_places(len(self.reference_split(source).labels), self.reference_size)

    def results(
        self, images: ImageSet, reference: ImageSet, suffix: str = "", by_class: bool = False
    ) -> Values:
        """The values, by full names, of the metrics whose `by_class` equals the argument.

        Metrics are left out if labels of the images, or images of the reference, are missing.
        """
        chosen = [m for m in self.metrics if m.by_class == by_class and m.fits(images, reference)]
        with self.extractor.in_float32():
            results = [metric.results(images, reference, suffix) for metric in chosen]
        return {name: value for each in results for name, value in each.items()}


@dataclass(frozen=True)
class PreparedMetrics:
    """The metrics with everything that samples are compared with."""

    metrics: GenerativeMetrics
    protocol: Protocol
    reference: ImageSet
    real: Values  # the values of test images, by full names
    test: ImageSet | None  # for metrics by class: the test images in random order

    @classmethod
    def of(cls, metrics: GenerativeMetrics, source: ImageData) -> Self:
        """Computes or reads what samples are compared with; call it on all ranks after `load`."""
        facts, chosen = metrics.reference_facts(source), metrics.reference_ids(source)
        kept = (metrics.observer, facts, metrics.cache_dir)
        reference = metrics.compared_with.image_set(source, chosen, *kept)
        if metrics.observer.keep and len(reference):
            vars(reference)["images"] = metrics.reference_split(source).images[chosen]
        real, test = real_values(metrics, source, reference)
        return cls(metrics, metrics.protocol_of(source), reference, real, test)

    def collection(self) -> MetricCollection:
        """The metrics for any loop, with update(images, labels), compute and reset of torchmetrics.

        The networks see each image once for all of them. The values of test images are in `real`.
        """
        named: dict[str, torchmetrics.Metric | MetricCollection] = {}
        for metric in self.metrics.metrics:
            metric.compare_with(self.reference, self.metrics.observer)
            named[metric.quantities[0].name] = metric
        return MetricCollection(named, compute_groups=[list(named)])

    def compute(self, observed: Observed, labels: Tensor | None) -> Values:
        """The values of the observed samples, with labels (n,), and of test images.

        Labels that are no classes say nothing to metrics. All ranks call this with the same
        arguments, rank 0 computes, and all get its result.
        """
        if labels is not None and labels.ndim > 1:
            labels = None
        count = len(observed[FEATURES])
        if count != self.metrics.num_samples:
            raise ValueError(
                f"num_samples={self.metrics.num_samples}, but {count} images were given"
            )
        return on_rank_zero(
            lambda: self._compute(self.metrics.observer.image_set(observed, labels))
        )

    def _compute(self, images: ImageSet) -> Values:
        results = self.metrics.results
        values = results(images, self.reference) | self.real
        if self.test is None or images.labels is None:
            return values
        beside = results(
            self.test.matching(images.required_labels), self.reference, REAL, by_class=True
        )
        return values | results(images, self.reference, by_class=True) | beside


def require_new_names(extra: Sequence[Quantity]) -> None:
    """Raises UserError for a metric of `extra` whose values would take the place of another's."""
    names = [each.name for each in extra]
    for name in names:
        if quantity_of(name) or name.endswith(BESIDE):
            raise UserError(
                f"metrics.extra: {name} is the name of another metric's result, or is read as one; "
                "give the metric a name of its own"
            )
        if names.count(name) > 1:
            raise UserError(f"metrics.extra has two metrics named {name}; write one of them")


def real_values(
    metrics: GenerativeMetrics, source: ImageData, reference: ImageSet
) -> tuple[Values, ImageSet | None]:
    """The values of test images, and the test images for metrics by class, if there are any."""
    count, chosen = len(metrics.test_ids(source)), observed_tests(metrics, source)
    keep = metrics.by_class or metrics.fld  # features of test images, not only their values
    images, labels = source.test_images(), source.test_labels()[chosen]

    def compute() -> dict[str, Tensor]:
        observed = metrics.observer.once(images, chosen, "test", metrics.cache_dir)
        first = metrics.observer.image_set(observed, labels).select(slice(count))
        values = on_rank_zero(lambda: metrics.results(first, reference, REAL))
        tensors = {name: torch.tensor(v, dtype=torch.float64) for name, v in values.items()}
        return tensors | ({FEATURES: observed[FEATURES]} if keep else {})

    reader = metrics.observer.classifier
    facts: dict[str, Any] = metrics.reference_facts(source) | {
        "test": count,
        "half_splits": metrics.half_splits,
        "per_class": keep and len(chosen),
        "classifier": reader.fingerprint if reader else None,
        "spatial_dim": metrics.extractor.spatial_dim,
        "patch": metrics.patch and [metrics.patch, *metrics.observer.corner],
        **{name: True for name in ON_REQUEST if getattr(metrics, name)},
    }
    if own := metrics.extra_metrics:  # code outside the package may change, and its values with it
        facts["extra"] = [m.identity() for m in own]
    name = f"real-{reference.name}-{metrics.extractor.name}-{short_count(count)}"
    stored = cached(metrics.cache_dir, name, facts, compute)
    features = stored.pop(FEATURES, None)
    test = None if features is None else ImageSet(metrics.extractor, features, labels)
    if test is not None:
        vars(reference)["unseen"] = test.features[:count]
    return {name: value.item() for name, value in stored.items()}, test


def observed_tests(metrics: GenerativeMetrics, source: ImageData) -> Tensor:
    """The indices of the test images to observe; those of `test_ids` come first."""
    order = random_places(len(source.test_images()), None)
    observe = torch.arange(len(order)) < metrics.num_samples
    if metrics.by_class:
        most = -(-metrics.num_samples // len(source.class_names))  # most samples of one class
        observe |= place_in_class(source.test_labels()[order]) < most
    return order[observe]
