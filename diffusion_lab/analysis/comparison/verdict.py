"""The conclusions that the seeds allow, in words, at each size of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_lab.analysis.comparison.fairness import reservations
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.pairs import ENOUGH, DataSize, Pair, by_data_size
from diffusion_lab.metrics import Quantity

SHOWN = 50  # pairs that are listed one by one; pairs.csv has all


@dataclass(frozen=True)
class Verdict:
    """The verdict by one metric: the answer, the pairs, and reservations.

    `by_size` has an answer for each size of the training data, if there are several.
    """

    answer: str
    by_size: tuple[str, ...]
    reservations: tuple[str, ...]
    pairs: tuple[Pair, ...]

    @property
    def tests(self) -> int:
        """The number of pairs that were tested."""
        return sum(pair.tested is not None for pair in self.pairs)

    @property
    def findings(self) -> list[str]:
        """The sentences on all pairs."""
        return [pair.finding(self.tests) for pair in self.pairs]

    @property
    def significant(self) -> list[str]:
        """The sentences on pairs with a significant difference."""
        return [pair.finding(self.tests) for pair in self.pairs if pair.significant]


def verdict(groups: Sequence[Group], metric: Quantity) -> Verdict | None:
    """Judges the groups by one metric; returns None if no group has it."""
    known = [group for group in groups if group.values(metric.name)]
    if not known:
        return None
    missing = [group.name for group in groups if group not in known]
    limits = [f"{metric.title} was not measured for {', '.join(missing)}"] if missing else []
    if len(known) == 1:
        return Verdict(_alone(known[0], groups, metric), (), tuple(limits), ())
    sizes = by_data_size(known, metric)
    several = len(sizes) > 1
    answers = {}
    for size in sizes:
        if len(size.groups) == 1:
            part = [group for group in groups if group.data_size == size.groups[0].data_size]
            answers[size.label] = _alone(size.groups[0], part, metric)
        else:
            answers[size.label] = _answer(size, metric)
            at = f"At {size.label}: " if several else ""
            limits += [f"{at}{sentence}" for sentence in _untested(size, metric)]
    return Verdict(
        _headline(sizes, metric) if several else answers[""],
        tuple(f"At {label}: {answer}" for label, answer in answers.items()) if several else (),
        (*limits, *reservations(groups)),
        tuple(pair for size in sizes for pair in size.pairs),
    )


def _untested(size: DataSize, metric: Quantity) -> list[str]:
    """Sentences on the groups of one size of the data that are in no pair, and on their values."""
    paired = {name for pair in size.pairs for name in (pair.ahead.name, pair.behind.name)}
    others = [group for group in size.groups if group.name not in paired]
    if not others:
        return []
    said = []
    for group in others:
        text = f"{group.name} {metric.title} {metric.number(group.mean(metric.name))}"
        spread = group.jackknife if metric.name == "fid" else None
        said.append(text if spread is None else f"{text} (jackknife ± {metric.number(spread)})")
    alone = len(others) == 1
    lines = [
        f"{', '.join(group.name for group in others)} share{'s' if alone else ''} fewer than "
        f"{ENOUGH} seeds with any other composition on the same data, so nothing can be said "
        f"beyond {'its run' if alone else 'their runs'}: {'; '.join(said)}"
    ]
    return lines if size.pairs else [*lines, _nearest(size.groups, metric)]


def _nearest(groups: Sequence[Group], metric: Quantity) -> str:
    """A sentence on the gap between the best group and the nearest one, if nothing was tested."""
    sign = -1 if metric.higher_is_better else 1
    best = min(groups, key=lambda group: sign * group.mean(metric.name))
    gaps = [(abs(g.mean(metric.name) - best.mean(metric.name)), g) for g in groups if g is not best]
    size, nearest = min(gaps, key=lambda found: found[0])
    text = f"The gap between {best.name} and {nearest.name} is {metric.gap(size)}"
    one, other = best.jackknife, nearest.jackknife
    if metric.name == "fid" and one is not None and other is not None:
        text += f", with jackknife deviations of {one:.3g} and {other:.3g} over samples"
    return f"{text}; another training seed may change a metric by more than other samples do"


def _headline(sizes: Sequence[DataSize], metric: Quantity) -> str:
    """One sentence that sums up the answers for all sizes of the data."""
    if all(len(size.groups) == 1 for size in sizes):
        return (
            f"Nothing is tested by {metric.title}: there is only one composition at each of "
            f"{len(sizes)} sizes of the data; the plot shows the means"
        )
    at: dict[str, list[str]] = {}  # name of the best composition -> sizes
    for size in sizes:
        best = size.best(size.groups)
        at.setdefault(best.name if best else "", []).append(size.images)
    nowhere = at.pop("", [])
    if len(at) == 1 and not nowhere:
        return (
            f"{next(iter(at))} is best by {metric.title} at each of {len(sizes)} sizes of the data"
        )
    tested = [pair for size in sizes for pair in size.tested]
    if not tested:
        same = f"Nothing is tested by {metric.title}: differences are the same in every seed"
        return same if any(size.pairs for size in sizes) else _nothing(metric)
    if not any(pair.significant for pair in tested):
        return (
            f"No difference is shown at this budget: none of {len(tested)} pairs of compositions "
            f"on the same data differs significantly in {metric.title}"
        )
    said = [f"{name} is best {_places(images)}" for name, images in at.items()]
    said += [f"none is shown to be best {_places(nowhere)}"] if nowhere else []
    depends = " it depends on the size of the data:" if len(at) > 1 else ""
    return f"By {metric.title}{depends} {', '.join(said)}"


def _places(images: Sequence[str]) -> str:
    words = " and ".join(filter(None, [", ".join(images[:-1]), images[-1]]))
    return f"at {words} training images"


def _answer(size: DataSize, metric: Quantity) -> str:
    """The answer for the compositions of one size of the data."""
    groups, tested = size.groups, size.tested
    significant = [pair for pair in tested if pair.significant]
    if not tested:
        return f"Nothing is tested: {size.pairs[0]}" if size.pairs else _nothing(metric)
    left = len(groups) * (len(groups) - 1) // 2 - len(tested)
    rest = f"; {_count(left, 'other pair')} could not be tested" if left else ""
    if not significant:
        if len(tested) == 1:
            return f"No difference is shown at this budget: {tested[0]}{rest}"
        gaps = [pair.detectable for pair in tested]
        return (
            f"No difference is shown at this budget: none of {len(tested)} pairs of compositions "
            f"differs significantly in {metric.title}; their seeds have 80 % power for gaps of "
            f"{metric.gap(min(gaps), max(gaps))}, depending on the pair{rest}"
        )
    if len(significant) == 1:
        others = len(tested) - 1
        equal = f"; no significant difference in {_count(others, 'other pair')}" if others else ""
        return f"{significant[0]}{equal}{rest}"
    if best := size.best(groups):
        beaten = len(groups) - 1
        return f"{best.name} is best by {metric.title}: better than each of the other {beaten}"
    names = {group.name for pair in tested for group in (pair.ahead, pair.behind)}
    if best := size.best([group for group in groups if group.name in names]):
        unsaid = [group.name for group in groups if group.name not in names]
        return (
            f"{best.name} is better by {metric.title} than each of the other {len(names) - 1} that "
            f"could be tested; nothing can be said about {', '.join(unsaid)}"
        )
    return (
        f"{len(significant)} of {len(tested)} pairs of compositions differ significantly in "
        f"{metric.title}, but none is shown to be better than all the others{rest}"
    )


def _nothing(metric: Quantity) -> str:
    return (
        f"Nothing can be said about {metric.title} beyond these runs: no two compositions on the "
        f"same data share {ENOUGH} seeds"
    )


def _alone(group: Group, groups: Sequence[Group], metric: Quantity) -> str:
    """The answer if only one of these groups has the metric."""
    if len(groups) > 1:
        return f"{metric.title} was measured for {group.name} only: nothing to compare"
    said = "No difference to test: all runs have the same composition"
    mean, width = metric.number(group.mean(metric.name)), group.half_width(metric.name)
    if width is None:
        return f"{said}, with {metric.title} {mean}"
    return f"{said} and differ only in their seeds; {metric.title} {mean} ± {metric.gap(width)}"


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
