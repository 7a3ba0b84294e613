"""The table of configuration keys knows every key of a training run."""

import copy

import pytest
from helpers.compositions import composed
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import (
    CLASS,
    KEYS,
    Means,
    as_path,
    flat,
    groups,
    leave_out,
    means,
    paths_as_text,
    row_of,
    verbatim,
)
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.common.messages import UserError

COMMANDS = {
    "train": [
        "first_stage=kl",
        "first_stage.run=x",
        "budget=macs",
        "+callbacks.pruning={_target_:diffusion_lab.training.callbacks.MedianPruning}",
    ],
    "train_autoencoder": [],
}


def keys(command: str, overrides: list[str]) -> list[str]:
    return list(flat(OmegaConf.to_container(composed(command, *overrides, "name=x"))))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_key_of_a_training_run_has_a_row(command):
    for overrides in ([], COMMANDS[command]):
        without = [key for key in keys(command, overrides) if row_of(key) is None]
        assert without == []


def test_every_group_has_a_row():
    names = {path.name for path in conf_dir().iterdir() if path.is_dir()}
    assert {name for name in names if row_of(name) is None} == {"debug", "hydra", "study"}


def test_the_longest_row_counts():
    assert means("data.source.root") == Means.RESUMABLE | Means.PATH
    assert Means.LOSS in means("data.source.image_size")
    assert Means.LOSS in means("objective/prediction")
    assert Means.RESUMABLE in means("callbacks.sample_grid")
    assert Means.IDENTITY not in means("callbacks.sample_grid.columns")
    assert Means.NAMED not in means("trainer")
    assert Means.NAMED in means("trainer.max_steps")
    assert Means.IDENTITY in means("own.setting")


def test_nothing_is_named_by_what_can_be_resumed_otherwise_unless_it_may_be_another():
    for key in KEYS:
        assert Means.PATH in means(key) or not (
            Means.NAMED in means(key) and Means.IDENTITY not in means(key)
        )


def test_groups_are_those_at_the_top():
    assert {"backbone", "denoiser", "sampler"} <= set(groups(Means.COST))


@pytest.mark.parametrize("text", ["${oc.env:HOME}", "a${b", "\\${a}", "\\\\${${a}}\\", "$", "\\"])
def test_texts_of_others_are_kept(text):
    cfg = OmegaConf.create(verbatim({"a": [text, 1, None]}))
    assert list(cfg.a) == [text, 1, None]
    assert OmegaConf.to_container(cfg.copy(), resolve=True) == {"a": [text, 1, None]}


def test_a_folder_of_digits_is_a_path():
    assert as_path("data.source.root", 2024) == "2024"
    assert as_path("seed", 2024) == 2024
    assert as_path("logger.wandb.project", 2024) == "2024"
    with refused("run_dir=true", by=UserError):
        as_path("run_dir", True)
    with refused("name=\"'true'\"", by=UserError):
        as_path("name", True)
    assert as_path("objective.time_sampler.stratified", True) is True
    cfg = OmegaConf.create({"run": 2024, "seed": 1, "first_stage": {"path": 7, CLASS: "x"}})
    paths_as_text(cfg)
    assert cfg == {"run": "2024", "seed": 1, "first_stage": {"path": "7", CLASS: "x"}}


def test_no_logger_beside_another_is_refused():
    for options in ("[tensorboard,none]", "[none, tensorboard]"):
        asked = f"logger={options}"
        with refused(asked, "logger=none", by=UserError):
            leave_out(copy.deepcopy(composed("train", asked)), {}, [asked])


def test_values_for_a_callback_that_an_experiment_leaves_out_are_left_out():
    cfg = copy.deepcopy(composed("train", "experiment=toy/two_moons", "+debug=fast"))
    leave_out(cfg, {}, [])
    assert cfg.callbacks.evaluation is None
    assert cfg.callbacks.sample_grid.columns == 2
