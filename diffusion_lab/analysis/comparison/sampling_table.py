"""The table of compositions by sampling: every judged metric of samples, for people and as CSV."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from diffusion_lab.analysis.comparison.groups import Group, runs_of
from diffusion_lab.analysis.comparison.measurements import judged_by
from diffusion_lab.analysis.comparison.other_samplings import OtherSampling
from diffusion_lab.analysis.comparison.table import Cell, Column, column_of
from diffusion_lab.common.formats import csv_text, literal_table
from diffusion_lab.metrics.metric import REAL
from diffusion_lab.metrics.quantities import TEST_LOSS


@dataclass(frozen=True)
class SamplingTable:
    """The metrics of `groups` and of the same groups by `others`; a group's rows are adjacent."""

    groups: Sequence[Group]
    others: Sequence[OtherSampling]

    @cached_property
    def by_label(self) -> dict[str, Sequence[Group]]:
        """The groups by the settings of each sampling, the one that is compared first."""
        compared = " ".join(dict.fromkeys(other.compared for other in self.others))
        return {compared: self.groups, **{other.label: other.groups for other in self.others}}

    @cached_property
    def columns(self) -> list[Column]:
        """The judged metrics that some group has by another sampling; losses have none."""
        drawn = [group for other in self.others for group in other.groups]
        metrics = (each for each in judged_by(runs_of(self.groups)) if each is not TEST_LOSS)
        return [column_of(m) for m in metrics if any(group.values(m.name) for group in drawn)]

    @property
    def head(self) -> list[str]:
        return ["composition", "sampling", *(column.title for column in self.columns)]

    @property
    def rows(self) -> Iterator[tuple[Group, str, list[Cell]]]:
        """Yields each group with the settings of a sampling, and its cells."""
        for label, group in self._rows():
            yield group, label, [column.mean(group) for column in self.columns]

    def markdown(self) -> str:
        """The table for a README."""
        return literal_table(self.head, ([g.name, label, *cells] for g, label, cells in self.rows))

    def csv(self) -> str:
        """A row for each run by each sampling, with values of real images, without rounding."""
        kinds = [f"{column.kind}{end}" for column in self.columns for end in ("", REAL)]
        rows = (
            [group.name, label, run.seed, *map(run.values.get, kinds)]
            for label, group in self._rows()
            for run in group.runs
        )
        return csv_text(["composition", "sampling", "seed", *kinds], rows)

    def _rows(self) -> Iterator[tuple[str, Group]]:
        for place in range(len(self.groups)):
            yield from ((label, groups[place]) for label, groups in self.by_label.items())
