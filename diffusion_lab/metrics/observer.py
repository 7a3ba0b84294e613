"""Runs networks on images, batch by batch and on all ranks, for the metrics to compare."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.common.messages import track
from diffusion_lab.compute.distributed import gather_by_id, rank_and_world, shard
from diffusion_lab.data import ImageDataModule
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.features import FeatureExtractor
from diffusion_lab.metrics.metric import ImageSet

FEATURES, GUESSES = "features", "guesses"
BATCH = 64  # images per step of the progress bar
Observed = dict[str, Tensor]  # outputs of the networks, one row per image, on the CPU


@dataclass(frozen=True)
class Observer:
    """The extractor of features and, for the accuracy, a classifier."""

    extractor: FeatureExtractor
    classifier: Classifier | None

    def load(self, source: ImageDataModule, device: torch.device | str) -> None:
        """Loads the networks; raises ExtractorUnavailable, also if one does not fit the data."""
        for network in filter(None, (self.extractor, self.classifier)):
            network.load(device)
            network.check(source)

    def __call__(self, images: Tensor) -> Observed:
        """Computes features, and classes if needed, of images, uint8 (B, C, H, W)."""
        observed = {FEATURES: self.extractor(images).cpu()}
        if self.classifier:
            observed[GUESSES] = self.classifier.guesses(images).cpu()
        return observed

    def gather(self, observed: list[Observed], ids: Sequence[int]) -> Observed:
        """Gathers what each rank observed of its `ids`, in the order of the ids, on every rank."""
        rows = {FEATURES: [torch.empty(0, self.extractor.dim)]}  # for a rank without images
        if self.classifier:
            rows[GUESSES] = [torch.empty(0, dtype=torch.int64)]
        return {
            name: gather_by_id(torch.cat([*empty, *(part[name] for part in observed)]), ids)
            for name, empty in rows.items()
        }

    def all_of(self, images: Tensor, chosen: Tensor, description: str) -> Observed:
        """Observes the chosen images, each rank its share of them, and gathers the results."""
        mine = shard(len(chosen), *rank_and_world())
        batches = track(chosen[mine].split(BATCH), description)
        return self.gather([self(images[batch.to(images.device)]) for batch in batches], mine)

    def image_set(self, observed: Observed, labels: Tensor | None) -> ImageSet:
        """Makes the set of the observed images for the metrics."""
        return ImageSet(self.extractor, observed[FEATURES], labels, observed.get(GUESSES))
