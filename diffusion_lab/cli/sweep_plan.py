"""A sweep before it begins: the configuration of its first job, and all of its jobs."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from diffusion_lab.assembly.sentences import composed, key_of, parse
from diffusion_lab.cli.arguments import MULTIRUN, PLACES, config_dir
from diffusion_lab.runs.sweep_record import Job
from diffusion_lab.training import study


def trains(flags: list[str]) -> bool:
    """Whether Hydra's flags let a sweep train, unlike --cfg."""
    return {flag for flag in flags if flag.startswith("-")} <= {*MULTIRUN, *PLACES}


def first_job(name: str, flags: list[str], overrides: list[str]) -> DictConfig:
    """The configuration of a sweep's first job, with Hydra's own."""
    own = config_dir(flags)
    searched = [f"hydra.searchpath=[file://{Path(own).resolve()}]"] if own else []
    first = [*first_values(overrides), *searched]
    return composed(name.replace("-", "_"), first)


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
    """Hydra's own overrides for a sweep by `overrides`: its folder, and the keys that are fixed.

    Jobs may run in other processes or on other machines, where only these describe the sweep.
    """
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
            own = composed_job(name, flags, chosen)
            jobs.append(Job(chosen, Path(str(own.resume or own.run_dir))))
        else:
            jobs.append(Job(chosen, study.folder_of(cfg, hydra)))
    return jobs


def composed_job(name: str, flags: list[str], overrides: list[str]) -> DictConfig:
    """The configuration of a job, with Hydra's own, which ${hydra:...} in it takes from now on."""
    cfg = first_job(name, flags, overrides)
    HydraConfig.instance().set_config(cfg)
    return cfg


def is_search(cfg: DictConfig) -> bool:
    """Whether the jobs of a sweep depend on the results of earlier ones."""
    return "n_trials" in cfg.hydra.sweeper
