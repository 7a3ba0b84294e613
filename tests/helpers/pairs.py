"""Chooses the pairs of two sets of options that a fast test takes."""

import pytest


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
