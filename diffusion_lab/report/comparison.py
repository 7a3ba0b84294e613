"""A report on a collection of runs: answers, sentences, tables and figures."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain, product

from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.quantity import TEST_LOSS, VALIDATION_LOSS
from diffusion_lab.report import facts, figures, tests, verdicts, words
from diffusion_lab.report.arms import BETWEEN, trained
from diffusion_lab.report.figures import Drawing
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.scaling import ScaledMetric, scaling
from diffusion_lab.report.tables import TIMES, ArmTable
from diffusion_lab.report.tests import Panel
from diffusion_lab.report.words import Fact

SHOWN = 12  # findings on pairs that are listed one by one; pairs.csv has all
BIASED = 1 / 3  # share of real images in a metric above which its bias is worth a word


def judge(found: Collection, metric: str, way: str | None = None) -> list[Panel]:
    """The panels of a metric by a sampling, by the test and the pairs of the protocol."""
    quantity, study = found.metrics[metric], found.study
    pairs = study.get("contrasts", "all")
    values = found.judged_values(metric, way)
    asked = None if pairs in (None, "all") else asked_about(pairs, values.arm.unique())
    test = study.get("test") or tests.JOINT
    panels = tests.panels(values, quantity, test, asked, found.real(metric))
    by_data = dict([*values.groupby("data")])
    return [
        replace(panel, pairs=tests.beside(panel.pairs, by_data[panel.data])) for panel in panels
    ]


def asked_about(pairs: Iterable[Sequence[str]], arms: Iterable[str]) -> list[tuple[str, str]]:
    """The pairs of arms that contrasts name; with more axes, those of equal values on each."""
    rests: dict[str, list[tuple[str, list[str]]]] = {}  # the arms with a name, without the name
    for arm in arms:
        for name in {arm, *(parts := arm.split(BETWEEN))}:
            rest = [part for part in parts if name not in (part, arm)]
            rests.setdefault(name, []).append((arm, rest))
    both = chain(*(product(rests.get(str(a), []), rests.get(str(b), [])) for a, b in pairs))
    once: dict[frozenset[str], tuple[str, str]] = {}
    for (one, own), (other, rest) in both:
        if own == rest and one != other:
            once.setdefault(frozenset((one, other)), (one, other))
    return [*once.values()]


@dataclass(frozen=True)
class Report:
    """The answers and figures of a comparison; raises UserError if no run has a finite metric.

    `panels` are those of the metric that decides, and `sentences` are on it; `notes` are on the
    whole comparison. `figures` stand above the fold, and those in `folded` below headings.
    """

    found: Collection

    @cached_property
    def panels(self) -> list[Panel]:
        if not self.found.judged:
            raise UserError("none of these runs has a finite value of any metric to compare")
        return judge(self.found, self.found.judged[0].name)

    @cached_property
    def others(self) -> dict[str, list[Panel]]:
        """The panels of the other metrics, with intervals that are not corrected."""
        found, by = self.found, tests.WELCH
        return {
            each.name: tests.panels(
                found.judged_values(each.name), each, by, None, found.real(each.name)
            )
            for each in found.judged[1:]
        }

    @cached_property
    def answers(self) -> dict[str, str]:
        """The answer by each metric, the one that decides first."""
        said = {self.panels[0].metric.name: verdicts.answer(self.panels)}
        for name, own in self.others.items():
            said[name] = "; ".join(f"{_at(panel)}{verdicts.secondary(panel)}" for panel in own)
        return said

    @property
    def answer(self) -> str:
        return next(iter(self.answers.values()))

    @cached_property
    def sentences(self) -> list[str]:
        """How sure the answer is: pairs, other tests, spreads, samplings, laws and conditions."""
        said = [*self._on_tests(), *self._on_spreads()]
        name = self.panels[0].metric.name
        for way in self.found.ways[1:] if name in self.found.resampled else ():
            if again := judge(self.found, name, way):
                said.append(f"With {way}: {verdicts.answer(again)}")
        said += [fact for each in self.scaling for fact in each.facts]
        return [*map(str, said), *map(str, facts.reservations(self.found))]

    @cached_property
    def notes(self) -> list[str]:
        return [*map(str, facts.notes(self.found))]

    @cached_property
    def scaling(self) -> list[ScaledMetric]:
        return scaling(self.found)

    @cached_property
    def uneven(self) -> bool:
        """Whether speeds say nothing of arms, so that no cost in time is shown."""
        return bool(facts.uneven_speeds(trained(self.found.arms)))

    @cached_property
    def table(self) -> ArmTable:
        return ArmTable(self.found, without=TIMES if self.uneven else ())

    @cached_property
    def by_sampling(self) -> list[ArmTable]:
        """A table for each other sampling by which all runs were measured."""
        found = self.found
        without = [kind for kind in self.table.by_run.columns if kind not in found.resampled]
        return [ArmTable(found, without=without, way=way) for way in found.ways[1:]]

    def _on_tests(self) -> Iterator[str | Fact]:
        """Yields the findings on pairs, other tests, and how they were corrected."""
        metric = self.panels[0].metric
        have = {arm for panel in self.panels for arm in panel.arms}
        if missing := [arm.line for arm in self.found.arms if arm.line not in have]:
            yield Fact("unmeasured_arms", metric=metric.title, arms=missing)
        for panel in self.panels:
            at, pairs = _at(panel), panel.pairs
            if panel.data:
                yield f"{at}{verdicts.verdict(panel)}"
            findings = verdicts.findings(panel) if len(panel.tested) > 1 or not panel.data else []
            yield from (f"{at}{each}" for each in findings[:SHOWN])
            yield from (f"{at}{each}" for each in verdicts.disagreements(panel)[:SHOWN])
            few = [arm for arm, runs in panel.means["count"].items() if runs < tests.ENOUGH]
            if few and len(pairs):
                yield Fact("few_runs", arms=few)
            joint = (self.found.study.get("test") or tests.JOINT) == tests.JOINT
            if joint and len(panel.arms) > 2 and (pairs.test == tests.WELCH).any():
                yield f"{at}{Fact('unequal_spread')}"
            if len(panel.tested) > 1:
                name = panel.tested.correction.iloc[0]
                yield f"{at}{Fact('correction', name=name, tests=len(panel.tested))}"

    def _on_spreads(self) -> Iterator[str | Fact]:
        """Yields facts on bias, on what varies, and on the number of runs that a gap needs."""
        metric, kid = self.panels[0].metric, any(each.name == "kid" for each in self.found.judged)
        for panel in self.panels:
            best = float(panel.means["mean"].iloc[0])
            if panel.floor and kid and panel.floor > BIASED * best:
                known = Fact("bias", metric=metric.title, real=panel.floor, value=best)
                yield f"{_at(panel)}{known}"
        ends = self.found.ends()
        own = ends[ends.metric == metric.name]
        if split := tests.variance_split(own):
            training = split[0]
            sampling = split[1] / own.groupby(["arm", "seed"]).size().mean()  # runs have means
            total = training + sampling or 1.0
            yield Fact("variance", training=training / total, sampling=sampling / total)
        for panel in self.panels:
            known = panel.means[panel.means["count"] >= tests.ENOUGH]
            gap = words.GAP_SHARE * abs(float(panel.means["mean"].iloc[0]))
            if len(known) > 1 and gap:
                weights = known["count"] - 1
                std = float(((known["std"] ** 2 * weights).sum() / weights.sum()) ** 0.5)
                needed = {"gap": metric.scale * gap, "seeds": tests.seeds_needed(std, gap)}
                yield f"{_at(panel)}{Fact('seeds_needed', **needed)}"

    @cached_property
    def colours(self) -> dict[str, int]:
        return {arm.line: arm.colour for arm in self.found.arms}

    @cached_property
    def figures(self) -> list[Drawing]:
        """The gaps to the best arm, and every run."""
        metric = self.panels[0].metric.name
        runs = figures.runs(self.panels, self.found.judged_values(metric), self.colours)
        return [*filter(None, [figures.gaps(self.panels, self.colours)]), runs]

    @cached_property
    def folded(self) -> dict[str, list[Drawing]]:
        """The figures along training, against costs, and of tuning."""
        found, metric = self.found, self.panels[0].metric
        # training measures the loss of validation images on the way, and of test images at its end
        on_the_way = VALIDATION_LOSS.name if metric is TEST_LOSS else metric.name
        axes = [axis for axis in figures.AXES if not (self.uneven and axis == "minutes")]
        costs = [cost for cost in figures.COSTS if not (self.uneven and cost in TIMES)]
        means = self.table.by_run.groupby("arm", sort=False).mean()
        tuned = facts.tunings(found.arms)
        grids = [each for each in tuned if not facts.at_random(each[1])]
        random = [each for each in tuned if facts.at_random(each[1])]
        keys = dict.fromkeys(key for _, part in grids for key in part["values"])
        plots: dict[str, list[Drawing | None]] = {
            "Along training": [figures.along(found, metric, on_the_way, axis) for axis in axes],
            "Against cost": [
                figures.pareto(means[[metric.name, cost]].dropna(), metric, found.arms)
                for cost in costs
                if cost in means
            ],
            "Tuning": [
                figures.tuning(key, [each for each in grids if key in each[1]["values"]])
                for key in keys
            ],
            "Search": [figures.searched(random)] if random else [],
        }
        drawn = {title: [*filter(None, several)] for title, several in plots.items()}
        return {title: several for title, several in drawn.items() if several}

    @cached_property
    def laws(self) -> list[Drawing]:
        return [figures.laws(each) for each in self.scaling]


def _at(panel: Panel) -> str:
    return f"At {panel.data} training images: " if panel.data else ""
