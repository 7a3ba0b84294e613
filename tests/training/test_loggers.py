"""Loggers beside W&B: what they have is what metrics.jsonl has, also after a resume."""

import importlib
import math
import signal
from pathlib import Path
from unittest.mock import Mock

import pytest
import wandb
import yaml
from helpers.faults import Killed, killed_within
from helpers.logged import (
    DRAWING,
    ROWS,
    assert_same_picture,
    assert_same_rows,
    by_step,
    once_each,
)
from helpers.pairs import first_fast
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, TINY_AUTOENCODER, summary_of, wandb_runs
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.cli.training_job import joined
from diffusion_lab.common import messages
from diffusion_lab.training import train
from diffusion_lab.training.logger import Clock, TensorBoard

RESUMED = ["train", *DRAWING, *ROWS, "run_dir=run", "logger=tensorboard"]


class Events:
    """TensorBoard's files of a run, as TensorBoard itself reads them."""

    def __init__(self, folder: Path):
        events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        everything = {"scalars": 0, "images": 0}
        self.found = events.EventAccumulator(str(folder / "tensorboard"), everything)
        self.found.Reload()

    def scalars(self) -> dict[int, dict[str, float]]:
        """The values by step, float32; asserts that there is one of each name."""
        return once_each(
            (name, event.step, event.value)
            for name in self.found.Tags()["scalars"]
            for event in self.found.Scalars(name)
        )

    def pictures(self, name: str) -> dict[int, bytes]:
        found = [(event.step, event.encoded_image_string) for event in self.found.Images(name)]
        assert len(dict(found)) == len(found)
        return dict(found)

    def settings(self) -> dict[str, object]:
        """The hyperparameters of the run's HParams page."""
        plugin = importlib.import_module("tensorboard.plugins.hparams.metadata")
        (content,) = self.found.PluginTagToContent("hparams").values()
        values = plugin.parse_session_start_info_plugin_data(content).hparams
        return {key: getattr(v, v.WhichOneof("kind")) for key, v in values.items()}


@pytest.fixture(scope="module")
def logged(trained_once) -> Path:
    """A run with two loggers at once."""
    pytest.importorskip("tensorboard")
    numbers = [f"logger.wandb.{key}=2024" for key in ("project", "name", "group", "tags")]
    both = "logger=[wandb,tensorboard]"
    return trained_once("train", *DRAWING, "run_dir=run", both, *numbers) / "run"


@pytest.mark.long
def test_several_loggers_are_chosen_by_a_list(logged):
    saved = OmegaConf.load(logged / "config.yaml")
    assert list(saved.logger) == ["wandb", "tensorboard"]
    assert wandb_runs(logged) == {saved.logger.wandb.run_id}


@pytest.mark.long
def test_tensorboard_has_the_rows_and_pictures_of_a_run(logged):
    events = Events(logged)
    assert_same_rows(events.scalars(), logged)
    grids = events.pictures("grids/samples")
    assert list(grids) == [2, 4]
    for step, content in grids.items():
        assert_same_picture(content, logged / f"samples/step_{step:07d}.png")
    (strip,) = events.pictures("grids/denoising").values()
    assert_same_picture(strip, logged / "samples/denoising_0000004.png")
    summary = summary_of(logged)
    for fact in ("parameters", "macs"):
        assert events.scalars()[4][f"summary/{fact}"] == summary[fact]


def test_tensorboard_has_the_settings_of_a_run(logged):
    settings = Events(logged).settings()
    saved = flat(yaml.safe_load((logged / "config.yaml").read_text()))
    saved = {key: value for key, value in saved.items() if not key.startswith("written_by.")}
    assert settings.keys() == saved.keys()
    assert settings["backbone.width"] == 32
    assert settings["choices.backbone"] == "dit"
    assert settings["data.flip"] == 0
    assert settings["data.fraction"] == "None"


@pytest.mark.long
@pytest.mark.parametrize("step", first_fast([4, 5, 6]))
def test_a_resumed_run_is_as_an_unbroken_one(lab, tmp_path, killed_at_step, trained_once, step):
    pytest.importorskip("tensorboard")
    whole = trained_once(*RESUMED) / "run"
    killed_at_step(step, *RESUMED)
    lab.done("train", "resume=run")
    events, folder = Events(tmp_path / "run"), tmp_path / "run"
    assert by_step(folder) == by_step(whole)
    assert_same_rows(events.scalars(), folder)
    assert list(events.pictures("grids/samples")) == [2, 4, 6, 8]


