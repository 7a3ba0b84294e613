"""The answer of tests in words and numbers: the verdict, each pair, and other metrics."""

from collections.abc import Sequence
from typing import Any

from diffusion_lab.common.formats import joined
from diffusion_lab.metrics.quantity import Quantity
from diffusion_lab.report.tests import ENOUGH, LEVEL, PAIRED, Panel
from diffusion_lab.report.words import NAMED, SHORT, TESTS, digits, few, p_in, percent


def number_of(metric: Quantity, value: float) -> str:
    """A value of a metric in three digits; a share as a percentage."""
    return digits(metric.scale * value, 3) + " %" * metric.percent


def gap_in(metric: Quantity, *ends: float) -> str:
    """A difference, or a range of differences, in two digits; shares in percentage points."""
    words = " to ".join(digits(metric.scale * end) for end in ends)
    return words + " points" * metric.percent


def change(panel: Panel, pair: Any) -> str:
    """By how much the better arm of a pair is ahead of the other, and the interval."""
    metric = panel.metric
    if pair.relative == pair.relative:  # not nan
        how = "closer to real images" if panel.floor else "lower"
        size, low, high = map(percent, (-pair.relative, -pair.relative_high, -pair.relative_low))
        return f"{size} {how} (95 % interval {low.removesuffix(' %')} to {high})"
    how = "higher" if metric.higher_is_better else "lower"
    ends = gap_in(metric, *sorted((abs(pair.low), abs(pair.high))))
    return f"{gap_in(metric, abs(pair.gap))} {how} (95 % interval {ends})"


def interval(metric: Quantity, pair: Any) -> str:
    """The gap of a pair, from the better to the worse mean, with its 95 % interval."""
    sign = 1 if pair.gap >= 0 else -1
    ends = sorted((sign * pair.low, sign * pair.high))
    return f"{gap_in(metric, abs(pair.gap))} (95 % interval {gap_in(metric, *ends)})"


def signed(metric: Quantity, pair: Any, arm: str) -> str:
    """The gap of a pair as one of its arms has it: its mean less that of the other."""
    gap = -pair.gap if arm == pair.ahead else pair.gap
    return f"{'+' if gap > 0 else ''}{digits(metric.scale * gap)}{' %' * metric.percent}"


def numbers(panel: Panel) -> dict[str, str]:
    """The mean of each arm as text."""
    return {str(arm): number_of(panel.metric, mean) for arm, mean in panel.means["mean"].items()}


def answer(panels: Sequence[Panel]) -> str:
    """The verdict, or one sentence on the best arm at each size of the data."""
    if len(panels) == 1:
        return verdict(panels[0])
    if all(len(panel.arms) == 1 for panel in panels):
        return "; ".join(f"{verdict(panel)} at {panel.data} training images" for panel in panels)
    at: dict[str | None, list[str]] = {}
    for panel in panels:
        at.setdefault(panel.best, []).append(panel.data)
    nowhere = at.pop(None, [])
    said = [f"{arm} is best at {joined(sizes)} training images" for arm, sizes in at.items()]
    said += [f"none is shown to be best at {joined(nowhere)} training images"] if nowhere else []
    return f"By {panels[0].metric.title} {', '.join(said)}"


def verdict(panel: Panel) -> str:
    """The answer for arms on the same data, with both numbers and the gap between them."""
    metric, value, (best, *rest), tested = panel.metric, numbers(panel), panel.arms, panel.tested
    real = "" if panel.real is None else f" (real images {number_of(metric, panel.real)})"
    head = f"{metric.title} {value[best]}{real}"
    if not rest:
        half = panel.means.half.iloc[0]
        spread = f" ± {gap_in(metric, half)}" if half == half else ""
        return f"{best} is the only arm with a value: {metric.title} {value[best]}{spread}"
    if tested.empty:
        return untested(panel)
    some = any(part_of(panel, pair) for pair in tested.itertuples())
    if panel.asked or len(rest) == 1 or some:
        shown = panel.best if some and len(rest) > 1 else None
        pairs = sorted(tested.itertuples(), key=lambda pair: pair.ahead != shown)
        each = [pair_in(panel, pair, real) for pair in pairs]
        more = f"; and {len(each) - NAMED} pairs more" if len(each) > NAMED else ""
        return (f"{shown} is best: " if shown else "") + "; ".join(each[:NAMED]) + more
    if len(won := panel.won):
        nearest, *further = won.itertuples()
        said = f"{head}, {change(panel, nearest)} than {nearest.behind}'s {value[nearest.behind]}"
        if 0 < len(further) <= NAMED:
            said += f"; {joined([f'{pair.behind} has {value[pair.behind]}' for pair in further])}"
        if panel.best is None:
            open_ = [arm for arm in rest if arm not in set(won.behind)]
            return f"{best} has {said}; no lead over {few(open_)} is shown"
        own, others = panel.means.iloc[0], panel.means.iloc[1:]
        if metric.higher_is_better:
            every = others["max"].max() < own["min"]
        else:
            every = others["min"].min() > own["max"]
        said += f"; every run of {best} is better than every other run" if every else ""
        return f"{best} is best: {said}"
    if count := tested.significant.sum():
        clearest = next(tested.sort_values("corrected").itertuples())
        return (
            f"No arm is shown to be best: {head} of {best} is the best mean, and {count} of "
            f"{len(tested)} pairs differ; {pair_in(panel, clearest, real)}"
        )
    return (
        f"No difference is shown among {len(rest) + 1} arms: {metric.title} from "
        f"{value[best]} ({best}) to {value[rest[-1]]} ({rest[-1]})"
    )


