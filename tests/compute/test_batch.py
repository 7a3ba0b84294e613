"""Tests of batch algebra: layouts multiply to the global batch, or are refused."""

import pytest
from helpers.refusals import refused

from diffusion_lab.compute.batch import solve_batch


def test_layout_multiplies_to_the_global_batch():
    asked = {(128, 1, None): (128, 1), (128, 4, None): (32, 1), (128, 2, 16): (16, 4)}
    for (batch, world, micro), expected in (asked | {(8, 8, 1): (1, 1)}).items():
        layout = solve_batch(batch, world, micro)
        assert (layout.micro_batch, layout.accumulate) == expected
        assert layout.micro_batch * layout.accumulate * world == batch


@pytest.mark.parametrize(
    ("batch", "world", "micro", "hint"),
    [
        (100, 3, None, "batch_size=99 or batch_size=102"),
        (2, 4, None, "batch_size=4 or batch_size=8"),
        (128, 2, 24, "micro_batch_size=16"),
        (128, 2, 0, "micro_batch_size=1"),
        (12, 1, 100, "micro_batch_size=12"),
        (0, 1, None, "batch_size=0"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_to_write(batch, world, micro, hint):
    with refused(hint):
        solve_batch(batch, world, micro)


def test_layout_is_said_in_full():
    assert str(solve_batch(128, 2, 16)) == (
        "global batch 128 = micro-batch 16 x 4 accumulated x 2 ranks"
    )
