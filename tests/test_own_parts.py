"""Trains runs with a user's own parts, each of one Python file and one YAML file."""

import importlib
import json
import math
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compositions import assembled
from helpers.exact_denoiser import GaussianMixture
from helpers.pages import PAGES, blocks_of, check_study, commands_of
from helpers.paths import ROOT
from helpers.refusals import assert_names, refused, sentence_of
from helpers.tiny_runs import TINY, TINY_AUTOENCODER, curve
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.assembly import families
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.estimate.budget import images_for
from diffusion_lab.runs import folder

OWN_PARTS, OWN_DATA = (PAGES / f"{name}.md" for name in ("own-parts", "own-data"))
PYTHON, YAML = (
    blocks_of(OWN_PARTS, language) | blocks_of(OWN_DATA, language)
    for language in ("python", "yaml")
)
QUICK = [*TINY, "logger=none", "callbacks.evaluation=null", "run_dir=run"]


def command_with(words: str) -> list[str]:
    """The arguments of the pages' command that begins so, after `--config-dir my_conf`."""
    lines = [line for page in (OWN_PARTS, OWN_DATA) for line in commands_of(page)]
    (line,) = (line for line in lines if line.startswith(f"diffusion-lab {words}"))
    return line.partition("--config-dir my_conf ")[2].split()


def without(group: str) -> list[str]:
    """The arguments of a quick run that are not of a group."""
    return [argument for argument in QUICK if not argument.startswith(group)]


# the arguments that train a quick run with each part, and the option's file
TRAIN = "train --config-dir my_conf"
PARTS = {
    "sampler": ("sampler/midpoint", [*QUICK, "sampler=midpoint", "sampler.steps=2"]),
    "schedule": ("schedule/power", [*command_with(f"{TRAIN} schedule"), *QUICK]),
    "network": (
        "backbone/convolutions",
        [*command_with(f"{TRAIN} backbone"), "backbone.width=8", *without("backbone")],
    ),
    "metric": (
        "metrics/mine",
        [*TINY, "logger=none", "run_dir=run", *command_with(f"{TRAIN} metrics")],
    ),
    "callback": (
        "callbacks/counts",
        [
            *QUICK,
            *command_with(f"{TRAIN} callbacks"),
            "callbacks.counts.every_n_steps=2",
            "trainer.max_steps=5",
        ],
    ),
    "objective": ("objective/loss/absolute", [*command_with(f"{TRAIN} objective/loss"), *QUICK]),
    "model": ("family/pixels", [*without("backbone"), *command_with(f"{TRAIN} family")]),
    "source": ("data/grey", [*without("data"), *command_with(f"{TRAIN} data=grey")]),
    "hour": ("data/sky", [*without("data"), *command_with(f"{TRAIN} data=sky")]),
}


@pytest.fixture
def forgetting(monkeypatch):
    """Removes the current folder from sys.path, as for a console script; unloads the parts."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield
    for part in [*PARTS, "module"]:
        sys.modules.pop(f"my_{part}s", None)


@pytest.fixture
def write(lab, tmp_path, forgetting):
    """A function: write("sampler") writes a part's two files -> the arguments that choose it."""

    def files_of(part: str) -> list[str]:
        option, arguments = PARTS[part]
        (tmp_path / f"my_{part}s.py").write_text(PYTHON[f"my_{part}s.py"])
        name = f"my_conf/{option}.yaml"
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(YAML[name])
        importlib.invalidate_caches()
        return ["--config-dir", "my_conf", *arguments]

    return files_of


@pytest.fixture(scope="module")
def kept(tmp_path_factory) -> Path:
    """The folder that keeps the run of each part, so that it is trained once."""
    return tmp_path_factory.mktemp("parts")


@pytest.fixture
def train_with(lab, write, kept):
    """A function: train_with("sampler") writes the part, and its run (trained once) to run/."""

    def leave_run(part: str) -> None:
        arguments = write(part)
        if not (kept / part).exists():
            lab.done("train", *arguments)
            shutil.copytree("run", kept / part)
        else:
            shutil.copytree(kept / part, "run")

    return leave_run


@pytest.mark.long
@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_ones_own_is_two_files(lab, train_with, part):
    train_with(part)
    lab.done("sample", "run=run", "num_samples=4")
    assert f"my_{part}s" in Path("run/config.yaml").read_text()


