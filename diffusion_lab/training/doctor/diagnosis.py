"""Runs all checks on one run; a part that cannot be built skips only the checks that need it."""

import dataclasses
from collections.abc import Callable, Iterable

from omegaconf import DictConfig

from diffusion_lab.common.messages import UserError
from diffusion_lab.profiling import budget
from diffusion_lab.training.doctor import data_checks, machine_checks, model_checks, training_checks
from diffusion_lab.training.doctor.finding import Finding, Missing, Remark, Status
from diffusion_lab.training.doctor.planned_run import PlannedRun
from diffusion_lab.training.doctor.report import Facts, facts_of, show

CHECKS: tuple[Callable[[PlannedRun], Iterable[Remark]], ...] = (
    *data_checks.CHECKS,
    *model_checks.CHECKS,
    *training_checks.CHECKS,
    *machine_checks.CHECKS,
)


def doctor(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Prints what is wrong with a training run; returns the checks and the facts."""
    if cfg.resume:
        raise UserError("doctor looks at a run before it is made; leave out resume=...")
    budget.apply(cfg, overrides)
    findings, facts = diagnose(cfg)
    show(findings, facts)
    return {"checks": [dataclasses.asdict(finding) for finding in findings], "facts": facts}


def diagnose(cfg: DictConfig) -> tuple[list[Finding], Facts]:
    """Returns the findings on a training run, at least one per check, and its facts."""
    run, findings = PlannedRun(cfg), []
    for check in CHECKS:
        name = check.__name__
        try:
            said = [Finding(name, *remark) for remark in check(run)] or [Finding(name, Status.OK)]
        except Missing as missing:
            said = [Finding(name, Status.SKIPPED, str(missing))]
        findings += said
    facts = facts_of(run)
    refused = [Finding(name, Status.ERROR, reason) for name, reason in run.refusals.items()]
    # a skipped check may share its name with a refused part, which is reported already
    others = [f for f in findings if f.status != Status.SKIPPED or f.name not in run.refusals]
    return refused + others, facts
