"""A few tests run on a simulated GPU by default; `make test-simulated-gpu` runs all that can."""

import os
import subprocess
import sys

import pytest
from helpers import simulated_gpu
from helpers.paths import ROOT

FOLDER = "tests/simulated_gpu"
RECIPES = ("dit", "unet-muon", "shortcut")


@pytest.mark.skipif(bool(simulated_gpu.missing()), reason=simulated_gpu.missing())
def test_faults_are_found_and_steps_cost_what_is_stored(tmp_path):
    test = f"{FOLDER}/test_step_counts.py::test_a_step_costs_what_is_stored"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist"),
            *(f"--basetemp={tmp_path / 'tests'}", f"{FOLDER}/test_found_faults.py"),
            *(f"{test}[{recipe}]" for recipe in RECIPES),
        ],
        cwd=ROOT,
        env=os.environ | {"DIFFUSION_LAB_GPU_TESTS_ON": "simulated"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    assert "8 passed" in done.stdout
