"""A W&B workspace and a report that compare runs, in panels of the names that runs log.

Both are built without a server; saving them needs one. Needs the package wandb-workspaces.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws

from diffusion_lab.analysis.wandb_runs import GROUPS
from diffusion_lab.metrics.quantity import QUANTITIES, REAL
from diffusion_lab.runs import log_names

DISTANCES = [q for q in QUANTITIES if q.name in ("fid", "kid")]
# measured on their own number of images
COVERAGE = [q for q in QUANTITIES if q.name in ("precision", "recall", "density", "coverage")]
TITLE = "Diffusion models compared"


@dataclass(frozen=True)
class Dashboard:
    """A comparison of the runs of a project, or of one W&B group of it.

    `protocol` is the protocol in the metrics' names: efficientnet_lite0-96/train60k-5k.
    `group_by` has the keys of a run's configuration by which runs are grouped, by their names in
    titles. Bars and curves are means over the runs with the same values, with the range from the
    lowest to the highest.
    """

    project: str
    protocol: str
    group_by: Mapping[str, str]
    group: str | None

    @property
    def title(self) -> str:
        """The title of the workspace and of the report."""
        return f"{TITLE} by {' and '.join(self.group_by)}"

    @property
    def fid(self) -> str:
        """The full name of FID, with the protocol."""
        return f"fid/{self.protocol}"

    @property
    def grouped(self) -> dict[str, Any]:
        """The arguments that average the curves and bars of runs with the same values."""
        averaged: dict[str, Any] = {"groupby_aggfunc": "mean", "groupby_rangefunc": "minmax"}
        if len(self.group_by) > 1:  # a panel takes one key; without it, those of the table of runs
            return averaged
        (key,) = self.group_by.values()
        return averaged | {"groupby": wr.Config(key)}

    def sections(self) -> dict[str, list]:
        """The panels of each section, by the section's title."""
        column = wr.ParallelCoordinatesPlotColumn
        shown = {group: f"choices.{group}" for group in GROUPS} | dict(self.group_by)
        columns = [column(wr.Config(key), name) for name, key in shown.items()]
        columns.append(column(wr.SummaryMetric(self.fid), "FID"))
        return {
            "Generated images": self._generated(),
            "Samples": [
                self._pictures("The same samples in training", "samples"),
                self._pictures("Samples out of noise", "denoising"),
                wr.WeavePanelSummaryTable(table_name=log_names.SAMPLES),
            ],
            "Validation and test images": [
                self._curve("Loss", "val/loss"),
                self._curve("Loss by time", "val/loss", x=log_names.SECONDS),
                self._curve("Loss by noise level", regex="^val_by_level/"),
                wr.BarPlot(title="Loss of test images", metrics=["test/loss"], **self.grouped),
            ],
            "Training": [
                self._curve("Loss", "train/loss"),
                self._curve("Loss by noise level", regex="^train_by_level/"),
                self._curve("Gradient norm", "train/grad_norm", "train/grad_norm_max"),
                self._curve("Learning rate", "train/lr"),
                self._curve("Images per second", "train/images_per_second"),
            ],
            "Cost": [
                self._fid_against("parameters", "FID by parameters"),
                self._fid_against("training_seconds", "FID by time"),
            ],
            "Configurations": [
                wr.ParallelCoordinatesPlot(title="Options and FID", columns=columns),
                wr.RunComparer(diff_only="split"),
            ],
            "Autoencoders": [
                self._curve("PSNR", "val/psnr"),
                self._curve("SSIM", "val/ssim"),
                self._pictures("Images and their reconstructions", "reconstructions"),
            ],
        }

    def _generated(self) -> list:
        """FID and KID with their values for real images, and the metrics by nearest neighbours."""
        panels: list[Any] = [self._curve("FID by time", self.fid, x=log_names.SECONDS)]
        for quantity in DISTANCES:
            name, real = (f"{quantity.name}{end}/{self.protocol}" for end in ("", REAL))
            panels.append(wr.BarPlot(title=quantity.title, metrics=[name], **self.grouped))
            panels.append(
                self._curve(f"{quantity.title} of samples and of real images", name, real)
            )
        names = "|".join(quantity.name for quantity in COVERAGE)
        titles = ", ".join(quantity.title for quantity in COVERAGE)
        return [*panels, self._curve(titles, regex=f"^({names})/")]

    def workspace(self, entity: str) -> ws.Workspace:
        """The workspace, a view of the project that W&B saves."""
        sections = [
            ws.Section(name=title, panels=panels, is_open=True)
            for title, panels in self.sections().items()
        ]
        return ws.Workspace(
            entity=entity,
            project=self.project,
            name=self.title,
            sections=sections,
            settings=ws.WorkspaceSettings(x_axis=log_names.IMAGES),
            runset_settings=ws.RunsetSettings(
                groupby=[ws.Config(key) for key in self.group_by.values()], filters=self.filters
            ),
        )

    def report(self, entity: str) -> wr.Report:
        """A report with a section of panels under each heading."""
        runs = wr.Runset(
            entity=entity,
            project=self.project,
            name=f"by {' and '.join(self.group_by)}",
            groupby=[f"config.{key}" for key in self.group_by.values()],
            filters=self.filters,
        )
        blocks: list[Any] = [wr.TableOfContents()]
        for title, panels in self.sections().items():
            blocks += [wr.H1(title), wr.PanelGrid(runsets=[runs], panels=panels)]
        return wr.Report(
            entity=entity,
            project=self.project,
            title=self.title,
            description=f"Metrics by protocol {self.protocol}; lower is better for FID and KID.",
            blocks=blocks,
            width="fluid",
        )

    @property
    def filters(self) -> ws.And | str:
        """The filter for the runs of the W&B group, if there is one."""
        return ws.And(ws.Metric("Group") == self.group) if self.group else ""

    def _curve(
        self, title: str, *y: str, x: str = log_names.IMAGES, regex: str | None = None
    ) -> wr.LinePlot:
        axis: dict[str, Any] = {"x": x, "title_x": log_names.AXES[x]}
        return wr.LinePlot(title=title, y=list(y), metric_regex=regex, **axis, **self.grouped)

    def _pictures(self, title: str, name: str) -> wr.MediaBrowser:
        keys = [f"{log_names.GRIDS}/{name}"]
        return wr.MediaBrowser(title=title, media_keys=keys, gallery_axis="step")

    def _fid_against(self, cost: str, title: str) -> wr.ScatterPlot:
        x, y = wr.SummaryMetric(cost), wr.SummaryMetric(self.fid)
        return wr.ScatterPlot(title=title, x=x, y=y, log_x=True)
