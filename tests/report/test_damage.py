"""A run whose files are damaged, or of another program, is named, and the others are compared."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from helpers.fake_runs import NAME, fake_group
from helpers.refusals import assert_names, refused
from omegaconf import OmegaConf

from diffusion_lab.analysis.status import find, rows_of
from diffusion_lab.report.frame import collect
from diffusion_lab.runs.files import read_config
from diffusion_lab.runs.folder import load_config

DEEP = "[" * 100_000 + "]" * 100_000


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three runs that can be compared."""
    fake_group(folder := tmp_path_factory.mktemp("whole"), "dit", [100.0, 110.0, 105.0])
    return folder


@pytest.fixture
def damaged(whole, tmp_path):
    """The second of three runs, to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "runs")) / "dit_1"


def left_out(run: Path) -> list[str]:
    """Checks what is said of a run that is left out; the others are compared."""
    assert len(rows_of(*find([run.parent]))[0]) == 3
    collection = collect([run.parent])
    assert len(collection.runs) == 3 - len(collection.left_out)
    return [str(fact) for fact in collection.left_out]


def changed(content: dict, key: str, value: object) -> dict:
    """The content with another value at a key."""
    *parents, last = key.split("|")
    node = content
    for parent in parents:
        node = node[parent]
    node[last] = value
    return content


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("data", "x"),
        ("data|source", [1]),
        ("data|source|_target_", 5),
        ("backbone", [1]),
        ("callbacks", 5),
        ("logger", 5),
        ("first_stage", 0.5),
        ("budget", {"seconds": "x"}),
        ("denoiser", {"self_conditioning": "x"}),
        ("seed", "x"),
        ("written_by", "x"),
    ],
)
def test_a_wrong_value_in_a_configuration_is_named(damaged, key, value):
    path = damaged / "config.yaml"
    path.write_text(yaml.safe_dump(changed(yaml.safe_load(path.read_text()), key, value)))
    assert_names(*left_out(damaged), path)
    with refused(path):
        load_config(damaged)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("images_seen", "x"),
        ("steps", [1]),
        ("metrics", [1]),
        (f"metrics|fid/{NAME}", "x"),
        ("metrics", None),
        ("protocol", "x"),
        ("protocol", {"a": 1}),
        ("sampling", 5),
        ("versions", "x"),
        ("at_other_steps", [1]),
        ("extra_quantities", ["x"]),
        ("git_commit", 5),
        ("precision", 5),
        ("ended_at", None),
        ("training_seconds", None),
    ],
)
def test_a_wrong_value_in_a_summary_is_named(damaged, key, value):
    path = damaged / "summary.json"
    path.write_text(json.dumps(changed(json.loads(path.read_text()), key, value)))
    assert_names(*left_out(damaged), damaged, path.name)


@pytest.mark.parametrize("name", ["config.yaml", "summary.json", "evaluations/one.json"])
@pytest.mark.parametrize(
    "content", ["", DEEP, "[1]", "\0", '{"metrics": {"fid": "x"}}', "seed: 1\nseed: 2"]
)
def test_a_file_of_something_else_is_named(damaged, name, content):
    path = damaged / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(content)
    assert_names(*left_out(damaged), damaged)


def test_words_of_a_configuration_are_read_as_omegaconf_reads_them(tmp_path):
    text = "a: 1e-3\nb: .5\nc: 2024-01-01\nd: on\ne: 1_000\nf: [0x10, ~, 'x']\ng: inf\n"
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path) == OmegaConf.load(tmp_path / "config.yaml")


@pytest.mark.parametrize("row", [DEEP, '{"step": 1, "seconds": "x"}', '{"images": [1]}'])
def test_rows_of_something_else_are_passed_over(damaged, row):
    with (damaged / "metrics.jsonl").open("a") as file:
        file.write(row)
    assert left_out(damaged) == []


@pytest.mark.parametrize("report", [{"neighbours": 5}, {"neighbours": {}, "sampling": "x"}])
def test_a_wrong_report_on_copies_is_left_out(damaged, report):
    (damaged / "memorization").mkdir()
    (damaged / "memorization/report.json").write_text(json.dumps(report))
    (fact,) = collect([damaged.parent]).omitted
    assert_names(str(fact), damaged)
