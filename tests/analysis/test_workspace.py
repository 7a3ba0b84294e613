"""The workspace and the report are built offline; their panels show names that runs log."""

import re
import shutil
import sys
from itertools import product

import pytest

pytest.importorskip("wandb_workspaces")

import wandb_workspaces.reports.v2 as wr
from helpers.fake_runs import NAME, fake_run
from helpers.fake_wandb_server import serving
from helpers.logged import is_known
from helpers.refusals import assert_names
from wandb_workspaces import workspaces as ws

from diffusion_lab.analysis import wandb_pages
from diffusion_lab.analysis.wandb_pages import GROUPS, Dashboard, key_of
from diffusion_lab.runs import log_names

PROTOCOL = "efficientnet_lite0-96/train64-16"  # the protocol of tiny runs
SEVERAL = {"backbone": "choices.backbone", "seed": "seed", "data.fraction": "data.fraction"}


@pytest.fixture
def dashboard():
    return Dashboard("tiny", PROTOCOL, {"backbone": "choices.backbone"}, "study")


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
    assert set(of_config) <= {f"choices.{group}" for group in GROUPS} | {*SEVERAL.values()}
    return [getattr(name, "name", name) for name in of_panel if not isinstance(name, wr.Config)]


def test_panels_are_of_the_naming_scheme(dashboard):
    for panels in dashboard.sections().values():
        assert panels
        for panel in panels:
            assert [name for name in named(panel) if not is_known(name)] == []


def test_panels_are_of_what_runs_log(dashboard, finished_run):
    rows = (finished_run / "metrics.jsonl").read_text()
    logged = {log_names.on_dashboards(name) for name in re.findall(r'"([^"]+)":', rows)}
    logged |= set(re.findall(r'"([^"]+)":', (finished_run / "summary.json").read_text()))
    logged |= {"grids/samples", "grids/denoising", log_names.SAMPLES}
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
    report = dashboard.report("me", "a verdict")
    headings = [block.text for block in report.blocks if isinstance(block, wr.H1)]
    assert headings == list(dashboard.sections())
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    assert len(grids) == len(headings)
    for grid, panels in zip(grids, dashboard.sections().values(), strict=True):
        assert [type(panel) for panel in grid.panels] == [type(panel) for panel in panels]
        (runs,) = grid.runsets
        assert runs.groupby == ["config.choices.backbone"]
        assert runs.filters == "Metric(\"Group\") == 'study'"


def test_several_keys_group_the_runs_of_every_panel():
    dashboard = Dashboard("tiny", PROTOCOL, SEVERAL, None)
    workspace = dashboard.workspace("me")
    view = workspace._to_model().spec.section
    (runs,) = view.run_sets
    assert [key.name for key in runs.grouping] == [
        "choices.value.backbone",
        "seed.value",
        "data.value.fraction",
    ]
    # panels group runs as their table does, unless they have a key of their own
    assert view.settings.use_runs_table_grouping_in_panels
    (first, *_) = dashboard.sections()["Generated images"]
    assert first.groupby is None
    assert (first.groupby_aggfunc, first.groupby_rangefunc) == ("mean", "minmax")
    (options, _) = dashboard.sections()["Configurations"]
    assert {column.metric.name for column in options.columns} > {"seed", "data.fraction"}
    grids = [b for b in dashboard.report("me", "a verdict").blocks if isinstance(b, wr.PanelGrid)]
    keys = ["config.choices.backbone", "config.seed", "config.data.fraction"]
    assert [runs.groupby for grid in grids for runs in grid.runsets] == [keys] * len(grids)


def test_without_a_group_all_runs_are_shown():
    dashboard = Dashboard("tiny", PROTOCOL, {"schedule": "choices.schedule"}, None)
    assert dashboard.workspace("me").runset_settings.filters == ""
    assert dashboard.workspace("me").runset_settings.groupby[0].name == "choices.schedule"


def test_the_command_saves_both_and_says_where(lab, monkeypatch):
    saved = []
    for kind in (ws.Workspace, wr.Report):
        monkeypatch.setattr(kind, "save", lambda self: saved.append(self) or self)
        monkeypatch.setattr(kind, "url", property(lambda self: f"https://{type(self).__name__}"))
    monkeypatch.setattr(wandb_pages, "why_unreachable", lambda: None)
    shown = ["group_by=objective", f"protocol={PROTOCOL}"]
    err = lab.done("wandb-report", "entity=me", "group=study", *shown)
    assert_names(err, "https://Workspace", "https://Report")
    assert [type(each) for each in saved] == [ws.Workspace, wr.Report]
    assert {each.entity for each in saved} == {"me"}
    assert {each.project for each in saved} == {"diffusion-lab"}


