"""Trains runs with a user's own parts, each of one Python file and one YAML file."""

import importlib
import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.paths import ROOT
from helpers.tiny_runs import TINY
from PIL import Image

from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Rectified

README = (ROOT / "README.md").read_text()
QUICK = [*TINY, "logger=none", "callbacks.evaluation=null", "run_dir=run"]
OTHER_NETWORK = [a for a in QUICK if not a.startswith("backbone")]
METRIC = """
from diffusion_lab.metrics.metric import Metric, Quantity

class MeanGap(Metric):
    quantities = (Quantity("mean_gap", "gap of means", "how far means are apart", False),)

    def measure(self, generated, reference):
        gap = generated.features.mean(0) - reference.features.mean(0)
        return {"mean_gap": float(gap.norm())}
"""
CALLBACK = '''
from diffusion_lab.training.callbacks import Periodic

class Counts(Periodic):
    """Writes down at which steps it was called."""

    def __init__(self, every_n_steps: int = 1):
        self.every_n_steps = every_n_steps

    def run(self, trainer):
        with (trainer.lightning_module.context.folder / "counts.txt").open("a") as file:
            file.write(f"{trainer.global_step} ")
'''
SOURCE = """
import torch
from diffusion_lab.data import DataSource, Split

class Grey(DataSource):
    native_shape = (1, 8, 8)
    class_names = ("dark", "light")

    def __init__(self, shades: tuple = (60, 200)):
        self.shades = shades

    def load(self):
        labels = torch.arange(40) % 2
        shades = torch.tensor(list(self.shades), dtype=torch.uint8)[labels]
        split = Split(shades[:, None, None, None].expand(-1, 1, 8, 8).contiguous(), labels)
        return split, split
"""


def code_of(name: str) -> str:
    return re.search(rf"```python\n(# {name}\n.+?)```", README, re.DOTALL)[1]


def command_with(words: str) -> list[str]:
    """The arguments of the README's command that begins with `words`."""
    return re.search(rf"^    diffusion-lab ({words}.*)$", README, re.MULTILINE)[1].split()


# part -> its code, configuration file, configuration, and the arguments that choose it
PARTS = {
    "sampler": (
        code_of("my_samplers.py"),
        "sampler/midpoint.yaml",
        "defaults: [{time_grid: uniform}, _self_]\n_target_: my_samplers.Midpoint\nsteps: 10\n",
        [*QUICK, "sampler=midpoint", "sampler.steps=2"],
    ),
    "schedule": (
        code_of("my_schedules.py"),
        "schedule/power.yaml",
        "_target_: my_schedules.Power\npower: 2\n",
        [*command_with("train --config-dir my_conf schedule=power")[3:], *QUICK],
    ),
    "network": (
        code_of("my_networks.py"),
        "backbone/convolutions.yaml",
        "_target_: my_networks.Convolutions\n_partial_: true\nwidth: 8\ndepth: 2\n",
        [*command_with("train --config-dir my_conf backbone=convolutions")[3:], *OTHER_NETWORK],
    ),
    "metric": (
        METRIC,
        "metrics/mine.yaml",
        "defaults: [efficientnet_lite0, _self_]\nextra: {gap: {_target_: my_metrics.MeanGap}}\n",
        [*TINY, "logger=none", "run_dir=run", "metrics=mine"],
    ),
    "callback": (
        CALLBACK,
        "callbacks/counts.yaml",
        "_target_: my_callbacks.Counts\nevery_n_steps: 1\n",
        [
            *QUICK,
            "trainer.max_steps=5",
            "+callbacks@callbacks.counts=counts",
            "callbacks.counts.every_n_steps=2",
        ],
    ),
    "source": (
        SOURCE,
        "data/grey.yaml",
        "defaults: [images, _self_]\nsource: {_target_: my_sources.Grey, shades: [60, 200]}\n",
        [*(a for a in QUICK if not a.startswith("data")), "data=grey", "data.validation_size=10"],
    ),
}


@pytest.fixture
def forgetting(monkeypatch):
    """Removes the current folder from sys.path, as for a console script; unloads the parts."""
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    yield
    for part in PARTS:
        sys.modules.pop(f"my_{part}s", None)


