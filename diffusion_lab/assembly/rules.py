"""Parts of a model that cannot be combined, one row each, beside the rules that parts bring.

Rows that look at absent parts do not apply, so the same table serves training and sampling.
"""

import math
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from diffusion_lab.backbone import Energy
from diffusion_lab.backbone.conditioning import RawLabels
from diffusion_lab.common import rules
from diffusion_lab.common.rules import Rules
from diffusion_lab.data.augmentation import NonLeaky
from diffusion_lab.diffusion.estimate import Estimate
from diffusion_lab.diffusion.sampler import Sampler
from diffusion_lab.diffusion.sampler.runge_kutta import ToleranceError
from diffusion_lab.diffusion.schedule import NoiseSchedule

KEYS = {
    "loss": "objective.loss",
    "prediction": "objective.prediction",
    "time_sampler": "objective.time_sampler",
    "teacher": "objective.teacher",
}


def adds_noise(sampler: Sampler, schedule: NoiseSchedule) -> bool:
    """Whether a sampler adds noise on its way; an adaptive one adds none."""
    drawn = []

    def randn_like(x: Tensor) -> Tensor:
        drawn.append(x)
        return torch.zeros_like(x)

    x = torch.ones(1, 1, 1, 1)
    with suppress(ToleranceError):  # said when images are drawn
        sampler(lambda *_: Estimate(x, 0 * x), x, schedule, randn_like)  # all of its steps
    return bool(drawn)


def embeds(backbone: object) -> bool:
    """Whether a network embeds labels itself."""
    return getattr(backbone, "embeds_labels", False)


