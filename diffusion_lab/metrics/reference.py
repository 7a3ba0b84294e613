"""The reference that samples are compared with: a split of the data, or an .npz.

An .npz has images, the mean and the covariance of their features, or both, as the reference batches
of ADM do (arXiv:2105.05233).
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import say
from diffusion_lab.common.ranges import Range
from diffusion_lab.compute.distributed import cached, on_rank_zero
from diffusion_lab.data import ImageData, Split
from diffusion_lab.data.loader import LabelledRows
from diffusion_lab.data.source.drawn_images import ARRAYS, array_in, images_in, opened_npz
from diffusion_lab.metrics.distances import FeatureSet, Moments, covariance_root
from diffusion_lab.metrics.extractor.base import (
    FEATURES,
    SPATIAL,
    ExtractorUnavailable,
    FeatureExtractor,
)
from diffusion_lab.metrics.observer import CLASSIFIED, ImageSet, Observed, Observer, short_count
from diffusion_lab.metrics.quantity import FILE, Protocol

MAP_MEAN, MAP_ROOT = "map_mean", "map_root"


def statistics(observed: Observed, device: torch.device) -> dict[str, torch.Tensor]:
    """The statistics of features, and the moments of the map if there is one; on the CPU."""
    found = FeatureSet(observed[FEATURES], device).statistics()
    if SPATIAL in observed:
        of_map = FeatureSet(observed[SPATIAL], device)
        found |= {MAP_MEAN: of_map.mean.cpu(), MAP_ROOT: of_map.root.cpu()}
    return found


STATISTICS = ("mu", "sigma")  # arrays of the mean (D,) and the covariance (D, D)
OF_MAP = ("mu_s", "sigma_s")  # the same of the extractor's map, by ADM's names
REFERENCE = Range("train, validation or the path of an .npz", lambda value: isinstance(value, str))
ASYMMETRY = 1e-4  # largest asymmetry of a covariance, relative to its largest entry


class Reference(ABC):
    """The images that samples are compared with, or the statistics of their features."""

    kind: str  # in protocols
    name: str  # in the names of values, before the number of images
    word: str  # in messages

    @abstractmethod
    def split(self, source: ImageData) -> Split | LabelledRows:
        """The images; raises ValueError if there are none."""

    def facts(self, source: ImageData) -> Protocol:
        """Entries of a protocol that say which images these are."""
        return {}

    def moments(self, extractor: FeatureExtractor) -> dict[str, Moments]:
        """The statistics of an extractor's outputs, by name, that were computed elsewhere."""
        return {}

    def check(self, extractor: FeatureExtractor) -> None:
        """Raises ExtractorUnavailable if the reference is of another extractor alone."""
        return None

    def image_set(
        self, source: ImageData, chosen: Tensor, observer: Observer, facts: Protocol, folder: str
    ) -> ImageSet:
        """Observes the chosen images, or reads what was observed, on all ranks.

        The results depend on `facts`, and are cached in `folder`. The set has the features, and of
        the other outputs only the moments.
        """
        extractor, split = observer.extractor, self.split(source)

        def stored(network: FeatureExtractor) -> dict[str, Tensor]:
            own: Protocol = {"spatial_dim": network.spatial_dim} if network.spatial_dim else {}
            own |= {"extractor": network.name, "extractor_fingerprint": network.fingerprint}

            def compute() -> dict[str, Tensor]:
                observed = Observer(network).once(split.images, chosen, self.word, folder)
                found = on_rank_zero(lambda: statistics(observed, network.compares_on))
                return found | {FEATURES: observed[FEATURES]}

            file = f"{self.name}{short_count(len(chosen))}-{network.name}"
            return cached(folder, file, facts | own, compute)

        found = ImageSet(extractor, torch.empty(0, extractor.dim), split=self.name)
        if len(chosen):  # else there are statistics alone
            kept, moments = stored(extractor), {}
            features = kept.pop(FEATURES)
            if extractor.spatial_dim:
                moments[SPATIAL] = Moments(kept.pop(MAP_MEAN), kept.pop(MAP_ROOT))
            if observer.classifier:
                read = stored(observer.classifier)
                moments[CLASSIFIED] = Moments(read["mean"], read["root"])
            found = ImageSet(extractor, features, split.labels[chosen], split=self.name)
            vars(found.statistics).update(kept)  # fills its cached properties
            vars(found)["moments"] = moments
        vars(found)["given"] = self.moments(extractor)
        return found


class Training(Reference):
    """The training split."""

    kind, name, word = "train", "train", "training"

    def split(self, source: ImageData) -> Split:
        return Split(source.reference_images(), source.reference_labels())


