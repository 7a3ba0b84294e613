"""Workspaces and reports of Weights & Biases, made of the runs in a folder."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.config_keys import Settings, as_list, flat
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.sentences import conf_dir, did_you_mean
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.formats import literal
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import Range, optional
from diffusion_lab.metrics.quantity import REAL, named
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import in_markdown
from diffusion_lab.report.records import run_folders
from diffusion_lab.runs import log_names
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.training.logger.run_logger import first_line, why_unreachable

GROUPS = ("backbone", "conditioning", "schedule", "objective", "sampler", "guidance", "data")
PROTOCOL = Range(
    "the part of a metric's name after fid/",
    lambda value: bool(re.fullmatch(r"[\w.-]+/[\w.-]+-\w+", str(value))),
    "efficientnet_lite0-96/train60k-5k",
)


def logged_runs(
    paths: Sequence[str], project: str, group: str | None
) -> Iterator[tuple[Path, Settings]]:
    """Yields the runs that a W&B project, or group, has, at or below the paths, or in outputs/."""
    found = list[Path]()
    with nullcontext() if paths else suppress(UserError):  # outputs/ may be empty, or missing
        found = run_folders(paths or [OUTPUTS])
    for folder in found:
        with suppress(UserError):  # of another version, for example
            config = load_config(folder)
            place = (config.get("logger") or {}).get("wandb")
            if place and place.project == project and group in (None, place.get("group")):
                yield folder, flat(OmegaConf.to_container(config))


def protocol_of(runs: Iterable[Path], project: str) -> str:
    """The one protocol by which runs were measured, as it is in the names of their metrics."""
    known = {name for run in runs for name in load_summary(run).metrics}
    protocols = sorted(name.removeprefix("fid/") for name in known if name.startswith("fid/"))
    if not protocols:
        raise UserError(
            f"no run of project={project} with FID was found; give the folders of its runs, or "
            f"write the part of a metric's name after fid/, as in protocol={PROTOCOL.example}"
        )
    if len(protocols) > 1:
        raise UserError(
            f"the runs were measured by {' and by '.join(protocols)}; choose one by protocol=..., "
            "or give the folders of some runs"
        )
    return protocols[0]


def key_of(name: str, runs: Mapping[Path, Settings]) -> str:
    """The key in a run's configuration of an option or a value, such as backbone or seed."""
    key, option = name, f"choices.{name.replace('/', '_')}"
    found = {each for settings in runs.values() for each in settings}
    if option in found or (not runs and (conf_dir() / name).is_dir()):
        return option
    if runs and key not in found:
        near = did_you_mean(name, sorted(found))
        raise UserError(
            f"group_by={name} is not a key of these runs; {near}use options and keys of their "
            "config.yaml, as in group_by=[backbone,data.fraction]"
        )
    return key


def wandb_report(cfg: DictConfig, overrides: list[str]) -> dict[str, str]:
    """Creates a workspace and a report and returns their URLs; creates none if `cfg.dry_run`."""
    check_keys(cfg, {"protocol": optional(PROTOCOL)})
    project, group = str(cfg.project), None if cfg.group is None else str(cfg.group)
    runs = dict(logged_runs([str(path) for path in as_list(cfg.paths)], project, group))
    protocol = cfg.protocol or protocol_of(runs, project)
    names = [str(name) for name in as_list(cfg.group_by)]
    if not names:
        raise UserError("group_by=[] is empty; write one or more keys, as in group_by=backbone")
    keys = {name: key_of(name, runs) for name in names}
    dashboard = Dashboard(project, protocol, keys, group)
    if not cfg.dry_run and (reason := why_unreachable()):
        raise UserError(f"nothing was created: {reason}; dry_run=true shows what would be")
    say(f"{dashboard.title}, FID by {protocol}")
    if cfg.dry_run:
        for title, panels in dashboard.sections().items():
            titles = (getattr(panel, "title", None) or type(panel).__name__ for panel in panels)
            say(f"{title}: {'; '.join(titles)}")
        say("Nothing was created (dry_run=true)")
        return {}
    said = ""
    if runs:
        try:
            said = in_markdown(Report(collect([*runs])))
        except UserError as error:  # unlike runs are no reason against a dashboard
            said = f"These runs are not compared: {literal(error)}"
    try:
        entity = str(cfg.entity or wandb.Api().default_entity)
        made = {
            "workspace": dashboard.workspace(entity).save().url,
            "report": dashboard.report(entity, said).save().url,
        }
    except Exception as error:  # a wrong key, project or server: each has its own class
        raise UserError(f"W&B refused this: {first_line(error)}") from error
    for what, url in made.items():
        say(f"{what.capitalize()}: {url}")
    return made


DISTANCES = named("fid", "kid")
# measured on their own number of images
COVERAGE = named("precision", "recall", "density", "coverage")


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
        return f"Diffusion models compared by {' and '.join(self.group_by)}"

    @property
    def fid(self) -> str:
        """The name of FID on dashboards, with the protocol."""
        return log_names.on_dashboards(f"fid/{self.protocol}")

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
                self._curve("Loss by noise level", regex="^levels/val/"),
                wr.BarPlot(title="Loss of test images", metrics=["test/loss"], **self.grouped),
            ],
            "Training": [
                self._curve("Loss", "train/loss"),
                self._curve("Loss by noise level", regex="^levels/train/"),
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
            of_both = (f"{quantity.name}{end}/{self.protocol}" for end in ("", REAL))
            name, real = map(log_names.on_dashboards, of_both)
            panels.append(wr.BarPlot(title=quantity.title, metrics=[name], **self.grouped))
            panels.append(
                self._curve(f"{quantity.title} of samples and of real images", name, real)
            )
        names = "|".join(quantity.name for quantity in COVERAGE)
        titles = ", ".join(quantity.title for quantity in COVERAGE)
        return [*panels, self._curve(titles, regex=f"^samples/({names})/")]

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

    def report(self, entity: str, said: str) -> wr.Report:
        """A report that says `said`, Markdown, and has a section of panels under each heading."""
        runs = wr.Runset(
            entity=entity,
            project=self.project,
            name=f"by {' and '.join(self.group_by)}",
            groupby=[f"config.{key}" for key in self.group_by.values()],
            filters=self.filters,
        )
        blocks: list[Any] = [*([wr.MarkdownBlock(text=said)] * bool(said)), wr.TableOfContents()]
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