@pytest.mark.slow
def test_what_is_saved_is_read_back_and_shows_what_was_uploaded(lab, run_folder, monkeypatch):
    with serving() as server:
        monkeypatch.setenv("WANDB_BASE_URL", server.url)
        monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
        lab.done("sync", "run")
        made = dict(re.findall(r"^(Workspace|Report): (.+)", lab.done("wandb-report", "run"), re.M))
        workspace = ws.Workspace.from_url(made["Workspace"])
        report = wr.Report.from_url(made["Report"])
    (uploaded,) = ({*set().union(*rows.values())} for rows in server.history.values())
    (summary,) = server.summaries.values()
    (config,) = server.configs.values()
    dashboard = Dashboard("diffusion-lab", PROTOCOL, {"backbone": "choices.backbone"}, None)
    assert config["choices"]["value"]["backbone"] == "dit"
    grids = [block for block in report.blocks if isinstance(block, wr.PanelGrid)]
    for title, panels in dashboard.sections().items():
        (section,) = [each for each in workspace.sections if each.name == title]
        grid = grids.pop(0)
        for saved in (section.panels, grid.panels):
            assert [type(panel) for panel in saved] == [type(panel) for panel in panels]
            for panel in saved if title != "Autoencoders" else ():
                assert {*named(panel)} <= {*uploaded, *summary}
                if regex := getattr(panel, "metric_regex", None):
                    assert any(re.search(regex, name) for name in uploaded)
    (text,) = [block.text for block in report.blocks if isinstance(block, wr.MarkdownBlock)]
    assert_names(
        text,
        "16 samples each",
        "protocol",
        "real images",
        "all runs is the only arm with a value: FID",
    )


def test_a_dry_run_lists_the_panels(lab, dashboard):
    err = lab.done("wandb-report", "dry_run=true", f"protocol={PROTOCOL}")
    for title, panels in dashboard.sections().items():
        assert_names(err, title, *(getattr(panel, "title", None) or "" for panel in panels))


LOGGER = {"_target_": "diffusion_lab.training.logger.WandB", "project": "diffusion-lab"}


@pytest.fixture
def outputs(tmp_path):
    """Four runs of two groups in W&B, measured by one protocol, and one that was not logged."""
    for seed, (group, fraction) in enumerate(product(("a", "b"), (0.1, 0.5))):
        config = {"logger": {"wandb": LOGGER | {"group": group}}, "data": {"fraction": fraction}}
        config["choices"] = {"backbone": "dit", "objective_prediction": "v"}
        fake_run(tmp_path / f"outputs/{group}/{fraction}", 20.0, seed, config)
    other = {f"fid/{PROTOCOL}": 1.0}
    fake_run(tmp_path / "outputs/c/run", 9.0, config={"logger": None}, metrics=other)
    return tmp_path / "outputs"


@pytest.fixture
def titled(lab):
    """titled(...) -> the title and the protocol of what wandb-report would save."""

    def run(*arguments: str) -> str:
        err = lab.done("wandb-report", *arguments, "dry_run=true")
        return next(line for line in err.splitlines() if ", FID by " in line)

    return run


def test_the_protocol_is_that_of_the_runs(titled, outputs):
    assert titled().endswith(f"FID by {NAME}")
    assert titled("outputs/b", "group=b").endswith(f"FID by {NAME}")
    for protocol in (PROTOCOL, "efficientnet_lite0-96/val5k-1k", "inception/stats-1a2b-50k"):
        assert titled(f"protocol={protocol}").endswith(f"FID by {protocol}")


def test_keys_of_the_runs_group_them(titled, outputs):
    assert "by backbone and data.fraction and seed" in titled(
        "group_by=[backbone,data.fraction,seed]"
    )
    assert "by objective/prediction" in titled("group_by=objective/prediction")


def test_runs_are_found_however_deep_they_are(titled, outputs):
    shutil.rmtree(outputs)
    config = {"logger": {"wandb": LOGGER}, "choices": {"backbone": "dit"}}
    fake_run(outputs / "small", 20.0, 0, config)
    assert titled().endswith(f"FID by {NAME}")
    shutil.move(outputs / "small", outputs / "deep/er/still/small")
    assert titled().endswith(f"FID by {NAME}")


def test_without_runs_options_are_grouped_by_their_names():
    for group in ("objective/prediction", "optimizer", "lr_schedule"):
        assert key_of(group, {}) == f"choices.{group.replace('/', '_')}"
    assert key_of("seed", {}) == "seed"


def test_the_runs_decide_what_can_be_shown(refusal, outputs):
    sentence = refusal("wandb-report", "dry_run=true", "group_by=[backbone,data.fractoin]")
    assert_names(sentence, "group_by=data.fractoin")
    assert "project=other" in refusal("wandb-report", "dry_run=true", "project=other")
    fake_run(
        outputs / "d/run",
        9.0,
        config={"logger": {"wandb": LOGGER}},
        metrics={f"fid/{PROTOCOL}": 1.0},
    )
    assert_names(refusal("wandb-report", "dry_run=true"), NAME, PROTOCOL, "protocol=")


def test_what_is_wrong_is_said(refusal, monkeypatch, tmp_path):
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    protocol = f"protocol={PROTOCOL}"
    assert "dry_run=true" in refusal("wandb-report", protocol)
    assert "group_by=[]" in refusal("wandb-report", protocol, "group_by=[]")
    assert "protocol='fid'" in refusal("wandb-report", "protocol=fid")
    assert "protocol=" in refusal("wandb-report")

    def refuse(_):
        raise ValueError("permission denied\nand more")

    monkeypatch.setattr(wandb_pages, "why_unreachable", lambda: None)
    monkeypatch.setattr(ws.Workspace, "save", refuse)
    sentence = refusal("wandb-report", "entity=me", protocol)
    assert "permission denied" in sentence
    assert "and more" not in sentence
    monkeypatch.delitem(sys.modules, wandb_pages.__name__)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert "pip install 'diffusion-lab[report]'" in refusal("wandb-report")
