"""The protocol of a study: what it asks and how it will be judged, fixed before its runs."""

from typing import Annotated

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.instantiate import naming_keys
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Range, one_of, settings, whole_list
from diffusion_lab.metrics.quantities import QUANTITIES

JUDGED = [quantity.name for quantity in QUANTITIES if quantity.judged]
TEXT = Range("a text", lambda value: isinstance(value, str) and bool(value))


@settings
class StudyProtocol:
    """The question of a study, the one `metric` that decides, its test, the seeds, and its end.

    `metric` is the name of a metric that compositions are judged by, such as fid. `stop` says when
    no more runs are made.
    """

    question: Annotated[str, TEXT]
    metric: Annotated[str, one_of(*JUDGED)]
    test: Annotated[str, one_of("paired", "welch")]
    seeds: Annotated[list[int], whole_list(0, shortest=2)]
    stop: Annotated[str, TEXT]


def protocol_of(cfg: DictConfig) -> StudyProtocol | None:
    """The protocol in a configuration; None if it has none. Raises UserError for a wrong one."""
    node = cfg.get("protocol")
    if node is None:
        return None
    values = OmegaConf.to_container(node) if isinstance(node, DictConfig) else None
    names = StudyProtocol.__annotations__
    if not isinstance(values, dict) or values.keys() != names.keys():
        raise UserError(f"protocol must have the keys {', '.join(names)} and no others")
    with naming_keys("protocol", {name: f"protocol.{name}" for name in names}):
        return StudyProtocol(**{str(key): value for key, value in values.items()})
