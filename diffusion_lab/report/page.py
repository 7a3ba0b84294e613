"""The comparison as one self-contained HTML file, made of page.html, page.css and page.js."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion_lab.build.config_keys import CLASS
from diffusion_lab.report import words
from diffusion_lab.report.facts import machine, setting
from diffusion_lab.report.figures import COLOURS, MARKERS, Drawing, marker
from diffusion_lab.report.frame import Collection
from diffusion_lab.report.pictures import OF_EACH, Samples, grid_noise
from diffusion_lab.report.records import Run
from diffusion_lab.report.scaling import ScaledMetric
from diffusion_lab.report.tables import NONE, ArmTable, Column, SamplingTable
from diffusion_lab.report.tests import Panel

PARTS = Path(__file__).parent
GENERATOR = "diffusion-lab compare"  # marks a page that `compare` wrote
HEADLINE = ("fid", "kid", "classifier_fid", "accuracy", "recall", "copy_ratio", "test_loss")
MAIN = 6  # most columns of numbers in the first table
AGREES, DISAGREES, NO_GAP = "agrees", "disagrees", "no gap shown"


@dataclass(frozen=True)
class Report:
    """The content of a page. The first of `answers` is by the metric that decides, `panels` too.

    `sentences` are on that metric, `notes` on the whole comparison. `figures` stand above the
    fold, and the others below headings.
    """

    found: Collection
    table: ArmTable
    panels: Sequence[Panel]
    others: Mapping[str, Sequence[Panel]]  # by metric
    answers: Mapping[str, str]  # by metric
    sentences: Sequence[str]
    notes: Sequence[str]
    scaling: Sequence[ScaledMetric]
    figures: Sequence[Drawing] = ()
    folded: Mapping[str, Sequence[Drawing]] = field(default_factory=dict)
    laws: Sequence[Drawing] = ()
    samples: Sequence[Samples] = ()

    @cached_property
    def sampled(self) -> SamplingTable | None:
        """The table by sampling; None if there is no other sampling."""
        return SamplingTable(self.found) if len(self.found.ways) > 1 else None

    @property
    def title(self) -> str:
        arms = len(self.found.arms)
        return self.found.study.get("question") or f"Comparison of {arms} arms"

    @property
    def drawings(self) -> list[Drawing]:
        """All figures."""
        rest = [each for several in self.folded.values() for each in several]
        return [*self.figures, *rest, *self.laws]

    @property
    def by_size(self) -> list[str]:
        """The answer at each size of the data."""
        return [f"At {each.data} training images: {words.verdict(each)}" for each in self.panels]

    @property
    def main(self) -> list[Column]:
        """The columns of the first table: the metric that decides, then others that people read."""
        decides = self.panels[0].metric.name
        order = list(dict.fromkeys((decides, *HEADLINE, *self.others)))
        known = {column.kind: column for column in self.table.columns}
        several = len({arm.data for arm in self.found.arms}) > 1
        kinds = [*(["training_images"] if several else ["parameters"]), *order]
        return [known[kind] for kind in kinds if kind in known][:MAIN]

    @property
    def strip(self) -> list[tuple[str, list[tuple[str, str, str]]]]:
        """What each other metric says of the best arm beside each other one, by its interval."""
        return [
            (panels[0].metric.title, [each for panel in panels for each in self._beside(panel)])
            for panels in self.others.values()
        ]

    def _beside(self, panel: Panel) -> list[tuple[str, str, str]]:
        ours = next((each for each in self.panels if each.data == panel.data), None)
        if ours is None or ours.arms[0] not in panel.arms:
            return []
        best, cells = ours.arms[0], []
        for pair in panel.tested.itertuples():
            if best in (pair.ahead, pair.behind):
                other = pair.behind if pair.ahead == best else pair.ahead
                shown = pair.low * pair.high > 0
                says = NO_GAP if not shown else AGREES if pair.ahead == best else DISAGREES
                cells.append((other, says, words.interval(panel.metric, pair)))
        return cells


def matrix(panel: Panel) -> list[list[Any]]:
    """The pair of each row's arm and each column's, or None, in the order of the means."""
    known = {(pair.ahead, pair.behind): pair for pair in panel.tested.itertuples()}
    both = known | {(behind, ahead): pair for (ahead, behind), pair in known.items()}
    return [[both.get((a, b)) for b in panel.arms] for a in panel.arms]


def render(report: Report) -> str:
    """Renders the page as HTML text."""
    found = report.found
    base = os.path.commonpath([os.path.abspath(run.folder.parent) for run in found.runs])
    # a single known value means that all grids have the same noise at each place
    noises = {grid_noise(each.run) for each in report.samples}
    page = Environment(
        loader=FileSystemLoader(PARTS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return page.get_template("page.html").render(
        report=report,
        arms=found.arms,
        generator=GENERATOR,
        style=(PARTS / "page.css").read_text(),
        script=(PARTS / "page.js").read_text(),
        colours={arm.line: arm.colour for arm in found.arms},
        palette=len(COLOURS),
        shape=lambda place: MARKERS[marker(place)],
        words=words,
        matrix=matrix,
        none_known=NONE,
        setting=setting(found),
        alike=len(noises) == 1 and None not in noises,
        of_each=OF_EACH,
        settings={
            key: [said(arm.settings, key) for arm in found.arms] for key in found.arms[0].settings
        },
        runs_folder=os.path.relpath(base),
        place=lambda run: os.path.relpath(run.folder, base),
        machines=machines(found.runs),
    )


def is_ours(folder: Path) -> bool:
    """Whether a folder holds a comparison."""
    page = folder / "index.html"
    return page.is_file() and f'content="{GENERATOR}"' in page.read_text(errors="replace")[:2000]


def said(settings: Mapping[str, object], key: str) -> str:
    """The value of a setting as text, a class without its module."""
    value = settings.get(key)
    if value is None:
        return NONE
    return str(value).rpartition(".")[2] if key.endswith(CLASS) else str(value)


def machines(runs: Sequence[Run]) -> list[str]:
    """A line for each machine, torch version and commit, with its number of runs."""
    counts = Counter(
        f"{machine(run)}, torch {run.summary.get('versions', {}).get('torch', '?')}, "
        f"commit {(run.summary.get('git_commit') or 'unknown')[:9]}"
        for run in runs
    )
    return [f"{count} runs: {text}" for text, count in counts.items()]
