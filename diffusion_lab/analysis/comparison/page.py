"""The comparison as one HTML file that needs nothing else, of page.html, page.css and page.js."""

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from diffusion_lab.analysis.comparison import page_tables
from diffusion_lab.analysis.comparison.data_sizes import DataLine
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.markup import details, glyph, listed, section
from diffusion_lab.analysis.comparison.pictures import OF_EACH, Samples, grid_noise
from diffusion_lab.analysis.comparison.svg import Drawing
from diffusion_lab.analysis.comparison.verdict import SHOWN, Verdict
from diffusion_lab.metrics import Quantity

PARTS = Path(__file__).parent
CORRECTED = "Holm's correction covers all pairs of one metric"
SEVERAL = "Several metrics are looked at, and no correction covers that"
GENERATOR = "diffusion-lab compare"  # by which a page is known as one of ours


@dataclass(frozen=True)
class Judged:
    """What the page shows of one metric."""

    metric: Quantity
    verdict: Verdict
    by_seed: Drawing
    along: list[Drawing]  # empty where nothing was measured in training
    fronts: list[Drawing]
    lines: list[DataLine]  # empty where all runs have the same data, as are the next
    over_data: Drawing | None
    crossed: list[str]


@dataclass(frozen=True)
class Report:
    """All that the page says; `notes` are sentences on the whole."""

    groups: Sequence[Group]
    judged: Sequence[Judged]
    samples: Sequence[Samples]
    setting: str
    notes: Sequence[str]
    left_out: Sequence[str]


def render(report: Report) -> str:
    """The HTML file."""
    sections = [
        _verdicts(report),
        page_tables.compositions(report.groups),
        _plots(report),
        _samples(report),
        page_tables.settings(report.groups),
        page_tables.runs(report.groups),
        _left_out(report),
    ]
    count = len(report.groups)
    title = f"Comparison of {count} compositions" if count > 1 else "Comparison of runs"
    page = Template((PARTS / "page.html").read_text())
    return page.substitute(
        generator=GENERATOR,
        title=title,
        setting=escape(report.setting),
        style=(PARTS / "page.css").read_text(),
        script=(PARTS / "page.js").read_text(),
        metrics=_choice(report.judged),
        body="\n".join(filter(None, sections)),
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    page = folder / "index.html"
    return page.is_file() and f'content="{GENERATOR}"' in page.read_text(errors="replace")[:2000]


def _choice(judged: Sequence[Judged]) -> str:
    return "".join(
        f'<label><input type="radio" name="metric" value="{each.metric.name}"'
        f"{' checked' if place == 0 else ''}><span>{escape(each.metric.title)}</span></label>"
        for place, each in enumerate(judged)
    )


def _of_metric(metric: Quantity, content: str) -> str:
    return f'<div data-metric="{metric.name}">{content}</div>'


def _verdicts(report: Report) -> str:
    parts = []
    tests = []  # of each metric
    for each in report.judged:
        verdict, metric = each.verdict, each.metric
        tests.append(sum(pair.tested is not None for pair in verdict.pairs))
        content = f'<p class="answer">{escape(verdict.answer)}.</p>'
        content += listed(verdict.by_size) + _over_data(each)
        apart = [
            f for f, pair in zip(verdict.findings, verdict.pairs, strict=True) if pair.told_apart
        ]
        if len(apart) > 1:
            shown = listed(apart[:SHOWN])
            content += details("Pairs that are told apart", shown) if verdict.by_size else shown
        content += listed(verdict.reservations, "muted")
        content += _figure(each.by_seed)
        if verdict.pairs:
            content += page_tables.pairs(metric, verdict.pairs)
        parts.append(_of_metric(metric, content))
    said = [CORRECTED] * (max(tests) > 1) + [SEVERAL] * (sum(map(bool, tests)) > 1)
    said += report.notes
    return section("verdict", "Verdict", "".join(parts) + listed(said, "muted"))


def _over_data(judged: Judged) -> str:
    """Where the lines of compositions over the size of the data cross."""
    if judged.over_data is None:
        return ""
    plot = f'<div class="plots">{_figure(judged.over_data)}</div>'
    return listed(judged.crossed) + _legend(judged.lines) + plot


def _figure(drawing: Drawing) -> str:
    label = escape(drawing.title)
    scroll = f'<div class="scroll" role="group" aria-label="{label}" tabindex="0">'
    return f'<figure class="plot">{scroll}{drawing.inline}</div></figure>'


def _legend(named: Sequence[Group | DataLine]) -> str:
    items = "".join(f"<li>{glyph(each.look)}{escape(each.name)}</li>" for each in named)
    return f'<ul class="legend" aria-label="Marks in the plots">{items}</ul>'


def _plots(report: Report) -> str:
    parts = []
    for each in report.judged:
        blocks = [
            ("Along training", each.along, ""),
            ("Against cost", each.fronts, "The line joins what nothing cheaper betters."),
        ]
        content = "".join(
            f"<h3>{title}</h3>"
            + (f'<p class="intro">{intro}</p>' if intro else "")
            + f'<div class="plots">{"".join(map(_figure, drawings))}</div>'
            for title, drawings, intro in blocks
            if drawings
        )
        if content:
            parts.append(_of_metric(each.metric, content))
    if not parts:
        return ""
    return section("plots", "Plots", _legend(report.groups) + "".join(parts))


def _samples(report: Report) -> str:
    if not report.samples:
        return ""
    noises = {grid_noise(each.member) for each in report.samples}
    alike = len(noises) == 1 and None not in noises
    rows, grids = [], []
    for each in report.samples:
        of = f"{each.group.name}, training seed {each.member.run.seed}"
        name = f"{glyph(each.group.look)}{escape(each.group.name)}"
        if each.strip:
            alt = f"Samples of {of}: the first {OF_EACH} of each row of its grid"
            rows.append(
                f'<figure><figcaption>{name}</figcaption><img src="{each.strip}" '
                f'alt="{escape(alt)}" loading="lazy"></figure>'
            )
        grids.append(
            f'<figure><img src="{each.grid}" alt="{escape(f"Sample grid of {of}")}" loading="lazy">'
            f'<figcaption>{name} <span class="pm">seed {each.member.run.seed}</span></figcaption>'
            "</figure>"
        )
    intro = "The runs' own grids, drawn at their end, a class a row where there are classes."
    if alike:
        intro += " Each place has the same class and the same noise in all of them."
    content = ""
    if rows:
        content = (
            '<div class="scroll strips" role="region" aria-label="Samples of each class" '
            f'tabindex="0">{"".join(rows)}</div>'
        )
    whole = f'<div class="grids">{"".join(grids)}</div>'
    content += details("Whole grids", whole) if rows else whole
    return section("samples", "Samples", content, intro)


def _left_out(report: Report) -> str:
    if not report.left_out:
        return ""
    return section("left-out", "Left out", listed(report.left_out))
