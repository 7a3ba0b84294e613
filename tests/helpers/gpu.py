"""The device of the tests in tests/gpu: a GPU, a simulated one, or the CPU to try the tests."""

import os

import pytest

ON = os.environ.get("DIFFUSION_LAB_GPU_TESTS_ON", "cuda")
NOT_SIMULATED = "GPU_TESTS_ON=simulated runs it"
if ON == "simulated":
    from helpers import simulated_gpu

    NOT_SIMULATED = simulated_gpu.missing()
SIMULATED = ON == "simulated" and not NOT_SIMULATED
DEVICE = "cuda" if ON == "simulated" else ON
TRAINER = "trainer.accelerator=" + {"cuda": "gpu", "cpu": "cpu"}[DEVICE]
# the marks of tests that need a simulated GPU
only_simulated = [
    pytest.mark.gpu,
    pytest.mark.skipif(not SIMULATED, reason=NOT_SIMULATED),
]


def simulate() -> None:
    """Makes the simulated GPUs of this process, if the tests are to run on these."""
    if SIMULATED:
        simulated_gpu.install(int(os.environ.get("DIFFUSION_LAB_SIMULATED_GPUS") or 1))