@pytest.fixture
def write(lab, tmp_path, forgetting):
    """A function: write("sampler") writes a part's two files -> the arguments that choose it."""

    def files_of(part: str) -> list[str]:
        code, place, configuration, arguments = PARTS[part]
        (tmp_path / f"my_{part}s.py").write_text(code)
        file = tmp_path / "my_conf" / place
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(configuration)
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
            code, _, err = lab("train", *arguments)
            assert code == 0, err
            shutil.copytree("run", kept / part)
        else:
            shutil.copytree(kept / part, "run")

    return leave_run


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_ones_own_is_two_files(lab, train_with, part):
    train_with(part)
    code, _, err = lab("sample", "run=run", "num_samples=4")
    assert code == 0, err
    assert f"my_{part}s." in Path("run/config.yaml").read_text()


def test_the_values_of_a_metric_are_kept_with_the_others(lab, train_with):
    train_with("metric")
    metrics = json.loads(Path("run/summary.json").read_text())["metrics"]
    for name in ("mean_gap", "mean_gap_real", "fid"):
        (value,) = (metrics[key] for key in metrics if key.startswith(f"{name}/"))
        assert value >= 0
    code, out, err = lab("evaluate", "run=run", "json=true")
    assert code == 0, err
    assert any(key.startswith("mean_gap/") for key in json.loads(out.splitlines()[-1]))


def test_a_callback_is_called_every_so_many_steps(train_with):
    train_with("callback")
    assert Path("run/counts.txt").read_text().split() == ["2", "4"]


def test_the_images_of_a_source_are_learned_from(train_with):
    train_with("source")
    with Image.open("run/samples/step_0000004.png") as picture:
        assert picture.size == (2 * (2 * 10 + 2), 2 * (2 * 10 + 2))  # one row per class


def test_the_readmes_sampler_is_chosen_for_a_trained_run(lab, write, run_folder):
    write("sampler")
    (chosen,) = re.findall(r"^    diffusion-lab (.*sampler=midpoint)$", README, re.MULTILINE)
    code, _, err = lab(*chosen.replace("outputs/NAME/TIMESTAMP", "run").split(), "num_samples=4")
    assert code == 0, err
    assert list((run_folder / "samples").glob("midpoint*.png"))


def test_the_readmes_network_borrows_the_keys_of_another(lab, write):
    write("network")
    code, _, err = lab(*command_with("train backbone=mlp"), *OTHER_NETWORK)
    assert code == 0, err


def test_a_run_is_not_opened_where_its_part_is_missing(lab, train_with, tmp_path, monkeypatch):
    train_with("network")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place != str(tmp_path)])
    sys.modules.pop("my_networks", None)
    code, _, err = lab("sample", "run=../run", "num_samples=4")
    assert code == 2
    warning, sentence = err.strip().splitlines()
    assert warning.startswith("Warning: ")
    for name in ("my_networks.Convolutions", "helpers.tiny_data.TinyData"):
        assert name in warning
    assert "my_networks" in sentence


def test_a_wrong_name_is_one_sentence(refusal, write):
    write("network")
    wrong = ["backbone=mlp", "backbone._target_=my_networks.Conv", *OTHER_NETWORK]
    assert "my_networks.Conv" in refusal("train", *wrong)
    assert not Path("run").exists()


@pytest.mark.slow
def test_a_network_that_reads_its_tensors_is_profiled_all_the_same(lab, write, tmp_path):
    write("network")
    code = code_of("my_networks.py").replace(
        "        return ", "        assert x.abs().max().item() < 10\n        return "
    )
    (tmp_path / "my_networks.py").write_text(code)
    arguments = ["--config-dir", "my_conf", "backbone=convolutions", "speed=false", "json=true"]
    code, out, err = lab("profile", *arguments)
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["macs"] > 0


def test_the_readmes_configurations_are_these():
    for part in ("sampler", "schedule"):
        for line in PARTS[part][2].replace("defaults: ", "`defaults: ").splitlines():
            assert line in README or f"`{line}`" in README, line


def made_of(name: str) -> dict:
    found = {}
    exec(code_of(name), found)
    return found


def test_the_readmes_sampler_is_of_second_order():
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


def test_the_readmes_schedule_is_inverted():
    schedule = made_of("my_schedules.py")["Power"](3)
    t = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    torch.testing.assert_close(schedule.at_logsnr(schedule(t).logsnr).t, t, atol=1e-9, rtol=0)
