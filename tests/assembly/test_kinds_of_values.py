"""Every key of `train` with a value of another kind: it trains, or one sentence says why not."""

import copy
from pathlib import Path

import pytest
from helpers.compositions import composed
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import CLASS, check_boxes, flat, leave_out, paths_as_text
from diffusion_lab.assembly.sentences import MISTAKES, conf_dir, sentence
from diffusion_lab.cli.commands import COMMANDS, prepare
from diffusion_lab.common.messages import UserError
from diffusion_lab.training import train
from diffusion_lab.training.task import build_task

VALUES = {"null": None, "{}": {}, "[1]": [1], "nan": float("nan")}
BASE = ("name=x", *TINY)


def plain() -> dict:
    return OmegaConf.to_container(composed("train", *BASE))


def boxes() -> list[str]:
    """The keys that have keys below them."""
    return sorted({key.rpartition(".")[0] for key in flat(plain())} - {""})


def is_group(key: str) -> bool:
    return (conf_dir() / key).is_dir()


def begin(key: str, value: object) -> None:
    """Does what `train` does before it makes a folder."""
    cfg = copy.deepcopy(composed("train", *BASE))
    OmegaConf.update(cfg, key, value, merge=isinstance(value, dict))
    check_boxes(cfg)
    leave_out(cfg, {}, [])
    paths_as_text(cfg)
    train.check_settings(cfg)
    build_task(cfg)


def one_sentence(key: str, value: object) -> bool:
    """Whether a value is refused in one sentence; no other error is let through."""
    try:
        begin(key, value)
    except MISTAKES as error:
        said = sentence(error)
        assert said
        assert "\n" not in said
        return True
    return False


@pytest.mark.parametrize("group", [path.name for path in conf_dir().iterdir() if path.is_dir()])
def test_a_group_takes_the_name_of_an_option_alone(group):
    for text in ("null", "[1]", "nan", "3", "true"):
        with pytest.raises(UserError, match=f"{group}="):
            prepare(COMMANDS["train"], [f"{group}={text}"])


def test_a_box_is_not_replaced_by_a_single_value(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    parts = [key for key in boxes() if not is_group(key) and not key.startswith("callbacks")]
    assert {"denoiser", "logger.wandb", "data.source", "sampler.time_grid"} <= set(parts)
    for key in parts:
        for value in (None, [1], float("nan")):
            assert one_sentence(key, value), (key, value)
    for key in ("name", "study_name", "run_dir", "init_from", "guidance.weak_run"):
        for value in ({}, [1]):
            assert one_sentence(key, value), (key, value)
    assert not list(Path().iterdir())


@pytest.mark.slow
def test_no_value_of_another_kind_ends_in_a_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = [key for key in flat(plain()) if not key.endswith((CLASS, "_partial_"))]
    assert len(keys) > 120
    refused = sum(one_sentence(key, value) for key in keys for value in VALUES.values())
    assert refused > 200
    assert not list(Path().iterdir())