def pair_in(panel: Panel, pair: Any, real: str = "") -> str:
    """The result of one pair, with both numbers, or with the gap alone if it is of some runs."""
    value, title = numbers(panel), panel.metric.title
    if part_of(panel, pair):
        over = f"over the {pair.pairs} seeds that both have: {title} differs by"
        if pair.significant:
            said = f"{pair.ahead} is better than {pair.behind}"
        else:
            said = f"No difference of {pair.ahead} and {pair.behind} is shown"
        return f"{said} {over} {interval(panel.metric, pair)}"
    if pair.significant:
        return (
            f"{pair.ahead} is better than {pair.behind}: {title} {value[pair.ahead]}{real}, "
            f"{change(panel, pair)} than {value[pair.behind]}"
        )
    return (
        f"No difference of {pair.ahead} and {pair.behind} is shown: {title} {value[pair.ahead]} "
        f"and {value[pair.behind]}, a gap of {interval(panel.metric, pair)}"
    )


def part_of(panel: Panel, pair: Any) -> bool:
    """Whether a pair is tested by some of its runs: by the seeds that both arms have."""
    counts = panel.means["count"][[pair.ahead, pair.behind]]
    return pair.test == PAIRED and bool((counts != pair.pairs).any())


def untested(panel: Panel) -> str:
    """The answer where no pair is tested, for few runs or for values that do not vary."""
    named = [f"{number} of {arm}" for arm, number in numbers(panel).items()]
    shown = joined(named) if len(named) <= NAMED else f"{named[0]} to {named[-1]}"
    if panel.asked and panel.means["count"].min() >= ENOUGH and panel.pairs.empty:
        return (
            f"Nothing is tested, since no pair of the protocol's contrasts can be: "
            f"{panel.metric.title} {shown}"
        )
    if panel.pairs.empty:
        paired = panel.test == PAIRED and panel.means["count"].min() >= ENOUGH
        needs = "two seeds that both arms have" if paired else "two runs of each arm"
        return (
            f"Nothing is tested, since a test needs {needs}: {panel.metric.title} "
            f"{shown}; another training seed may change it by more than other samples do"
        )
    return (
        f"Nothing is tested: values of {panel.metric.title} differ by the same in every seed, "
        f"{shown}, as those of copies, or of runs that are blind to the seed"
    )


def findings(panel: Panel) -> list[str]:
    """A sentence on each tested pair: the best arm's, those without a gap, the rest."""
    known = panel.tested
    rank = (known.ahead != panel.arms[0]) * (1 + known.significant)
    ordered = known.assign(rank=rank).sort_values(["rank", "corrected"], kind="stable")
    return [_finding(panel, pair) for pair in ordered.itertuples()]


def _finding(panel: Panel, pair: Any) -> str:
    count = f"better in {pair.better:g} of {pair.pairs} pairs of runs; {p_in(pair.corrected)}"
    if pair.significant:
        return f"{pair.ahead} is ahead of {pair.behind} by {interval(panel.metric, pair)}; {count}"
    sizes = (pair.detectable, pair.detectable_low, pair.detectable_high)
    power, low, high = (digits(panel.metric.scale * each, 1) for each in sizes)
    return (
        f"{pair_in(panel, pair)}; {count}; four of five such studies find a true gap of "
        f"{power} ({low} to {high})"
    )


def disagreements(panel: Panel) -> list[str]:
    """A sentence on each pair of which other tests, after their correction, say otherwise."""
    said = []
    for pair in panel.tested.itertuples():
        others = {test: getattr(pair, f"p_{test}") for test in TESTS if test != pair.test}
        known = {test: p for test, p in others.items() if p == p}  # not nan
        for test in [each for each in pair.against if known.get(each, 1) < LEVEL]:
            p = known.pop(test)
            said.append(
                f"By {SHORT[test]} ({p_in(p)}) it is {pair.behind} that is ahead of {pair.ahead}, "
                "since not all of their seeds are the same"
            )
        against = [
            f"{SHORT[test]} ({p_in(p)})"
            for test, p in known.items()
            if (p < LEVEL) != pair.significant
        ]
        if against:
            own, named = f"{SHORT[pair.test]} ({p_in(pair.corrected)})", joined(against)
            by, but = (own, named) if pair.significant else (named, own)
            said.append(f"By {by} {pair.ahead} is ahead of {pair.behind}; not so by {but}")
    return said


def secondary(panel: Panel) -> str:
    """The word of another metric than the primary one, by an interval without correction."""
    value, (best, *rest), title = numbers(panel), panel.arms, panel.metric.title
    if not rest:
        return f"{title} was measured for {best} alone: {value[best]}"
    if panel.means["mean"].nunique() == 1 and panel.tested.empty:
        return f"{title} is equal in the mean for all arms, {value[best]}"
    said = f"{best} has the best mean {title}, {value[best]}, then {rest[0]}, {value[rest[0]]}"
    known = panel.tested
    own = known[(known.ahead == best) & (known.behind == rest[0])]
    return said + "".join(f": a gap of {interval(panel.metric, pair)}" for pair in own.itertuples())
