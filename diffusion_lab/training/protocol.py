"""The protocol of a study: what it asks and how it will be judged, fixed before its runs."""

from typing import Annotated

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.instantiate import naming_keys
from diffusion_lab.common.formats import joined
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Range, one_of, settings, whole_list
from diffusion_lab.metrics.quantities import BUILT_IN
from diffusion_lab.metrics.quantity import QUANTITIES
from diffusion_lab.training.callbacks import SampleEvaluation, configured

JUDGED = [quantity.name for quantity in QUANTITIES if quantity.judged]
CLASSIFIER_METRICS = ("accuracy", "classifier_fid")
ON_REQUEST = ("mmd", "fld", "real_or_drawn")  # measured if the key of metrics is true
OPTIONAL = {"test", "sampling", "contrasts", "sampling_seeds"}  # keys that have defaults
TESTS = ("joint", "welch", "paired")  # of `compare`
TEXT = Range("a text", lambda value: isinstance(value, str) and bool(value))


@settings
class StudyProtocol:
    """The question of a study, the one `metric` that decides, its test, the seeds, and its end.

    `metric` is the name of a metric that compositions are judged by, such as fid. `stop` says when
    no more runs are made. `sampling` own lets each composition be drawn by its own sampler and
    guidance; else they have to be equal. `contrasts` are the pairs of arms that are asked about.
    """

    question: Annotated[str, TEXT]
    metric: Annotated[str, one_of(*JUDGED)]
    seeds: Annotated[list[int], whole_list(0, shortest=2)]
    stop: Annotated[str, TEXT]
    test: Annotated[str, one_of(*TESTS)] = TESTS[0]
    sampling: Annotated[str, one_of("equal", "own")] = "equal"
    contrasts: str | list[list[str]] = "all"
    sampling_seeds: list[int] | None = None


def protocol_of(cfg: DictConfig) -> StudyProtocol | None:
    """The protocol in a configuration; None if it has none.

    Raises UserError for a wrong one, and for a metric that the run would not measure.
    """
    node = cfg.get("protocol")
    if node is None:
        return None
    values = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
    names = list(StudyProtocol.__annotations__)
    if not isinstance(values, dict) or values.keys() | OPTIONAL != set(names):
        raise UserError(
            f"protocol must have the keys {', '.join(names)} and no others; "
            f"{joined(sorted(OPTIONAL))} may be left out"
        )
    with naming_keys("protocol", {name: f"protocol.{name}" for name in names}):
        protocol = StudyProtocol(**{str(key): value for key, value in values.items()})
    require_measured(protocol.metric, cfg)
    return protocol


def require_measured(metric: str, cfg: DictConfig) -> None:
    """Raises UserError unless a run measures the metric, at its end or by `memorization`."""
    if metric in CLASSIFIER_METRICS and not cfg.metrics.get("classifier"):
        raise UserError(
            f"protocol.metric={metric} needs a classifier; write metrics.classifier=..."
        )
    if metric in ON_REQUEST and not cfg.metrics.get(metric):
        raise UserError(f"protocol.metric={metric} is not measured; write metrics.{metric}=true")
    of_samples = [quantity.name for each in BUILT_IN for quantity in each.quantities]
    if metric in of_samples and configured(cfg, SampleEvaluation) is None:
        raise UserError(
            f"protocol.metric={metric} is not measured without callbacks.evaluation; keep that "
            "callback, or write protocol.metric=test_loss"
        )
