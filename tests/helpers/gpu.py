"""The device of the tests in tests/gpu: a GPU, or the CPU to try the tests themselves."""

import os

DEVICE = os.environ.get("DIFFUSION_LAB_GPU_TESTS_ON", "cuda")
TRAINER = "trainer.accelerator=" + {"cuda": "gpu", "cpu": "cpu"}[DEVICE]
