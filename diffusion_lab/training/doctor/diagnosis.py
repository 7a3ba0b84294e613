"""All checks on one composition; what refuses to be built hides only what depends on it."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig

from diffusion_lab.build.instantiate import errors_at
from diffusion_lab.build.sentences import MISTAKES, sentence
from diffusion_lab.common.errors import UserError
from diffusion_lab.profiling import budget
from diffusion_lab.training.doctor import (
    data_checks,
    machine_checks,
    metric_checks,
    model_checks,
    training_checks,
)
from diffusion_lab.training.doctor.facts import GROUPS, Facts
from diffusion_lab.training.doctor.finding import ERROR, OK, SKIPPED, Finding
from diffusion_lab.training.doctor.report import show
from diffusion_lab.training.doctor.stages import STAGES

CHECKS: tuple[Callable, ...] = (
    *data_checks.CHECKS,
    *model_checks.CHECKS,
    *training_checks.CHECKS,
    *metric_checks.CHECKS,
    *machine_checks.CHECKS,
)
Results = dict[str, Any]  # what the stages have made, by their names


def doctor(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Says what is wrong with a training run; returns the checks and the facts."""
    if cfg.resume:
        raise UserError("doctor looks at a run before it is made; leave out resume=...")
    budget.apply(cfg, overrides)
    findings, facts = diagnose(cfg)
    show(findings, facts)
    return {"checks": [dataclasses.asdict(finding) for finding in findings], "facts": facts}


def diagnose(cfg: DictConfig) -> tuple[list[Finding], Facts]:
    """What there is to say of a training run, one finding at least a check, and its facts."""
    results, refusals = run_stages(cfg)
    findings = [Finding(name, ERROR, reason) for name, reason in refusals.items()]
    for check in CHECKS:
        name, arguments = check.__name__, arguments_of(check, results)
        if arguments is not None:
            said = [Finding(name, *remark) for remark in check(**arguments)]
            findings += said or [Finding(name, OK)]
        elif name not in refusals:
            findings.append(Finding(name, SKIPPED))
    facts: Facts = {}
    for group in GROUPS:
        if (arguments := arguments_of(group, results)) is not None:
            facts |= group(**arguments)
    return findings, facts


def run_stages(cfg: DictConfig) -> tuple[Results, dict[str, str]]:
    """The results of all stages that nothing stood against, and why others were refused."""
    results: Results = {"cfg": cfg}
    refusals: dict[str, str] = {}
    for stage, refusal in STAGES.items():
        if (arguments := arguments_of(stage, results)) is None:
            continue
        if refusal is None:
            results[stage.__name__] = stage(**arguments)
            continue
        try:
            with errors_at(cfg, ""):
                results[stage.__name__] = stage(**arguments)
        except MISTAKES as error:
            refusals[refusal] = sentence(error)
        except torch.OutOfMemoryError:
            refusals[refusal] = (
                "a few steps do not fit into the device's memory; write a smaller "
                "micro_batch_size, or wait until the device is free"
            )
    return results, refusals


def arguments_of(function: Callable, results: Results) -> Results | None:
    """The results that are parameters of a stage or a check; None if one is missing."""
    parameters = inspect.signature(function).parameters.values()
    if any(p.name not in results and p.default is p.empty for p in parameters):
        return None
    return {p.name: results[p.name] for p in parameters if p.name in results}
