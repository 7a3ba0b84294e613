"""What an error names: its wording stands in golden/messages.txt, and tests assert the rest."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import RangeError


@contextmanager
def refused(*named: object, by: type[Exception] = UserError) -> Iterator[None]:
    """Expects an error of one sentence that names all of these: keys, paths and numbers."""
    with pytest.raises(by) as caught:
        yield
    sentence = str(caught.value)
    assert "\n" not in sentence
    missing = [each for each in named if str(each) not in sentence]
    assert not missing, f"{missing} stand not in: {sentence}"


@contextmanager
def out_of_range(argument: str) -> Iterator[None]:
    """Expects that this argument is told to be out of its range."""
    with pytest.raises(RangeError) as caught:
        yield
    assert caught.value.argument == argument
