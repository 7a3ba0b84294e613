"""What the seeds allow to be said, in words, at each size of the training data."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_lab.analysis.comparison.data_sizes import DataSize, by_data_size
from diffusion_lab.analysis.comparison.fairness import reservations
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.pair_sentences import (
    difference,
    finding,
    undecided,
    untestable,
    untested,
)
from diffusion_lab.analysis.comparison.pairs import ENOUGH, Pair, pairs_of
from diffusion_lab.analysis.comparison.significance import half_width
from diffusion_lab.metrics import Quantity

SHOWN = 50  # pairs that are told of one by one; pairs.csv has all


@dataclass(frozen=True)
class Verdict:
    """On one metric: the answer, a sentence on each pair, and what cannot be said.

    `by_size` are the answers for each size of the training data, where there are several.
    """

    answer: str
    by_size: tuple[str, ...]
    findings: tuple[str, ...]
    reservations: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def tests(self) -> int:
        """The number of pairs that were tested."""
        return sum(pair.tested is not None for pair in self.pairs)

    @property
    def told_apart(self) -> list[str]:
        """The sentences on pairs that are told apart."""
        findings = zip(self.findings, self.pairs, strict=True)
        return [finding for finding, pair in findings if pair.told_apart]


def verdict(groups: Sequence[Group], metric: Quantity) -> Verdict | None:
    """What can be said by one metric; None where no group has it."""
    known = [group for group in groups if group.values(metric.name)]
    if not known:
        return None
    missing = [group.name for group in groups if group not in known]
    limits = [f"{', '.join(missing)} had no {metric.title} measured"] if missing else []
    if len(known) == 1:
        return Verdict(_alone(known[0], groups, metric), (), (), tuple(limits), ())
    sizes, pairs = by_data_size(known), pairs_of(known, metric)
    pairs_at = {size.label: [pair for pair in pairs if pair.size == size.label] for size in sizes}
    several = len(sizes) > 1
    answers = {}
    for size in sizes:
        if len(size.groups) == 1:
            part = [group for group in groups if group.data_size == size.groups[0].data_size]
            answers[size.label] = _alone(size.groups[0], part, metric)
            continue
        answers[size.label] = _answer(size.groups, pairs_at[size.label], metric)
        said = untested(size.groups, pairs_at[size.label], metric)
        limits += [f"At {size.label}: {each}" if several else each for each in said]
    order = [pair for size in sizes for pair in sorted(pairs_at[size.label], key=_rank)]
    tests = sum(pair.tested is not None for pair in pairs)
    return Verdict(
        headline(sizes, pairs_at, metric) if several else answers[""],
        tuple(f"At {label}: {answer}" for label, answer in answers.items()) if several else (),
        tuple(finding(pair, metric, tests) for pair in order),
        (*limits, *reservations(groups)),
        tuple(order),
    )


def _rank(pair: Pair) -> tuple[bool, float]:
    return not pair.told_apart, pair.tested.p if pair.tested else 1.0


def headline(sizes: Sequence[DataSize], pairs: dict[str, list[Pair]], metric: Quantity) -> str:
    """The answers for all sizes of the data in a sentence."""
    if all(len(size.groups) == 1 for size in sizes):
        return (
            f"Nothing is tested by {metric.title}: there is one composition at each of "
            f"{len(sizes)} sizes of the data, and its means are in the plot"
        )
    best = {size.label: _best(size.groups, pairs[size.label]) for size in sizes}
    names = {group and group.name for group in best.values()}
    if len(names) == 1 and None not in names:
        return f"{names.pop()} is best by {metric.title} at each of {len(sizes)} sizes of the data"
    paired = [pair for found in pairs.values() for pair in found]
    tested = [pair for pair in paired if pair.tested]
    if not tested:
        same = f"Nothing is tested by {metric.title}: differences are the same in every seed"
        return same if paired else _nothing(metric)
    if not any(pair.told_apart for pair in tested):
        return (
            f"No difference is shown at this budget: by {metric.title} none of {len(tested)} pairs "
            "of compositions of the same data can be told apart"
        )
    return _best_by_size(sizes, best, metric)


def _best_by_size(
    sizes: Sequence[DataSize], best: dict[str, Group | None], metric: Quantity
) -> str:
    """Which composition is best at which sizes, where it is not the same at all of them."""
    at: dict[str | None, list[str]] = {}
    for size in sizes:
        group = best[size.label]
        at.setdefault(group.name if group else None, []).append(size.images)
    places = {}
    for name, images in at.items():
        sizes_named = " and ".join(filter(None, [", ".join(images[:-1]), images[-1]]))
        places[name] = f"at {sizes_named} training images"
    elsewhere = places.pop(None, None)
    said = [f"{name} is best {place}" for name, place in places.items()]
    said += [f"none is shown to be best {elsewhere}"] if elsewhere else []
    depends = " it depends on the size of the data:" if len(places) > 1 else ""
    return f"By {metric.title}{depends} {', '.join(said)}"


def _best(groups: Sequence[Group], pairs: Sequence[Pair]) -> Group | None:
    """What is better than each of the others, by tests."""
    for group in groups:
        beaten = [pair for pair in pairs if pair.told_apart and pair.ahead.name == group.name]
        if len(groups) > 1 and len(beaten) == len(groups) - 1:
            return group
    return None


def _answer(groups: Sequence[Group], pairs: Sequence[Pair], metric: Quantity) -> str:
    """For compositions of one size of the data."""
    tested = [pair for pair in pairs if pair.tested]
    apart = [pair for pair in tested if pair.told_apart]
    if not tested:
        return f"Nothing is tested: {untestable(pairs[0], metric)}" if pairs else _nothing(metric)
    left = len(groups) * (len(groups) - 1) // 2 - len(tested)
    rest = f"; {_count(left, 'other pair')} could not be tested" if left else ""
    if not apart:
        if len(tested) == 1:
            return f"No difference is shown at this budget: {undecided(tested[0], metric)}{rest}"
        gaps = [pair.detectable for pair in tested]
        return (
            f"No difference is shown at this budget: by {metric.title} none of {len(tested)} pairs "
            "of compositions can be told apart; at their spread a gap must exceed "
            f"{metric.gap(min(gaps), max(gaps))}, by pair, to be told from chance{rest}"
        )
    if len(apart) == 1:
        others = len(tested) - 1
        told = f"; {_count(others, 'other pair')} cannot be told apart" if others else ""
        return difference(apart[0], metric) + told + rest
    if best := _best(groups, apart):
        beaten = len(groups) - 1
        return f"{best.name} is best by {metric.title}: better than each of the other {beaten}"
    names = dict.fromkeys(g.name for pair in tested for g in (pair.ahead, pair.behind))
    among = [group for group in groups if group.name in names]
    if best := _best(among, apart):
        unsaid = [group.name for group in groups if group.name not in names]
        return (
            f"{best.name} is better by {metric.title} than each of the other {len(among) - 1} that "
            f"could be tested; nothing is said of {', '.join(unsaid)}"
        )
    return (
        f"{len(apart)} of {len(tested)} pairs of compositions can be told apart by {metric.title}, "
        f"and none is shown to be better than all the others{rest}"
    )


def _nothing(metric: Quantity) -> str:
    return (
        f"Nothing can be said by {metric.title} beyond these runs: no two compositions of the same "
        f"data share {ENOUGH} seeds"
    )


def _alone(group: Group, groups: Sequence[Group], metric: Quantity) -> str:
    """For the one composition, of these groups, that has the metric."""
    if len(groups) > 1:
        return f"{metric.title} was measured of {group.name} alone: nothing to compare"
    values = group.values(metric.name)
    said = "No difference to be tested: all runs are one composition"
    if len(values) < ENOUGH:
        return f"{said}, with {metric.title} {metric.number(values[0])}"
    return (
        f"{said} and differ in their seeds alone; {metric.title} "
        f"{metric.number(statistics.mean(values))} ± {metric.gap(half_width(values))}"
    )


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
