"""The comparison as one self-contained HTML file, made of page.html, page.css and page.js."""

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.data_sizes import DataLine
from diffusion_lab.analysis.comparison.drawings import ON_THE_WAY
from diffusion_lab.analysis.comparison.fairness import machine
from diffusion_lab.analysis.comparison.groups import Group, runs_of
from diffusion_lab.analysis.comparison.other_samplings import OtherSampling
from diffusion_lab.analysis.comparison.pictures import OF_EACH, Samples, grid_noise
from diffusion_lab.analysis.comparison.sampling_table import SamplingTable
from diffusion_lab.analysis.comparison.scaling_section import Scaling
from diffusion_lab.analysis.comparison.svg import COLOURS, MARKERS, Drawing, marker
from diffusion_lab.analysis.comparison.table import NONE, CompositionTable
from diffusion_lab.analysis.comparison.tuning import distinct
from diffusion_lab.analysis.comparison.verdict import SHOWN, Verdict, counted
from diffusion_lab.build.config_keys import CLASS
from diffusion_lab.metrics import Quantity
from diffusion_lab.training.protocol import TESTS

PARTS = Path(__file__).parent
GENERATOR = "diffusion-lab compare"  # marks a page that `compare` wrote


@dataclass(frozen=True)
class Judged:
    """Everything that the page shows about one metric."""

    metric: Quantity
    verdict: Verdict
    by_seed: Drawing
    along: list[Drawing]  # empty if nothing was measured in training
    fronts: list[Drawing]
    lines: list[DataLine]  # empty, as are the next two, if all runs have the same data
    over_data: Drawing | None
    crossed: list[str]

    @property
    def drawings(self) -> list[Drawing]:
        """All plots of the metric."""
        over = [self.over_data] if self.over_data else []
        return [self.by_seed, *self.along, *self.fronts, *over]

    @property
    def sentences(self) -> list[str]:
        """The sentences below the answer."""
        said = self.verdict
        joint = map(str, said.joint)
        return [*said.by_size, *self.crossed, *said.findings, *joint, *said.reservations]


@dataclass(frozen=True)
class Report:
    """The content of the page; `notes` are sentences on the whole comparison."""

    groups: Sequence[Group]
    judged: Sequence[Judged]
    samples: Sequence[Samples]
    setting: str
    names: Mapping[str, str]  # the metrics' full names by short ones
    notes: Sequence[str]
    left_out: Sequence[str]
    tuning: Sequence[Drawing] = ()
    scaling: Scaling | None = None  # None without a family of sizes
    others: Sequence[OtherSampling] = ()

    @property
    def sentences(self) -> list[str]:
        """The sentences below the first answer: on its metric, other samplings and scaling."""
        laws = self.scaling.sentences if self.scaling else []
        return [*self.judged[0].sentences, *(other.sentence for other in self.others), *laws]

    @cached_property
    def table(self) -> CompositionTable:
        """The table of compositions."""
        return CompositionTable(self.groups, self.names)

    @cached_property
    def samplings(self) -> SamplingTable | None:
        """The table by sampling; None if there is no other sampling."""
        return SamplingTable(self.groups, self.others) if self.others else None


def render(report: Report) -> str:
    """Renders the page as HTML text."""
    groups = report.groups
    runs = runs_of(groups)
    base = os.path.commonpath([os.path.abspath(run.folder.parent) for run in runs])
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
        generator=GENERATOR,
        style=(PARTS / "page.css").read_text(),
        script=(PARTS / "page.js").read_text(),
        colours=len(COLOURS),
        shape=lambda look: MARKERS[marker(look)],
        shown=SHOWN,
        tests=TESTS,
        on_the_way=ON_THE_WAY,
        none_known=NONE,
        compositions=report.table,
        tuned=[each.group for each in distinct(groups)] if report.tuning else [],
        any_plots=any(each.along or each.fronts for each in report.judged),
        alike=len(noises) == 1 and None not in noises,
        of_each=OF_EACH,
        settings={
            key: [said(group.settings, key) for group in groups] for key in groups[0].settings
        },
        runs_folder=os.path.relpath(base),
        place=lambda run: os.path.relpath(run.folder, base),
        machines=machines(runs),
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


def machines(trained: Sequence[Run]) -> list[str]:
    """A line for each machine, torch version and commit, with its number of runs."""
    counts = Counter(
        f"{machine(run)}, torch {run.summary.get('versions', {}).get('torch', '?')}, "
        f"commit {(run.summary.get('git_commit') or 'unknown')[:9]}"
        for run in trained
    )
    return [f"{counted(count, 'run')}: {text}" for text, count in counts.items()]
