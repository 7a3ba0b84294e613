"""The settings that make a run's composition, and those that do not."""

import json

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.runs.same import INDIFFERENT
from diffusion_lab.runs.settings import (
    FRACTION,
    NOT_OF_THE_LOSS,
    OF_THE_LOSS,
    Settings,
    below,
    flat,
    with_defaults,
)

# What may differ between runs of one composition: where it ran, what it was called, how it was
# watched, and the budget that its size and length follow from. Sampling is here as all runs are
# measured with one, whatever they would have chosen.
ASIDE = (
    *INDIFFERENT,
    "seed",
    "name",
    "study_name",
    "budget",
    "optimized_metric",
    "metrics",
    "sampler",
    "guidance",
    "activation_checkpointing",
    "callbacks.evaluation",
    "callbacks.pruning",
    "data.on_device",
    "data.validation_size",
    "first_stage.cache",
    "trainer.deterministic",
)


def settings_of(run: Run) -> Settings:
    """What makes a run's composition."""
    # null is all of the data, too
    known = {FRACTION: 1} | _known(run)
    if OmegaConf.select(run.config, "budget.seconds") is not None:
        known.pop("trainer.max_steps", None)  # endless: trainer.max_time is the run's length
    return {key: value for key, value in known.items() if not below(key, ASIDE)}


def losses_compare(runs: list[Run]) -> bool:
    """Whether the held-out losses of all runs are one quantity."""
    kinds = set()
    for run in runs:
        kept = {
            key: value
            for key, value in _known(run).items()
            if key.startswith(OF_THE_LOSS)
            and key not in NOT_OF_THE_LOSS
            and (key not in ASIDE or key == "data.validation_size")
        }
        kinds.add(json.dumps(kept, sort_keys=True))
    return len(kinds) == 1


def _known(run: Run) -> Settings:
    """All that is set; null is left out, as a run may be older than a key."""
    plain = flat(with_defaults(OmegaConf.to_container(run.config)))
    return {key: _whole(value) for key, value in plain.items() if value is not None}


def _whole(value: object) -> object:
    """Numbers that are equal as one: 1.0 as 1, also in lists."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
