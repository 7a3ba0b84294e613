"""A family of a user's own, in one module and one option, is trained, opened and exported."""

import json

from helpers.refusals import sentence_of
from helpers.tiny_runs import TINY

from diffusion_lab import runs
from diffusion_lab.runs import trusted_targets

OPTION = """# @package _global_
defaults:
  - override /backbone: null
  - override /conditioning: null
  - override /objective: null
  - override /first_stage: null
  - override /sampler: null
  - override /guidance: null
  - override /schedule: null
  - override /augmentation: null
  - override /coupling: null
  - override /alignment: null
  - override /callbacks@callbacks.denoising: null
  - override /callbacks@callbacks.level_losses: null

family: helpers.own_family
denoiser: null
"""
PLAIN = [each for each in TINY if not each.startswith("backbone")]


def test_one_module_and_one_option_make_a_family(lab, tmp_path):
    (tmp_path / "conf/family").mkdir(parents=True)
    (tmp_path / "conf/family/pixels.yaml").write_text(OPTION)
    code, _, err = lab(
        "train", "--config-dir", "conf", *PLAIN, "family=pixels", "logger=none", "run_dir=run"
    )
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["finished"]
    assert summary["parameters"] == 2 * 8 * 8
    assert {"val/nats", "test/nats"} <= summary["metrics"].keys()
    for command in (["sample", "run=run"], ["export", "run=run", "output=exported"]):
        code, _, err = lab(*command)
        assert code == 0, err
    code, _, err = lab("sample", "run=exported", "output=again")
    assert code == 0, err
    named = dict(trusted_targets.targets(runs.load_config("run")))["family"]
    assert named.startswith("helpers.own_family"), "opening it says that its code is a stranger's"


def test_a_family_that_is_nowhere_is_refused(lab):
    code, _, err = lab("train", *TINY, "family=diffusion", "++family=nowhere.at_all")
    assert code == 2
    assert "nowhere.at_all" in sentence_of(err)
