"""The parts of a model, and checks before training that they fit one another."""

from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.stage import check_embeddings
from diffusion_lab.common.messages import UserError
from diffusion_lab.data.augmentation import Augmentation, NonLeaky
from diffusion_lab.diffusion.denoiser import NOISE_LABELS, Denoiser
from diffusion_lab.diffusion.estimate import NOTHING, Given
from diffusion_lab.diffusion.likelihood import GREY_STEP
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.objective import Objective
from diffusion_lab.diffusion.objective.jump_loss import MeanFlow
from diffusion_lab.diffusion.objective.jump_loss.mean_flow import slope_of_output
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.first_stage import FirstStage

RARE = 0.1  # density of draws, below which a level is hardly trained; uniform draws have 1
FLAT = 0.05  # of the largest slope, below which a slope counts as 0
LARGE_GAIN = 1000  # gain of the network's error above which samples of good models fail


@dataclass(frozen=True)
class Model:
    """The denoiser that is trained, and the parts that define its task."""

    denoiser: Denoiser
    schedule: NoiseSchedule
    objective: Objective
    first_stage: FirstStage
    augmentation: Augmentation | None


def check_training(schedule: NoiseSchedule, objective: Objective, noise_label: str) -> None:
    """Raises UserError, which says what to change, if these parts cannot be trained together."""
    end = schedule(torch.ones(()))
    reaches_noise = bool(end.alpha == 0)
    if not objective.prediction.x0_gain(end).isfinite():
        raise UserError(
            f"objective/prediction={option(objective)} does not determine the image at pure noise, "
            "which this schedule reaches (alpha = 0 at t = 1); use objective/prediction=v, flow or "
            "x0, or a schedule that keeps some signal, such as schedule=cosine"
        )
    if noise_label == "index" and schedule.discrete_steps is None:
        raise UserError(
            "denoiser.noise_label=index needs a schedule with a table, and this one has none; "
            "use denoiser.noise_label=time, or a discrete schedule such as schedule=ddpm_linear"
        )
    if noise_label == "log_sigma" and reaches_noise:
        raise UserError(
            "denoiser.noise_label=log_sigma is infinite at pure noise, which this schedule "
            "reaches; use denoiser.noise_label=time"
        )
    if objective.variance_loss is not None and (schedule.discrete_steps or 0) < 2:
        raise UserError(
            "objective.variance_loss needs a schedule with a table, and this one has none; use "
            "objective/variance_loss=none, or a discrete schedule such as schedule=ddpm_linear"
        )


@torch.no_grad()
def check_network(model: Model) -> None:
    """Raises ValueError if the network lacks a derivative, or cannot be told what it must be.

    That is the noise level, the label, if it embeds labels itself, and where to jump.
    """
    denoiser, objective = model.denoiser, model.objective
    check_embeddings(denoiser.backbone)
    embeds = getattr(denoiser.backbone, "embeds_labels", False)
    energy = isinstance(denoiser.backbone, Energy)
    trains = objective.forward_mode or objective.jumps or energy
    if not (embeds or trains):
        return
    device = next(denoiser.parameters()).device
    x = torch.zeros(1, *denoiser.image_shape, device=device)
    level = objective.schedule(torch.full((1,), 0.5)).to(device)
    denoiser.eval()  # an image of zeros is no part of a network's statistics
    if embeds:
        check_embedded_labels(denoiser, x, level, dropped=objective.label_dropout > 0)
    if trains:
        generator = torch.Generator().manual_seed(0)  # training's draws do not depend on this one
        with torch.set_grad_enabled(energy):
            loss, _ = objective.training_loss_at(denoiser, x, x, level, NOTHING, generator)
            if energy:
                differentiate_twice(loss.sum())
                denoiser.zero_grad()
    denoiser.train()


def check_embedded_labels(denoiser: Denoiser, x: Tensor, level: NoiseLevel, dropped: bool) -> None:
    """Calls a network that embeds labels itself with the first and the last label of an image.

    If labels are dropped in training, also with the null label. Raises ValueError where it fails.
    """
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


