"""What the seeds allow to be said, in words: paired t-tests over common seeds, Holm-corrected."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

from omegaconf import OmegaConf

from diffusion_lab.comparison.figures import JACKKNIFE, Metric
from diffusion_lab.comparison.groups import Group
from diffusion_lab.comparison.statistics import (
    LEVEL,
    Tested,
    half_width,
    holm,
    paired_p_value,
)
from diffusion_lab.profiling import amount

ENOUGH = 2  # common seeds of a paired test
SHOWN = 50  # pairs that are told of one by one; pairs.csv has all


@dataclass(frozen=True)
class Pair:
    """Two groups over the seeds that they share; `ahead` has the better mean of the two."""

    ahead: Group
    behind: Group
    seeds: tuple[int, ...]
    gap: float  # mean of behind - ahead over the seeds, signed
    half_width: float  # of the gap's 95 % confidence interval, uncorrected
    detectable: float  # the least gap that these seeds' spread could have told from chance
    tested: Tested

    @property
    def told_apart(self) -> bool:
        """Whether the difference is one, at 5 % over all pairs."""
        return self.tested.corrected < LEVEL


@dataclass(frozen=True)
class Verdict:
    """On one metric: the answer, a sentence on each pair, and what cannot be said."""

    answer: str
    findings: tuple[str, ...]
    reservations: tuple[str, ...]
    pairs: tuple[Pair, ...]


def pairs_of(groups: Sequence[Group], metric: Metric) -> list[Pair]:
    """All pairs with enough common seeds; groups of different parts of the data make none."""
    found = []
    for a, b in combinations(groups, 2):
        seeds = common_seeds(a, b, metric.kind)
        if a.data_size != b.data_size or len(seeds) < ENOUGH:
            continue
        differences = [_value(b, seed, metric) - _value(a, seed, metric) for seed in seeds]
        first_ahead = not metric.better(statistics.mean(differences), 0)
        ahead, behind = (a, b) if first_ahead else (b, a)
        found.append((ahead, behind, seeds, [d if first_ahead else -d for d in differences]))
    tests = holm([paired_p_value(differences) for *_, differences in found])
    return [
        Pair(
            ahead,
            behind,
            seeds,
            statistics.mean(differences),
            half_width(differences),
            half_width(differences, tested.level),
            tested,
        )
        for (ahead, behind, seeds, differences), tested in zip(found, tests, strict=True)
    ]


def common_seeds(a: Group, b: Group, kind: str) -> tuple[int, ...]:
    """Of which both have a finite figure."""
    return tuple(
        seed
        for seed, member in a.by_seed.items()
        if kind in member.figures and seed in b.by_seed and kind in b.by_seed[seed].figures
    )


def verdict(groups: Sequence[Group], metric: Metric) -> Verdict | None:
    """What can be said by one metric; None where no group has it."""
    groups = [group for group in groups if group.values(metric.kind)]
    if not groups:
        return None
    if len(groups) == 1:
        return Verdict(_only_seeds(groups[0], metric), (), (), ())
    pairs = pairs_of(groups, metric)
    reservations = [*_untested(groups, pairs, metric), *unequal_budgets(groups)]
    findings = [_finding(pair, metric, len(pairs)) for pair in pairs]
    order = sorted(range(len(pairs)), key=lambda i: (not pairs[i].told_apart, pairs[i].tested.p))
    return Verdict(
        _answer(groups, pairs, metric),
        tuple(findings[i] for i in order),
        tuple(reservations),
        tuple(pairs[i] for i in order),
    )


def _answer(groups: Sequence[Group], pairs: list[Pair], metric: Metric) -> str:
    apart = [pair for pair in pairs if pair.told_apart]
    if not pairs:
        return (
            f"Nothing can be said by {metric.title} beyond these runs: no two compositions "
            f"of the same data share {ENOUGH} seeds"
        )
    if not apart:
        if len(pairs) == 1:
            return f"No difference at this budget: {_undecided(pairs[0], metric)}"
        least, most = (f(pair.detectable for pair in pairs) for f in (min, max))
        return (
            f"No difference at this budget: by {metric.title} none of {len(pairs)} pairs of "
            f"compositions can be told apart; the least gap that could have been told from chance "
            f"is {number(least, metric)} to {number(most, metric)}, by pair"
        )
    if len(apart) == 1:
        others = f"; {len(pairs) - 1} other pairs cannot be told apart" if len(pairs) > 1 else ""
        return _difference(apart[0], metric) + others
    tested = {group.name: group for pair in pairs for group in (pair.ahead, pair.behind)}
    for name in tested:
        beaten = [pair.behind.name for pair in apart if pair.ahead.name == name]
        if len(beaten) == len(tested) - 1:
            return f"{name} is best by {metric.title}: better than each of the other {len(beaten)}"
    return (
        f"By {metric.title}, {len(apart)} of {len(pairs)} pairs of compositions can be told apart, "
        "and no composition is better than all the others"
    )


def _difference(pair: Pair, metric: Metric) -> str:
    size = abs(pair.gap)
    low, high = (number(size + sign * pair.half_width, metric) for sign in (-1, 1))
    return (
        f"{pair.ahead.name} is better than {pair.behind.name}: {metric.title} "
        f"{'higher' if metric.higher_is_better else 'lower'} by {number(size, metric)} "
        f"(95 % confidence interval {low} to {high})"
    )


def _undecided(pair: Pair, metric: Metric) -> str:
    if pair.gap == pair.detectable == 0:
        return (
            f"{pair.ahead.name} and {pair.behind.name} have the same {metric.title}, seed by seed"
        )
    return (
        f"{pair.ahead.name} and {pair.behind.name} cannot be told apart by {metric.title}; their "
        f"gap of {number(abs(pair.gap), metric)} is below {number(pair.detectable, metric)}, the "
        f"least that {len(pair.seeds)} seeds so spread could have told from chance"
    )


def _finding(pair: Pair, metric: Metric, tests: int) -> str:
    said = (_difference if pair.told_apart else _undecided)(pair, metric)
    p = f"p = {pair.tested.p:.2g}"
    if tests > 1:
        p += f", {pair.tested.corrected:.2g} after Holm's correction for {tests} pairs"
    seeds = ", ".join(str(seed) for seed in pair.seeds)
    return f"{said}; paired over seeds {seeds}: {p}"


def _only_seeds(group: Group, metric: Metric) -> str:
    values = group.values(metric.kind)
    said = "No difference to be tested: all runs are one composition"
    if len(values) < ENOUGH:
        return f"{said}, with {metric.title} {number(values[0], metric)}"
    return (
        f"{said} and differ in their seeds alone; {metric.title} "
        f"{number(statistics.mean(values), metric)} ± {number(half_width(values), metric)}"
    )


def _untested(groups: Sequence[Group], pairs: list[Pair], metric: Metric) -> list[str]:
    """What is known of groups that are in no pair, and what it is not."""
    tested = {name for pair in pairs for name in (pair.ahead.name, pair.behind.name)}
    others = [group for group in groups if group.name not in tested]
    if not others:
        return []
    said = []
    for group in others:
        text = f"{metric.title} {number(group.mean(metric.kind), metric)}"
        spread = jackknife(group) if metric.kind == "fid" else None
        said.append(text if spread is None else f"{text} (jackknife ± {number(spread, metric)})")
    alone = len(others) == 1
    names = ", ".join(group.name for group in others)
    lines = [
        f"{names} share{'s' if alone else ''} no {ENOUGH} seeds with another composition of the "
        f"same data, so nothing can be said beyond {'its run' if alone else 'their runs'}: "
        + "; ".join(said if alone else (f"{g.name} {t}" for g, t in zip(others, said, strict=True)))
    ]
    best = min(
        groups,
        key=lambda group: group.mean(metric.kind) * (-1 if metric.higher_is_better else 1),
    )
    if not pairs:
        rest = [group for group in groups if group is not best]
        nearest = min(rest, key=lambda g: abs(g.mean(metric.kind) - best.mean(metric.kind)))
        gap = abs(best.mean(metric.kind) - nearest.mean(metric.kind))
        text = f"The gap between {best.name} and {nearest.name} is {number(gap, metric)}"
        spreads = [jackknife(group) for group in (best, nearest)]
        if metric.kind == "fid" and None not in spreads:
            text += " beside jackknife deviations of {:.3g} and {:.3g} over samples".format(
                *spreads
            )
        lines.append(f"{text}; another seed of training may move a figure by more than samples do")
    return lines


def jackknife(group: Group) -> float | None:
    """The standard deviation of the only seed's FID over its samples, where there is one seed."""
    if len(group.members) == 1:
        return group.members[0].figures.get(JACKKNIFE)
    return None


def unequal_budgets(groups: Sequence[Group]) -> list[str]:
    """A sentence if the groups have not all seen as many images, nor were to be equal in time."""
    images = [group.mean("images_seen") for group in groups]
    if min(images) == max(images) or budgeted_seconds(groups):
        return []
    return [
        f"Budgets are unequal: compositions have seen {amount(min(images))} to "
        f"{amount(max(images))} images"
    ]


def budgeted_seconds(groups: Sequence[Group]) -> int | None:
    """Seconds of training, if they were the budget of every run."""
    runs = [member.run for group in groups for member in group.members]
    limits = {OmegaConf.select(run.config, "budget.seconds") for run in runs}
    return limits.pop() if len(limits) == 1 else None


def number(value: float, metric: Metric) -> str:
    """In three digits; shares in percentage points."""
    return f"{100 * value:.3g} %" if metric.percent else f"{value:.3g}"


def _value(group: Group, seed: int, metric: Metric) -> float:
    return group.by_seed[seed].figures[metric.kind]
