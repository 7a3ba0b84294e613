"""Runs a command in one process per device: started here, or by the user's torchrun or srun.

Each process works on its share of the images. The first writes the files and speaks, and what the
command returns, says and exits with is that of one process.
"""

import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.sentences import own_places
from diffusion_lab.cli.job import REPLY, STOPPED
from diffusion_lab.common.files import read_json
from diffusion_lab.common.messages import TrainingStopped, UserError
from diffusion_lab.common.ranges import Range, whole
from diffusion_lab.compute import launch
from diffusion_lab.compute.device import pick_device
from diffusion_lab.compute.started import in_launched_process

DEVICES = Range(
    "auto or a whole number of at least 1", lambda value: value == "auto" or whole(1).allows(value)
)


def on_all_devices(
    name: str, cfg: DictConfig, overrides: list[str], work: Callable[[], Any]
) -> Any:
    """Calls `work`, the command `name`, here or in a new process per device; returns its result.

    Raises UserError with the sentence of the process that failed, or exits with its code.
    """
    launched = in_launched_process()
    if launched:  # before all checks: connected processes say once what is wrong
        launch.join_process_group(pick_device(cfg.device))
    check_keys(cfg, {"devices": DEVICES})
    count = launch.processes_of_command(cfg.device, cfg.devices)
    if launched or count == 1:
        return work()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "reply.json"
        os.environ[REPLY] = str(path)
        try:
            ended = launch.run_on_all_devices(name, [*own_places(), *overrides], count)
        except TrainingStopped as error:
            left = read_json(path)
            if "code" in left:  # after a trace
                if HydraConfig.get().mode == RunMode.MULTIRUN:  # an exit would end the other jobs
                    raise RuntimeError("a process of this job failed, as it said above") from error
                sys.exit(left["code"])
            raise UserError(left.get("error", str(error))) from error
        finally:
            del os.environ[REPLY]
        if not ended:
            sys.exit(STOPPED)
        return read_json(path)["result"]
