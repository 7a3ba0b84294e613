"""A comparison: from run folders to a folder with a page, tables and figures."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from diffusion_lab.common.files import require_own, write_atomically
from diffusion_lab.common.formats import literal
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.metrics.quantity import TEST_LOSS, VALIDATION_LOSS
from diffusion_lab.report import facts, figures, page, tests, verdicts, words
from diffusion_lab.report.arms import trained
from diffusion_lab.report.frame import Collection, collect
from diffusion_lab.report.page import Report, samples
from diffusion_lab.report.scaling import scaling, scaling_csv
from diffusion_lab.report.tables import TIMES, ArmTable, pairs_csv
from diffusion_lab.report.tests import Panel
from diffusion_lab.report.words import Fact

PLOTS = "plots"
SHOWN = 12  # findings on pairs that are listed one by one; pairs.csv has all


def compare(paths: Sequence[str], output: str) -> dict[str, object]:
    """Compares the run folders at or below `paths`; writes the folder `output`.

    Raises UserError, before anything is written, if there is no run, if the runs were measured in
    different ways, or if `output` contains other files.
    """
    folder = Path(output)
    require_own(folder, page.is_ours)
    found = collect(paths)
    report = drawn(answered(found))
    write(folder, report)
    left_out = [str(fact) for fact in found.left_out]
    for sentence in (*left_out, f"{next(iter(report.answers.values()))}."):
        say(sentence)
    for sentence in report.sentences:
        say(f"  {sentence}.")
    say(f"Page, tables and figures: {folder / 'index.html'}")
    return {
        "folder": str(folder),
        "verdict": dict(report.answers),
        "compositions": {arm.name: [str(run.folder) for run in arm.runs] for arm in found.arms},
        "left_out": left_out,
    }


def answered(found: Collection) -> Report:
    """Judges the arms of a collection; raises UserError if no run has a finite metric."""
    if not found.judged:
        raise UserError("none of these runs has a finite value of any metric to compare")
    panels = judge(found, found.judged[0].name)
    # other metrics have intervals without correction
    others = {
        metric.name: tests.panels(
            found.judged_values(metric.name), metric, tests.WELCH, None, found.real(metric.name)
        )
        for metric in found.judged[1:]
    }
    answer = verdicts.at_sizes(panels) if len(panels) > 1 else verdicts.verdict(panels[0])
    secondary = {
        name: "; ".join(f"{_at(panel)}{verdicts.secondary(panel)}" for panel in own)
        for name, own in others.items()
    }
    scaled = scaling(found)
    said = [*_sentences(found, panels), *(fact for each in scaled for fact in each.facts)]
    uneven = facts.uneven_speeds(trained(found.arms))
    return Report(
        found,
        ArmTable(found, without=TIMES if uneven else ()),
        panels,
        others,
        {found.judged[0].name: answer, **secondary},
        [*map(str, said), *map(str, facts.reservations(found))],
        [*map(str, facts.notes(found))],
        scaled,
    )


def drawn(report: Report) -> Report:
    """The report with its figures and samples."""
    return replace(
        report,
        figures=[*_first_figures(report.found, report.panels)],
        folded=_folded(report.found, report.panels, report.others),
        laws=[figures.laws(each) for each in report.scaling],
        samples=samples(report.found.arms),
    )


def judge(found: Collection, metric: str, way: str | None = None) -> list[Panel]:
    """The panels of a metric by a sampling, by the test and the pairs of the protocol."""
    quantity, study = found.metrics[metric], found.study
    pairs = study.get("contrasts", "all")
    asked = None if pairs in (None, "all") else [(str(a), str(b)) for a, b in pairs]
    test = study.get("test") or tests.JOINT
    values = found.judged_values(metric, way)
    panels = tests.panels(values, quantity, test, asked, found.real(metric))
    by_data = dict([*values.groupby("data")])
    return [
        replace(panel, pairs=tests.beside(panel.pairs, by_data[panel.data])) for panel in panels
    ]


def _at(panel: Panel) -> str:
    return f"At {panel.data} training images: " if panel.data else ""


def _sentences(found: Collection, panels: Sequence[Panel]) -> Iterator[str | Fact]:
    """Yields what is said below the answer: on pairs, other tests, spreads and other samplings."""
    metric = panels[0].metric
    have = {arm for panel in panels for arm in panel.arms}
    if missing := [arm.line for arm in found.arms if arm.line not in have]:
        yield Fact("unmeasured_arms", metric=metric.title, arms=missing)
    for panel in panels:
        at, pairs = _at(panel), panel.pairs
        if panel.data:
            yield f"{at}{verdicts.verdict(panel)}"
        findings = verdicts.findings(panel) if len(panel.tested) > 1 or not panel.data else []
        yield from (f"{at}{each}" for each in findings[:SHOWN])
        yield from (f"{at}{each}" for each in verdicts.disagreements(panel)[:SHOWN])
        few = [arm for arm, runs in panel.means["count"].items() if runs < tests.ENOUGH]
        if few and len(pairs):
            yield Fact("few_runs", arms=few)
        joint = (found.study.get("test") or tests.JOINT) == tests.JOINT
        if joint and len(panel.arms) > 2 and (pairs.test == tests.WELCH).any():
            yield f"{at}{Fact('unequal_spread')}"
        if len(panel.tested) > 1:
            name = panel.tested.correction.iloc[0]
            yield f"{at}{Fact('correction', name=name, tests=len(panel.tested))}"
    yield from _of_spreads(found, panels[0])
    for way in found.ways[1:]:
        again = judge(found, metric.name, way)
        if again:
            said = verdicts.at_sizes(again) if len(again) > 1 else verdicts.verdict(again[0])
            yield f"With {way}: {said}"


def _of_spreads(found: Collection, panel: Panel) -> Iterator[Fact]:
    """Yields facts on bias, on what varies, and on the number of runs that a gap of 5 % needs."""
    metric, best = panel.metric, float(panel.means["mean"].iloc[0])
    if panel.floor and "kid" in found.metrics and panel.floor > facts.BIASED * best:
        yield Fact("bias", metric=metric.title, real=panel.floor, value=best)
    ends = found.ends()
    if split := tests.variance_split(ends[ends.metric == metric.name]):
        total = sum(split) or 1.0
        yield Fact("variance", training=split[0] / total, sampling=split[1] / total)
    known = panel.means[panel.means["count"] >= tests.ENOUGH]
    gap = words.GAP_SHARE * abs(best)
    if len(known) > 1 and gap:
        weights = known["count"] - 1
        std = float(((known["std"] ** 2 * weights).sum() / weights.sum()) ** 0.5)
        needed = tests.seeds_needed(std, gap)
        kind = "seeds_needed" if needed else "many_seeds_needed"
        scale = metric.scale
        yield Fact(kind, share=words.GAP_SHARE, gap=scale * gap, seeds=needed)


def _first_figures(found: Collection, panels: Sequence[Panel]) -> Iterator[figures.Drawing]:
    """Yields the figures above the fold: the gaps to the best arm, and every run."""
    colours = {arm.line: arm.colour for arm in found.arms}
    if drawn := figures.gaps(panels, colours):
        yield drawn
    yield figures.runs(panels, found.judged_values(panels[0].metric.name), colours)


def _folded(
    found: Collection, panels: Sequence[Panel], others: Mapping[str, Sequence[Panel]]
) -> dict[str, list[figures.Drawing]]:
    """The figures below headings: along training, against costs, tuning, and other metrics."""
    uneven = facts.uneven_speeds(trained(found.arms))
    metric, ends, colours = panels[0].metric, found.ends(), {a.line: a.colour for a in found.arms}
    frame = found.frame[found.frame.sampling.isin(["", found.ways[0]])]
    # training measures the loss of validation images on the way, and of test images at its end
    name = VALIDATION_LOSS.name if metric is TEST_LOSS else metric.name
    plots: dict[str, list[figures.Drawing]]
    plots = {"Along training": [], "Against cost": [], "Tuning": [], "Other metrics": []}
    for axis in figures.AXES:
        if not (uneven and axis == "minutes"):
            line = figures.along(frame, metric, name, found.arms, axis)
            plots["Along training"] += [line] if line else []
    means = ends.groupby(["metric", "arm"]).value.mean()
    for cost in figures.COSTS:
        if cost in means and not (uneven and cost in TIMES):
            points = (means[metric.name].to_dict(), means[cost].to_dict())
            line = figures.pareto(*points, metric, cost, found.arms)
            plots["Against cost"] += [line] if line else []
    tuned = facts.distinct(found.arms)
    for key in dict.fromkeys(key for each in tuned for key in each.facts["values"]):
        with_key = [each for each in tuned if key in each.facts["values"]]
        plots["Tuning"].append(figures.tuning(key, with_key))
    for other, own in others.items():
        plots["Other metrics"].append(figures.runs(own, found.judged_values(other), colours))
    return {title: several for title, several in plots.items() if several}


def write(folder: Path, report: Report) -> None:
    """Writes every file, and deletes the figures of an earlier comparison.

    The page is the first, as it marks the folder as one that a later comparison may replace.
    """
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / "index.html", page.render(report))
    (folder / PLOTS).mkdir(exist_ok=True)
    plots = {f"{drawing.name}.svg": drawing.file for drawing in report.drawings}
    kinds = ("tuning", *report.found.metrics, VALIDATION_LOSS.name)
    for old in (folder / PLOTS).glob("*.svg"):
        if old.name not in plots and old.name.startswith(kinds):
            old.unlink()
    others = [panel for several in report.others.values() for panel in several]
    files = {
        "table.md": in_markdown(report),
        "table.csv": report.table.csv(),
        "table.tex": report.table.latex(),
        "runs.csv": report.table.runs_csv(),
        "pairs.csv": pairs_csv(report.panels, others),
        "samplings.csv": report.sampled.csv() if report.sampled else None,
        "scaling.csv": scaling_csv(report.scaling) if report.scaling else None,
        **{f"{PLOTS}/{name}": drawing for name, drawing in plots.items()},
    }
    for name, content in files.items():
        if content is None:  # not in this comparison, but maybe in an earlier one
            (folder / name).unlink(missing_ok=True)
        else:
            write_atomically(folder / name, content)


def in_markdown(report: Report) -> str:
    """The table and every sentence."""
    said = [*report.sentences, *report.notes, *map(str, report.found.left_out)]
    answer, *_ = report.answers.values()
    head = f"{literal(facts.setting(report.found))}\n\n"
    if question := report.found.study.get("question"):
        head = f"**{literal(question)}**\n\n{head}"
    text = f"{head}{report.table.markdown()}\n{literal(answer)}.\n"
    text += f"\n{report.sampled.markdown()}" if report.sampled else ""
    return text + "".join(f"\n* {literal(sentence).rstrip('.')}." for sentence in said) + "\n"
