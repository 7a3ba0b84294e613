"""Runs a command under Hydra: composes its configuration, calls it, and prints how it ended."""

import json
import os
import pkgutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import hydra
from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab.assembly.config_keys import check_boxes, leave_out, paths_as_text
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.sentences import (
    HYDRA_VERSION,
    MISTAKES,
    Combination,
    conf_dir,
    own_places,
    sentence,
)
from diffusion_lab.cli.commands import COMMANDS, admit, expand
from diffusion_lab.common.files import read_json, require_writable, write_json
from diffusion_lab.common.messages import FULL, TrainingStopped, UserError
from diffusion_lab.common.ranges import Range, whole
from diffusion_lab.compute import slurm, started

STOPPED = 130  # the exit code of a command that Ctrl-C has ended
REPLY = "DIFFUSION_LAB_REPLY"  # the variable with the file for a result or an error
DEVICES = Range(
    "auto or a whole number of at least 1", lambda value: value == "auto" or whole(1).allows(value)
)


def run(name: str, arguments: list[str]) -> None:
    """Runs the command `name` under Hydra, with conf/<name>.yaml and the given arguments."""

    def job(cfg: DictConfig) -> float | None:
        try:
            return call(name, cfg)
        except KeyboardInterrupt:
            sys.exit(STOPPED)
        except Exception as error:
            if started.in_a_group():
                # Hydra would only store the error, and the other processes would wait for this one
                leave_group(error)
            if not isinstance(error, MISTAKES):
                raise
            if HydraConfig.get().mode == RunMode.RUN:
                fail(sentence(error), getattr(error, "diverged", False))
            if slurm.started_by_srun():
                say(f"diffusion-lab: {sentence(error)}")  # into the job's log
            raise  # Hydra raises it at the sweep's end, after the other jobs

    sys.argv = [f"diffusion-lab {name}", *arguments]
    config = name.replace("-", "_")
    hydra.main(**HYDRA_VERSION, config_path=str(conf_dir()), config_name=config)(job)()


def call(name: str, cfg: DictConfig) -> float | None:
    """Calls a command's function; prints its result, or returns what a search optimises."""
    command, result = COMMANDS[name], result_of(name, cfg)
    if command.trains:
        return result
    if started.rank() == 0 and not reply(result=result) and cfg.get("json"):
        print(json.dumps(result))
    if command.fails(result):
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # an exit would end the other jobs
            raise UserError("some jobs found errors, see above")
        sys.exit(1)
    return None


def result_of(name: str, cfg: DictConfig) -> Any:
    """Calls a command's function with the configuration that Hydra has composed."""
    command = COMMANDS[name]
    # imported late: torch and lightning take seconds, which --help and typing errors need not wait
    try:
        function = pkgutil.resolve_name(f"diffusion_lab.{command.function}")
    except ImportError as error:
        if not command.extra:
            raise
        raise UserError(
            f"{name} needs {error.name}, which is not installed; write "
            f"pip install 'diffusion-lab[{command.extra}]'"
        ) from error
    overrides = list(HydraConfig.get().overrides.task)
    check_boxes(cfg)
    leave_out(cfg, HydraConfig.get().runtime.choices, overrides)
    paths_as_text(cfg)
    key = "output" if cfg.get("output") else "run"  # where commands with an output write
    if "output" in cfg and cfg.get(key):
        require_writable(key, str(cfg[key]), "choose another place with output=...")
    combined = [combinations(name, cfg, overrides)] if command.combines else []
    work = partial(function, cfg, overrides, *combined)
    if not command.trains:  # a training explains its failures in its run folder
        work = partial(explained, work)
    return on_all_devices(name, cfg, overrides, work) if command.on_all_devices else work()


def on_all_devices(
    name: str, cfg: DictConfig, overrides: list[str], work: Callable[[], Any]
) -> Any:
    """Calls `work`, the command `name`, here or in a new process per device; returns its result.

    Each process works on its share of the images. The first writes the files and speaks, and what
    the command returns, says and exits with is that of one process: raises UserError with the
    sentence of the process that failed, or exits with its code.
    """
    from diffusion_lab.compute import launch  # late: it waits for torch
    from diffusion_lab.compute.device import pick_device

    launched = started.in_launched_process()
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


def explained(work: Callable[[], Any]) -> Any:
    """Calls `work`; a file that cannot be used, or a full device, becomes a UserError."""
    try:
        return work()
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":  # torch's, which may not be imported
            raise
        raise UserError("the device's memory is full; write a smaller batch_size") from error
    except OSError as error:
        if error.filename is None:
            raise
        remedy = "; free space on its disk" if error.errno in FULL else ""
        raise UserError(f"{error.filename} cannot be used: {error.strerror}{remedy}") from error


def combinations(name: str, cfg: DictConfig, overrides: list[str]) -> list[Combination]:
    """Composes the configuration of each combination of the comma-separated values."""
    single = [override for override in overrides if not override.startswith("combinations=")]
    composed = []
    for chosen in expand(list(cfg.combinations)):
        own = [admit(f"{key}={value}", COMMANDS[name].run_groups) for key, value in chosen.items()]
        overrides = [*single, *own]
        found = compose(name.replace("-", "_"), overrides=overrides)
        composed.append(Combination(chosen, found, overrides))
    return composed


def say(line: str) -> None:
    """Prints one line on standard error, on any rank."""
    print(line, file=sys.stderr)


def reply(**content: object) -> bool:
    """Leaves a result or an error to the process that has started this one; False if none has."""
    path = os.environ.get(REPLY)
    if path:
        write_json(Path(path), content)
    return bool(path)


def fail(message: str, diverged: bool = False) -> NoReturn:
    """Prints one sentence, of several processes the first, and exits with code 2."""
    if is_first() and not reply(error=message, diverged=diverged):
        say(f"diffusion-lab: {message}")
    sys.exit(2)


def is_first() -> bool:
    """Whether this process is the first to fail of those that were started together."""
    if not started.in_a_group():
        return True
    from diffusion_lab.compute.distributed import first_to_fail  # late: torch takes seconds

    return first_to_fail()


def leave_group(error: Exception) -> NoReturn:
    """Ends this process, one of several, after an error; exits with the code of one process."""
    from diffusion_lab.compute import distributed

    lost = distributed.another_ended(error)
    follows = isinstance(error, distributed.FirstStopped)
    if lost or follows:
        time.sleep(distributed.SECONDS_TO_BE_ENDED_IN)  # the launcher ends this process too
    if follows:
        sys.exit(2)
    if lost:
        fail("another process of this command ended, or did not answer")
    if isinstance(error, MISTAKES):
        fail(sentence(error))
    if is_first():
        reply(code=1)
        traceback.print_exception(error)
    sys.exit(1)
