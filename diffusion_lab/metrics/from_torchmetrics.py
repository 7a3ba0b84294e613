"""Metrics of torchmetrics, or of anybody, among ours."""

import inspect

import torch
import torchmetrics
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.extractor.base import GPU_BATCH
from diffusion_lab.metrics.metric import Metric, Values, identity_of
from diffusion_lab.metrics.observer import ImageSet, short_count
from diffusion_lab.metrics.quantity import Quantity

SEED = 0  # of what a metric draws
REAL_ARGUMENT = "real"  # the argument of `update` that tells real images from samples
CHANNELS = 3  # which networks of torchmetrics take


def described(name: str, kind: type[torchmetrics.Metric], better: bool | None) -> Quantity:
    """The quantity of a class of metric; `better` is whether higher is, None if nothing says so."""
    meaning, judged = f"{kind.__name__} of torchmetrics", better is not None
    return Quantity(name, name, meaning, bool(better), judged=judged, tabled=True)


def alone() -> bool:
    """Whether a metric gathers from other ranks: never, as the first rank has all samples."""
    return False


class FromTorchmetrics(Metric):
    """A torchmetrics.Metric as a metric of ours, under the name that it has in `extra`.

    Its `update` takes samples (B, C, H, W) alone, or with real=False, and then images of the
    reference with real=True. They are float in [0, 1], or uint8 for a metric that has the option
    `normalize` and leaves it false; a single channel is tiled to three. Its value is a number, or a
    mean and a standard deviation. Raises UserError for a metric that takes anything else.
    """

    def __init__(self, name: str, metric: torchmetrics.Metric):
        super().__init__()
        required = [
            argument.name
            for argument in inspect.signature(metric.update).parameters.values()
            if argument.default is argument.empty and argument.kind != argument.VAR_KEYWORD
        ]
        self.needs_images = REAL_ARGUMENT in required
        if len(required) != 1 + self.needs_images:
            raise UserError(
                f"metrics.extra.{name}: {type(metric).__name__}.update takes "
                f"{', '.join(required)}, but there are only generated images, and real ones "
                f"(`{REAL_ARGUMENT}=True`); write a metric whose update takes images alone or "
                "(images, real)"
            )
        for part in metric.modules():
            if isinstance(part, torchmetrics.Metric):
                part.distributed_available_fn = alone
        self.name, self.metric = name, metric
        self.kept: Tensor | None = None  # real images whose features the metric keeps
        self._identity = [name, *identity_of(metric)]  # once, as it reads all weights
        self.checksum = hashing.of_text(str(self._identity))[:8]
        self.quantities = (described(name, type(metric), metric.higher_is_better),)

    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        """The value under the metric's name and, if it has one, its standard deviation."""
        real = reference.images if self.needs_images else None
        keeps = not getattr(self.metric, "reset_real_features", True)
        with torch.random.fork_rng():  # KID and IS draw subsets
            torch.manual_seed(SEED)
            if keeps and real is not None and real is self.kept:
                self.metric.reset()
            else:
                self._forget(keeps)
                if real is not None:
                    self._update(real, True)
                self.kept = real
            self._update(generated.images, False)
            value = self.metric.compute()
        self.metric.reset()
        mean, *deviation = value if isinstance(value, tuple | list) else (value,)
        return {self.name: float(mean)} | {f"{self.name}_std": float(std) for std in deviation}

    def _forget(self, keeps: bool) -> None:
        """Forgets all images, also real ones whose features the metric keeps."""
        if keeps:
            self.metric.reset_real_features = True
        self.metric.reset()
        if keeps:
            self.metric.reset_real_features = False

    def _update(self, images: Tensor | None, real: bool) -> None:
        if images is None:
            raise ValueError(f"metrics.extra.{self.name} needs images, not only their features")
        for batch in images.split(GPU_BATCH):
            batch = batch.to(self.metric.device)
            if getattr(self.metric, "normalize", True):
                batch = batch / 255
            if batch.shape[1] == 1:
                batch = batch.expand(-1, CHANNELS, -1, -1)
            if self.needs_images:
                self.metric.update(batch, real=real)
            else:
                self.metric.update(batch)

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        """The metric's class with a checksum of its settings, and the numbers of images."""
        pair = f"{reference.name}-" if self.needs_images else ""
        return f"{type(self.metric).__name__}-{self.checksum}/{pair}{short_count(len(generated))}"

    def identity(self) -> list[str]:
        return self._identity
