"""Sweeps of training runs: each job writes its outcome to a file, and the sweep reports them."""

import os
import re
import shlex
import sys
from collections import defaultdict
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import datetime
from itertools import count, product
from pathlib import Path
from statistics import fmean

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict

from diffusion_lab.assembly.sentences import MISTAKES, composed, key_of, parse, sentence
from diffusion_lab.cli.commands import MULTIRUN, PLACES, apart, config_dir, flags_in
from diffusion_lab.cli.job import run, say
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import UserError
from diffusion_lab.compute import slurm
from diffusion_lab.runs import sweep_record
from diffusion_lab.runs.progress import locked
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.runs.sweep_record import DONE, FAILED, SKIPPED, Job
from diffusion_lab.training import study, tuned

SHOWN = 5  # arms with the lowest FID
# what differs between the folders of an arm: the seed, and the checksum of a name that is cut
CHANGES = re.compile("(?<=seed-)\\d+|(?<=\N{HORIZONTAL ELLIPSIS}_)[0-9a-f]{8}$")


def first_job(name: str, flags: list[str], overrides: list[str]) -> DictConfig:
    """The configuration of a sweep's first job, with Hydra's own."""
    return composed(name.replace("-", "_"), [*first_values(overrides), *searched(flags)])


def searched(flags: list[str]) -> list[str]:
    """The override that finds what --config-dir has, where Hydra does not read that flag."""
    own = config_dir(flags)
    return [f"hydra.searchpath=[file://{Path(own).resolve()}]"] if own else []


def first_values(overrides: Sequence[str]) -> list[str]:
    """Overrides with the first value of each that has several, without intervals."""
    both = zip(overrides, parse(overrides), strict=True)
    return [_first(text, each) for text, each in both if not each.is_interval_sweep()]


def with_single_values(overrides: Sequence[str]) -> list[str]:
    """Overrides with the only value of each that sweeps over one, as in backbone=choice(unet).

    Hydra makes a configuration of its own without what is swept, in which keys of that value, such
    as backbone.channels, would be missing.
    """
    return [
        _first(text, each) if each.is_discrete_sweep() and len(elements(each)) == 1 else text
        for text, each in zip(overrides, parse(overrides), strict=True)
    ]


def _first(text: str, override: Override) -> str:
    swept = override.is_sweep_override()
    return f"{text.partition('=')[0]}={elements(override)[0]}" if swept else text


def elements(override: Override) -> list[str]:
    """The values of an override as text: those of a sweep, or the one."""
    if override.is_sweep_override():
        return list(override.sweep_string_iterator())
    return [override.get_value_element_as_str()]


def sweep_overrides(sweep: Path, overrides: list[str]) -> list[str]:
    """Overrides that tell jobs, which may run elsewhere, a sweep's folder and fixed keys."""
    parsed = parse(each for each in overrides if "=" in each and not each.startswith("hydra"))
    varies = {key_of(override): override.is_sweep_override() for override in parsed}
    names = ",".join(f"'{key}'" for key, several in varies.items() if not several)
    return [f"hydra.sweep.dir={sweep}", f"hydra.job.config.override_dirname.exclude_keys=[{names}]"]


def jobs_of(name: str, flags: list[str], overrides: list[str], cfg: DictConfig) -> list[Job]:
    """The jobs of a sweep in Hydra's order, `cfg` being composed for it; none of a search."""
    if is_search(cfg):
        return []
    values: dict[str, list[str]] = {}
    for each in parse(o for o in overrides if not o.startswith("hydra")):
        key = each.get_key_element()
        values[key] = [f"{key}={value}" for value in elements(each)]
    given = any(OmegaConf.is_interpolation(cfg, key) or cfg[key] for key in ("resume", "run_dir"))
    jobs, hydra = [], cfg.hydra.copy()
    OmegaConf.update(hydra, "mode", RunMode.MULTIRUN)
    for chosen in map(list, product(*values.values())):
        OmegaConf.update(hydra, "overrides.task", chosen)
        if given:  # and perhaps another one for each job
            own = first_job(name, flags, chosen)
            HydraConfig.instance().set_config(own)  # which ${hydra:...} in it takes from now on
            jobs.append(Job(chosen, Path(str(own.resume or own.run_dir))))
        else:
            jobs.append(Job(chosen, study.folder_of(cfg, hydra)))
    return jobs


def is_search(cfg: DictConfig) -> bool:
    """Whether the jobs of a sweep depend on the results of earlier ones."""
    return "n_trials" in cfg.hydra.sweeper


