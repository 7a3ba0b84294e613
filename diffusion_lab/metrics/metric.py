"""A metric of generated images, of ours or of torchmetrics: how it is computed and called."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import CodeType
from typing import Any, ClassVar

import torch
import torchmetrics
from torch import Tensor
from torchmetrics.utilities import dim_zero_cat

from diffusion_lab.common import hashing
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute.distributed import rank_and_world
from diffusion_lab.metrics.extractor.base import GPU_BATCH
from diffusion_lab.metrics.observer import ImageSet, Observer, short_count
from diffusion_lab.metrics.quantity import Quantity

LABELS, PLACES = "labels", "places"  # states of metrics, beside the outputs of networks
PLAIN = (str, int, float, tuple, list, type(None))  # types of settings
UNKNOWN = -1  # the label of a sample of no known class
Values = dict[str, float]  # values by the names of quantities, or by full names


class Metric(torchmetrics.Metric, ABC):
    """A comparison of generated images with reference images.

    A subclass sets `quantities` and returns their values from `measure`. The option `extra` of
    `GenerativeMetrics` adds metrics to an evaluation. After `compare_with`, it serves any loop as
    torchmetrics do: each rank updates with its own samples, and `compute` takes those of all ranks,
    in the order in which torch's DistributedSampler deals them out.
    """

    quantities: tuple[Quantity, ...]
    needs_labels: ClassVar[bool] = False  # whether the samples must be of known classes
    needs_images: bool = True  # whether statistics are too little of a reference
    from_file: ClassVar[str | None] = None  # the output whose statistics in a file it takes
    # whether real images are also measured class by class, with the samples' number of each
    by_class: ClassVar[bool] = False
    full_state_update = True  # forward, too, counts samples before it forgets them
    observer: Observer | None = None
    reference: ImageSet

    def compare_with(self, reference: ImageSet, observer: Observer) -> None:
        """Sets what samples are compared with, and the networks that see them, which are loaded."""
        self.reference, self.observer = reference, observer
        whole = torch.empty(0, dtype=torch.int64)
        self.states = {**observer.no_rows(), LABELS: whole, PLACES: whole}
        for name in self.states:
            self.add_state(name, [], dist_reduce_fx="cat")
        self.reset()

    def reset(self) -> None:
        """Forgets all samples."""
        super().reset()
        if self.observer:  # a rank without samples gathers tensors of the others' dimensions
            for name, no_rows in self.states.items():
                getattr(self, name).append(no_rows.to(self.device))

    def update(self, images: Tensor, labels: Tensor | None = None) -> None:
        """Observes samples, uint8 (B, C, H, W), of the requested classes `labels` (B,), if any.

        Raises ValueError before `compare_with`.
        """
        if self.observer is None:
            raise ValueError(f"{type(self).__name__}: call compare_with before update")
        rank, world = rank_and_world()
        first = sum(map(len, getattr(self, PLACES)))
        places = torch.arange(first, first + len(images)) * world + rank
        if labels is None:
            labels = torch.full((len(images),), UNKNOWN)
        for name, rows in {**self.observer(images), LABELS: labels, PLACES: places}.items():
            getattr(self, name).append(rows.to(self.device))

    def compute(self) -> dict[str, Tensor]:
        """The values by full names, such as fid/inception/train60k-5k, () float64 each.

        Empty if labels or images are missing that the metric needs. Raises ValueError before
        `compare_with`.
        """
        if self.observer is None:
            raise ValueError(f"{type(self).__name__}: call compare_with before compute")
        found = {name: dim_zero_cat(getattr(self, name)).cpu() for name in self.states}
        order = found.pop(PLACES).argsort()
        rows = {name: each[order] for name, each in found.items()}
        labels = rows.pop(LABELS)
        images = self.observer.image_set(rows, None if (labels == UNKNOWN).any() else labels)
        if not self.fits(images, self.reference):
            return {}
        with images.extractor.in_float32():
            values = self.results(images, self.reference)
        return {name: torch.tensor(value, dtype=torch.float64) for name, value in values.items()}

    @abstractmethod
    def measure(self, generated: ImageSet, reference: ImageSet) -> Values:
        """The values of the quantities by their names; empty where they cannot be computed."""

    def protocol(self, generated: ImageSet, reference: ImageSet) -> str:
        """The part of a value's name that says what it depends on: extractor, numbers of images."""
        given = reference.given.get(self.from_file) if self.from_file else None
        name = given.name if given else reference.name
        return f"{generated.extractor.name}/{name}-{short_count(len(generated))}"

    def fits(self, generated: ImageSet, reference: ImageSet) -> bool:
        """Whether the samples have the labels, and the reference the images, that are needed."""
        unlabelled = self.needs_labels and generated.labels is None
        return not unlabelled and not (self.needs_images and not len(reference))

    def results(self, generated: ImageSet, reference: ImageSet, suffix: str = "") -> Values:
        """The values by full names, such as fid/inception/train60k-5k.

        Raises UserError if `measure` returns anything else than single numbers by their names.
        """
        values, owner = self.measure(generated, reference), f"{type(self).__name__}.measure"
        if not isinstance(values, Mapping):
            raise UserError(
                f"{owner} must return numbers by their names, got a {type(values).__name__}; write "
                f"return {{{self.quantities[0].name!r}: ...}}"
            )
        protocol = self.protocol(generated, reference)
        return {
            f"{name}{suffix}/{protocol}": number(f"{name} of {owner}", value)
            for name, value in values.items()
        }

    def identity(self) -> list[str]:
        """The code and the settings, by which values of test images are cached."""
        return identity_of(self)


