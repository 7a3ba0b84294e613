"""The parts of a model, and trials of its network before training."""

from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.instantiate import is_own
from diffusion_lab.assembly.pipeline import with_steps
from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.base import compile_network
from diffusion_lab.backbone.stage import check_embeddings
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.rules import option
from diffusion_lab.data.augmentation import Augmentation
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import NOTHING, Given
from diffusion_lab.diffusion.likelihood import GREY_STEP
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.objective import Loss, Objective
from diffusion_lab.diffusion.objective.loss.base import check_each, check_losses, same_dropout
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.first_stage import FirstStage

LATER = 10**15  # training images, after which a loss takes all derivatives that it ever takes
RARE = 0.1  # density of draws, below which a level is hardly trained; uniform draws have 1


@dataclass(frozen=True)
class Drawable:
    """A denoiser and all that drawing from it needs to know, of its training too."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    first_stage: FirstStage
    loss: Loss
    label_dropout: float
    augmentation: Augmentation | None
    paired: bool  # whether training paired the noise with images


@dataclass(frozen=True)
class Model(Drawable):
    """A drawing with the objective that trains it."""

    objective: Objective


def compile_model(denoiser: Denoiser, objective: Objective, mode: str | None) -> None:
    """Compiles a network in place, as `compile_network` does; whole, the denoising loss with it.

    One that is differentiated more than once stays as it is, as compiled code has one gradient.
    """
    loss = objective.loss
    if loss.forward_mode or isinstance(denoiser.backbone, Energy):
        return
    compile_network(denoiser.backbone, mode)
    if mode == "layers":
        return
    alone = loss.measured
    in_graph = torch.compile(alone, mode=mode)

    def measured(*inputs: Any, **named: Any) -> Tensor:
        # without a gradient a denoiser marks sizes as dynamic, and where it is sharded it gathers
        # weights: neither can be in a graph
        outside = not torch.is_grad_enabled() or isinstance(denoiser, FSDPModule)
        return (alone if outside else in_graph)(*inputs, **named)

    loss.measured = measured  # type: ignore[method-assign]


@torch.no_grad()
def check_network(denoiser: Denoiser, objective: Objective) -> None:
    """Raises ValueError if the network lacks a derivative, or cannot be told what it must be.

    That is the noise level, the label, if it embeds labels itself, and where to jump. Raises
    UserError if somebody's own loss does not have one value for each image.
    """
    check_embeddings(denoiser.backbone)
    embeds = getattr(denoiser.backbone, "embeds_labels", False)
    energy = isinstance(denoiser.backbone, Energy)
    trains = objective.loss.forward_mode or objective.loss.two_levels or energy
    own, own_loss = is_own(denoiser.backbone), is_own(objective) or is_own(objective.loss)
    if not (embeds or trains or own or own_loss):
        return
    device = next(denoiser.parameters()).device
    x = torch.zeros(1, *denoiser.image_shape, device=device)
    level = objective.schedule(torch.full((1,), 0.5)).to(device)
    denoiser.eval()  # an image of zeros is no part of a network's statistics
    if own and device.type != "meta":  # where it may need numbers
        check_answer(denoiser, x, level)
    if embeds:
        check_embedded_labels(denoiser, x, level, dropped=objective.label_dropout > 0)
    if own_loss:
        check_shapes(denoiser, objective, x.expand(2, -1, -1, -1))
    if trains:
        objective = deepcopy(objective).to(device)  # its loss may have weights
        generator = torch.Generator().manual_seed(0)  # training's draws do not depend on this one
        with torch.set_grad_enabled(energy):
            parts = objective.parts(LATER)
            losses = objective.loss(parts, denoiser, x, x, level, NOTHING, generator)
            if energy:
                differentiate_twice(losses.minimised.sum())
                denoiser.zero_grad()
    denoiser.train()


def check_answer(denoiser: Denoiser, x: Tensor, level: NoiseLevel) -> None:
    """Raises ValueError if a network answers with something else than as many images.

    What the network itself raises is left to training, which may have another device.
    """
    channels, wrong = x.shape[1] * (1 + denoiser.learned_variance), list[str]()

    def look(network: torch.nn.Module, inputs: object, output: object) -> None:
        if not isinstance(output, Tensor) or output.shape != (1, channels, *x.shape[2:]):
            shape = tuple(getattr(output, "shape", ())) or f"a {type(output).__name__}"
            wrong.append(
                f"{type(network).__name__}.forward must return a tensor (B, {channels}, "
                f"{x.shape[2]}, {x.shape[3]}) for B images, got {shape} for one"
            )

    hook = denoiser.backbone.register_forward_hook(look)
    with suppress(Exception):
        denoiser(x, level, Given(denoiser.conditioning.labels.blank(1, x.device)))
    hook.remove()
    if wrong:
        raise ValueError(wrong[0])


def check_shapes(denoiser: Denoiser, objective: Objective, x0: Tensor) -> None:
    """Raises UserError if losses of x0 (B, C, H, W), in training or validation, are not (B,).

    What a loss itself raises is left to training, which has a teacher and another device.
    """
    count, given = len(x0), Given(denoiser.conditioning.labels.blank(len(x0), x0.device))
    try:
        with torch.enable_grad(), same_dropout(x0):
            objective = deepcopy(objective).to(x0.device)
            losses = objective(denoiser, x0, given)
            level = objective.schedule(torch.full((count,), 0.5)).to(x0.device)
            parts = objective.schedule, objective.prediction, denoiser
            measured = objective.loss.measured(*parts, x0, x0, level, given)
    except UserError:
        raise
    except Exception:
        return
    check_losses(objective, losses, count)
    check_each(f"measured of {type(objective.loss).__name__}", measured, count)


def check_embedded_labels(denoiser: Denoiser, x: Tensor, level: NoiseLevel, dropped: bool) -> None:
    """Raises ValueError unless a network takes the first and the last label, and the null label."""
    given: list[Given] = [NOTHING] if dropped else []
    if denoiser.conditioning.conditional:
        ends = (0, denoiser.conditioning.labels.classes - 1)
        given += [Given(labels=torch.tensor([label], device=x.device)) for label in ends]
    for each in given or [NOTHING]:
        try:
            denoiser(x, level, each)
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            label = "the null label" if each.labels is None else f"label {each.labels.item()}"
            reason = str(error).splitlines()[0]
            raise ValueError(
                f"settings do not fit these images or labels; of {label} the network says: {reason}"
            ) from error


def differentiate_twice(loss: Tensor) -> None:
    """Takes the gradient of an energy's loss; raises ValueError if there is none."""
    try:
        loss.backward()
    except RuntimeError as error:
        if "derivative" not in str(error):
            raise
        raise ValueError(
            "network has an operation that can be differentiated only once, and an energy is "
            f"differentiated twice; choose another: {str(error).splitlines()[0]}"
        ) from error