def check_first_stage(
    first_stage: FirstStage, augmentation: Augmentation | None, clip: float | None
) -> None:
    """Raises UserError if latents would be clipped, or cached while augmentation changes images."""
    if clip is not None and not first_stage.of_pixels:
        raise UserError(
            f"denoiser.clip={clip} is for pixels in [-1, 1], and latents have no limit; write "
            "denoiser.clip=null"
        )
    if augmentation is not None and first_stage.cache:
        raise UserError(
            "augmentation changes the images at every step, so their latents cannot be "
            "cached; write first_stage.cache=false, or augmentation=none with data.flip=true"
        )


def advice(
    schedule: NoiseSchedule,
    objective: Objective,
    clipped: bool,
    augmentation: Augmentation | None = None,
    flipped: bool = False,
    latents: bool = False,
    conditional: bool = False,
) -> list[str]:
    """Warnings about a model that can be trained but may disappoint; `flipped` is `data.flip`.

    `clipped` says whether the denoiser or the guidance clips its estimate. With `latents`, which
    are unbounded, clipping is not recommended. `conditional` is whether the network sees labels.
    """
    lines = []
    end, prediction = schedule(torch.ones(())), objective.prediction
    # relative to the size of the output: an unscaled score is small where its gain is large
    gain = float(prediction.x0_gain(end) * torch.hypot(*prediction.mix(end)))
    if gain > LARGE_GAIN and not clipped:
        remedy = "" if latents else "sample with guidance.clip=1, or "
        lines.append(
            f"objective/prediction={option(objective)} multiplies the network's error by "
            f"{gain:.0f} at the noisiest level; {remedy}use objective/prediction=v"
        )
    if flipped and isinstance(augmentation, NonLeaky) and augmentation.flip_x:
        lines.append(
            "data.flip=true mirrors images without telling the network, so half of the samples "
            "will be mirrored; write data.flip=false, because augmentation.flip_x=true does tell it"
        )
    if conditional and getattr(objective.coupling, "per_class", None) is False:
        lines.append(
            "coupling.per_class=false gives the images of a label noise of their own, but samples "
            "of a label start from any noise; write coupling.per_class=true, or conditioning=none"
        )
    return lines


def steep_label(denoiser: Denoiser, objective: Objective) -> str | None:
    """The warning that MeanFlow's derivative is taken by a label that runs to 1000, if it is."""
    differentiated = objective.jump_loss is not None and objective.jump_loss.forward_mode
    if not differentiated or denoiser.noise_label is not NOISE_LABELS["time"]:
        return None
    return (
        "denoiser.noise_label=time makes the derivative that objective/jump_loss=mean_flow learns "
        "from a thousand times steeper, and samples worse; write denoiser.noise_label=auto, unless "
        "init_from has weights with this label"
    )


def hardly_jumps(objective: Objective) -> str | None:
    """The warning that MeanFlow's target is undetermined for some jump to an image, if so.

    Its divisor, the change of the jump's end with the output, is 0 on the way or near 0 at the
    noisiest level.
    """
    if not isinstance(objective.jump_loss, MeanFlow):
        return None
    starts = objective.schedule(torch.linspace(0.01, 1, 100, dtype=torch.float64))
    slopes = slope_of_output(objective, starts, objective.schedule(torch.full((100,), 1e-4)))
    steady = (slopes > 0).all() or (slopes < 0).all()
    if steady and slopes[-1].abs() > FLAT * slopes.abs().max():
        return None
    return (
        "objective/jump_loss=mean_flow does not determine all jumps to an image with this schedule "
        "and prediction, so samples of one call may fail; write schedule=rectified "
        "objective/prediction=flow"
    )


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


def option(objective: Objective) -> str:
    """The name of the prediction among the options of objective/prediction."""
    return type(objective.prediction).__name__.lower()
