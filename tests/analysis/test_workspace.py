"""The workspace and the report are built offline; their panels show names that runs log."""

import re

import pytest

pytest.importorskip("wandb_workspaces")

import wandb_workspaces.reports.v2 as wr
from helpers.logged_names import is_known
from helpers.refusals import assert_names
from wandb_workspaces import workspaces as ws

from diffusion_lab.analysis import wandb_report
from diffusion_lab.analysis.wandb_workspace import GROUPS, Dashboard
from diffusion_lab.metrics import log_names

PROTOCOL = "efficientnet_lite0-96/train64-16"  # the protocol of tiny runs


@pytest.fixture
def dashboard():
    return Dashboard("tiny", PROTOCOL, "backbone", "study")


def named(panel) -> list:
    """The names of metrics, axes and media that a panel reads."""
    of_panel = {
        wr.LinePlot: lambda: [panel.x, *panel.y],
        wr.BarPlot: lambda: list(panel.metrics),
        wr.ScatterPlot: lambda: [panel.x, panel.y],
        wr.MediaBrowser: lambda: panel.media_keys,
        wr.WeavePanelSummaryTable: lambda: [panel.table_name],
        wr.ParallelCoordinatesPlot: lambda: [column.metric for column in panel.columns],
        wr.RunComparer: lambda: [],
    }[type(panel)]()
    of_config = [key.name for key in of_panel if isinstance(key, wr.Config)]
    assert set(of_config) <= {f"choices.{group}" for group in GROUPS}
    return [getattr(name, "name", name) for name in of_panel if not isinstance(name, wr.Config)]


def test_panels_are_of_the_naming_scheme(dashboard):
    for panels in dashboard.sections().values():
        assert panels
        for panel in panels:
            assert [name for name in named(panel) if not is_known(name)] == []


def test_panels_are_of_what_runs_log(dashboard, finished_run):
    logged = set(re.findall(r'"([^"]+)":', (finished_run / "metrics.jsonl").read_text()))
    logged |= set(re.findall(r'"([^"]+)":', (finished_run / "summary.json").read_text()))
    logged |= {"grids/samples", log_names.SAMPLES}
    for title, panels in dashboard.sections().items():
        for panel in panels:
            if title != "Autoencoders":
                assert set(named(panel)) <= logged
            if regex := getattr(panel, "metric_regex", None):
                assert any(re.search(regex, name) for name in logged)


def test_the_workspace_groups_runs_and_has_both_x_axes(dashboard):
    workspace = dashboard.workspace("me")
    assert (workspace.entity, workspace.project) == ("me", "tiny")
    assert [section.name for section in workspace.sections] == list(dashboard.sections())
    curves = [
        panel
        for section in workspace.sections
        for panel in section.panels
        if isinstance(panel, wr.LinePlot)
    ]
    assert {curve.x for curve in curves} == set(log_names.AXES)
    assert {curve.groupby.name for curve in curves} == {"choices.backbone"}
    assert {(c.groupby_aggfunc, c.groupby_rangefunc) for c in curves} == {("mean", "minmax")}
    view = workspace._to_model().spec.section  # in the form that the server receives
    (runs,) = view.run_sets
    assert [(key.section, key.name) for key in runs.grouping] == [
        ("config", "choices.value.backbone")
    ]
    assert "'value': 'study'" in str(runs.filters)
    assert view.settings.x_axis == "images"


def test_the_report_has_a_grid_under_each_heading(dashboard):
    report = dashboard.report("me")
    headings = [block.text for block in report.blocks if isinstance(block, wr.H1)]
    assert headings == list(dashboard.sections())
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    assert len(grids) == len(headings)
    for grid, panels in zip(grids, dashboard.sections().values(), strict=True):
        assert [type(panel) for panel in grid.panels] == [type(panel) for panel in panels]
        (runs,) = grid.runsets
        assert runs.groupby == ["config.choices.backbone"]
        assert runs.filters == "Metric(\"Group\") == 'study'"


def test_without_a_group_all_runs_are_shown():
    dashboard = Dashboard("tiny", PROTOCOL, "schedule", None)
    assert dashboard.workspace("me").runset_settings.filters == ""
    assert dashboard.workspace("me").runset_settings.groupby[0].name == "choices.schedule"


def test_the_command_saves_both_and_says_where(lab, monkeypatch):
    saved = []
    for kind in (ws.Workspace, wr.Report):
        monkeypatch.setattr(kind, "save", lambda self: saved.append(self) or self)
        monkeypatch.setattr(kind, "url", property(lambda self: f"https://{type(self).__name__}"))
    monkeypatch.setattr(wandb_report, "why_unreachable", lambda: None)
    code, _, err = lab("wandb-report", "entity=me", "group=study", "group_by=objective")
    assert code == 0, err
    assert_names(err, "https://Workspace", "https://Report")
    assert [type(each) for each in saved] == [ws.Workspace, wr.Report]
    assert {each.entity for each in saved} == {"me"}
    assert {each.project for each in saved} == {"diffusion-lab"}


def test_a_dry_run_lists_the_panels(lab, dashboard):
    code, _, err = lab("wandb-report", "dry_run=true")
    assert code == 0, err
    for title, panels in dashboard.sections().items():
        assert_names(err, title, *(getattr(panel, "title", None) or "" for panel in panels))


def test_what_is_wrong_is_said(refusal, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert "dry_run=true" in refusal("wandb-report")
    assert "group_by='colour'" in refusal("wandb-report", "group_by=colour")
    assert "protocol='fid'" in refusal("wandb-report", "protocol=fid")

    def refuse(_):
        raise ValueError("permission denied\nand more")

    monkeypatch.setattr(wandb_report, "why_unreachable", lambda: None)
    monkeypatch.setattr(ws.Workspace, "save", refuse)
    sentence = refusal("wandb-report", "entity=me")
    assert "permission denied" in sentence
    assert "and more" not in sentence
    monkeypatch.setattr(wandb_report.importlib.util, "find_spec", lambda _: None)
    assert "pip install 'diffusion-lab[report]'" in refusal("wandb-report")