def test_a_family_of_ones_own_is_measured_and_exported(lab, train_with):
    train_with("model")
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]
    assert {"val/nats", "test/nats"} <= metrics.keys()
    for command in ("evaluate run=run", "export run=run output=exported", "sample run=exported"):
        lab.done(*command.split())
    named = dict(folder.targets(OmegaConf.load("exported/config.yaml")))
    assert named["family"].startswith("my_models"), "a stranger's code is named"


def test_a_family_that_is_nowhere_is_refused():
    with refused("family=nowhere.at_all"):
        families.part(OmegaConf.create({"family": "nowhere.at_all"}), "task")


@pytest.mark.long
def test_the_values_of_a_metric_are_kept_with_the_others(lab, train_with):
    train_with("metric")
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]
    for name in ("mean_gap", "mean_gap_real", "fid"):
        (value,) = (metrics[key] for key in metrics if key.startswith(f"{name}/"))
        assert value >= 0
    result = lab.result("evaluate", "run=run")
    assert any(key.startswith("mean_gap/") for key in result)


def test_a_callback_is_called_every_so_many_steps(train_with):
    train_with("callback")
    assert Path("run/counts.txt").read_text().split() == ["2", "4"]


@pytest.mark.parametrize("value", ["torch.ones(())", "numpy.float32(1)", "torch.ones(2)"])
def test_a_callback_records_single_numbers(lab, write, tmp_path, value):
    arguments = write("callback")
    code = PYTHON["my_callbacks.py"].replace(
        "        with (",
        f'        trainer.lightning_module.record({{"mine": {value}}})\n        with (',
    )
    (tmp_path / "my_callbacks.py").write_text(f"import numpy\nimport torch\n{code}")
    wrong = value == "torch.ones(2)"
    err = lab.done("train", *arguments, code=2 if wrong else 0)
    if wrong:
        assert_names(sentence_of(err), "mine", "(2,)")
    else:
        assert curve(tmp_path / "run", "mine") == [1, 1]


def test_a_callback_that_inherits_from_one_that_does_not_work_is_refused(refusal, write, tmp_path):
    arguments = write("callback")
    (tmp_path / "my_callbacks.py").write_text(
        "from lightning.pytorch.callbacks import GradientAccumulationScheduler\n\n\n"
        "class Counts(GradientAccumulationScheduler):\n"
        "    def __init__(self, every_n_steps):\n"
        "        super().__init__({0: every_n_steps})\n"
    )
    assert_names(refusal("train", *arguments), "callbacks.counts", "micro_batch_size")
    assert not Path("run").exists()


def test_the_images_of_a_source_are_learned_from(train_with):
    train_with("source")
    with Image.open("run/samples/step_0000004.png") as picture:
        assert picture.size == (2 * (2 * 10 + 2), 2 * (2 * 10 + 2))  # one row per class


DATA_MODULES = """
import lightning

from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.images import ImageData


class Plain(lightning.LightningDataModule):
    def __init__(self, batch_size=8):
        super().__init__()


class Images(ImageData):
    pass


class Whole(ImageDataModule):
    pass


def made(**settings):
    return Plain()
"""


@pytest.mark.parametrize("kind", ["Plain", "Images", "made"])
def test_a_data_module_of_another_kind_is_refused_before_anything_is_written(
    refusal, tmp_path, forgetting, kind
):
    (tmp_path / "my_modules.py").write_text(DATA_MODULES)
    own = f"data._target_=my_modules.{kind}"
    for command in (["train", *QUICK], ["train-autoencoder", *TINY_AUTOENCODER, "run_dir=run"]):
        assert_names(refusal(*command, own), own, "diffusion_lab.data.ImageDataModule")
    assert not Path("run").exists()


def test_a_run_of_a_data_module_of_another_kind_is_refused(refusal, lab, tmp_path, forgetting):
    (tmp_path / "my_modules.py").write_text(DATA_MODULES)
    lab.done("train", *QUICK, "data._target_=my_modules.Whole")
    config = Path("run/config.yaml")
    config.write_text(config.read_text().replace("my_modules.Whole", "my_modules.Plain"))
    for command in ("evaluate run=run", "sample run=run", "train resume=run trainer.max_steps=6"):
        assert_names(refusal(*command.split()), "my_modules.Plain", "ImageDataModule")


