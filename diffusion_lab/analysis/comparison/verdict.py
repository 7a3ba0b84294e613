"""The conclusions that the seeds allow, in words, at each size of the training data."""

from collections.abc import Sequence
from dataclasses import dataclass

from diffusion_lab.analysis.comparison import fairness, stability
from diffusion_lab.analysis.comparison.groups import Group, of_seeds
from diffusion_lab.analysis.comparison.joint import Joint, joint_model
from diffusion_lab.analysis.comparison.pairs import (
    ENOUGH,
    DataSize,
    Pair,
    by_data_size,
    tested,
)
from diffusion_lab.common.formats import joined
from diffusion_lab.metrics import Quantity
from diffusion_lab.training.protocol import PAIRED

SHOWN = 50  # pairs that are listed one by one; pairs.csv has all
UNSHOWN = 6  # pairs without a shown difference that are listed one by one
NAMED = 3  # compositions that a sentence names; more are counted


@dataclass(frozen=True)
class Verdict:
    """The verdict by one metric: the answer, the pairs, and reservations.

    `by_size` has an answer for each size of the training data, if there are several, and `joint`
    a model of all compositions and seeds for each size where they are complete.
    """

    answer: str
    by_size: tuple[str, ...]
    reservations: tuple[str, ...]
    pairs: tuple[Pair, ...]
    joint: tuple[Joint, ...] = ()

    @property
    def tests(self) -> int:
        """The number of pairs that were tested."""
        return sum(pair.tested is not None for pair in self.pairs)

    @property
    def findings(self) -> list[str]:
        """The sentences on the pairs; pairs without a shown difference are counted if many."""
        others = [pair for pair in self.pairs if not pair.significant]
        said = [pair.finding() for pair in others]
        if len(others) > UNSHOWN:
            title = others[0].metric.title
            said = [f"{len(others)} pairs do not differ significantly in {title}; see pairs.csv"]
        return [*self.significant[:SHOWN], *said]

    @property
    def significant(self) -> list[str]:
        """The sentences on pairs with a significant difference."""
        return [pair.finding() for pair in self.pairs if pair.significant]


def verdicts(
    groups: Sequence[Group],
    metrics: Sequence[Quantity],
    primary: str | None = None,
    test: str = PAIRED,
    seeds: Sequence[int] | None = None,
) -> dict[str, Verdict]:
    """Judges the groups by each metric that a group has; returns the verdicts by its name.

    Holm's correction covers all pairs of all metrics. If a metric was named as the `primary` one
    before the runs, its own pairs are a family by themselves, over `seeds` alone.
    """
    found = {}
    for metric in metrics:
        chosen = groups
        if metric.name == primary and seeds is not None:
            chosen = of_seeds(groups, seeds)
        known = [group for group in chosen if group.values(metric.name)]
        if known:
            found[metric] = chosen, by_data_size(known, metric, test)
    everything = [size for _, sizes in found.values() for size in sizes]
    judged = {}
    for metric, (chosen, sizes) in found.items():
        family = sizes if metric.name == primary else everything
        judged[metric.name] = _verdict(chosen, metric, tested(sizes, family), test)
    return judged


def _verdict(
    groups: Sequence[Group], metric: Quantity, sizes: Sequence[DataSize], test: str
) -> Verdict:
    known = [group for group in groups if group.values(metric.name)]
    missing = [group.name for group in groups if group not in known]
    limits = [f"{metric.title} was not measured for {listed(missing)}"] if missing else []
    if len(known) == 1:
        return Verdict(_alone(known[0], groups, metric), (), tuple(limits), ())
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
    models = (joint_model(size, metric) for size in sizes) if test == PAIRED else ()
    return Verdict(
        _headline(sizes, metric) if several else answers[""],
        tuple(f"At {label}: {answer}" for label, answer in answers.items()) if several else (),
        (*limits, *fairness.reservations(groups), *stability.reservations(groups)),
        tuple(pair for size in sizes for pair in size.pairs),
        tuple(filter(None, models)),
    )


def listed(names: Sequence[str]) -> str:
    """Up to three names, or their number."""
    if len(names) > NAMED:
        return f"{len(names)} compositions"
    return joined(names)


