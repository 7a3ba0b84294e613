"""Plans runs on GPUs that are not here: memory, time and disk, from their configurations alone."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.build.overrides import Combination
from diffusion_lab.common.messages import UserError
from diffusion_lab.profiling import budget
from diffusion_lab.training.planning.disk import disk_of
from diffusion_lab.training.planning.memory import memory_of
from diffusion_lab.training.planning.report import compare, show
from diffusion_lab.training.planning.run_elsewhere import RunElsewhere
from diffusion_lab.training.planning.run_plan import RunPlan
from diffusion_lab.training.planning.speed import duration_of, step_of


def plan(
    cfg: DictConfig, overrides: list[str], combinations: list[Combination]
) -> dict[str, object]:
    """Plans one run, or several side by side; returns the results."""
    if cfg.resume:
        raise UserError("plan looks at a run before it is made; leave out resume=...")
    own = f"backbone={HydraConfig.get().runtime.choices['backbone']}"
    plans = []
    for each in combinations:
        budget.apply(each.cfg, each.overrides)
        name = " ".join(f"{key}={value}" for key, value in each.chosen.items()) or own
        plans.append(plan_of(each.cfg, name))
    if len(plans) > 1:
        compare(plans)
    else:
        show(plans[0])
    results = [planned.as_dict() for planned in plans]
    return {"plans": results} if combinations[0].chosen else results[0]


def plan_of(cfg: DictConfig, name: str) -> RunPlan:
    """The plan of the run that a configuration describes; raises UserError for a wrong one."""
    run = RunElsewhere(cfg)
    memory = memory_of(run)
    step = step_of(run, memory)
    length = duration_of(run, step)
    return RunPlan(name, run, memory, step, length, disk_of(run, length.steps))
