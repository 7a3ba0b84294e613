"""Files of others are not executed: no pickles, and a warning of unknown classes in a run."""

import os
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml
from helpers import picture_files
from helpers.paths import CONF
from helpers.reduced import Reduced
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import QUICK
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.assembly.sentences import parse
from diffusion_lab.metrics.extractor import DINOv2
from diffusion_lab.metrics.extractor.base import ExtractorUnavailable
from diffusion_lab.runs import folder
from diffusion_lab.runs.folder import load_config, save_config
from diffusion_lab.runs.importing.kind.base import assigned

OURS = ["experiment=toy/two_moons", "+debug=fast", "trainer=cpu", "callbacks.evaluation=null"]


@pytest.fixture
def run(trained_once, tmp_path):
    trained = trained_once("train", *QUICK, "run_dir=run") / "run"
    return Path(shutil.copytree(trained, tmp_path / "run"))


def change(folder, part, **values):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[part] |= values
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("command", ["sample run=run", "train resume=run trainer.max_steps=9"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_checkpoint_that_is_a_program_is_not_run(refusal, tmp_path, run, command, how):
    content = {"state_dict": Reduced(os.mkdir, str(tmp_path / "executed"))}
    for name in ("last", "previous"):
        path = run / f"checkpoints/{name}.ckpt"
        if how == "pickle":
            path.write_bytes(pickle.dumps(content))
        else:
            torch.save(content, path)
    sentence = refusal(*command.split())
    assert_names(sentence, "last.ckpt", *["could run code"] * (how == "torch"))
    assert "weights_only" not in sentence
    assert not (tmp_path / "executed").exists()


def test_the_weights_of_an_extractor_are_no_program(tmp_path):
    path = tmp_path / "model.pth"
    torch.save({"a": Reduced(os.mkdir, str(tmp_path / "executed"))}, path)
    with refused(path, by=ExtractorUnavailable):
        DINOv2("vit_small_patch14_dinov2.lvd142m", str(path)).load("cpu")
    assert not (tmp_path / "executed").exists()


SECRET = "${oc.env:HOME}"  # the value of an environment variable, if it were resolved


@pytest.mark.long
def test_a_class_named_like_a_variable_keeps_its_name(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "a secret")
    classes = {f"{name}/{i}.png": 9 * i for name in (SECRET, "a${b") for i in range(16)}
    picture_files.folder(tmp_path / "pictures", classes)
    images = ["data=image_folder", "data.source.path=pictures", "data.source.store=false"]
    images += ["data.source.image_size=8", "data.validation_size=2"]
    ours = [each for each in QUICK if not each.startswith("data.")]
    lab.done("train", *ours, *images, "run_dir=run")
    for command in (
        ["sample", "run=run", "num_samples=2"],
        ["train", "resume=run", "trainer.max_steps=6"],
        ["sample", "run=run", "num_samples=2", "data_root=."],
    ):
        lab.done(*command)
    assert list(load_config("run").data.source.classes) == [SECRET, "a${b"]
    texts = [path.read_text() for path in tmp_path.rglob("*.yaml")]
    texts += [path.read_text() for path in tmp_path.rglob("*.json")]
    assert not any("a secret" in text for text in texts)


def test_texts_of_another_s_configuration_are_not_resolved(lab, tmp_path, run, monkeypatch):
    monkeypatch.setenv("HOME", "a secret")
    path = run / "config.yaml"
    config = yaml.safe_load(path.read_text()) | {"name": SECRET, "study_name": "a${b"}
    path.write_text(yaml.safe_dump(config))
    assert load_config(run).name == SECRET
    save_config(run, load_config(run))
    assert load_config(run).study_name == "a${b"
    said = lab("sample", "run=run", "num_samples=2"), lab("publish", "run", "output=published")
    assert said[0][0] == 0, said[0]
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert not any(b"a secret" in content for content in [*written, str(said).encode()])


def test_settings_of_another_s_network_are_not_resolved():
    settings = {"a": SECRET, "b": {"c": [SECRET, "\\" + SECRET]}}
    read = {each.key_or_group: each.value() for each in parse(assigned("x", settings))}
    assert OmegaConf.to_container(OmegaConf.create(read), resolve=True) == {
        f"x.{key}": value for key, value in settings.items()
    }


def test_a_run_with_classes_of_other_packages_is_warned_of_before_they_are_used(lab, tmp_path, run):
    change(run, "sampler", _target_="fractions.Fraction")
    code, _, err = lab("sample", "run=run")
    assert code != 0  # a Fraction is no sampler
    warning = err.index("Warning")
    line = err[warning:].splitlines()[0]
    assert_names(line, "run/config.yaml", "fractions.Fraction", "helpers.tiny_data.TinyData")
    assert err.count("Warning: ") == 1


@pytest.mark.parametrize("name", ["torch.hub.load", "diffusion_lab.nothing", "torch"])
def test_a_function_is_refused(refusal, run, name):
    change(run, "optimizer", _target_=name)
    change(run, "backbone", block={"_target_": "torch.nn.Identity", "deep": [{"_target_": name}]})
    assert f" {name} at " in refusal("sample", "run=run")


def test_a_class_that_starts_a_program_is_refused(refusal, tmp_path, run):
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
    made = str(tmp_path / "executed")
    facts = {"stdout": None, "stderr": None, "local_rank_id": 0, "numa_options": None}
    change(run, "sampler", _target_=handler, entrypoint="touch", args=[made], env={}, **facts)
    assert handler in refusal("sample", "run=run", "num_samples=2")
    assert not (tmp_path / "executed").exists()


def test_a_class_that_empties_a_file_is_refused(refusal, tmp_path, run):
    writer = "lightning.pytorch.loggers.csv_logs.ExperimentWriter"
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs/metrics.csv").write_text("kept")
    change(run, "sampler", _target_=writer, log_dir=str(tmp_path / "theirs"))
    assert_names(refusal("sample", "run=run", "num_samples=2"), writer, "sampler")
    assert (tmp_path / "theirs/metrics.csv").read_text() == "kept"


@pytest.mark.long
def test_a_run_of_ours_with_a_metric_of_torchmetrics_is_not_warned_of(lab):
    own = "++metrics.extra.tv._target_=torchmetrics.image.TotalVariation"
    said = lab.done("train", *OURS, own, "logger=none", "run_dir=run", "trainer.max_steps=1")
    said += lab.done("sample", "run=run", "num_samples=4")
    assert "Warning" not in said


@pytest.mark.parametrize(
    ("key", "name", "trusted"),
    [
        ("trainer", "lightning.Trainer", True),
        ("callbacks.mine", "lightning.pytorch.callbacks.EarlyStopping", True),
        ("trainer.strategy", "lightning.pytorch.strategies.DDPStrategy", True),
        ("trainer.strategy", "diffusion_lab.compute.sharding.FSDP", True),
        ("optimizer", "torch.optim.AdamW", True),
        ("backbone.block", "torch.nn.SiLU", True),
        ("backbone.block", "diffusion_lab.backbone.embedding.nn.Linear", True),  # of torch.nn
        ("metrics.extra.mine", "torchmetrics.image.TotalVariation", True),
        # in the place of another key
        ("sampler", "lightning.Trainer", False),
        ("sampler", "diffusion_lab.training.logger.TensorBoard", False),
        ("sampler.logger", "diffusion_lab.training.logger.TensorBoard", False),
        ("logger.mine", "lightning.pytorch.loggers.CSVLogger", False),
        ("metrics", "torchmetrics.image.TotalVariation", False),
        ("trainer.strategy", "lightning.Trainer", False),
        ("denoiser", "torch.nn.SiLU", False),
        ("own", "diffusion_lab.diffusion.sampler.Heun", False),
        # reached through trusted modules, defined in others
        ("sampler", "diffusion_lab.diffusion.sampler.base.math", False),
        ("data.source", "diffusion_lab.data.source.image_files.Path", False),
        ("optimizer", "torch.optim.optimizer.OrderedDict", False),
        # not classes
        ("backbone", "torch.nn.functional.relu", False),
        ("backbone", "torch.nn.Module.load_state_dict", False),
        ("data", "diffusion_lab.data.nothing", False),
    ],
)
def test_a_key_may_hold_the_classes_of_its_places(key, name, trusted):
    assert folder.is_trusted(key, name) == trusted


def test_nothing_is_imported_to_judge_a_class_of_another_place():
    before = set(sys.modules)
    for name in ("diffusion_lab.__main__.main", "lightning.app.App", "this.s", "antigravity.x"):
        assert not folder.is_trusted("sampler", name)
    assert set(sys.modules) == before


@pytest.mark.long
def test_every_class_of_our_configurations_is_trusted():
    checked = 0
    for path in CONF.rglob("*.yaml"):
        text = path.read_text().replace("???", "null")
        group = path.relative_to(CONF).parent.as_posix()
        if group in ("gpu", "kind", "hydra"):  # no part of a run
            continue
        whole = group == "." or "@package _global_" in text
        content = OmegaConf.create(verbatim(yaml.safe_load(text) or {}))
        for key, name in folder.targets(content, "" if whole else group.replace("/", ".")):
            checked += 1
            assert name == "None" or folder.is_trusted(key, name), path
    assert checked > 100


def test_targets_are_found_at_any_depth():
    cfg = OmegaConf.create({"_target_": "a.B", "c": [{"d": {"_target_": "e.F"}}, 1], "g": None})
    assert list(folder.targets(cfg)) == [("", "a.B"), ("c.d", "e.F")]
