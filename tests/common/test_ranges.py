"""Ranges of arguments: the values of each, and what a decorated constructor checks."""

import inspect
from dataclasses import dataclass
from functools import partial

import pytest
from helpers.refusals import out_of_range, refused
from omegaconf import OmegaConf

from diffusion_lab.common.ranges import (
    RangeError,
    above,
    at_least,
    between,
    either,
    flag,
    inside,
    number,
    one_of,
    optional,
    ranges,
    share,
    whole,
    whole_list,
)

NAN, INF = float("nan"), float("inf")
ALLOWED = [
    (whole(1), [1, 7], [0, 1.0, True, "1", None, NAN]),
    (whole(1, 3), [1, 3], [0, 4]),
    (number(), [-1, 0.5], [NAN, INF, False, "1", None]),
    (at_least(0), [0, 0.5], [-1, NAN, INF]),
    (above(0), [0.1, 3], [0, -1, NAN, True]),
    (share(), [0.1, 1], [0, 1.1]),
    (between(0, 1), [0, 1, 0.5], [-0.1, 1.1, NAN, "0"]),
    (inside(-1, 1), [0, 0.9], [-1, 1]),
    (flag(), [True, False], [0, 1, None, "true"]),
    (one_of("a", "b"), ["a", "b"], ["c", None, 0, ["a"]]),
    (whole_list(0), [[], [0, 3], (1,), OmegaConf.create([1, 2])], ["12", [-1], [1.5], 3, None]),
    (whole_list(0, shortest=1), [[0]], [[]]),
    (either(one_of("auto"), above(0)), ["auto", 1], [0, "x", None]),
    (optional(whole(1)), [None, 1], [0, "null"]),
]


@pytest.mark.parametrize(
    ("allowed", "good", "bad"), ALLOWED, ids=lambda value: getattr(value, "wanted", "")
)
def test_a_range_allows_its_values_alone(allowed, good, bad):
    assert all(allowed.allows(value) for value in good)
    assert not any(allowed.allows(value) for value in bad)


class Steps:
    @ranges(steps=whole(1), clip=optional(above(0).as_in(0.5)))
    def __init__(self, steps: int, clip: float | None = None, *, name: str = "x"):
        self.steps, self.clip, self.name = steps, clip, name


@ranges(size=whole(1))
@dataclass(frozen=True)
class Size:
    size: int = 3


def test_a_decorated_constructor_keeps_its_signature():
    assert list(inspect.signature(Steps).parameters) == ["steps", "clip", "name"]
    assert list(inspect.signature(Size).parameters) == ["size"]


@pytest.mark.parametrize(
    "call", [lambda: Steps(0), lambda: Steps(steps=0), lambda: partial(Steps, clip=1)(0)]
)
def test_arguments_are_checked_however_they_are_passed(call):
    with pytest.raises(RangeError) as error:
        call()
    assert (error.value.argument, error.value.value) == ("steps", 0)
    assert error.value.of("sampler.steps") == "sampler.steps=0 must be a whole number of at least 1"


def test_defaults_are_checked_and_an_example_ends_the_sentence():
    assert Steps(1, name="y").name == "y"
    with out_of_range("size"):
        Size(0)
    with pytest.raises(RangeError) as error:
        Steps(1, clip=-1)
    assert error.value.of("a.clip").endswith(", as in a.clip=0.5")


def test_python_says_which_argument_does_not_fit():
    with refused("stepz", by=TypeError):
        Steps(stepz=1)
    with refused(" y", by=TypeError):
        ranges(y=whole(1))(lambda x: x)
