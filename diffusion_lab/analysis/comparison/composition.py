"""The settings that make a run's composition, and those that do not."""

import json

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.build.config_keys import FRACTION, Means, Settings, flat, means


def settings_of(run: Run) -> Settings:
    """The settings that make a run's composition."""
    # null is all of the data, too
    known = {FRACTION: 1} | _known(run)
    if OmegaConf.select(run.config, "budget.seconds") is not None:
        known.pop("trainer.max_steps", None)  # endless: trainer.max_time is the run's length
    return {key: value for key, value in known.items() if Means.COMPOSITION in means(key)}


def losses_compare(runs: list[Run]) -> bool:
    """Whether the held-out losses of all runs are one quantity."""
    decisive = Means.LOSS | Means.IDENTITY  # a path says where the same images are
    kinds = {
        json.dumps({k: v for k, v in _known(run).items() if decisive in means(k)}, sort_keys=True)
        for run in runs
    }
    return len(kinds) == 1


def _known(run: Run) -> Settings:
    """All settings of a run that are not null."""
    plain = flat(OmegaConf.to_container(run.config))
    return {key: _whole(value) for key, value in plain.items() if value is not None}


def _whole(value: object) -> object:
    """Numbers that are equal as one: 1.0 as 1, also in lists."""
    if isinstance(value, list):
        return [_whole(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value
