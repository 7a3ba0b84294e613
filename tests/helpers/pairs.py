"""Chooses what a fast test takes of its parameters."""

from collections.abc import Iterable

import pytest


def first_fast(values: Iterable[object], fast: int = 1) -> list:
    """The values of a parameter: the first ones have a fast test, the rest slow ones."""
    return [
        pytest.param(value, marks=[] if i < fast else pytest.mark.slow)
        for i, value in enumerate(values)
    ]


def each_once(first: dict[str, object], second: dict[str, object]) -> list:
    """All pairs of two sets of named values; each of the first has one fast pair, the rest slow."""
    return [
        pytest.param(
            a,
            b,
            id=f"{name}-{other}",
            marks=[] if (i - j) % len(second) == 0 else pytest.mark.slow,
        )
        for i, (name, a) in enumerate(first.items())
        for j, (other, b) in enumerate(second.items())
    ]
