"""Checks a training run before it starts: makes its parts, and looks at them one after another."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from omegaconf import DictConfig

from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.sentences import MISTAKES, sentence
from diffusion_lab.common.messages import UserError
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.doctor.checks_of_resources import OF_IMAGES, OF_MACHINE
from diffusion_lab.estimate.doctor.checks_of_settings import OF_SETTINGS
from diffusion_lab.estimate.doctor.parts import PARTS, BrokenRules, Unknown
from diffusion_lab.estimate.doctor.report import FACTS, Finding, show

CHECKS = (*OF_IMAGES, *OF_SETTINGS, *OF_MACHINE)
UNMEASURED = "not measured: speed=false, a precision for training only, or too little memory"
TOO_LARGE = (
    "a training step does not fit into the device's memory; write a smaller micro_batch_size, or "
    "wait until the device is free"
)


def doctor(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints what is wrong with a training run; returns the checks and the facts."""
    if cfg.resume:
        raise UserError("doctor looks at a run before it is made; leave out resume=...")
    findings, facts = diagnose(budget.with_budget(cfg, overrides))
    show(findings, facts)
    return {"checks": [finding._asdict() for finding in findings], "facts": facts}


def diagnose(cfg: DictConfig) -> tuple[list[Finding], dict[str, Any]]:
    """Returns the findings on a training run, at least one per check, and its facts."""
    made: dict[str, Any] = {"cfg": cfg}
    errors, checked = [], []
    unknown: set[str] = set()  # parts that are missing and were not refused
    for name, error, make in PARTS:
        if absent := needs(make) - made.keys():
            unknown |= {name} if absent & unknown else set()
            continue
        try:
            with errors_at(cfg, ""):
                made[name] = make(**taken(make, made))
        except Unknown:
            unknown.add(name)
        except (*MISTAKES, torch.OutOfMemoryError) as refusal:
            errors += [Finding(error, "error", reason) for reason in reasons(refusal)]
    wrong = {each.name for each in errors}
    for check in CHECKS:
        name, absent = check.__name__, needs(check) - made.keys()
        if not absent:
            said = [Finding(name, *remark) for remark in check(**taken(check, made))]
            checked += said or [Finding(name, "ok")]
        elif name not in wrong:  # else it is reported already
            reason = UNMEASURED if absent & unknown else ""
            checked.append(Finding(name, "skipped", reason))
    known = {name: fact for name, fact in FACTS.items() if needs(fact) <= made.keys()}
    return errors + checked, {name: fact(**taken(fact, made)) for name, fact in known.items()}


def needs(step: Callable[..., Any]) -> set[str]:
    """The names of the parts that a step takes and cannot do without."""
    parameters = inspect.signature(step).parameters.values()
    return {each.name for each in parameters if each.default is each.empty}


def taken(step: Callable[..., Any], made: dict[str, Any]) -> dict[str, Any]:
    """The parts that a step takes, as far as they are made."""
    return {name: made[name] for name in inspect.signature(step).parameters if name in made}


def reasons(refusal: BaseException) -> list[str]:
    """The sentences that say why a part cannot be made."""
    if isinstance(refusal, BrokenRules):
        return list(refusal.args)
    return [TOO_LARGE if isinstance(refusal, torch.OutOfMemoryError) else sentence(refusal)]
