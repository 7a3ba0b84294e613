"""The benchmark compares networks of equal size."""

import runpy

import pytest
from helpers.paths import ROOT

pytest.importorskip("diffusers")


@pytest.mark.slow
def test_both_sides_have_the_same_multiply_accumulates():
    benchmark = runpy.run_path(str(ROOT / "experiments/benchmarks/backbones.py"))
    cases = [case for case in benchmark["CASES"].values() if case.library == "diffusers"]
    for case in cases:
        ours, theirs = (benchmark["count_flops"](build, case) for build in (case.ours, case.theirs))
        # diffusers' DiT embeds the noise level anew in each block
        assert theirs == pytest.approx(ours, rel=0.003)
