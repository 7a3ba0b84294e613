"""Tuning as a part of a study: before its runs, the best values of some keys for each network.

The tuning runs lie in outputs/<study>/tuning/, with what they found in tuning.json.
"""

import math
from collections.abc import Container, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from statistics import mean
from typing import Annotated, Any

from hydra.conf import HydraConf
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.config_keys import verbatim
from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.build.overrides import key_of, parse, unquoted
from diffusion_lab.common.files import OUTPUTS, read_json
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Flag, Range, one_of, optional, settings, whole, whole_list
from diffusion_lab.runs.folder import CONFIG, load_config
from diffusion_lab.training.callbacks import collapse, non_finite

FOLDER, FOUND = "tuning", "tuning.json"
TEXTS = Range(
    "a list of texts",
    lambda value: (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and all(isinstance(each, str) for each in value)
    ),
)
NAME = Range("the name of a study", lambda v: isinstance(v, str))


def _are_grids(value: Any) -> bool:
    """Whether each key has a list of at least two rising numbers above 0."""
    return isinstance(value, Mapping) and bool(value) and all(map(_is_grid, value.values()))


def _is_grid(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 1
    return (
        listed
        and all(type(each) in (int, float) and each > 0 for each in value)
        and all(a < b for a, b in pairwise(value))
    )


GRIDS = Range("keys, each with a list of two or more rising numbers above 0", _are_grids)
Point = dict[str, float]  # a value of each tuned key
Tried = dict[str, Any]  # "values": a Point, and "results": the metric by seed


@settings
class Tuning:
    """The keys that a study tunes, and the runs by which it tunes them.

    For each combination of values of the keys in `of`, each of the keys in `values` takes the
    values of its grid, in runs of `images` training images for each of `seeds`. The best mean of
    `metric` wins: fid, of `num_samples` samples to validation images, or val/loss. While the best
    value is at an end of its grid, the grid grows by one, at most `grow` times. `overrides` are
    further overrides of these runs, which are `running`. The results of the study `study` count, or
    its own. `chosen` and `tried` hold the results once they are known.
    """

    of: Annotated[list[str], TEXTS]
    values: Annotated[dict[str, list[float]], GRIDS]
    grow: Annotated[int, whole(0)]
    metric: Annotated[str, one_of("fid", "val/loss")]
    seeds: Annotated[list[int], whole_list(0, shortest=1)]
    images: Annotated[int | None, optional(whole(1))]
    num_samples: Annotated[int, whole(2)]
    overrides: Annotated[list[str], TEXTS]
    study: Annotated[str | None, optional(NAME)]
    running: Flag
    chosen: dict[str, float] | None
    tried: list[Tried] | None

    def study_in(self, cfg: DictConfig) -> str:
        """The study whose results count for a run; raises UserError if there is none."""
        if not (study := self.study or cfg.study_name):
            raise UserError("tuning belongs to a study; write study_name=... or tuning=none")
        return study

    def overrides_of_runs(self) -> list[str]:
        """The overrides that make a run of the study a tuning run, without values and seed."""
        length = [] if self.images is None else [f"budget.images={self.images}"]
        if self.metric == "fid":
            measured = ["metrics.reference=validation", f"metrics.num_samples={self.num_samples}"]
            measured += ["callbacks.evaluation.every_n_steps=null"]
            measured += ["callbacks.evaluation.also_steps=null"]
        else:
            measured = ["callbacks.evaluation=null"]
        return ["tuning.running=true", *length, *measured, *self.overrides]

    def best(self, tried: Sequence[Tried]) -> Tried | None:
        """The best of the values tried, by their mean over seeds; None if every run failed."""
        known = [each for each in tried if math.isfinite(average(each))]
        return min(known, key=average, default=None)

    def beyond(self, tried: Sequence[Tried], grown: int) -> list[Point]:
        """The values to try next, because the best ones are at an end of a grid.

        A new value continues its grid by the factor between the two values at that end; a grid of
        whole numbers stays one.
        """
        best = self.best(tried)
        if best is None or grown >= self.grow:
            return []
        new = []
        for key, value in best["values"].items():
            grid = sorted({each["values"][key] for each in tried})
            neighbour = {grid[-1]: grid[-2], grid[0]: grid[1]}.get(value)
            if neighbour is None:
                continue
            further = short(value * value / neighbour)
            if all(isinstance(each, int) for each in grid):
                further = round(further)
            if further > 0 and further not in grid:
                new.append(best["values"] | {key: further})
        return new

    def inside(self, tried: Sequence[Tried]) -> bool:
        """Whether the best value of each key lies between two others."""
        best = self.best(tried)
        grids = ({each["values"][key] for each in tried} for key in self.values)
        ends = ((min(grid), max(grid)) for grid in grids)
        return best is not None and all(
            best["values"][key] not in pair for key, pair in zip(self.values, ends, strict=True)
        )


def average(tried: Tried) -> float:
    """The mean of the metric over seeds; infinite if a run failed."""
    results = tried["results"].values()
    return math.inf if None in results else mean(results)


def short(value: float) -> float:
    """A value in three digits, so that 0.001 * 2 * 2 is 0.004."""
    return float(f"{value:.3g}")


def name_of(values: Mapping[str, str]) -> str:
    """The name of a combination in tuning.json: backbone=dit."""
    return " ".join(f"{key}={unquoted(value)}" for key, value in values.items())


def file_of(study: str) -> Path:
    """The file that says what the tuning of a study found."""
    return OUTPUTS / study / FOLDER / FOUND


def refuse_tuned(tuning: Tuning, given: Container[str]) -> None:
    """Raises UserError if the command line gives a value of a tuned key."""
    for key in tuning.values:
        if key in given:
            raise UserError(
                f"{key} is tuned by the study, so it cannot be given; leave it out, or write the "
                f"values to try, as in 'tuning.values={{{key}:[1e-3,2e-3]}}'"
            )


def has_diverged(folder: Path) -> bool:
    """Whether a run ended because its loss was not finite, or because its samples became alike."""
    return any((folder / name).exists() for name in (non_finite.FOLDER, collapse.FILE))


def apply(cfg: DictConfig, job: HydraConf, folder: Path | None) -> None:
    """Sets the tuned keys of a study's run to the values that were found for it, in place.

    A run whose `folder` is there keeps its own values if none are found now. Raises UserError if
    the command line sets a tuned key, or if no values have been found yet.
    """
    if not cfg.get("tuning") or cfg.tuning.running:
        return
    tuning: Tuning = instantiate(cfg, "tuning")
    given = {key_of(each): each.get_value_element_as_str() for each in parse(job.overrides.task)}
    refuse_tuned(tuning, given)
    study = tuning.study_in(cfg)
    if missing := [key for key in tuning.of if key not in given]:
        raise UserError(
            f"this study is tuned for each {missing[0]}; write one, as in {missing[0]}=..."
        )
    name = name_of({key: given[key] for key in tuning.of})
    found = read_json(file_of(study)).get(name)
    if not found and folder and (folder / CONFIG).is_file():
        own = load_config(folder).get("tuning")
        found = own and {"chosen": own.chosen, "tried": own.tried}
    if not found or not found["chosen"]:
        why = "every tuning run failed" if found else "its values have not been tuned yet"
        raise UserError(
            f"{name}: {why}; run the study {study} as a sweep first (train -m), which tunes it"
        )
    for key, value in found["chosen"].items():
        OmegaConf.update(cfg, key, verbatim(value))
    cfg.tuning.chosen, cfg.tuning.tried = found["chosen"], found["tried"]
