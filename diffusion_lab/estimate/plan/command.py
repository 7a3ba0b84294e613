"""Plans runs on GPUs that are not here: memory, time and disk, from their configurations alone."""

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from diffusion_lab.build.overrides import Combination
from diffusion_lab.common.messages import UserError
from diffusion_lab.estimate import budget
from diffusion_lab.estimate.plan.report import compare, show
from diffusion_lab.estimate.plan.run_plan import plan_of


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
        plans.append(plan_of(each.cfg, each.name or own))
    if len(plans) > 1:
        compare(plans)
    else:
        show(plans[0])
    results = [planned.as_dict() for planned in plans]
    return {"plans": results} if combinations[0].chosen else results[0]
