"""A comparison is logged to W&B, and read back from its offline record."""

import csv
import json

import pytest
import wandb
from helpers import wandb_record
from helpers.fake_runs import UNET, fake_group
from helpers.refusals import assert_names

from diffusion_lab.report.page import table as table_of

LOGGER = {"_target_": "diffusion_lab.training.logger.WandB", "project": "tiny", "group": "study"}


@pytest.fixture
def runs(tmp_path):
    logged = {"logger": {"wandb": LOGGER}}
    fake_group(tmp_path / "runs", "dit", [20.0, 21.5, 22.0], config=logged)
    fake_group(tmp_path / "runs", "unet", [10.0, 11.0, 12.4], config={**UNET, **logged})


def table(record: wandb_record.Record, name: str) -> list[dict]:
    """The rows of a table of the record."""
    (facts,) = record.media(f"comparison/{name}", wandb_record.TABLE).values()
    content = json.loads((record.folder / "files" / facts["path"]).read_text())
    return [dict(zip(content["columns"], row, strict=True)) for row in content["data"]]


def test_a_column_is_of_numbers_or_of_texts(tmp_path):
    (tmp_path / "pairs.csv").write_text('data,gap,p\n550,1.5,\n"5,500",2,0.1\n')
    head, rows = table_of(tmp_path / "pairs.csv")
    assert head == ["data", "gap", "p"]
    assert rows == [["550", 1.5, None], ["5,500", 2.0, 0.1]]
    (tmp_path / "none.csv").write_text("data\n")
    assert table_of(tmp_path / "none.csv") == (["data"], [])


@pytest.mark.long
def test_verdict_tables_and_page_are_logged(lab, tmp_path, runs):
    code, out, err = lab("compare", "runs", "wandb=tiny", "json=true")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert_names(err, "diffusion-lab sync comparison")
    record = wandb_record.read(tmp_path / "comparison")
    assert (record.run["project"], record.run["run_group"]) == ("tiny", "study")
    assert record.run["job_type"] == "compare"
    assert record.config["compositions"] == result["compositions"]
    answers = {f"verdict/{metric}": answer for metric, answer in result["verdict"].items()}
    assert answers
    assert answers.items() <= record.summary.items()
    for name, file in {"compositions": "table", "runs": "runs", "pairs": "pairs"}.items():
        with (tmp_path / f"comparison/{file}.csv").open(newline="") as opened:
            expected = list(csv.DictReader(opened))
        rows = table(record, name)
        assert [list(row) for row in rows] == [list(row) for row in expected]
    means = {row["composition"]: row["fid"] for row in table(record, "compositions")}
    assert means == {"DiT": pytest.approx(63.5 / 3), "UNet": pytest.approx(33.4 / 3)}
    (page,) = record.media("comparison/page", wandb_record.PAGE).values()
    shown = (record.folder / "files" / page["path"]).read_text()
    assert shown == (tmp_path / "comparison/index.html").read_text()
    (files,) = (f for name, f in record.artifacts.items() if name.startswith("comparison-"))
    assert files.keys() >= {"index.html", "table.md", "table.tex", "runs.csv"}
    assert not any(name.startswith("wandb") for name in files)


@pytest.mark.slow
def test_a_comparison_is_made_again_beside_its_record(lab, tmp_path, runs):
    for _ in range(2):
        lab.done("compare", "runs", "wandb=tiny")
    assert len(list((tmp_path / "comparison/wandb").glob("offline-run-*"))) == 2


@pytest.mark.long
def test_a_comparison_stays_where_wandb_fails(refusal, tmp_path, runs, monkeypatch):
    def init(**_):
        raise wandb.errors.CommError("no service")

    monkeypatch.setattr(wandb, "init", init)
    assert_names(refusal("compare", "runs", "wandb=tiny"), "comparison", "no service")
    assert (tmp_path / "comparison/index.html").is_file()


def test_a_wrong_project_is_refused_before_anything_is_written(refusal, tmp_path, runs):
    assert "wandb='a/b'" in refusal("compare", "runs", "wandb=a/b")
    assert not (tmp_path / "comparison").exists()