def _untested(size: DataSize, metric: Quantity) -> list[str]:
    """Sentences on the groups of one size of the data that are in no pair, and on their values."""
    paired = {name for pair in size.pairs for name in (pair.ahead.name, pair.behind.name)}
    others = [group for group in size.groups if group.name not in paired]
    if not others:
        return []
    names = listed([group.name for group in others])
    share = "shares" if len(others) == 1 else "share"
    lines = [f"{names} {share} fewer than {ENOUGH} seeds with any other, so it is not tested"]
    if len(others) <= NAMED:
        values = [f"{g.name} {metric.number(g.mean(metric.name))}" for g in others]
        lines.append(f"{metric.title} of one run each: {', '.join(values)}")
    return lines if size.pairs else [*lines, *_nearest(size.groups, metric)]


def _nearest(groups: Sequence[Group], metric: Quantity) -> list[str]:
    """Sentences on the gap between the best group and the nearest one, if nothing was tested."""
    sign = -1 if metric.higher_is_better else 1
    best = min(groups, key=lambda group: sign * group.mean(metric.name))
    gaps = [(abs(g.mean(metric.name) - best.mean(metric.name)), g) for g in groups if g is not best]
    size, nearest = min(gaps, key=lambda found: found[0])
    lines = [f"The gap between {best.name} and {nearest.name} is {metric.gap(size)}"]
    one, other = best.jackknife, nearest.jackknife
    if metric.name == "fid" and one is not None and other is not None:
        lines.append(f"Their jackknife deviations over samples are {one:.3g} and {other:.3g}")
    return [*lines, "Another training seed may change a metric by more than other samples do"]


def _headline(sizes: Sequence[DataSize], metric: Quantity) -> str:
    """One sentence that sums up the answers for all sizes of the data."""
    if all(len(size.groups) == 1 for size in sizes):
        return (
            f"Nothing is tested by {metric.title}: there is only one composition at each of "
            f"{len(sizes)} sizes of the data"
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
    pairs = [pair for size in sizes for pair in size.tested]
    if not pairs:
        same = f"Nothing is tested by {metric.title}: differences are the same in every seed"
        return same if any(size.pairs for size in sizes) else _nothing(metric)
    if not any(pair.significant for pair in pairs):
        return (
            f"No difference is shown at this budget: none of {len(pairs)} pairs on the same data "
            f"differs significantly in {metric.title}"
        )
    said = [f"{name} is best {_places(images)}" for name, images in at.items()]
    said += [f"none is shown to be best {_places(nowhere)}"] if nowhere else []
    depends = " it depends on the size of the data:" if len(at) > 1 else ""
    return f"By {metric.title}{depends} {', '.join(said)}"


def _places(images: Sequence[str]) -> str:
    return f"at {joined(images)} training images"


def _answer(size: DataSize, metric: Quantity) -> str:
    """The answer for the compositions of one size of the data."""
    groups, pairs = size.groups, size.tested
    significant = [pair for pair in pairs if pair.significant]
    if not pairs:
        return f"Nothing is tested: {size.pairs[0]}" if size.pairs else _nothing(metric)
    left = len(groups) * (len(groups) - 1) // 2 - len(pairs)
    rest = f"; {counted(left, 'other pair')} untested" if left else ""
    if not significant:
        if len(pairs) == 1:
            return f"No difference is shown at this budget: {pairs[0]}{rest}"
        gaps = [pair.detectable for pair in pairs]
        return (
            f"No difference is shown at this budget by {len(pairs)} pairs, which have 80 % power "
            f"for {metric.title} gaps of {metric.gap(min(gaps), max(gaps))}{rest}"
        )
    if len(significant) == 1:
        others = len(pairs) - 1
        equal = f"; no difference in {counted(others, 'other pair')}" if others else ""
        return f"{significant[0]}{equal}{rest}"
    if best := size.best(groups):
        beaten = len(groups) - 1
        return f"{best.name} is best by {metric.title}: better than each of the other {beaten}"
    names = {group.name for pair in pairs for group in (pair.ahead, pair.behind)}
    if best := size.best([group for group in groups if group.name in names]):
        unsaid = [group.name for group in groups if group.name not in names]
        return (
            f"{best.name} is better by {metric.title} than each of the other {len(names) - 1} that "
            f"were tested, and nothing is said about {listed(unsaid)}"
        )
    return (
        f"{len(significant)} of {len(pairs)} pairs differ significantly in {metric.title}, but "
        f"none is shown to be better than all others{rest}"
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


def counted(count: int, what: str) -> str:
    """A number with its noun: 2 tests."""
    return f"{count} {what}{'s' if count != 1 else ''}"
