"""Controls of the count of copies: how many copies it finds, and how many where there are none.

Copies are training images that the run denoised, with its own grain and blur. A control run has no
copies.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.config_keys import SUBSET_SEED, Means, flat, means
from diffusion_lab.assembly.objects import read_data
from diffusion_lab.assembly.pipeline import Pipeline
from diffusion_lab.common import hashing
from diffusion_lab.common.images import to_float
from diffusion_lab.common.messages import UserError, say, track
from diffusion_lab.common.randomness import mix_seed, random_places
from diffusion_lab.compute.distributed import cached, gather_shards, own_batches
from diffusion_lab.data import ImageData
from diffusion_lab.data.loader import fits
from diffusion_lab.diffusion.noise import NoiseLevel
from diffusion_lab.diffusion.schedule import NoiseSchedule
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.metrics import neighbours
from diffusion_lab.metrics.extractor.base import FEATURES
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.observer import Observer
from diffusion_lab.runs.averages import length_and_step
from diffusion_lab.runs.summary import load_summary

Views = dict[str, list[Tensor]]  # by space, the views (n, D) of the same images
Rates = dict[str, dict[str, float]]  # by space, the shares of images that were found


@dataclass(frozen=True)
class CopySpaces:
    """The training images, uint8 (N, C, H, W), in each space: the extractor's, and pixels."""

    metrics: GenerativeMetrics
    training: Tensor
    mirrored: bool  # whether images are compared with them as mirror images, too

    @cached_property
    def known(self) -> dict[str, Tensor]:
        """The training images (N, D) by space, on a GPU where they fit; computed once."""
        views = replace(self, mirrored=False).views(self.training, "training")
        place = self.metrics.extractor.compares_on
        found = {name: own for name, (own,) in views.items()}
        return {name: own.to(place) if fits([own], place) else own for name, own in found.items()}

    def views(self, images: Tensor, stored_as: str | None = None) -> Views:
        """The views (n, D) of images, uint8 (n, C, H, W), by space; cached as `stored_as`."""
        sides = [images, images.flip(-1)] if self.mirrored else [images]
        return {
            self.metrics.extractor.name: [self.features(side, stored_as) for side in sides],
            "pixels": [to_float(side).flatten(1) for side in sides],
        }

    def features(self, images: Tensor, stored_as: str | None) -> Tensor:
        """The features (n, D) of images uint8 (n, C, H, W), of which each rank computes a share."""
        extractor, everything = self.metrics.extractor, torch.arange(len(images))
        observer, folder = Observer(extractor), self.metrics.cache_dir
        if stored_as is None:
            told = f"{extractor.name} features"
            return observer.all_of(images, everything, told)[FEATURES]
        key = {"images": hashing.of_tensors([images]), "extractor": extractor.fingerprint}
        name = f"{stored_as}-{len(images)}-{extractor.name}"

        def compute() -> dict[str, Tensor]:
            return {FEATURES: observer.once(images, everything, stored_as, folder)[FEATURES]}

        return cached(folder, name, key, compute)[FEATURES]

    def rates(self, images: Tensor, sources: Tensor, limits: dict[str, float]) -> Rates:
        """The shares of images, uint8 (n, C, H, W), that count as copies, by each criterion.

        `limits` are distances by space, and `sources` (n,) the indices of the training images that
        the images were made from; `source_found` is the share whose nearest training image is that
        one, or equal to it.
        """
        found = {}
        for name, views in self.views(images).items():
            distances, index = neighbours.nearest_view(views, self.known[name], 2)
            equal = (self.training[index[:, 0]] == self.training[sources]).flatten(1).all(1)
            shares = neighbours.detected(distances, limits[name])
            found[name] = shares | {"source_found": equal.double().mean().item()}
        return found


@dataclass(frozen=True)
class ControlRun:
    """An open run, and which of the measured run's training images it did not see, (N,) bool."""

    opened: DiffusionRun
    pipeline: Pipeline
    unseen: Tensor
    other_settings: list[str]  # keys in which its composition differs, besides the subset's seed
    step: int | None = None  # of both runs' checkpoints; None for the newest of each

    @classmethod
    def open(cls, cfg: DictConfig, measured: DiffusionRun, step: int | None) -> "ControlRun":
        """Opens `cfg.control`, at a step or as it ended, beside the measured run.

        Raises UserError if it can be no control of that run.
        """
        beside = cfg.copy()
        beside.run, beside.step = cfg.control, step
        opened = open_diffusion_run(beside)
        read_data(opened.saved, opened.datamodule)
        unseen = images_unseen(measured.datamodule, opened.datamodule, cfg.control)
        differing = other_settings(measured.saved, opened.saved)
        if differing:
            say(
                f"control={cfg.control} differs from this run in {', '.join(differing)}, so its "
                "samples may have other grain and blur"
            )
        return cls(opened, opened.pipeline(cfg), unseen, differing, step)

    def counted(
        self, cfg: DictConfig, spaces: CopySpaces, drawn: Views, test: Views
    ) -> dict[str, object]:
        """Counts copies by the control, beside the views of our samples and of test images."""
        told = "Drawing the control's samples"
        samples = self.opened.draw_all(self.pipeline, cfg, description=told)
        found = {}
        for name, views in spaces.views(samples).items():
            known = spaces.known[name][self.unseen]  # the same training images for all three
            ours, beside, theirs = (
                neighbours.nearest_view(each, known, 2)[0]
                for each in (drawn[name], test[name], views)
            )
            found[name] = against_control(ours, beside[:, 0], theirs)
        _, made_at = length_and_step(str(cfg.get("average")))
        step = int(made_at) if made_at else self.step
        return {
            "run": str(cfg.control),
            "weights": self.opened.weights,
            "other_settings": self.other_settings,
            # by the run and by the control, null if unknown; another number means other grain
            "images_seen": [images_seen(each, step) for each in (cfg.run, cfg.control)],
            "training_images": int(self.unseen.sum()),
            "shared_images": int((~self.unseen).sum()),
            "neighbours": found,
        }


