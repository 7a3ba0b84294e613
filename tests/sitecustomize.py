"""Gives processes that a test starts the GPUs of the test; Python runs this file as it starts."""

import os

if os.environ.get("DIFFUSION_LAB_GPU_TESTS_ON") == "simulated":
    from helpers.gpu import simulate

    simulate()