class Validation(Reference):
    """The validation images, against which models are chosen."""

    kind, name, word = "validation", "val", "validation"

    def split(self, source: ImageData) -> LabelledRows:
        if not len(source.validation_labels()):
            raise ValueError(
                "reference=validation needs validation images, and no training images are kept for "
                "validation; write data.validation_size=auto or a number"
            )
        return LabelledRows(source.validation_rows(), source.validation_labels())

    def facts(self, source: ImageData) -> Protocol:
        return {"validation_images": len(source.validation_labels())}  # decides which they are


@dataclass(frozen=True)
class FileReference(Reference):
    """The images, the statistics, or both in an .npz; code in the file is never run."""

    path: Path
    kind = FILE  # not the path, which may differ between machines
    word = "reference"

    def __post_init__(self) -> None:
        if not self.path.is_file() or self.path.suffix != ".npz":
            problem = "is no .npz" if self.path.exists() else "does not exist"
            raise ValueError(
                f"{self._where} {problem}; write train, validation, or the path of an .npz with "
                "images or statistics"
            )
        if not self.names & set(ARRAYS) and not self.names >= set(STATISTICS):
            raise ValueError(
                f"{self._where} has no array {' or '.join(ARRAYS)} of images, and no statistics "
                f"{' and '.join(STATISTICS)}; give a file that has"
            )

    @property
    def _where(self) -> str:
        return f"reference={self.path}"

    @cached_property
    def names(self) -> set[str]:
        """The names of the arrays in the file."""
        with opened_npz(self.path, self._where) as file:
            return set(file.files)

    @cached_property
    def checksum(self) -> str:
        """The first 8 digits of the file's sha256, in the names of values."""
        return hashing.of_file(self.path)[:8]

    @property
    def name(self) -> str:  # type: ignore[override]
        return f"file-{self.checksum}-"

    def split(self, source: ImageData) -> Split:
        """The images, which are of no class; none if the file has statistics alone."""
        if "images" not in vars(self):
            images = torch.empty(0, *source.native_shape, dtype=torch.uint8)
            if self.names & set(ARRAYS):
                with opened_npz(self.path, self._where) as file:
                    images = images_in(file, self._where, source.native_shape)
            vars(self)["images"] = images
        images = vars(self)["images"]
        return Split(images, torch.full((len(images),), -1))

    def facts(self, source: ImageData) -> Protocol:
        return {"reference_file": self.checksum}

    def check(self, extractor: FeatureExtractor) -> None:
        known = self._statistics
        if known is None or len(known.mean) == extractor.dim:
            return
        unfit = (
            f"{self._where} has statistics of {len(known.mean):,} features, and "
            f"{extractor.name} has {extractor.dim:,}"
        )
        if not self.names & set(ARRAYS):
            raise ExtractorUnavailable(f"{unfit}; choose the extractor that they belong to")
        say(f"{unfit}, so FID compares with the images in the file instead")

    def moments(self, extractor: FeatureExtractor) -> dict[str, Moments]:
        known = {FEATURES: self._statistics}
        if extractor.spatial_dim:
            known[SPATIAL] = self._read(OF_MAP)
        dims = {FEATURES: extractor.dim, SPATIAL: extractor.spatial_dim}
        return {name: own for name, own in known.items() if own and len(own.mean) == dims[name]}

    @cached_property
    def _statistics(self) -> Moments | None:
        return self._read(STATISTICS)

    def _read(self, arrays: tuple[str, str]) -> Moments | None:
        """The moments by a mean and a covariance, if the file has these arrays."""
        if not self.names >= set(arrays):
            return None
        with opened_npz(self.path, self._where) as file:
            mean, covariance = (array_in(file, name, self._where) for name in arrays)
        finite = all(x.dtype.kind == "f" and np.isfinite(x).all() for x in (mean, covariance))
        if not finite or mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
            raise ValueError(
                f"{self._where} has {' and '.join(STATISTICS)} of shapes {mean.shape} and "
                f"{covariance.shape}, which must be finite numbers of shapes (D,) and (D, D)"
            )
        if np.abs(covariance - covariance.T).max() > ASYMMETRY * np.abs(covariance).max():
            raise ValueError(
                f"{self._where} has a sigma that is not symmetric, so it is no covariance"
            )
        root = covariance_root(torch.from_numpy(covariance.astype(np.float64)))
        return Moments(torch.from_numpy(mean.astype(np.float64)), root, f"stats-{self.checksum}")


SPLITS = {"train": Training(), "validation": Validation()}


def reference_of(text: str, per_class: bool, fld: bool) -> Reference:
    """The reference that a setting names; raises ValueError if other settings do not allow it."""
    allowed = {"per_class": (per_class, tuple(SPLITS)), "fld": (fld, ("train",))}
    for key, (asked, references) in allowed.items():
        if asked and text not in references:
            raise ValueError(
                f"reference={text} does not go with {key}=true; write "
                f"reference={' or '.join(references)}, or {key}=false"
            )
    return SPLITS[text] if text in SPLITS else FileReference(Path(text))
