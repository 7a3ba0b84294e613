"""Builds objects from configurations: children, lists, factories, full keys in every error."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from helpers.compositions import composed
from helpers.refusals import refused
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import CLASS, check_boxes, flat, leave_out, paths_as_text
from diffusion_lab.assembly.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.assembly.sentences import MISTAKES, conf_dir, sentence
from diffusion_lab.cli.commands import COMMANDS, prepare
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import above, optional, ranges, whole
from diffusion_lab.training import train
from diffusion_lab.training.task import build_task

HERE = f"{__name__}."


@ranges(size=whole(1))
@dataclass
class Part:
    size: int = 1
    inner: Any = None


class Whole:
    @ranges(depth=whole(1))
    def __init__(self, width: int, depth: int, part: Any = None):
        if width < depth:
            raise ValueError(f"width={width} must not be below depth={depth}")
        if width > 100:
            raise ValueError("nothing is that wide")
        self.part = part(size=width - 10) if callable(part) else part


class Picky:
    def __init__(self, name: str):
        self.name = name + "!"


def config(**nodes):
    return OmegaConf.create(nodes)


def part(**settings):
    return {"_target_": f"{HERE}Part", **settings}


def test_children_lists_and_plain_values_are_built():
    cfg = config(a=part(size=3, inner=[part(size=2), {"x": part(), "y": 5}, "text", None]))
    made = instantiate(cfg, "a")
    assert made == Part(3, [Part(2), {"x": Part(), "y": 5}, "text", None])
    assert type(made.inner) is list
    assert instantiate(cfg, "b") is None


def test_facts_replace_settings_now_or_later():
    cfg = config(now=part(size=0), later=part(size=2, _partial_=True))
    assert instantiate(cfg, "now", size=4) == Part(4)
    factory = instantiate(cfg, "later")
    assert factory() == Part(2)
    assert factory(size=5, inner=1) == Part(5, 1)


@pytest.mark.parametrize(
    ("node", "start"),
    [
        (part(size=0), "a.size=0 must be a whole number"),
        (part(inner=part(size=0)), "a.inner.size=0 must be"),
        (part(inner=[part(), part(size="x")]), "a.inner[1].size='x' must be"),
        (part(sise=1), "a.sise: "),
        (part(inner=part(x=1, y=2)), "a.inner.x, a.inner.y: "),
        ({"_target_": f"{HERE}Whole", "width": 1}, "a does not fit Whole: "),
        (
            {"_target_": f"{HERE}Whole", "width": 1, "depth": 2},
            "a.width=1 must not be below depth=2",
        ),
        ({"_target_": f"{HERE}Whole", "width": 200, "depth": 2}, "a: nothing is that wide"),
        ({"_target_": f"{HERE}Picky", "name": 3}, "a value of a does not fit: "),
        ({"_target_": f"{HERE}Lost"}, f"a._target_={HERE}Lost cannot be used: "),
        ({"_target_": "os.system", "command": "true"}, "a._target_=os.system cannot be used: "),
    ],
)
def test_an_error_begins_with_the_full_key(node, start):
    with pytest.raises(UserError) as error:
        instantiate(config(a=node), "a")
    assert str(error.value).startswith(start)
    assert str(error.value).count("a.") <= max(start.count("a."), 1)
    assert "\n" not in str(error.value)


def test_factories_remember_their_keys_where_others_call_them():
    whole_node = {"_target_": f"{HERE}Whole", "_partial_": True, "depth": 2}
    cfg = config(outer={"network": whole_node | {"part": part(_partial_=True)}})
    network = instantiate(cfg, "outer.network")
    assert network(width=11).part == Part(1)
    for width, start in (
        (1, "outer.network: width"),
        (5, "outer.network.part: size must be a whole number of at least 1, got -5"),
    ):
        with pytest.raises(UserError) as error:
            network(width=width)
        assert str(error.value).startswith(start)
    with refused("outer.network", "Whole", "hight"):
        network(width=11, hight=3)


def test_errors_of_an_object_that_is_used_later_begin_with_its_key():
    cfg = config(data={"size": 3, "pad": None})
    for error, start in (
        (ValueError("pad=2 must be above the images' 3"), "data.pad=2 must be"),
        (ValueError("there are no images"), "data: there are no images"),
        (UserError("other.key=1 must be 2"), "other.key=1 must be 2"),
        (FileNotFoundError("no file"), "data cannot be used: no file"),
    ):
        with pytest.raises(UserError) as told, errors_at(cfg, "data"):
            raise error
        assert str(told.value).startswith(start)
    with refused("a sentence"), errors_at(cfg, ""):
        raise ValueError("a sentence")


def test_keys_of_a_command_are_checked():
    cfg = config(a={"b": 0}, c=None)
    check_keys(cfg, {"c": optional(above(0))})
    with refused("a.b=0"):
        check_keys(cfg, {"a.b": whole(1)})


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


@pytest.mark.long
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
