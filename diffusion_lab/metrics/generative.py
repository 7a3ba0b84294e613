"""How generated images compare with the training images, and how real test images would do."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from diffusion_lab.common.errors import is_whole, require
from diffusion_lab.common.progress import say, track
from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute.cache import cached
from diffusion_lab.compute.distributed import gather_by_id, on_rank_zero, rank_and_world, shard
from diffusion_lab.metrics.coverage import DENSITY_NEIGHBOURS, density_coverage, precision_recall
from diffusion_lab.metrics.distances import FeatureSet, frechet, frechet_of_halves, kid
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.features import FeatureExtractor, ImageSource
from diffusion_lab.metrics.inception_score import inception_score
from diffusion_lab.metrics.per_class import Labelled, class_distances, first_of_each
from diffusion_lab.metrics.protocol import Protocol, short_count, with_fingerprint

REFERENCE_SEED = 0  # of `random_places`
COVERAGE_SIZE = 10_000  # of each side at most, as published; all pairs are compared
FEATURES, GUESSES = "features", "guesses"  # of an observation
BATCH = 64  # images between two movements of the progress bar


class GenerativeMetrics:
    """FID, KID, precision, recall, density and coverage of `num_samples` generated images.

    The reference is `reference_size` images of the training split, or all of it. A value's name
    holds what it depends on, as in `fid/<extractor>/train60k-5k`: reference and number of images.
    Beside each stands its value, `fid_floor/...`, for as many test images, or for all where there
    are fewer. From `half_splits` random halves come the FID's standard deviation, estimated rather
    too large, and FID-infinity, valid for several times more samples than features only;
    `per_class` adds a FID of each class, with a floor of as many test images of that class;
    `classifier`, a file of `diffusion-lab train-extractor`, the share of samples of the class that
    was asked for.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference_size: int | None,
        num_samples: int,
        cache_dir: str,
        half_splits: int = 5,
        per_class: bool = False,
        classifier: str | None = None,
    ):
        some = "a whole number of at least 2, for a distance"
        require(
            reference_size is None or is_whole(reference_size, 2),
            "metrics.reference_size",
            reference_size,
            f"{some}, or null for all",
            10000,
        )
        require(is_whole(num_samples, 2), "metrics.num_samples", num_samples, some, 5000)
        require(
            is_whole(half_splits, 0),
            "metrics.half_splits",
            half_splits,
            "a whole number of at least 0",
            5,
        )
        require(isinstance(per_class, bool), "metrics.per_class", per_class, "true or false")
        self.extractor = extractor
        self.reference_size = reference_size
        self.num_samples = num_samples
        self.cache_dir = Path(str(cache_dir))  # a folder 2024 is a number to Hydra
        self.half_splits = half_splits
        self.per_class = per_class
        self.classifier = Classifier(classifier) if classifier else None

    def check(self, conditional: bool, num_classes: int) -> None:
        """Raises ValueError if what is asked for needs labels that a model does not take."""
        for name, asked, none in (
            ("per_class", self.per_class, "false"),
            ("classifier", self.classifier, "null"),
        ):
            if asked and not conditional:
                raise ValueError(
                    f"metrics.{name} needs samples of known classes; write metrics.{name}={none}, "
                    "or train with conditioning=class_label"
                )
        if self.per_class and self.num_samples < 2 * num_classes:
            raise ValueError(
                f"metrics.per_class needs 2 samples of each of {num_classes} classes, not "
                f"metrics.num_samples={self.num_samples} in all"
            )

    def load(self, source: ImageSource, device: torch.device | str) -> None:
        """Loads the networks; raises ExtractorUnavailable, also if one does not fit the data."""
        for network in filter(None, (self.extractor, self.classifier)):
            network.load(device)
            network.check(source)

    def test_ids(self, source: ImageSource) -> Tensor:
        """The test images that the floor is of: `num_samples`, or all where there are fewer."""
        return random_places(len(source.test_images()), self.num_samples)

    def protocol_of(self, source: ImageSource) -> Protocol:
        """How figures will be measured: known before any feature is, once networks are loaded."""
        facts = self._reference_facts(source)
        return with_fingerprint(facts | {"num_samples": self.num_samples, "rounding": "uint8"})

    def _reference_facts(self, source: ImageSource) -> Protocol:
        return {
            "extractor": self.extractor.name,
            "extractor_fingerprint": self.extractor.fingerprint,
            "data": source.fingerprint,
            "reference_images": len(self._reference_ids(source)),
            "reference_seed": REFERENCE_SEED,
        }

    def _reference_ids(self, source: ImageSource) -> Tensor:
        return random_places(len(source.reference_images()), self.reference_size)

    def prepare(self, source: ImageSource) -> None:
        """Reference and floor, computed or read; all ranks together, after `load`."""
        self.protocol = self.protocol_of(source)
        facts, chosen = self._reference_facts(source), self._reference_ids(source)
        self.reference_name = f"train{short_count(len(chosen))}"
        self.reference_labels = source.reference_labels()[chosen]
        name = f"{self.reference_name}-{self.extractor.name}"

        def reference() -> dict[str, Tensor]:
            train = source.reference_images()
            features = self._observe_all(train, chosen, "training")[FEATURES]
            # which every rank has already, and need not be sent
            rest = on_rank_zero(lambda: vars(FeatureSet.of(features)) | {FEATURES: None})
            return rest | {FEATURES: features}

        self.reference = FeatureSet(**cached(self.cache_dir, name, facts, reference))
        self._prepare_floor(source, facts, name)

    def _prepare_floor(self, source: ImageSource, facts: Protocol, name: str) -> None:
        test, count = source.test_images(), len(self.test_ids(source))
        order = random_places(len(test), None)  # of which `test_ids` are the first
        observe = torch.arange(len(test)) < count
        if self.per_class:
            most = -(-self.num_samples // len(source.class_names))  # samples of one class
            observe |= first_of_each(source.test_labels()[order], most)
        chosen = order[observe]
        labels = source.test_labels()[chosen]

        def floor() -> dict[str, Tensor]:
            observed = self._observe_all(test, chosen, "test")
            first = {what: rows[:count] for what, rows in observed.items()}
            values = on_rank_zero(lambda: self._figures(first, labels[:count], "_floor"))
            figures = {
                name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()
            }
            return figures | ({FEATURES: observed[FEATURES]} if self.per_class else {})

        facts = facts | {
            "test": count,
            "half_splits": self.half_splits,
            "per_class": self.per_class and len(chosen),
            "classifier": self.classifier.fingerprint if self.classifier else None,
        }
        kept = cached(self.cache_dir, f"floor-{name}-{short_count(count)}", facts, floor)
        if self.per_class:
            self.test = Labelled(kept.pop(FEATURES), labels)
        self.floor = {name: value.item() for name, value in kept.items()}

    def observe(self, images: Tensor) -> dict[str, Tensor]:
        """What figures need of images, uint8 (B, C, H, W), a row an image, on the CPU."""
        observed = {FEATURES: self.extractor(images).cpu()}
        if self.classifier:
            observed[GUESSES] = self.classifier.guesses(images).cpu()
        return observed

    def gather(self, observed: list[dict[str, Tensor]], ids: Sequence[int]) -> dict[str, Tensor]:
        """What all ranks observed, each of its `ids`, in the order of the ids, on every rank."""
        rows = {FEATURES: [torch.empty(0, self.extractor.dim)]}  # of a rank without images
        if self.classifier:
            rows[GUESSES] = [torch.empty(0, dtype=torch.int64)]
        return {
            name: gather_by_id(torch.cat([*empty, *(part[name] for part in observed)]), ids)
            for name, empty in rows.items()
        }

    def compute(self, observed: dict[str, Tensor], labels: Tensor | None) -> dict[str, float]:
        """Figures and floors, of what was observed of `num_samples` images with labels (n,).

        All ranks call this with the same, rank 0 alone computes, and all have what comes of it.
        """
        count = len(observed[FEATURES])
        if count != self.num_samples:
            raise ValueError(
                f"metrics.num_samples={self.num_samples}, but {count} images were given"
            )
        return on_rank_zero(lambda: self._compute(observed, labels))

    def _compute(self, observed: dict[str, Tensor], labels: Tensor | None) -> dict[str, float]:
        values = self._figures(observed, labels, "") | self.floor
        if self.per_class:
            reference = Labelled(self.reference.features, self.reference_labels)
            generated = Labelled(observed[FEATURES], labels)
            values |= class_distances(generated, self.test, reference, self.extractor.name)
        return values

    def _observe_all(self, images: Tensor, chosen: Tensor, split: str) -> dict[str, Tensor]:
        """Of the chosen images of a split, each rank taking its share of them."""
        what = f"{self.extractor.name} features of {len(chosen):,} {split} images"
        say(f"Computing {what}, once: {self.cache_dir} keeps the results")
        mine = shard(len(chosen), *rank_and_world())
        observed = [
            self.observe(images[batch.to(images.device)])
            for batch in track(chosen[mine].split(BATCH), what)
        ]
        return self.gather(observed, mine)

    def _figures(
        self, observed: dict[str, Tensor], labels: Tensor | None, kind: str
    ) -> dict[str, float]:
        """Values by their whole names; `kind` is "" or "_floor"."""
        features = observed[FEATURES]
        count = short_count(len(features))
        against = f"{self.extractor.name}/{self.reference_name}-{count}"
        values = {f"{name}{kind}/{against}": v for name, v in self._distances(features).items()}
        size = min(len(features), len(self.reference.features), COVERAGE_SIZE)
        if size > DENSITY_NEIGHBOURS:
            against = f"{self.extractor.name}/train{short_count(size)}-{short_count(size)}"
            for name, value in coverage(features[:size], self.reference.features[:size]).items():
                values[f"{name}{kind}/{against}"] = value
        logits = self.extractor.logits(features)
        if logits is not None:
            name = f"inception_score{kind}/{self.extractor.name}/{count}"
            values[name] = inception_score(logits.cpu())
        if self.classifier:
            right = (observed[GUESSES] == labels).double().mean()
            values[f"accuracy{kind}/{self.classifier.name}/{count}"] = right.item()
        return values

    def _distances(self, features: Tensor) -> dict[str, float]:
        images = FeatureSet.of(features)
        values = {"fid": frechet(images, self.reference), "kid": kid(images, self.reference)}
        if self.half_splits and len(features) >= 4:
            halves = frechet_of_halves(features, self.reference, self.half_splits)
            values["fid_std"] = halves.std(correction=0).item()
            values["fid_infinity"] = 2 * values["fid"] - halves.mean().item()
        return values


def coverage(features: Tensor, reference: Tensor) -> dict[str, float]:
    """Precision, recall, density and coverage of features (n, D) against as many real ones."""
    names = ("precision", "recall", "density", "coverage")
    values = precision_recall(features, reference) + density_coverage(features, reference)
    return dict(zip(names, values, strict=True))
