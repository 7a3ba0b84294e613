"""Assertions on what an error names; golden/messages.txt has the wording of errors."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import RangeError


def sentence_of(err: str) -> str:
    """The one sentence that a command ended with, without a traceback beside it."""
    said = [line for line in err.splitlines() if line.startswith("diffusion-lab: ")]
    assert len(said) == 1, err
    assert "Traceback" not in err
    return said[0].removeprefix("diffusion-lab: ")


def assert_names(text: str, *named: object) -> None:
    """Asserts that a text contains all of `named`: keys, paths and numbers."""
    missing = [each for each in named if str(each) not in text]
    assert not missing, f"{missing} stand not in: {text}"


@contextmanager
def refused(*named: object, by: type[Exception] = UserError) -> Iterator[None]:
    """Expects an error of one sentence that contains all of `named`: keys, paths and numbers."""
    with pytest.raises(by) as caught:
        yield
    sentence = str(caught.value)
    assert "\n" not in sentence
    assert_names(sentence, *named)


@contextmanager
def out_of_range(argument: str) -> Iterator[None]:
    """Expects the error for `argument` being out of its range."""
    with pytest.raises(RangeError) as caught:
        yield
    assert caught.value.argument == argument
