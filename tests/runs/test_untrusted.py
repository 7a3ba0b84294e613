"""Files of others are not executed: no pickles, and a warning of unknown classes in a run."""

import os
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.commands import run_alone
from helpers.paths import ROOT
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

from diffusion_lab.metrics import ExtractorUnavailable
from diffusion_lab.metrics.extractor import DINOv2
from diffusion_lab.runs import trusted_targets

QUICK = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
OURS = ["experiment=toy/two_moons", "+debug=fast", "trainer=cpu", "callbacks.evaluation=null"]


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    run_alone(folder, "train", *QUICK, "run_dir=run")
    return folder / "run"


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def change(folder, part, **values):
    path = folder / "config.yaml"
    config = yaml.safe_load(path.read_text())
    config[part] |= values
    path.write_text(yaml.safe_dump(config))


@pytest.mark.parametrize("command", ["sample run=run", "train resume=run trainer.max_steps=9"])
@pytest.mark.parametrize("how", ["pickle", "torch"])
def test_a_checkpoint_that_is_a_program_is_not_run(refusal, tmp_path, run, command, how):
    content = {"state_dict": Bomb(tmp_path / "executed")}
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
    torch.save({"a": Bomb(tmp_path / "executed")}, path)
    with refused(path, by=ExtractorUnavailable):
        DINOv2("vit_small_patch14_dinov2.lvd142m", str(path)).load("cpu")
    assert not (tmp_path / "executed").exists()


def test_a_run_with_classes_of_other_packages_is_warned_of_before_they_are_used(lab, tmp_path, run):
    change(run, "sampler", _target_="fractions.Fraction")
    code, _, err = lab("sample", "run=run")
    assert code != 0  # a Fraction is no sampler
    warning = err.index("Warning")
    line = err[warning:].splitlines()[0]
    assert_names(line, "run/config.yaml", "fractions.Fraction", "helpers.tiny_data.TinyData")
    assert err.count("Warning: ") == 1


def test_a_run_of_ours_is_not_warned_of(lab, tmp_path):
    code, _, err = lab("train", *OURS, "logger=none", "run_dir=run", "trainer.max_steps=1")
    assert code == 0, err
    code, _, err = lab("sample", "run=run", "num_samples=4")
    assert code == 0, err
    assert "Warning" not in err


@pytest.mark.parametrize("name", ["torch.hub.load", "diffusion_lab.nothing", "torch"])
def test_a_function_is_refused(refusal, run, name):
    change(run, "optimizer", _target_=name)
    change(run, "backbone", block={"_target_": "torch.nn.Identity", "deep": [{"_target_": name}]})
    assert f" {name}, " in refusal("sample", "run=run")


def test_a_class_that_starts_a_program_is_refused(refusal, tmp_path, run):
    handler = "torch.distributed.elastic.multiprocessing.subprocess_handler.SubprocessHandler"
    made = str(tmp_path / "executed")
    facts = {"stdout": None, "stderr": None, "local_rank_id": 0, "numa_options": None}
    change(run, "sampler", _target_=handler, entrypoint="touch", args=[made], env={}, **facts)
    assert handler in refusal("sample", "run=run", "num_samples=2")
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "trusted"),
    [
        ("lightning.Trainer", True),
        ("lightning.pytorch.callbacks.EarlyStopping", True),
        ("lightning.pytorch.strategies.DDPStrategy", True),
        ("lightning.pytorch.loggers.CSVLogger", True),
        ("torch.optim.AdamW", True),
        ("torch.optim.lr_scheduler.LambdaLR", True),
        ("torch.nn.SiLU", True),
        ("diffusion_lab.backbone.embedding.nn.Linear", True),  # defined by torch.nn
        ("diffusion_lab.compute.sharding.FSDP", True),
        # reached through trusted modules, defined in others
        ("diffusion_lab.compute.launch.logging.FileHandler", False),
        ("diffusion_lab.compute.slurm.subprocess.Popen", False),
        ("diffusion_lab.compute.slurm.Path", False),
        ("torch.optim.optimizer.OrderedDict", False),
        ("torch.multiprocessing.Process", False),
        ("torch.utils.cpp_extension.subprocess.Popen", False),
        # classes of torch and lightning that no configuration uses
        ("torch.FileStore", False),
        ("torch.package.PackageImporter", False),
        ("torch.distributed.TCPStore", False),
        ("lightning.pytorch.cli.LightningCLI", False),
        # not classes
        ("torch.load", False),
        ("torch.nn.functional.relu", False),
        ("torch.nn.Module.load_state_dict", False),
        ("diffusion_lab.runs.diffusion_run.load", False),
    ],
)
def test_a_class_is_judged_by_where_it_is_defined(name, trusted):
    assert trusted_targets.is_trusted(name) == trusted


def test_every_class_of_our_configurations_is_trusted():
    files = (ROOT / "conf").rglob("*.yaml")
    texts = [re.sub("#.*", "", path.read_text()) for path in files]
    names = {name for text in texts for name in re.findall(r"_target_: *([^\s?]+)", text)}
    assert len(names) > 100
    assert [name for name in sorted(names) if not trusted_targets.is_trusted(name)] == []


def test_targets_are_found_at_any_depth():
    cfg = OmegaConf.create({"_target_": "a.B", "c": [{"d": {"_target_": "e.F"}}, 1], "g": None})
    assert list(trusted_targets.targets(cfg)) == ["a.B", "e.F"]