def images_seen(run: str, step: int | None) -> int | None:
    """The training images behind a step of a run, by default the last; None if unknown."""
    summary = load_summary(run)
    if step is None:
        return summary.images_seen
    return summary.images_seen * step // summary.steps if summary.images_seen else None


def against_control(ours: Tensor, test: Tensor, theirs: Tensor) -> dict[str, float]:
    """Counts copies among the samples of a run and of its control, whose null is without copies.

    Distances to the two nearest training images that the control has not seen: `ours` (n, 2) of the
    run's samples and `theirs` (n, 2) of the control's; `test` (m,) to the nearest, of test images.
    `limit` is the usual one, from test images, and `control_limit` comes from the control in the
    same way. Copies are counted by the first, and `copies_by_control` by the second.
    """
    limit, own = (each.quantile(neighbours.UNUSUAL).item() for each in (test, theirs[:, 0]))
    by_control = neighbours.detected(ours, own)["copies"]
    return {
        "limit": limit,
        "control_limit": own,
        **neighbours.detected(ours, limit),
        **{f"control_{name}": share for name, share in neighbours.detected(theirs, limit).items()},
        "copies_by_control": by_control,
        "copy_ratio_by_control": by_control / neighbours.expected_share(len(theirs)),
    }


def images_unseen(ours: ImageData, theirs: ImageData, control: str) -> Tensor:
    """Finds which of our training images a control was not trained on: (N,) bool.

    Raises UserError if `control`, its folder, has other data, or has seen all but one of them.
    """
    for what in ("image_shape", "native_shape", "class_names"):
        if (expected := getattr(ours, what)) != (found := getattr(theirs, what)):
            raise UserError(
                f"control={control} has {what.replace('_', ' ')} {found}, but this run {expected}; "
                "give a run on another part of the same data"
            )
    if ours.fingerprint != theirs.fingerprint:
        raise UserError(
            f"control={control} was trained on other data; give a run on another part of the same "
            "data"
        )
    unseen = not_among(theirs.train_images(), ours.train_images())
    if (left := int(unseen.sum())) < 2:
        raise UserError(
            f"control={control} was trained on {len(unseen) - left} of this run's {len(unseen)} "
            "training images, but 2 must be new to it; give a run on another part of the data, by "
            "data.per_class=... data.subset_seed=..."
        )
    return unseen


def not_among(known: Tensor, images: Tensor) -> Tensor:
    """Whether each image (n, C, H, W) differs from all of `known`, (N, C, H, W): (n,) bool."""
    # by their content, since some data contain an image twice
    seen = {image.numpy().tobytes() for image in known}
    return torch.tensor([image.numpy().tobytes() not in seen for image in images], dtype=torch.bool)


def other_settings(ours: DictConfig, theirs: DictConfig) -> list[str]:
    """The keys of a composition, besides the subset's seed, in which two configurations differ."""
    first, second = (flat(OmegaConf.to_container(saved)) for saved in (ours, theirs))
    return sorted(
        key
        for key in first.keys() | second.keys()
        if Means.COMPOSITION in means(key) and key != SUBSET_SEED
        if first.get(key) != second.get(key)
    )


LEVELS = "sigma_over_alpha"  # of a report: the key of the shares found, by level
POSITIVE = 0x706F736974  # separates these draws from others with the same seed


def copies_found(
    cfg: DictConfig,
    opened: DiffusionRun,
    pipeline: Pipeline,
    levels: Mapping[str, NoiseLevel],
    spaces: CopySpaces,
    measured: Mapping[str, neighbours.Neighbours],
) -> dict[str, dict]:
    """The shares that the limits of `measured` find of training images denoised from `levels`."""
    if not levels:
        return {}
    chosen = random_places(len(spaces.training), cfg.control_images)
    limits = {name: space.limit for name, space in measured.items()}
    rates = {}
    for name, level in levels.items():
        copies = denoised(opened, pipeline, chosen, level, cfg.batch_size, cfg.seed)
        rates[name] = spaces.rates(copies, chosen, limits)
    return {"positive": {"images": len(chosen), LEVELS: rates}}


def denoised(
    opened: DiffusionRun,
    pipeline: Pipeline,
    chosen: Tensor,
    level: NoiseLevel,
    batch_size: int,
    seed: int,
) -> Tensor:
    """Lets the run denoise the noised training images `chosen` (n,); uint8 (n, C, H, W), native."""
    data, seed = opened.datamodule, mix_seed(seed, POSITIVE)
    images, labels = data.padded(data.train_images()[chosen]), data.train_labels()[chosen]
    batches = track(own_batches(len(chosen), batch_size), "Denoising training images")
    with opened.autocast:
        parts = [pipeline.renew(images[ids], labels[ids], level, ids, seed) for ids in batches]
    return data.to_native(gather_shards(parts))


def levels_at(schedule: NoiseSchedule, ratios: Sequence[float]) -> dict[str, NoiseLevel]:
    """The levels of a schedule at these sigma / alpha, by name; raises UserError for others."""
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


def lines(controls: Mapping[str, dict]) -> Iterator[str]:
    """The results of the controls in words, a line each, and one by space for the control run."""
    if "positive" in controls:
        count, levels = controls["positive"]["images"], controls["positive"][LEVELS]
        noised = f"noised to sigma / alpha of {' / '.join(levels)}, and denoised by the run"
        yield f"{count} training images {noised}: {in_words(levels)}"
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
