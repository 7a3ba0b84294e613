"""Checks, before training and before sampling, that a number of steps fits a model."""

import torch

from diffusion_lab.build import rules
from diffusion_lab.build.model import Drawable
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.rules import option
from diffusion_lab.diffusion.objective import Loss
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.pipeline import with_steps


def check_steps(model: Drawable, sampler: Sampler, steps: int) -> None:
    """Raises UserError if the sampler cannot draw in this number of `also_steps`."""
    key = f"callbacks.evaluation.also_steps=[{steps}]"
    if sampler.adaptive:
        raise UserError(
            f"{key} has no meaning for {type(sampler).__name__}, which chooses its own steps; "
            "leave also_steps out"
        )
    other = with_steps(sampler, steps)
    try:
        other.levels(model.schedule)
    except ValueError as error:
        raise UserError(f"{key} does not fit sampler.time_grid: {error}") from error
    try:  # a sampler of one step may add no noise, and of two some
        rules.check(sampler=other, schedule=model.schedule, paired=model.paired)
    except UserError as error:
        raise UserError(f"with {key} {error}") from error


def untrained_jumps(loss: Loss, sampler: Sampler, schedule: NoiseSchedule) -> str | None:
    """The warning that the sampler asks for jumps that training never made, if it does."""

    def trained(t: torch.Tensor) -> torch.Tensor:
        return loss.trained_for(t[:-1], t[1:] if sampler.jumps else torch.zeros_like(t[1:]))

    if not sampler.of_few_steps or (made := trained(sampler.levels(schedule).t)).all():
        return None
    grids = (torch.linspace(1, 0, n + 1, dtype=torch.float64) for n in range(sampler.steps, 0, -1))
    most = next((len(grid) - 1 for grid in grids if trained(grid).all()), 1)
    return (
        f"training with objective/loss={option(loss)} never makes {int((~made).sum())} of the "
        f"{len(made)} jumps of the sampler, which lie between those that it makes; for these "
        f"alone write sampler.steps={most} sampler/time_grid=uniform "
        "sampler.time_grid.sigma_min=0"
    )
