"""Compares generated images with training images, and test images too, as reference values."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Annotated

import torch
import torchmetrics
from torch import Tensor

from diffusion_lab.common.randomness import random_places
from diffusion_lab.common.ranges import PATH, Flag, optional, settings, whole
from diffusion_lab.data import ImageData, Split
from diffusion_lab.data.loader import LabelledRows
from diffusion_lab.metrics.classifier_scores import Accuracy
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.base import FeatureExtractor
from diffusion_lab.metrics.feature_distances import (
    FID,
    MIND,
    MMD,
    ClassFID,
    ClassifierFID,
    SpatialFID,
)
from diffusion_lab.metrics.from_torchmetrics import FromTorchmetrics
from diffusion_lab.metrics.image_set import ImageSet
from diffusion_lab.metrics.likelihood_divergence import FLD
from diffusion_lab.metrics.metric import Metric, Values
from diffusion_lab.metrics.observer import Observer
from diffusion_lab.metrics.quantities import BUILT_IN
from diffusion_lab.metrics.quantity import Protocol, Quantity, with_fingerprint
from diffusion_lab.metrics.real_or_drawn import RealOrDrawn
from diffusion_lab.metrics.reference import REFERENCE, reference_of
from diffusion_lab.metrics.seams import Seams

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
        self.observer = Observer(self.extractor, reader, self.patch, keep=self.keep_images)
        of_classifier = (reader,) if reader else None
        arguments: dict[type[Metric], tuple | None] = {  # None: not measured
            FID: (self.half_splits,),
            MMD: () if self.mmd else None,
            MIND: () if self.mind else None,
            FLD: () if self.fld else None,
            RealOrDrawn: () if self.real_or_drawn else None,
            SpatialFID: () if self.extractor.spatial_dim else None,
            Seams: (self.patch,) if self.patch else None,
            ClassifierFID: of_classifier,
            Accuracy: of_classifier,
            ClassFID: () if self.per_class else None,
        }
        pairs = [(kind, arguments.get(kind, ())) for kind in BUILT_IN]
        chosen = [kind(*given) for kind, given in pairs if given is not None]
        self.metrics = chosen + self.extra_metrics

    @property
    def by_class(self) -> bool:
        """Whether any metric measures both samples and real images class by class."""
        return any(metric.by_class for metric in self.metrics)

    @property
    def keep_images(self) -> bool:
        """Whether any metric looks at the images themselves."""
        extra = any(isinstance(metric, FromTorchmetrics) for metric in self.extra_metrics)
        return extra or self.real_or_drawn

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
