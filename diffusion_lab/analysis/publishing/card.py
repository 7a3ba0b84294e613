"""The card of a published folder: its facts, and their text."""

import json
import math
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab.common.files import read_json
from diffusion_lab.common.formats import literal, literal_table
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


UNKNOWN = "not recorded"
Card = dict[str, Any]


def text_of(card: Card, table: str) -> str:
    """The card as Markdown; `table` is the comparison's table."""
    parts = [
        "# A published comparison",
        "The records of a comparison, written by `diffusion-lab publish`: the configuration, "
        "metrics and measurements of every run, without weights. `diffusion-lab compare` on this "
        "folder makes the table, the plots and the page of it again, and refuses a record whose "
        "checksum has changed. All facts below are in `card.json`, with the checksum of each file.",
        table,
        *sections(card),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def sections(card: Card) -> Iterator[str]:
    """Yields headings, paragraphs and tables."""
    if card["study_protocols"]:
        yield "## What was fixed before the runs"
        for each in card["study_protocols"]:
            yield literal_table(["", "value"], facts(each))
    yield "## How it was measured"
    yield literal_table(["", "value"], facts(card["protocol"] | {"sampling": card["sampling"]}))
    if card["jumps"]:
        yield f"Networks that are told where a step goes: {listed(card['jumps'])}."
    yield f"Training seeds: {listed(card['seeds'])}. Checksum of the data: {listed(card['data'])}."
    for each in card["classifiers"]:
        yield classifier(each)
    yield "## Commands"
    yield from commands(card)
    yield "## Tuning"
    yield from tuning(card["tuning"])
    yield "## Time"
    yield from time(card)
    if card["sources"]:
        yield "Their first stages and teachers, or the runs whose weights they began from:"
        yield literal_table(
            ["run", "images", "seconds of training"],
            [
                [folder, words(each["images_seen"]), words(each["training_seconds"])]
                for folder, each in card["sources"].items()
            ],
        )
    yield "## Code and machines"
    yield literal_table(
        ["commit", "uncommitted changes", "runs"],
        [[e["commit"] or UNKNOWN, words(e["dirty"]), e["runs"]] for e in card["code"]],
    )
    yield from map(machine, card["machines"])
    yield from what_is_missing(card)


def facts(known: Card) -> Iterator[list[str]]:
    """Yields a row for each fact; nested ones are named by their path."""
    for key, value in known.items():
        if isinstance(value, dict):
            yield from ([f"{key}.{name}", text] for name, text in facts(value))
        else:
            yield [key, "null" if value is None else words(value)]


def words(value: object) -> str:
    """A value as text."""
    names = {None: UNKNOWN, True: "yes", False: "no"}
    known = value is None or isinstance(value, bool)
    return names[value] if known else str(value)  # type: ignore[index]


def listed(values: Iterable[object]) -> str:
    return ", ".join(map(literal, values)) or "none"


def classifier(facts: Card) -> str:
    """A sentence on a classifier: the checksum in the names of metrics, and the published file."""
    name, file = literal(facts["name"]), facts["file"]
    if not file:
        return f"{name} in names of metrics is a classifier whose file is not published."
    return (
        f"{name} in names of metrics is a classifier whose file has the sha256 "
        f"{literal(facts['sha256_of_original'])}. {literal(file)} holds its weights in half "
        f"precision, and so has another sha256, {literal(facts['sha256'])}; metrics measured with "
        "it have another name."
    )


def commands(card: Card) -> Iterator[str]:
    """Yields the command that all runs share, and what each run adds to it."""
    known = card["commands"]
    own = {place: each for place, each in known["runs"].items() if each is not None}
    if own:
        line = shlex.join(["diffusion-lab", "train", *known["common"]])
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", line)), default=0))
        yield f"{fence}sh\n{line}\n{fence}"
        yield literal_table(
            ["run", "also has"], [[place, shlex.join(each)] for place, each in own.items()]
        )
    if missing := [place for place in known["runs"] if place not in own]:
        yield (
            f"The command lines of {len(missing)} runs were not recorded; `config.yaml` of each "
            f"has all settings. Studies: {listed(card['studies'])}."
        )


def tuning(found: Card | None) -> Iterator[str]:
    """Yields what was tuned, and the chosen values."""
    if found is None:
        yield "Nothing was tuned."
        return
    yield literal_table(
        ["", "value"], facts({key: value for key, value in found.items() if key != "chosen"})
    )
    for file, chosen in found["chosen"].items():
        yield f"Chosen, as in {literal(file)}:"
        yield literal_table(
            ["network", "values"], [[name, values or "none"] for name, values in chosen.items()]
        )


def time(card: Card) -> Iterator[str]:
    """Yields the hours of runs and tuning, and the dates."""
    yield literal_table(
        ["", "runs", "wall-clock hours", "core-hours"],
        [
            [kind, each["runs"], words(each["wall_clock_hours"]), words(each["core_hours"])]
            for kind, each in card["hours"].items()
        ],
    )
    yield (
        "Core-hours are training time x threads x processes; wall-clock hours are summed over "
        "runs, also over those that ran at the same time."
    )
    dates = card["dates"]
    yield literal(f"The runs ended from {dates['first_run_ended']} to {dates['last_run_ended']}.")


def machine(known: Card) -> str:
    """A line on a machine and its versions."""
    versions = known["versions"] or {}
    named = [f"{key} {words(known[key])}" for key in ("precision", "threads", "ranks", "python")]
    installed = [f"{name} {version}" for name, version in versions.items()]
    device, processor = words(known["device"]), known["processor"]
    named_twice = processor is None or processor in device  # as a CPU is
    parts = [device] if named_twice else [device, f"processor {processor}"]
    return f"* {known['runs']} runs: {listed([*parts, *named, *installed])}."


def what_is_missing(card: Card) -> Iterator[str]:
    """Yields what was left out, of runs and of their rows."""
    if card["left_out"]:
        yield "## Left out"
        yield "\n".join(f"* {literal(sentence).rstrip('.')}." for sentence in card["left_out"])
    if card["thinned"]:
        yield "## Rows that were left out"
        yield (
            "`metrics.jsonl` of these runs was too large, so rows of training losses were left out "
            "evenly; every row of a measurement is there, and the median of images per second is "
            "that of all rows."
        )
        rows = [[run, each["rows"], each["kept"]] for run, each in card["thinned"].items()]
        yield literal_table(["run", "rows", "published rows"], rows)