def test_samples_of_a_kind_of_labels_are_asked_for(lab, train_with):
    train_with("hour")
    lab.done("sample", "run=run", "labels=[6,18]", "num_samples=2", "save=npz")
    (path,) = Path("run/samples").glob("*n2.npz")
    assert np.load(path)["labels"].tolist() == [6, 18]
    err = lab.done("sample", "run=run", "labels=[24]", code=2)
    assert_names(err, "labels=[24]", "hours")


def test_the_sampler_is_chosen_for_a_trained_run(lab, write, run_folder):
    write("sampler")
    _, *chosen = command_with("sample --config-dir my_conf")
    arguments = ["--config-dir", "my_conf", "run=run", *chosen, "num_samples=4"]
    lab.done("sample", *arguments)
    assert list((run_folder / "samples").glob("midpoint*.png"))


def test_the_network_borrows_the_keys_of_another(lab, write):
    write("network")
    target = "backbone._target_=my_networks.Convolutions"
    assert f"diffusion-lab train backbone=mlp {target} backbone.width=64" in commands_of(OWN_PARTS)
    arguments = ["backbone=mlp", target, "backbone.width=64", *without("backbone")]
    lab.done("train", *arguments)


def test_a_run_is_not_opened_where_its_part_is_missing(lab, train_with, tmp_path, monkeypatch):
    train_with("network")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    sys.modules.pop("my_networks", None)
    err = lab.done("sample", "run=../run", "num_samples=4", code=2)
    warning, sentence = err.strip().splitlines()
    assert warning.startswith("Warning: ")
    for name in ("my_networks.Convolutions", "helpers.tiny_data.TinyData"):
        assert name in warning
    assert "my_networks" in sentence


def test_a_wrong_name_is_one_sentence(refusal, write):
    write("network")
    wrong = ["backbone=mlp", "backbone._target_=my_networks.Conv", *without("backbone")]
    assert "my_networks.Conv" in refusal("train", *wrong)
    assert not Path("run").exists()


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("self.condition_width = width", "self.width = width", "condition_width"),
        ("(self, x, noise, condition)", "(self, x, noise)", "(x, noise, condition)"),
        ("        return ", "        return x[..., 1:]  # ", "(1, 8, 8, 7)"),
        ("        return ", "        return x, ", "tuple"),
    ],
)
def test_a_network_that_cannot_be_asked_is_refused_before_anything_is_written(
    refusal, write, tmp_path, old, new, named
):
    arguments = write("network")
    code = PYTHON["my_networks.py"]
    assert old in code
    (tmp_path / "my_networks.py").write_text(code.replace(old, new))
    assert_names(refusal("train", *arguments), "Convolutions", named)
    assert not Path("run").exists()


def test_an_option_that_is_no_yaml_is_named_with_its_line(refusal, write):
    arguments = write("network")
    file = Path("my_conf/backbone/convolutions.yaml")
    file.write_text("_target_: my_networks.Convolutions\n_partial_: true\n  width: 8\n")
    assert_names(refusal("train", *arguments), str(file), "line 3")


@pytest.mark.slow
def test_a_network_that_reads_its_tensors_is_counted_all_the_same(lab, write, tmp_path):
    write("network")
    code = PYTHON["my_networks.py"].replace(
        "        return ", "        assert x.abs().max().item() < 10\n        return "
    )
    (tmp_path / "my_networks.py").write_text(code)
    counted = []
    for command, more in (("profile", "speed=false"), ("plan", "devices=1")):
        result = lab.result(command, "--config-dir", "my_conf", "backbone=convolutions", more)
        counted.append(result)
    assert counted[0]["macs"] == counted[1]["macs"] > 0
    assert counted[1]["memory"]["activations"] > 0


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("error.abs().flatten(1).mean(1)", "error.abs().mean()", "()"),
        ("error.abs().flatten(1).mean(1)", "error.abs().mean().reshape(1)", "(1,)"),
        ("error.abs().flatten(1).mean(1)", "error.abs()", "(2, 1, 8, 8)"),
        ("flatten(1).mean(1), level)", "flatten(1).mean(1), level, error.mean())", "()"),
        ("Losses(error.abs().flatten(1).mean(1), level)", "error.abs().mean()", "Tensor"),
        ("return Losses", "Losses", "NoneType"),
        ("flatten(1).mean(1), level)", "flatten(1).mean(1), level.t)", "level"),
        (
            "    rules =",
            "    def measured(self, *parts):\n        return parts[3].mean()\n\n    rules =",
            "()",
        ),
    ],
)
def test_a_loss_without_a_value_for_each_image_is_refused_before_anything_is_written(
    refusal, write, tmp_path, old, new, named
):
    arguments = write("objective")
    code = PYTHON["my_objectives.py"]
    assert old in code
    (tmp_path / "my_objectives.py").write_text(code.replace(old, new))
    assert_names(refusal("train", *arguments), "Absolute", named)
    assert not Path("run").exists()


