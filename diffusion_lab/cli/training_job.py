"""One job of train or train-autoencoder: a run that is new, resumed, or found finished."""

import gc
import json
import sys
import traceback
from functools import partial
from pathlib import Path

from hydra.conf import HydraConf
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab.assembly.config_keys import as_list, updated
from diffusion_lab.assembly.sentences import MISTAKES
from diffusion_lab.cli.job import STOPPED, fail
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute import slurm
from diffusion_lab.estimate import budget
from diffusion_lab.runs import sweep_record
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.progress import reason_of
from diffusion_lab.runs.resuming import resumed
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.training import study, tuned
from diffusion_lab.training.train import Outcome, train

EXIT_CODES = {Outcome.STOPPED: STOPPED, Outcome.REQUEUED: 0}  # exit codes of unfinished runs


def trained(command: str, cfg: DictConfig, overrides: list[str]) -> float | None:
    """Trains one composition; returns its `optimized_metric`, None for a failed job of a sweep."""
    job = HydraConfig.get()
    if job.mode != RunMode.MULTIRUN:
        return run(command, cfg, job, overrides)[1]
    gc.collect()  # frees the memory of this process's previous run, which has reference cycles
    try:
        study.check_search(cfg, job)
    except UserError as error:
        fail(str(error))  # ends the search, not only this trial
    alone, folder = list(overrides), None
    try:
        folder = study.folder_of(cfg, job)
        if folder and not cfg.run_dir:
            alone.append(f"run_dir={folder}")
        status, value = run(command, cfg, job, overrides)
        sweep_record.note(job.sweep.dir, job.job.num, status, alone)
        return value
    except (KeyboardInterrupt, SystemExit) as end:
        if folder and getattr(end, "code", STOPPED) == STOPPED:
            say("Repeat the command of the sweep to resume this run and start the rest.")
        raise
    except Exception as error:
        if not isinstance(error, MISTAKES):
            traceback.print_exc()
        text = reason_of(error)
        sweep_record.note(job.sweep.dir, job.job.num, sweep_record.FAILED, alone, error=text)
        say(f"Failed: {text}")
        if slurm.tasks() > 1:
            raise  # or the other processes would wait for this one
        return None


def run(
    command: str, cfg: DictConfig, job: HydraConf, overrides: list[str]
) -> tuple[str, float | None]:
    """Trains a new run, resumes one, or finds it finished; loggers group the runs of a study.

    A requeued SLURM job resumes the run that it began with the same overrides; if that ended
    before its first checkpoint, it starts again in the same folder. Returns the outcome, DONE
    or SKIPPED, and the run's `optimized_metric`.
    """
    if cfg.resume:
        train_or_exit(resumed(cfg.resume, overrides, command), overrides)
        return sweep_record.DONE, None
    study.check_protocol(cfg)
    folder, metric = study.folder_of(cfg, job), cfg.optimized_metric
    place = folder or (Path(cfg.run_dir) if cfg.run_dir else None)
    cfg = tuned.with_tuned(cfg)
    study.check_metric(cfg, place)
    begun = None if folder else slurm.own_run(cfg.name, cfg.run_dir, command, overrides)
    if begun and (begun / CONFIG).is_file():
        if load_summary(begun).finished:
            say(f"{begun} is already finished")
            return sweep_record.SKIPPED, None
        cfg = load_config(begun)
        cfg.resume = str(begun)
        train_or_exit(cfg, overrides)
        return sweep_record.DONE, None
    state = study.state_of(folder, cfg) if folder else study.NEW
    if folder and state == study.EMPTY:
        study.move_aside(folder)
    if state == study.FINISHED:
        say(f"{folder} is already finished")
    elif folder and state == study.UNFINISHED:
        resume = [f"resume={folder}", *study.overrides_to_resume(folder, overrides)]
        train_or_exit(resumed(str(folder), resume, command), resume)
    else:
        cfg = budget.with_budget(cfg, overrides)
        train_or_exit(*joined(cfg, overrides, job, folder))
    value = study.final_metric(place, metric) if place and metric else None
    return sweep_record.SKIPPED if state == study.FINISHED else sweep_record.DONE, value


def train_or_exit(cfg: DictConfig, overrides: list[str]) -> None:
    """Trains a run, and exits if it was stopped before its end."""
    outcome = train(cfg, overrides)
    if outcome in EXIT_CODES:
        sys.exit(EXIT_CODES[outcome])


def joined(
    cfg: DictConfig, overrides: list[str], job: HydraConf, folder: Path | None
) -> tuple[DictConfig, list[str]]:
    """A new run's configuration and overrides, with its folder and its place in loggers."""
    place: dict[str, object] = {}
    if folder and not cfg.run_dir:
        place["run_dir"] = str(folder)
    for key, logger in (cfg.get("logger") or {}).items():
        if "group" not in logger:  # it has no place but the run folder
            continue
        if cfg.study_name:
            place[f"logger.{key}.group"] = logger.group or cfg.study_name
            place[f"logger.{key}.name"] = logger.name or (folder.name if folder else cfg.name)
            budgets = [f"budget-{unit}" for unit in budget.units(cfg)]
            tags = [*as_list(logger.tags), cfg.study_name, *budgets]
            # each device's process repeats this
            place[f"logger.{key}.tags"] = list(dict.fromkeys(tags))
        elif job.mode == RunMode.MULTIRUN and not logger.group:
            place[f"logger.{key}.group"] = job.sweep.dir.rsplit("/", 1)[-1]
    return updated(cfg, place), [
        *overrides,
        *(f"{key}={json.dumps(value)}" for key, value in place.items()),
    ]


train_model = partial(trained, "train")
train_first_stage = partial(trained, "train-autoencoder")
