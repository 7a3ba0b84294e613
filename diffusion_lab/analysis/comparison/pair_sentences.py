"""Sentences on pairs of compositions, and on compositions that are in no pair."""

from collections.abc import Sequence

from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.pairs import ENOUGH, Pair
from diffusion_lab.metrics import Quantity


def difference(pair: Pair, metric: Quantity) -> str:
    size = abs(pair.gap)
    interval = metric.gap(size - pair.half_width, size + pair.half_width)
    corrected = pair.tested is not None and pair.tested.corrected > pair.tested.p
    of = " of this pair alone, uncorrected:" if corrected else ""
    return (
        f"{pair.ahead.name} is better than {pair.behind.name}: {metric.title} "
        f"{'higher' if metric.higher_is_better else 'lower'} by {metric.gap(size)} "
        f"(95 % confidence interval{of} {interval})"
    )


def undecided(pair: Pair, metric: Quantity) -> str:
    return (
        f"{pair.ahead.name} and {pair.behind.name} cannot be told apart by {metric.title}; their "
        f"gap is {metric.gap(abs(pair.gap))}, and over {len(pair.seeds)} seeds of this spread "
        f"a gap must exceed {metric.gap(pair.detectable)} to be told from chance"
    )


def untestable(pair: Pair, metric: Quantity) -> str:
    size = metric.gap(abs(pair.gap)) if pair.gap else "nothing"
    return (
        f"{pair.ahead.name} and {pair.behind.name} differ in {metric.title} by {size} in each of "
        f"{len(pair.seeds)} seeds, and differences without spread cannot be tested; they are a "
        "sign of copied runs, or of runs that do not depend on their seed"
    )


def finding(pair: Pair, metric: Quantity, tests: int) -> str:
    """A sentence on a pair, one of so many that were tested."""
    at = f"At {pair.size}: " if pair.size else ""
    if pair.tested is None:
        return at + untestable(pair, metric)
    said = (difference if pair.told_apart else undecided)(pair, metric)
    p = f"p = {pair.tested.p:.2g}"
    if tests > 1:
        p += f", {pair.tested.corrected:.2g} after Holm's correction for {tests} pairs"
    seeds = ", ".join(str(seed) for seed in pair.seeds)
    return f"{at}{said}; paired over seeds {seeds}: {p}"


def untested(groups: Sequence[Group], pairs: Sequence[Pair], metric: Quantity) -> list[str]:
    """What is known of groups of one size of the data that are in no pair, and what it is not."""
    paired = {name for pair in pairs for name in (pair.ahead.name, pair.behind.name)}
    others = [group for group in groups if group.name not in paired]
    if not others:
        return []
    said = []
    for group in others:
        text = f"{group.name} {metric.title} {metric.number(group.mean(metric.name))}"
        spread = group.jackknife if metric.name == "fid" else None
        said.append(text if spread is None else f"{text} (jackknife ± {metric.number(spread)})")
    alone = len(others) == 1
    lines = [
        f"{', '.join(group.name for group in others)} share{'s' if alone else ''} no {ENOUGH} "
        "seeds with another composition of the same data, so nothing can be said beyond "
        f"{'its run' if alone else 'their runs'}: {'; '.join(said)}"
    ]
    if not pairs and len(groups) > 1:
        lines.append(_nearest(groups, metric))
    return lines


def _nearest(groups: Sequence[Group], metric: Quantity) -> str:
    """The gap between the best and what is nearest to it, where nothing was tested."""
    sign = -1 if metric.higher_is_better else 1
    best = min(groups, key=lambda group: sign * group.mean(metric.name))
    rest = [group for group in groups if group is not best]
    nearest = min(rest, key=lambda g: abs(g.mean(metric.name) - best.mean(metric.name)))
    size = abs(best.mean(metric.name) - nearest.mean(metric.name))
    text = f"The gap between {best.name} and {nearest.name} is {metric.gap(size)}"
    one, other = best.jackknife, nearest.jackknife
    if metric.name == "fid" and one is not None and other is not None:
        text += f" beside jackknife deviations of {one:.3g} and {other:.3g} over samples"
    return f"{text}; another seed of training may move a figure by more than samples do"
