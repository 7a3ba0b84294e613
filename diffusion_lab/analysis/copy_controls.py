"""Controls of the count of copies: how many copies it finds, and how many where there are none.

Copies are training images that the run denoised, with its own grain and blur, and training images
with noise on them. A control run has no copies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.analysis.control_run import ControlRun
from diffusion_lab.analysis.copy_spaces import CopySpaces, Detector, Rates, Views
from diffusion_lab.common.messages import UserError, track
from diffusion_lab.common.randomness import SampleNoise, mix_seed, random_places
from diffusion_lab.compute.distributed import gather_shards, own_batches
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.families.diffusion.run import DiffusionRun
from diffusion_lab.metrics.neighbours import Neighbours
from diffusion_lab.pipeline import Pipeline

POSITIVE, GRAIN = 0x706F736974, 0x677261696E  # separate these draws from others with the same seed


@dataclass(frozen=True)
class Controls:
    """The controls that a configuration asks for; those that it turns off are left out."""

    opened: DiffusionRun
    pipeline: Pipeline
    levels: dict[str, NoiseLevel]  # of the positive control, by their sigma / alpha
    control: ControlRun | None

    @classmethod
    def prepared(cls, cfg: DictConfig, opened: DiffusionRun, pipeline: Pipeline) -> "Controls":
        """Raises UserError for a level or a control run that does not fit the opened run."""
        levels = levels_at(pipeline.schedule, cfg.positive_at or ())
        control = None if cfg.control is None else ControlRun.open(cfg, opened)
        return cls(opened, pipeline, levels, control)

    def counted(
        self,
        cfg: DictConfig,
        spaces: CopySpaces,
        measured: Mapping[str, Neighbours],
        drawn: Views,
        test: Views,
    ) -> dict[str, dict]:
        """The results by control; `drawn` and `test` are views of samples and test images."""
        detector = Detector(spaces, {name: space.limit for name, space in measured.items()})
        chosen = random_places(len(spaces.training), cfg.control_images)
        found: dict[str, dict] = {}
        if self.levels:
            found["positive"] = {"images": len(chosen), "sigma_over_alpha": {}}
        for name, level in self.levels.items():
            images = self.denoised(chosen, level, cfg.batch_size, cfg.seed)
            found["positive"]["sigma_over_alpha"][name] = detector.rates(images, chosen)
        if self.control is not None:
            found["negative"] = self.control.counted(cfg, spaces, measured, drawn, test)
        if cfg.grain:
            images = spaces.training[chosen]
            grey = {f"{std:g}": with_grain(images, std, cfg.seed) for std in cfg.grain}
            rates = {name: detector.rates(noisy, chosen) for name, noisy in grey.items()}
            found["grain"] = {"images": len(chosen), "grey_levels": rates}
        return found

    def denoised(self, chosen: Tensor, level: NoiseLevel, batch_size: int, seed: int) -> Tensor:
        """Noises the training images `chosen` (n,) to a level, and lets the run denoise them.

        Returns uint8 (n, C, H, W) of native size; see `Pipeline.renew`.
        """
        data, seed = self.opened.datamodule, mix_seed(seed, POSITIVE)
        images, labels = data.padded(data.train_images()[chosen]), data.train_labels()[chosen]
        batches = track(own_batches(len(chosen), batch_size), "Denoising training images")
        with self.opened.autocast:
            parts = [
                self.pipeline.renew(images[ids], labels[ids], level, ids, seed) for ids in batches
            ]
        return data.to_native(gather_shards(parts))


def levels_at(schedule: NoiseSchedule, ratios: Sequence[float]) -> dict[str, NoiseLevel]:
    """The levels of a schedule at these sigma / alpha, named by them.

    Raises UserError for one that the schedule does not have.
    """
    found = {}
    for ratio in ratios:
        level = schedule.at_logsnr(torch.tensor(-2 * math.log(ratio), dtype=torch.float64))
        nearest = (level.sigma / level.alpha).item()
        if not math.isclose(nearest, ratio, rel_tol=1e-3):
            raise UserError(
                f"positive_at has {ratio:g}, but the sigma / alpha of this run's schedule that is "
                f"nearest to it is {nearest:.4g}; write that, or positive_at=[] for no such control"
            )
        found[f"{ratio:g}"] = level
    return found


def with_grain(images: Tensor, std: float, seed: int) -> Tensor:
    """Adds Gaussian noise of `std` grey levels to images, uint8 (n, C, H, W), and rounds them.

    An image has the same noise at every level.
    """
    noise = SampleNoise(mix_seed(seed, GRAIN), range(len(images)))(images.shape[1:])
    return (images + std * noise).round_().clamp_(0, 255).to(torch.uint8)


def lines(controls: Mapping[str, dict]) -> Iterator[str]:
    """The results of the controls in words, a line each, and one by space for the control run."""
    for name, unit, done in (
        ("positive", "sigma_over_alpha", "noised to sigma / alpha of {}, and denoised by the run"),
        ("grain", "grey_levels", "with noise of {} grey levels"),
    ):
        if name in controls:
            levels = controls[name][unit]
            how = done.format(" / ".join(levels))
            yield f"{controls[name]['images']} training images {how}: {in_words(levels)}"
    if "negative" in controls:
        negative = controls["negative"]
        yield (
            f"Control {negative['run']}, {negative['training_images']} training images "
            f"({negative['shared_images']} that it saw too are left out):"
        )
        for space, found in negative["neighbours"].items():
            yield (
                f"copies {found['copies']:.3g} in {space}, {found['control_copies']:.3g} in the "
                f"control; {found['copies_by_control']:.3g} by the limit from the control"
            )


def in_words(levels: Mapping[str, Rates]) -> str:
    """The shares that were found, each with one number for each level."""
    words = []
    for space, shares in next(iter(levels.values())).items():
        rates = [rates[space] for rates in levels.values()]
        each = (f"{name} {' / '.join(f'{rate[name]:.2g}' for rate in rates)}" for name in shares)
        words.append(f"in {space} {', '.join(each)}")
    return "; ".join(words)
