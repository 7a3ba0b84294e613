"""The example W&B sweep starts an existing command with overrides that Hydra accepts."""

import subprocess
import sys
import tomllib

import pytest
import yaml
from helpers.logged_names import is_known
from helpers.paths import ROOT
from helpers.tiny_runs import TINY
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from diffusion_lab.cli.commands import COMMANDS

SWEEP = yaml.safe_load((ROOT / "experiments/wandb_sweep.yaml").read_text())


def values(parameter: dict) -> list:
    """The values of a parameter, or the ends of its interval."""
    return parameter.get("values") or [
        parameter[key] for key in ("value", "min", "max") if key in parameter
    ]


def test_the_command_is_a_script_of_this_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert SWEEP["program"] in scripts
    program, command, *fixed, chosen = SWEEP["command"]
    assert (program, chosen) == ("${program}", "${args_no_hyphens}")
    assert command in COMMANDS
    assert all("=" in override for override in fixed)


@pytest.mark.parametrize("key", SWEEP["parameters"])
def test_each_parameter_is_an_override(key):
    parameter = SWEEP["parameters"][key]
    assert values(parameter)
    assert all(not isinstance(value, str) for value in values(parameter)) or "values" in parameter
    _, command, *fixed, _ = SWEEP["command"]
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        composed = [
            compose(command, overrides=["name=x", *fixed, f"{key}={value}"])
            for value in values(parameter)
        ]
    chosen = [str(OmegaConf.select(cfg, key)) for cfg in composed]
    assert len(set(chosen)) == len(values(parameter))


@pytest.mark.slow
def test_a_run_keeps_the_id_that_the_agent_gave_it(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_SWEEP_ID", "sweep")
    monkeypatch.setenv("WANDB_RUN_ID", "chosen")
    # in a new process, as the agent starts it: W&B reads its environment variables once
    command = [sys.executable, "-m", "diffusion_lab", "train", *TINY, "callbacks.evaluation=null"]
    subprocess.run([*command, "run_dir=run"], check=True, cwd=tmp_path)
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert config["logger"]["wandb"]["run_id"] == "chosen"
    assert list((tmp_path / "run/wandb").glob("offline-run-*-chosen"))


def test_the_metric_is_logged():
    assert is_known(SWEEP["metric"]["name"])
