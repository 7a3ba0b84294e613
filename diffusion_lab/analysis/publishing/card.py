"""The card of a published comparison: its commands, code, machines, hours, data and protocol."""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab.common.files import read_json
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.records import Run
from diffusion_lab.runs import published
from diffusion_lab.runs.files import DIRTY, read_config
from diffusion_lab.runs.summary import Summary, load_summary
from diffusion_lab.training.tuned import FOUND

TEXT = "card.md"
Facts = dict[str, object]
SOURCES = ("first_stage.run", "objective.teacher.run", "init_from")  # runs that a run began from
SOURCE_FACTS = (
    *("images_seen", "training_seconds", "wall_seconds", "threads", "ranks"),
    *("ended_at", "git_commit", "overrides"),
)
TUNING = ("of", "values", "metric", "seeds", "images", "num_samples", "grow", "overrides", "study")
MACHINE = ("device", "processor", "precision", "threads", "ranks", "python", "versions")


def card_of(
    collection: Collection,
    places: Mapping[Path, str],
    tunings: Mapping[Path, str],
    tuning_runs: Mapping[Path, str],
) -> Facts:
    """The facts of a card, apart from the published files.

    The mappings give the places of runs, of folders with tuning runs, and of the tuning runs.
    """
    runs = collection.runs
    trained = [run for run in runs if not run.drawn_elsewhere]
    summaries = {places[run.folder]: run.summary for run in trained}
    tuned = {place: load_summary(folder) for folder, place in tuning_runs.items()}
    sources = sources_of(runs)
    everything = [*summaries.values(), *tuned.values(), *sources.values()]
    return {
        "written_by": {"command": published.WRITER, "version": diffusion_lab.__version__},
        "compositions": {
            arm.name: [places[run.folder] for run in arm.runs] for arm in collection.arms
        },
        "seeds": sorted({run.seed for run in runs}),
        "studies": sorted({run.config.study_name for run in runs if run.config.get("study_name")}),
        "commands": commands_of(summaries),
        "study_protocols": protocols_of(trained),
        "protocol": collection.protocol,
        "sampling": collection.sampling,
        "jumps": [arm.name for arm in collection.arms if arm.runs[0].summary.jumps],
        # the checksums of what samples were compared with, in any evaluation
        "data": sorted({str(each["protocol"].get("data")) for run in runs for each in run.kept}),
        "code": code_of(everything),
        "machines": machines_of([*summaries.values(), *tuned.values()]),
        "sources": {
            folder: {key: getattr(each, key) for key in SOURCE_FACTS}
            for folder, each in sources.items()
        },
        "hours": {
            "runs": hours_of(summaries.values()),
            "tuning": hours_of(tuned.values()),
            **({"first stages and teachers": hours_of(sources.values())} if sources else {}),
            "total": hours_of(everything),
        },
        "dates": dates_of([*places, *tuning_runs]),
        "tuning": tuning_of(runs, tunings),
    }


def protocols_of(runs: Iterable[Run]) -> list[Facts]:
    """The distinct protocols that studies fixed before their runs; none without a study."""
    known: list[Facts] = []
    for run in runs:
        if (part := run.part("protocol")) and part not in known:
            known.append(part)
    return known


def sources_of(runs: Iterable[Run]) -> dict[str, Summary]:
    """Summaries of first stages and teachers that runs began from, by folder, if still there."""
    saved = [read_config(run.folder) for run in runs]  # opened, they name copies
    folders = dict.fromkeys(
        str(folder)
        for run, cfg in zip(runs, saved, strict=True)
        for key in SOURCES
        if (folder := OmegaConf.select(cfg, key))
        and Path(folder).resolve() != run.folder.resolve()  # a resumed run's own first stage
    )
    found = {folder: load_summary(Path(folder)) for folder in folders}
    return {folder: summary for folder, summary in found.items() if summary != Summary()}


def commands_of(summaries: Mapping[str, Summary]) -> Facts:
    """The overrides of `train` that all runs have, and each run's others; null if not recorded."""
    known = {place: summary.overrides for place, summary in summaries.items()}
    recorded = [each for each in known.values() if each is not None]
    first = recorded[0] if recorded else []
    common = [each for each in first if all(each in other for other in recorded)]
    own = {
        place: None if each is None else [word for word in each if word not in common]
        for place, each in known.items()
    }
    return {"common": common, "runs": own}


def code_of(summaries: Iterable[Summary]) -> list[Facts]:
    """The commits that runs were trained with, and whether there were changes; null if unknown."""
    counts = Counter(summary.git_commit for summary in summaries)
    return [
        {
            "commit": commit and commit.removesuffix(DIRTY),
            "dirty": commit and commit.endswith(DIRTY),
            "runs": count,
        }
        for commit, count in counts.items()
    ]


def machines_of(summaries: Iterable[Summary]) -> list[Facts]:
    """The distinct machines and versions, each with its number of runs; null where unknown."""
    counts = Counter(json.dumps({key: getattr(each, key) for key in MACHINE}) for each in summaries)
    return [json.loads(text) | {"runs": count} for text, count in counts.items()]


def hours_of(summaries: Iterable[Summary]) -> Facts:
    """The hours of some runs together; a sum is null if a run has not recorded its part.

    Core-hours are training time x threads x processes. Wall-clock hours include the measurements
    at the end, and are added up even if runs were trained at the same time.
    """
    wall, core = [], []
    for each in summaries:
        factors = [x for x in (each.training_seconds, each.threads) if x is not None]
        wall.append(each.wall_seconds)
        core.append(math.prod(factors) * (each.ranks or 1) if len(factors) == 2 else None)
    return {"runs": len(wall), "wall_clock_hours": hours(wall), "core_hours": hours(core)}


def hours(seconds: Sequence[float | None]) -> float | None:
    """The sum in hours; None if one is unknown."""
    known = [each for each in seconds if each is not None]
    return round(sum(known) / 3600, 4) if len(known) == len(seconds) else None


def dates_of(folders: Iterable[Path]) -> Facts:
    """When the first and the last of the runs ended, in UTC."""
    times = [str(load_summary(folder).ended_at) for folder in folders]
    return {"first_run_ended": min(times), "last_run_ended": max(times)}


def tuning_of(runs: Iterable[Run], tunings: Mapping[Path, str]) -> Facts | None:
    """The tuned keys, the metric that decided, and the chosen values; None if nothing was tuned."""
    asked = next((part for run in runs if (part := run.part("tuning"))), {})
    if not asked and not tunings:
        return None
    return {
        **{key: asked.get(key) for key in TUNING},
        "chosen": {
            f"{place}/{FOUND}": {
                name: found["chosen"] for name, found in read_json(folder / FOUND).items()
            }
            for folder, place in tunings.items()
        },
    }


def thinned_in(folder: Path) -> dict[str, Facts]:
    """The runs in a published folder whose metrics.jsonl lacks rows, with their numbers of rows."""
    found = {}
    for file in sorted(folder.rglob(published.PUBLISHED)):
        if facts := published.facts_of(file.parent)[published.THINNED]:
            found[file.parent.relative_to(folder).as_posix()] = facts
    return found