TABLE: Rules = {
    "objective.label_dropout=1 trains without any label; write a smaller number, or "
    "conditioning=none": lambda label_dropout: label_dropout == 1,
    "objective/teacher chooses the noise of each sample, which a coupling would exchange; write "
    "coupling=none": lambda teacher, coupling: teacher and coupling,
    "denoiser.noise_label=index needs a schedule with a table, and this one has none; use "
    "denoiser.noise_label=time, or a discrete schedule such as schedule=ddpm_linear": (
        lambda noise_label, schedule: noise_label == "index" and schedule.discrete_steps is None
    ),
    "denoiser.noise_label=log_sigma is infinite at pure noise, which this schedule reaches; use "
    "denoiser.noise_label=time": (
        lambda noise_label, schedule: (
            noise_label == "log_sigma" and schedule(torch.ones(())).alpha == 0
        )
    ),
    "denoiser.clip={clip} is for pixels in [-1, 1], and latents have no limit; write "
    "denoiser.clip=null": lambda clip, first_stage: clip is not None and not first_stage.of_pixels,
    "augmentation changes the images at every step, so their latents cannot be cached; write "
    "first_stage.cache=false, or augmentation=none with data.flip=true": (
        lambda augmentation, first_stage: augmentation is not None and first_stage.cache
    ),
    "a coupling would give the images of a label noise of their own, and only classes keep theirs "
    "apart; write coupling=none, or conditioning=none": (
        lambda conditioning, coupling: (
            coupling and conditioning.conditional and not conditioning.labels.classes
        )
    ),
    "backbone=energy is a derivative of its network, which a compiled one does not have; write "
    "compile=auto": lambda backbone, compiled: (
        isinstance(backbone, Energy) and compiled not in (False, "auto")
    ),
    "backbone.base_width={backbone.base_width} has no rates for the network of this condition; "
    "write conditioning=class_label, or backbone.base_width=null": lambda conditioning, backbone: (
        getattr(backbone, "base_width", None)
        and conditioning.conditional
        and not conditioning.labels.classes
    ),
    "conditioning=raw_labels is for networks that embed labels themselves, such as "
    "backbone=diffusers_model, and this one does not; write conditioning=class_label": (
        lambda conditioning, backbone: isinstance(conditioning, RawLabels) and not embeds(backbone)
    ),
    "this network embeds labels itself; write conditioning=raw_labels, or conditioning=none": (
        lambda conditioning, backbone: (
            embeds(backbone)
            and conditioning.conditional
            and not isinstance(conditioning, RawLabels)
        )
    ),
    "this network cannot be told how an image was augmented; write augmentation=none": (
        lambda backbone, described: embeds(backbone) and described
    ),
    "this sampler.time_grid needs a schedule with a table, and this one has none; use "
    "sampler/time_grid=uniform, or a discrete schedule such as schedule=ddpm_linear": (
        lambda sampler, schedule: sampler.time_grid.needs_table and schedule.discrete_steps is None
    ),
    "sampler.variance=learned needs a model trained with objective/loss/variance=hybrid; use "
    "sampler.variance=fixed_small with this model": (
        lambda sampler, asked: (
            getattr(sampler, "variance", None) == "learned" and not asked.learned_variance
        )
    ),
    "guidance=cfg_plus_plus takes x0 from one estimate and the noise from another, which only "
    "samplers of one jump per step can; use sampler=ddim, euler, ddpm, euler_ancestral or "
    "reverse_sde": lambda guidance, sampler: guidance.keeps_weak_noise and not sampler.one_jump,
    "guidance=embedded tells the network a scale, which this one was not trained with; train with "
    "objective=improved_mean_flow objective.loss.guidance=8, or use guidance=classifier_free": (
        lambda guidance, loss: guidance.told_scale and not loss.told_scale
    ),
    "guidance.scale={guidance.scale} is beyond {loss.guidance}, the largest scale in training, "
    "objective.loss.guidance; write a smaller one": (
        lambda guidance, loss: (
            guidance.told_scale and guidance.scale > getattr(loss, "guidance", math.inf)
        )
    ),
    "guidance=classifier moves the mean of the samples that an image may become, and this sampler "
    "asks for another answer; use guidance=classifier_free": (
        lambda guidance, sampler: guidance.by_classifier and sampler.of_few_steps
    ),
    "guidance=cfg_zero_star leaves out steps on pure noise, and a model of few steps has none to "
    "spare; write guidance.zero_above=null": (
        lambda guidance, sampler: (
            sampler.of_few_steps and getattr(guidance, "zero_above", None) is not None
        )
    ),
    "guidance.clip={guidance.clip} does not fit this sampler: the network's answer for a jump is "
    "no image, and may exceed any limit; write guidance.clip=null guidance.percentile=null, or use "
    "sampler=few_step": lambda guidance, sampler: sampler.jumps and guidance.clip is not None,
    "guidance.clip={guidance.clip} is for pixels in [-1, 1], and latents have no limit; write "
    "guidance.clip=null guidance.percentile=null": (
        lambda guidance, first_stage: guidance.clip is not None and not first_stage.of_pixels
    ),
    "guidance=classifier classifies the estimate of an image, and this run diffuses the latents of "
    "an encoder; use guidance=classifier_free": (
        lambda guidance, first_stage: guidance.by_classifier and not first_stage.of_pixels
    ),
    "guidance.scale={guidance.scale} needs a model trained on labels; write guidance.scale=1, or "
    "train with conditioning=class_label": (
        lambda guidance, conditional: guidance.needs_labels and not conditional
    ),
    "guidance.scale={guidance.scale} uses the unconditional model, which objective.label_dropout=0 "
    "does not train; train with objective.label_dropout=0.1": (
        lambda guidance, conditional, label_dropout: (
            guidance.asks_unlabelled and conditional and not label_dropout
        )
    ),
    "this sampler adds noise on its way, for which it needs the score, and a model of dependent "
    "pairs (of a coupling, or reflow) does not give it; use one without noise, such as "
    "sampler=dpm_solver, unipc or heun, or train without such pairs": (
        lambda paired, sampler, schedule: paired and adds_noise(sampler, schedule)
    ),
}
WARNINGS: Rules = {  # of what can be trained, but may disappoint
    "data.flip=true mirrors nothing, since the teacher draws the images; write data.flip=false": (
        lambda teacher, flipped: flipped and teacher and not teacher.asked
    ),
    "data.flip=true mirrors images without telling the network, so half of the samples will be "
    "mirrored; write data.flip=false, because augmentation.flip_x=true does tell it": (
        lambda augmentation, flipped: (
            flipped and isinstance(augmentation, NonLeaky) and augmentation.flip_x
        )
    ),
    "coupling.per_class=false gives the images of a label noise of their own, but samples of a "
    "label start from any noise; write coupling.per_class=true, or conditioning=none": (
        lambda coupling, conditional: conditional and getattr(coupling, "per_class", None) is False
    ),
}


def check(**parts: Any) -> None:
    """Raises UserError with the sentence of the first rule that the parts break, if any."""
    rules.check(TABLE, KEYS, **parts)


def warned(**parts: Any) -> Iterator[str]:
    """The warnings about parts that can be trained together, but may disappoint."""
    return rules.sentences(WARNINGS, KEYS, "warnings", **parts)
