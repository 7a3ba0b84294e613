"""The real images that metrics compare with: observed once, and then read from a folder."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.common.messages import say
from diffusion_lab.compute.cache import cached
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.data import Split
from diffusion_lab.data.loader import LabelledRows
from diffusion_lab.metrics.distances import FeatureSet, Moments
from diffusion_lab.metrics.extractor.base import FEATURES, SPATIAL, FeatureExtractor
from diffusion_lab.metrics.image_set import ImageSet, short_count
from diffusion_lab.metrics.observer import CLASSIFIED, Observed, Observer

MAP_MEAN, MAP_ROOT = "map_mean", "map_root"


@dataclass(frozen=True)
class RealImages:
    """Chosen images of a split, to be observed once; `name` and `word` are the split's, train and
    training. All ranks call the methods together.
    """

    split: Split | LabelledRows
    chosen: Tensor  # (n,) int64, places in the split
    name: str
    word: str
    folder: str  # that caches what was observed

    def observe(self, observer: Observer) -> Observed:
        """Observes the images, and says where the results are to be cached."""
        what = f"{observer.extractor.name} features of {len(self.chosen):,} {self.word} images"
        say(f"Computing {what} once, to be cached in {self.folder}")
        return observer.all_of(self.split.images, self.chosen, what)

    def reference(self, observer: Observer, facts: Mapping[str, object]) -> ImageSet:
        """The images as a reference, computed or read; `facts` says what else they depend on.

        It has the features, and of the other outputs only the moments.
        """
        extractor = observer.extractor
        stored = self._stored(extractor, facts)
        features, moments = stored.pop(FEATURES), {}
        if extractor.spatial_dim:
            moments[SPATIAL] = Moments(stored.pop(MAP_MEAN), stored.pop(MAP_ROOT))
        if observer.classifier:
            read = self._stored(observer.classifier, facts)
            moments[CLASSIFIED] = Moments(read["mean"], read["root"])
        labels = self.split.labels[self.chosen]
        reference = ImageSet(extractor, features, labels, split=self.name)
        vars(reference.statistics).update(stored)  # fills its cached properties
        vars(reference)["moments"] = moments
        return reference

    def _stored(self, network: FeatureExtractor, facts: Mapping[str, object]) -> dict[str, Tensor]:
        """The features of a network and their statistics, computed or read."""
        own: dict[str, object] = {
            "extractor": network.name,
            "extractor_fingerprint": network.fingerprint,
        }
        if network.spatial_dim:
            own["spatial_dim"] = network.spatial_dim

        def compute() -> dict[str, Tensor]:
            observed = self.observe(Observer(network))
            found = on_rank_zero(lambda: statistics(observed, network.compares_on))
            return found | {FEATURES: observed[FEATURES]}

        file = f"{self.name}{short_count(len(self.chosen))}-{network.name}"
        return cached(self.folder, file, {**facts, **own}, compute)


def statistics(observed: Observed, device: torch.device) -> dict[str, torch.Tensor]:
    """The statistics of features, and the moments of the map if there is one; on the CPU."""
    found = FeatureSet(observed[FEATURES], device).statistics()
    if SPATIAL in observed:
        of_map = FeatureSet(observed[SPATIAL], device)
        found |= {MAP_MEAN: of_map.mean.cpu(), MAP_ROOT: of_map.root.cpu()}
    return found
