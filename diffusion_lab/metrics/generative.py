"""How far generated images are from the training images: FID and KID, with their floors."""

from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from diffusion_lab.distributed import gather_by_id, rank_and_world, shard
from diffusion_lab.metrics.cache import cached
from diffusion_lab.metrics.distances import FeatureSet, frechet, kid
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.progress import progress_bar, say

SUBSET_SEED = 0  # of the permutation whose first images are the subset of a split
BATCH = 64  # images between two movements of the progress bar


class ImageSource(Protocol):
    """What metrics need of a data module; images are uint8 (N, C, H, W), never augmented."""

    fingerprint: str  # of the content of both splits

    def reference_images(self) -> Tensor: ...

    def test_images(self) -> Tensor: ...


class GenerativeMetrics:
    """FID and KID of `num_samples` generated images against training images.

    The reference is `reference_size` images of the training split, or all of it. A value's name
    holds what it depends on, as in `fid/<extractor>/train60k-5k`: reference and number of images.
    The floor is the same distance for as many test images, or for all where there are fewer.
    """

    def __init__(
        self,
        extractor: FeatureExtractor,
        reference_size: int | None,
        num_samples: int,
        cache_dir: str,
    ):
        for name, value in (("reference_size", reference_size), ("num_samples", num_samples)):
            if value is not None and value < 2:
                raise ValueError(f"metrics.{name}={value} is too few for a distance; use 2 or more")
        self.extractor = extractor
        self.reference_size = reference_size
        self.num_samples = num_samples
        self.cache_dir = Path(cache_dir)

    def prepare(self, source: ImageSource, device: torch.device | str) -> None:
        """Loads the extractor, the reference and the floor; all ranks together, before training.

        Raises ExtractorUnavailable before anything else is done.
        """
        self.extractor.load(device)
        train, test = source.reference_images(), source.test_images()
        size = min(self.reference_size or len(train), len(train))
        self.reference_name = f"train{short_count(size)}"
        key = {
            "data": source.fingerprint,
            "extractor": self.extractor.fingerprint,
            "reference": size,
            "seed": SUBSET_SEED,
        }
        name = f"{self.reference_name}-{self.extractor.name}"
        self.reference = FeatureSet(
            **cached(
                self.cache_dir, name, key, lambda: vars(self._feature_set(train, size, "training"))
            )
        )
        size = min(self.num_samples, len(test))
        floor = cached(
            self.cache_dir,
            f"floor-{name}-{short_count(size)}",
            key | {"test": size},
            lambda: self._distances(self._feature_set(test, size, "test")),
        )
        self.floor = self._named("_floor", floor, size)

    def compute(self, features: Tensor) -> dict[str, float]:
        """Metrics and floors of the features (num_samples, D) of all generated images."""
        if len(features) != self.num_samples:
            raise ValueError(
                f"metrics.num_samples={self.num_samples}, but {len(features)} images were given"
            )
        distances = self._distances(FeatureSet.of(features.cpu()))
        return self._named("", distances, self.num_samples) | self.floor

    def _feature_set(self, images: Tensor, size: int, split: str) -> FeatureSet:
        """Features of `size` images, each rank taking its share of them."""
        generator = torch.Generator().manual_seed(SUBSET_SEED)
        chosen = torch.randperm(len(images), generator=generator)[:size]
        what = f"{self.extractor.name} features of {size:,} {split} images"
        say(f"Computing {what}, once: {self.cache_dir} keeps the results")
        mine = shard(size, *rank_and_world())
        parts = chosen[mine].split(BATCH)
        features = []
        with progress_bar(what, len(parts) + 1) as advance:  # the last step is the statistics
            for part in parts:
                features.append(self.extractor(images[part.to(images.device)]).cpu())
                advance()
            return FeatureSet.of(gather_by_id(torch.cat(features), mine))

    def _distances(self, images: FeatureSet) -> dict[str, Tensor]:
        distances = {"fid": frechet(images, self.reference), "kid": kid(images, self.reference)}
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in distances.items()}

    def _named(self, kind: str, distances: dict[str, Tensor], size: int) -> dict[str, float]:
        protocol = f"{self.extractor.name}/{self.reference_name}-{short_count(size)}"
        return {f"{name}{kind}/{protocol}": value.item() for name, value in distances.items()}


def short_count(count: int) -> str:
    """60000 -> 60k, 1234 -> 1234."""
    return f"{count // 1000}k" if count % 1000 == 0 else str(count)


def report(values: dict[str, float]) -> list[str]:
    """A line for people a metric: value, floor and name, of what `compute` returned."""
    floors = {name.split("_floor/")[0]: name for name in values if "_floor/" in name}
    lines = []
    for name, value in values.items():
        metric, _, protocol = name.partition("/")
        if metric in floors:
            floor = floors[metric]
            count = floor.rpartition("-")[2]
            other = "" if floor.endswith(protocol) else f" at {count} images"
            lines.append(
                f"{metric.upper()} {value:.4g} (floor {values[floor]:.4g}{other}) [{name}]"
            )
    return lines