@pytest.mark.slow
def test_a_run_that_is_killed_in_its_last_evaluation_has_nothing_twice(lab, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    finish = train.finish

    def killed(prepared):
        finish(prepared)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(train, "finish", killed)
        with pytest.raises(Killed):
            lab(*RESUMED)
    lab.done("train", "resume=run")
    found = Events(tmp_path / "run").scalars()
    assert_same_rows(found, tmp_path / "run")
    assert "test/loss" in found[8]


def test_a_job_that_died_before_its_first_checkpoint_leaves_nothing(tmp_path):
    pytest.importorskip("tensorboard")
    for value in (1.0, 2.0):
        (tmp_path / "metrics.jsonl").write_text('{"step": 3, "train/loss": 1.0}\n')
        logger = TensorBoard(tmp_path, Clock(8), {"name": "x"}, resumed_from=0)
        logger.start()
        logger.log_metrics({"train/loss": value}, 3)
        logger.finish(None)
    assert Events(tmp_path).scalars()[3]["train/loss"] == 2.0


def test_rows_survive_a_kill(tmp_path):
    pytest.importorskip("tensorboard")

    def write_and_die():
        logger = TensorBoard(tmp_path, Clock(8), {"name": "x"}, resumed_from=0)
        logger.start()
        logger.log_metrics({"train/loss": 1.5, "val/loss": math.nan}, 3)
        signal.raise_signal(signal.SIGKILL)

    killed_within(write_and_die)
    assert Events(tmp_path).scalars()[3]["train/loss"] == 1.5


def test_loggers_that_fail_are_left_alone(lab, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    full, gone = OSError("no space left"), wandb.errors.CommError("the server is gone")
    monkeypatch.setattr(SummaryWriter, "add_scalar", Mock(side_effect=full))
    monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", Mock(side_effect=gone))
    err = lab.done("train", *QUICK, "logger=[wandb,tensorboard]", "run_dir=run")
    assert err.count("no space left") == err.count("the server is gone") == 1
    assert summary_of(tmp_path / "run")["finished"] is True
    assert wandb.run is None  # else the next run of a sweep would write into it


@pytest.mark.parametrize("name", first_fast(["tensorboard", "mlflow", "trackio"]))
def test_a_package_that_is_missing_is_named_before_anything_is_written(
    refusal, tmp_path, monkeypatch, name
):
    def missing(package):
        raise ImportError(package)

    monkeypatch.setattr(messages, "import_module", missing)
    sentence = refusal("train", *QUICK, f"logger={name}", "run_dir=run")
    assert_names(sentence, f"logger.{name}", f"pip install 'diffusion-lab[{name}]'")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_autoencoder_logs_its_reconstructions(lab, tmp_path):
    pytest.importorskip("tensorboard")
    quick = [each for each in TINY_AUTOENCODER if each != "logger=none"]
    pictures = ["callbacks.evaluation=null", "callbacks.sample_grid.every_n_steps=2"]
    lab.done("train-autoencoder", *quick, *pictures, "logger=tensorboard", "run_dir=run")
    assert list(Events(tmp_path / "run").pictures("grids/reconstructions")) == [2, 4]


@pytest.mark.long
def test_a_run_of_one_unnamed_logger_is_resumed(lab, run_folder):
    """Run folders were written so before a run could have several loggers."""
    config = OmegaConf.load(run_folder / "config.yaml")
    wandb, choices = config.logger.wandb, config.pop("choices")
    del wandb["checkpoints"]
    config.logger = {**wandb, "choices": choices}
    config.written_by.format = 3
    OmegaConf.save(config, run_folder / "config.yaml")
    lab.done("train", "resume=run", "trainer.max_steps=6", "callbacks.evaluation=null")
    saved = OmegaConf.load(run_folder / "config.yaml")
    assert wandb_runs(run_folder) == {wandb.run_id} == {saved.logger.wandb.run_id}
    assert saved.choices == choices


def test_runs_of_a_study_share_a_group_in_every_logger_that_has_groups():
    place = {"group": None, "name": None, "tags": ["own"]}
    cfg = OmegaConf.create({"study_name": "mine", "run_dir": "run", "name": "x", "budget": None})
    cfg.logger = {"wandb": place, "mlflow": place | {"name": "chosen"}, "mine": {}}
    cfg, overrides = joined(cfg, ["own=1"], OmegaConf.create({}), Path("run"))
    assert cfg.logger.wandb == {"group": "mine", "name": "run", "tags": ["own", "mine"]}
    assert cfg.logger.mlflow == {"group": "mine", "name": "chosen", "tags": ["own", "mine"]}
    assert cfg.logger.mine == {}
    for tags, known in ((2024, [2024, "mine"]), ("own", ["own", "mine"]), (None, ["mine"])):
        alone = OmegaConf.merge(cfg, {"logger": None})
        alone.logger = {"wandb": place | {"tags": tags}}
        assert joined(alone, [], OmegaConf.create({}), None)[0].logger.wandb.tags == known
    assert overrides[0] == "own=1"
    assert len(overrides) == 7