def sweep(name: str, arguments: list[str]) -> None:
    """Runs a sweep, and reports how its jobs ended; exits with code 1 if one of them failed."""
    flags, overrides = apart(arguments)
    if given := [o for o in overrides if o.lstrip("+").startswith("hydra.sweeper.params")]:
        raise UserError(f"{given[0]} is of no use; write the values themselves, as in seed=0,1")
    if not flags_in(flags) <= {*MULTIRUN, *PLACES}:  # such as --cfg
        run(name, arguments)
        return
    folder = new_folder()
    own = sweep_overrides(folder, overrides)
    cfg = first_job(name, flags, [*overrides, *own])
    if cfg.hydra.launcher.get("n_jobs") == 0:
        raise UserError(
            "hydra.launcher.n_jobs=0 runs nothing; write 1 or more, or -1 for all cores"
        )
    jobs, on_slurm = jobs_of(name, flags, overrides, cfg), "wait" in cfg.hydra.launcher
    waits = not on_slurm or cfg.hydra.launcher.wait
    if is_search(cfg):
        if not waits:
            raise UserError(
                "hydra.launcher.wait=false is not possible for a search, whose jobs depend on "
                "earlier ones; leave it out"
            )
        # the search writes its database there
        (OUTPUTS / (cfg.study_name or "search")).parent.mkdir(parents=True, exist_ok=True)
    elif cfg.study_name or on_slurm:
        if on_slurm:
            refuse_queued(jobs)
            if cfg.study_name and not cfg.resume and finished(name, flags, jobs):
                return
        check_composed(name, flags, jobs)
        sweep_record.write(folder, cfg.study_name, jobs)
    try:
        with ExitStack() as stack:
            if folder.exists():  # with the record of a study's jobs
                stack.enter_context(locked(folder))  # so that `status` knows that this runs
            run(name, [*flags, *with_single_values(overrides), *own])
    except ValueError:
        outcomes = sweep_record.outcomes(folder)
        if not outcomes or any(outcome["status"] != FAILED for outcome in outcomes):
            raise  # if all jobs failed, the error is only that Optuna finds no best trial
    finally:
        alone = [name, *(flag for flag in flags if flag not in MULTIRUN)]
        report(folder, alone)
    if not waits:
        say("To see how they are:")
        say(f"  diffusion-lab status {OUTPUTS / (cfg.study_name or '')}")
    elif any(outcome["status"] == FAILED for outcome in sweep_record.outcomes(folder)):
        sys.exit(1)


def check_composed(name: str, flags: list[str], jobs: Sequence[Job]) -> None:
    """Raises UserError if a job after the first, which is composed already, cannot be composed."""
    for job in jobs[1:]:
        try:
            first_job(name, flags, job.overrides)
        except MISTAKES as error:
            raise UserError(f"{sentence(error)}; the job is {shlex.join(job.overrides)}") from error


def finished(name: str, flags: list[str], jobs: Sequence[Job]) -> bool:
    """Whether all runs of a study are finished; raises UserError if one has other settings."""
    folders = [job.folder for job in jobs if job.folder and load_summary(job.folder).finished]
    if len(folders) < len(jobs):
        return False
    for job, folder in zip(jobs, folders, strict=True):
        own = first_job(name, flags, job.overrides)
        HydraConfig.instance().set_config(own)  # which ${hydra:...} in it takes from now on
        with open_dict(own):
            del own.hydra
        study.state_of(folder, tuned.with_tuned(own))
        say(f"{folder} is already finished")
    return True


def refuse_queued(jobs: Sequence[Job]) -> None:
    """Raises UserError if SLURM already has jobs for some of the runs."""
    folders = {job.folder for job in jobs if job.folder}
    earlier = [
        job.slurm
        for study in {folder.parent for folder in folders}
        for sweep in sweep_record.of_study(study)
        for job in sweep
        if job.slurm and job.folder in folders
    ]
    known = slurm.queue(earlier)
    held = [each for each in earlier if each in known and (known[each].waits or known[each].runs)]
    if held:
        raise UserError(
            f"SLURM already has jobs for {len(held)} of these {len(jobs)} runs; wait until they "
            f"end, or cancel them with `scancel {' '.join(held)}`"
        )


def new_folder() -> Path:
    """The folder of a sweep that starts now; a study that is tuned has several sweeps."""
    begun = f"{OUTPUTS}/multirun/{datetime.now():%Y-%m-%d_%H-%M-%S}_{os.getpid()}"
    names = (f"{begun}{'' if number == 1 else f'_{number}'}" for number in count(1))
    return next(folder for folder in map(Path, names) if not folder.exists())


def report(sweep: Path, command: list[str]) -> None:
    """Prints the outcomes of a sweep, and how to run each failed job by `command`."""
    outcomes = sweep_record.outcomes(sweep)
    counts = {s: sum(o["status"] == s for o in outcomes) for s in (DONE, SKIPPED, FAILED)}
    if outcomes:
        say("Runs: " + ", ".join(f"{count} {s}" for s, count in counts.items() if count))
    for outcome in outcomes:
        if outcome["status"] == FAILED:
            say(f"Failed: {outcome['error']}. To run this job alone:")
            say(f"  diffusion-lab {shlex.join([*command, *outcome['overrides']])}")
    say_best(outcomes)


def say_best(outcomes: Sequence[dict]) -> None:
    """Prints a study's arms with the lowest mean FID over seeds, and how to compare its runs."""
    finished: list[Path] = []
    arms: dict[tuple[str, ...], dict[Path, float]] = defaultdict(dict)  # by all but the seed
    for overrides in (outcome["overrides"] for outcome in outcomes):
        keys = [each.partition("=")[::2] for each in overrides]
        folder = next((Path(value) for key, value in keys if key == "run_dir"), None)
        if folder is None or not (summary := load_summary(folder)).finished:
            continue
        finished.append(folder)
        arm = tuple(f"{key}={value}" for key, value in keys if key not in ("seed", "run_dir"))
        fids = [value for name, value in summary.metrics.items() if name.startswith("fid/")]
        if fids:
            arms[arm][folder] = fids[0]  # those of a second extractor are other quantities
    found = sorted((fmean(runs.values()), len(runs), min(runs)) for runs in arms.values())
    for value, runs, folder in found[:SHOWN]:
        mean = f", mean of {runs} seeds" if runs > 1 else ""
        say(f"  FID {value:.4g}{mean}  {re.sub(CHANGES, '*', str(folder)) if runs > 1 else folder}")
    if len(finished) > 1:
        say(f"Next: diffusion-lab compare {finished[0].parent}")