def number(name: str, value: Any) -> float:
    """A value as a plain number; raises UserError, which begins with its name, if it is none."""
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError) as error:
        shape = tuple(getattr(value, "shape", ()))
        kind = type(value).__name__ + (f" of shape {shape}" if shape else "")
        raise UserError(f"{name} must be a single number, got a {kind}") from error


def identity_of(metric: torchmetrics.Metric) -> list[str]:
    """The source of a metric's class, the plain attributes of all its parts, and its weights."""
    common = set(vars(torchmetrics.SumMetric()))
    settings = [settings_of(part, common) for part in metric.modules()]
    weights = hashing.of_tensors(dict(metric.named_parameters()))
    kind = type(metric)
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # it was typed into a notebook
        functions = {name: getattr(each, "__code__", None) for name, each in vars(kind).items()}
        source = str({name: compiled(code) for name, code in functions.items() if code})
    return [source, str(settings), weights]


def compiled(code: CodeType) -> list[object]:
    """The instructions of a function with their names and constants, functions in it included."""
    constants = [compiled(c) if isinstance(c, CodeType) else repr(c) for c in code.co_consts]
    return [code.co_code.hex(), code.co_names, constants]


def settings_of(part: torch.nn.Module, common: set[str]) -> dict[str, object]:
    """The plain attributes of a metric or a network in it, without states and what is `common`."""
    others = common.union(getattr(part, "_defaults", ()))
    return {
        name: value
        for name, value in vars(part).items()
        if name not in others and isinstance(value, PLAIN)
    }


SEED = 0  # of what a metric draws
REAL_ARGUMENT = "real"  # the argument of `update` that tells real images from samples


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
        known = keeps and real is not None and real is self.kept
        with torch.random.fork_rng():  # KID and IS draw subsets
            torch.manual_seed(SEED)
            if keeps:
                self.metric.reset_real_features = not known
            self.metric.reset()
            if keeps:
                self.metric.reset_real_features = False
            if real is not None and not known:
                self._update(real, True)
            self.kept = real
            self._update(generated.images, False)
            value = self.metric.compute()
        self.metric.reset()
        parts = value if isinstance(value, tuple | list) and len(value) in (1, 2) else [value]
        owner = f"metrics.extra.{self.name}: the value of {type(self.metric).__name__}"
        names = (self.name, f"{self.name}_std")
        return {name: number(owner, part) for name, part in zip(names, parts, strict=False)}

    def _update(self, images: Tensor | None, real: bool) -> None:
        if images is None:
            raise ValueError(f"metrics.extra.{self.name} needs images, not only their features")
        for batch in images.split(GPU_BATCH):
            batch = batch.to(self.metric.device)
            if getattr(self.metric, "normalize", True):
                batch = batch / 255
            if batch.shape[1] == 1:
                batch = batch.expand(-1, 3, -1, -1)
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