def test_a_loss_that_cannot_be_tried_is_refused_in_its_first_step(refusal, write, tmp_path):
    arguments = write("objective")
    code = PYTHON["my_objectives.py"].replace("flatten(1).mean(1)", "mean()")
    code = code.replace("        output =", "        assert len(x0) > 2\n        output =")
    (tmp_path / "my_objectives.py").write_text(code)
    assert_names(refusal("train", *arguments), "Absolute", "()", "8")
    assert not Path("run/metrics.jsonl").exists()


def test_a_loss_is_costed_and_says_what_it_forbids(lab, write, refusal):
    arguments = write("objective")
    assert_names(
        refusal("train", *arguments, "coupling=optimal_transport"),
        "objective/loss=absolute",
        "coupling=none",
    )
    cfg = assembled()
    cfg.objective.loss = {"_target_": "my_objectives.Absolute"}
    images = images_for(1e12, cfg, 1000)
    sys.modules["my_objectives"].Absolute.extra_passes = 1.0
    assert images / images_for(1e12, cfg, 1000) == pytest.approx(4 / 3, rel=1e-3)


def test_a_run_is_sampled_without_the_class_of_its_loss(lab, train_with):
    train_with("objective")
    Path("my_objectives.py").unlink()
    sys.modules.pop("my_objectives", None)
    lab.done("sample", "run=run", "num_samples=4")


def test_the_readmes_parts_are_those_of_the_pages():
    files = blocks_of(ROOT / "README.md", "python")
    assert files
    for name, code in files.items():
        assert code == PYTHON[name], name


def made_of(name: str) -> dict:
    found = {}
    exec(PYTHON[name], found)
    return found


def test_the_sampler_is_of_second_order():
    mixture, schedule = GaussianMixture([0.5, 0.5], [-1.0, 1.5], 0.5), Rectified()
    levels = schedule(torch.tensor([0.9, 0.2]))
    torch.manual_seed(0)
    x = torch.randn(200, 1, dtype=torch.float64)
    exact = mixture.transport(x, *levels)
    errors = []
    for steps in (20, 40):
        sampler = made_of("my_samplers.py")["Midpoint"](steps, UniformGrid())
        path = schedule(torch.linspace(0.9, 0.2, steps + 1, dtype=torch.float64))
        *_, end = sampler.walk(mixture.denoise, x, path, schedule, None)
        errors.append((end - exact).square().mean().sqrt())
    assert math.log2(errors[0] / errors[1]) == pytest.approx(2, abs=0.1)


def test_the_schedule_is_inverted():
    schedule = made_of("my_schedules.py")["Power"](3)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.at_logsnr(schedule(t).logsnr).t, t, atol=1e-9, rtol=0)


@pytest.mark.long
def test_the_study_of_the_page_is_read_and_its_trainings_compose(tmp_path, monkeypatch):
    ((name, text),) = blocks_of(PAGES / "sweeps.md", "yaml").items()
    (tmp_path / name).parent.mkdir(parents=True)
    (tmp_path / name).write_text(text)
    for label in ("fox", "hare"):
        (tmp_path / "photos" / label).mkdir(parents=True)
        for number in range(20):
            Image.new("RGB", (64, 64)).save(tmp_path / "photos" / label / f"{number}.png")
    monkeypatch.chdir(tmp_path)
    lines = [line for line in commands_of(PAGES / "sweeps.md") if "--config-dir" in line]
    assert lines
    for line in lines:
        check_study(line.split()[2:])