def rarely_trained(objective: Objective, sampler: Sampler) -> str | None:
    """The warning that samples depend on nearly clean levels that training hardly draws, if any.

    A level counts if it is cleaner than the median draw, its noise can be seen, and the time
    sampler draws less than a tenth as densely there as uniform draws would.
    """
    schedule, drawn = objective.schedule, objective.time_sampler
    calls = sampler.time_grid(schedule, sampler.steps)[:-1]
    median = drawn.quantile(torch.full((1,), 0.5, dtype=torch.float64), schedule)
    visible = calls.sigma > GREY_STEP * calls.alpha  # fainter noise cannot be seen
    rare = visible & (calls.t < median) & (drawn.density(calls.t, schedule) < RARE)
    if not rare.any():
        return None
    places = torch.linspace(0.01, 1, 100, dtype=torch.float64)
    end = schedule(places[drawn.density(places, schedule) >= RARE][0])
    shorter = f"sample with sampler.time_grid.sigma_min={float(end.sigma / end.alpha):.2g}, or "
    remedy = shorter if hasattr(sampler.time_grid, "sigma_min") else ""
    has_share = hasattr(drawn, "uniform")
    wider = "objective.time_sampler.uniform=0.2" if has_share else "objective/time_sampler=uniform"
    return (
        f"{rare.double().mean():.0%} of the sampler's {len(calls)} network calls are at nearly "
        "clean levels that training draws less than a tenth as often as uniform draws would, "
        f"which leaves grain in the samples; {remedy}train with {wider}"
    )


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
