"""The README's schedule and sampler of one's own: as accurate as it says, and used by a run."""

import math
import re

import pytest
import torch
from helpers.exact_denoiser import GaussianMixture
from helpers.paths import ROOT
from helpers.tiny_runs import TINY

from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.diffusion.schedule import Rectified

README = (ROOT / "README.md").read_text()
FILES = {
    "schedule/power.yaml": "_target_: my_schedules.Power\npower: 2\n",
    "sampler/midpoint.yaml": "defaults: [{time_grid: uniform}, _self_]\n"
    "_target_: my_samplers.Midpoint\nsteps: 10\n",
}


def code_of(name: str) -> str:
    return re.search(rf"```python\n(# {name}\n.+?)```", README, re.DOTALL)[1]


def made_of(name: str) -> dict:
    found = {}
    exec(code_of(name), found)
    return found


def test_the_readmes_configurations_are_these():
    for content in FILES.values():
        for line in content.replace("defaults: ", "`defaults: ").splitlines():
            assert line in README or f"`{line}`" in README, line


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


def test_both_are_found_by_the_command_line(lab, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_schedules.py", "my_samplers.py"):
        (tmp_path / name).write_text(code_of(name))
    for name, content in FILES.items():
        (tmp_path / "my_conf" / name).parent.mkdir(parents=True)
        (tmp_path / "my_conf" / name).write_text(content)
    train, sample = re.findall(
        r"^    diffusion-lab (.*(?:power|midpoint).*)$", README, re.MULTILINE
    )
    quick = [*TINY, "logger=none", "callbacks.evaluation=null", "run_dir=run"]
    code, _, err = lab(*train.split(), *quick)
    assert code == 0, err
    assert "power: 3" in (tmp_path / "run/config.yaml").read_text()
    code, _, err = lab(*sample.replace("outputs/NAME/TIMESTAMP", "run").split(), "num_samples=4")
    assert code == 0, err
    assert list((tmp_path / "run/samples").glob("midpoint*.png"))
