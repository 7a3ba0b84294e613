"""diffusion-lab doctor."""

import dataclasses
import json
import sys

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from diffusion_lab.common.errors import UserError
from diffusion_lab.profiling import budget
from diffusion_lab.training.doctor import diagnose, show
from diffusion_lab.training.doctor.finding import ERROR


def run(cfg: DictConfig) -> None:
    """Says what is wrong with a training run; ends with code 1 if it would be refused."""
    if cfg.resume:
        raise UserError("doctor looks at a run before it is made; leave out resume=...")
    budget.apply(cfg, list(HydraConfig.get().overrides.task))
    findings, facts = diagnose(cfg)
    show(findings, facts)
    if cfg.json:
        checks = [dataclasses.asdict(finding) for finding in findings]
        print(json.dumps({"checks": checks, "facts": facts}))
    if any(finding.status == ERROR for finding in findings):
        if HydraConfig.get().mode == RunMode.MULTIRUN:  # whose other jobs go on
            raise UserError("some of the compositions cannot be trained; the reasons are above")
        sys.exit(1)
