"""Builds objects from configurations: children, lists, factories, full keys in every error."""

from dataclasses import dataclass
from typing import Any

import pytest
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.assembly.instantiate import check_keys, errors_at, instantiate
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import above, optional, ranges, whole

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
