"""An offline W&B run holds everything that a run logs, and W&B's own reader finds it there."""

import json
import re
import shutil
from pathlib import Path

import pytest
from helpers import wandb_record
from helpers.logged import KINDS, SCALARS, is_known
from helpers.paths import ROOT
from helpers.tiny_data import TinyData
from helpers.tiny_runs import TINY, TINY_AUTOENCODER, rows
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab import runs
from diffusion_lab.runs import log_names
from diffusion_lab.training.logger import Clock, WandB
from diffusion_lab.training.logger.wandb_logger import COLUMNS, MOST_ROWS, chosen

PAGE = (ROOT / "docs/pages/wandb.md").read_text()


def assert_same_scalars(record: wandb_record.Record, folder: Path) -> None:
    """Checks that names, steps and values equal metrics.jsonl's; times are of steps' first rows."""
    steps, clock = {}, {}
    for row in rows(folder):
        step, seconds = row.pop("step"), row.pop("seconds")
        clock.setdefault(step, seconds)
        shown = {log_names.on_dashboards(name): value for name, value in row.items()}
        steps[step] = steps.get(step, {}) | shown
    logged = {step: dict(row) for step, row in record.scalars.items()}
    times = [row.pop("seconds") for row in logged.values()]
    assert logged == steps
    # W&B's rows are written just after the file's, and before the next step's
    clock = list(clock.values())
    assert all(ours <= theirs for ours, theirs in zip(clock, times, strict=True))
    assert all(theirs < ours for ours, theirs in zip(clock[1:], times[:-1], strict=True))


def table_rows(record: wandb_record.Record, step: int) -> list[dict]:
    path = record.media(log_names.SAMPLES, wandb_record.TABLE)[step]["path"]
    table = json.loads((record.folder / "files" / path).read_text())
    assert table["columns"] == COLUMNS
    return [dict(zip(COLUMNS, row, strict=True)) for row in table["data"]]


def trained(lab, tmp_path, command, *arguments) -> wandb_record.Record:
    lab.done(command, *arguments, "run_dir=run", "callbacks.sample_grid.every_n_steps=2")
    return record_of(tmp_path / "run")


def record_of(folder: Path) -> wandb_record.Record:
    record = wandb_record.read(folder)
    assert_same_scalars(record, folder)
    logged = set().union(*record.rows.values())
    assert [name for name in logged if not is_known(name)] == []
    assert record.axes["*"] == "images"
    assert {"images", "seconds"} < record.axes.keys()
    last = {
        name: value
        for step in sorted(record.scalars)
        for name, value in record.scalars[step].items()
    }
    # plain values: panels of runs do not read W&B's {"min": ...}
    assert {name: record.summary[name] for name in last} == last
    return record


@pytest.mark.long
def test_a_training_run(finished_run):
    record = record_of(finished_run)
    assert record.run["display_name"] == "fashion_mnist_dit/run"
    assert not [name for name in record.artifacts if "checkpoints" in name]
    saved = runs.load_config(finished_run)
    logged = {key: value for key, value in record.config.items() if key != "_wandb"}
    saved.guidance.interval[1] = "Infinity"  # as W&B keeps it
    assert logged == OmegaConf.to_container(saved, resolve=True)
    assert record.config["backbone"]["width"] == 32
    choices = {
        **{"data": "fashion_mnist", "backbone": "dit", "conditioning": "class_label"},
        **{"schedule": "rectified", "objective": "flow_matching", "objective_prediction": "flow"},
        **{"sampler": "dpm_solver", "guidance": "none"},
    }
    assert record.config["choices"].items() >= choices.items()
    assert record.scalars[4].keys() >= {
        "train/loss",
        "val/loss",
        "levels/val/t0.05",
        "samples/fid/efficientnet_lite0-96/train64-16",
        "real/fid/efficientnet_lite0-96/train64-16",
        "images",
        "seconds",
    }
    grids = record.media("grids/samples", wandb_record.PICTURE)
    assert list(grids) == [2, 4]
    assert grids[2]["caption"] == "step 2, 16 images seen: samples of seed 0, one row per class"
    for step, facts in grids.items():
        with (
            Image.open(record.folder / "files" / facts["path"]) as logged,
            Image.open(finished_run / f"samples/step_{step:07d}.png") as kept,
        ):
            assert logged.tobytes() == kept.tobytes()
    assert list(record.media("grids/denoising", wandb_record.PICTURE)) == [4]
    table = table_rows(record, 4)
    assert [row["class"] for row in table] == [
        name for name in TinyData.class_names for _ in range(2)
    ]
    assert [row["sample"] for row in table] == list(range(8))
    assert {(row["seed"], row["step"], row["images_seen"]) for row in table} == {(0, 4, 32)}
    # pictures stay in the run's folder until their upload
    assert len(list((finished_run / "wandb/artifacts/staging").glob("*"))) > 8


@pytest.mark.slow
def test_an_unconditional_run_has_samples_without_a_class(lab, tmp_path):
    unlabelled = ["conditioning=none", "callbacks.evaluation=null"]
    record = trained(lab, tmp_path, "train", *TINY, *unlabelled)
    assert [row["class"] for row in table_rows(record, 4)] == [None] * 4
    caption = record.media("grids/samples", wandb_record.PICTURE)[4]["caption"]
    assert caption == "step 4, 32 images seen: samples of seed 0, without classes"


