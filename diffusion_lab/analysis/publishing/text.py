"""The card of a published comparison in words: card.md, made of nothing but card.json."""

import re
import shlex
from collections.abc import Iterable, Iterator
from typing import Any

from diffusion_lab.common.formats import literal, literal_table

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