@pytest.mark.slow
def test_an_autoencoder_run(lab, tmp_path):
    arguments = [argument for argument in TINY_AUTOENCODER if argument != "logger=none"]
    record = trained(lab, tmp_path, "train-autoencoder", *arguments)
    assert record.config["choices"]["autoencoder"] == "kl"
    assert "val/psnr" in record.scalars[4]
    grids = record.media("grids/reconstructions", wandb_record.PICTURE)
    assert list(grids) == [2, 4]
    assert "each above its reconstructions" in grids[4]["caption"]


@pytest.mark.slow
def test_a_run_on_two_devices_is_one_run(lab, tmp_path):
    arguments = ["trainer.devices=2", "callbacks.evaluation=null"]
    record = trained(lab, tmp_path, "train", *TINY, *arguments)
    assert len(table_rows(record, 4)) == 8


@pytest.mark.long
def test_checkpoints_become_an_artifact_that_opens_as_a_run(lab, tmp_path):
    keeping = ["callbacks.checkpoint.every_n_steps=2", "callbacks.checkpoint.keep_every_n_steps=2"]
    asked = [*keeping, "logger.wandb.checkpoints=true", "callbacks.evaluation=null"]
    record = trained(lab, tmp_path, "train", *TINY, *asked)
    files = record.artifacts[f"checkpoints-{run_id(tmp_path)}"]
    kept = {f"checkpoints/{name}.ckpt" for name in ("step_0000002", "step_0000004", "last")}
    assert files.keys() == kept | {"config.yaml", "summary.json", "metrics.jsonl"}
    for name, file in files.items():
        (tmp_path / "again" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "again" / name)
    shutil.rmtree(tmp_path / "run")
    runs.load(tmp_path / "again")
    lab.done("sample", "run=again", "num_samples=2", "step=2")


def test_what_a_run_prints_is_logged_if_it_is_asked_for(tmp_path):
    for asked, console in ((False, "off"), (True, "wrap")):
        logger = WandB(tmp_path, Clock(8), {"name": "x"}, 0, run_id="a", console=asked)
        assert logger.facts["settings"].console == console


def run_id(tmp_path: Path) -> str:
    return runs.load_config(tmp_path / "run").logger.wandb.run_id


@pytest.mark.slow
def test_a_resumed_run_goes_on_from_its_step(lab, tmp_path, run_folder):
    (first,) = (tmp_path / "run/wandb").glob("offline-run-*")
    lab.done("train", "resume=run", "trainer.max_steps=6", "callbacks.evaluation=null")
    assert wandb_record.read(first).run["run_id"] == run_id(tmp_path)
    (second,) = set((tmp_path / "run/wandb").glob("offline-run-*")) - {first}
    assert list(wandb_record.read(first).rows) == [1, 2, 3, 4]
    record = wandb_record.read(second)
    assert list(record.rows) == [5, 6]
    assert record.run["run_id"] == run_id(tmp_path)
    assert record.config["choices"] == wandb_record.read(first).config["choices"]


def test_of_many_samples_the_first_of_each_class_are_in_the_table():
    assert chosen(8, 2) == list(range(8))
    few = chosen(10 * 100, 100)
    assert len(few) == MOST_ROWS
    assert few == [100 * label + column for label in range(10) for column in range(5)]
    assert chosen(1000 * 2, 2) == list(range(0, 2 * MOST_ROWS, 2))


def test_choices_are_those_that_runs_differ_in():
    choices = {"backbone": "dit", "objective/prediction": "v", "experiment": None}
    noise = {"hydra/launcher": "basic", "callbacks": "diffusion"}
    assert log_names.grouped(choices | noise) == {"backbone": "dit", "objective_prediction": "v"}


def test_names_on_dashboards_begin_with_what_is_looked_at():
    for name, shown in {
        "fid/efficientnet_lite0-96/train64-16": "samples/fid/efficientnet_lite0-96/train64-16",
        "fid_std_real/inception/train-50k": "real/fid_std/inception/train-50k",
        "real_or_drawn/network/8": "samples/real_or_drawn/network/8",
        "rfid/efficientnet_lite0-96/test-5k": "reconstructions/fid/efficientnet_lite0-96/test-5k",
        "seams/4px/8": "samples/seams/4px/8",
        "test_by_level/t0.05": "levels/test/t0.05",
        "train_grad_norm/blocks/0": "modules/grad_norm/blocks/0",
        "val_latent/mean0": "latents/val/mean0",
    }.items():
        assert log_names.on_dashboards(name) == shown
    for name in ("train/loss", "val/own/part", "images", "recall_real", "my_callback/seconds"):
        assert log_names.on_dashboards(name) == name


def test_the_page_lists_the_naming_scheme():
    table = PAGE[PAGE.index("| name | what it is |") :].split("\n\n")[0]
    rows = re.findall(r"^\| (`.+?) \|", table, re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`([^`]+)`", row)}
    real_values = {f"real/{kind}/*" for kind in KINDS} - {"real/fid/*"}
    assert set(SCALARS) - real_values == listed - {
        *log_names.AXES,
        log_names.SAMPLES,
        f"{log_names.GRIDS}/samples",
        f"{log_names.GRIDS}/denoising",
        f"{log_names.GRIDS}/reconstructions",
    }
