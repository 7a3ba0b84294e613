"""The control run of the count of copies: a model that did not see the images that are counted.

Its samples have the grain and blur of such models, and cannot be copies. N training images of the
measured run, n samples, D features or pixels.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.analysis.copy_spaces import CopySpaces, Views
from diffusion_lab.build.config_keys import SUBSET_SEED, Means, flat, means
from diffusion_lab.build.objects import read_data
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.metrics.neighbours import (
    UNUSUAL,
    Neighbours,
    detected,
    expected_share,
    nearest_view,
)
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.runs.summary import load_summary


@dataclass(frozen=True)
class ControlRun:
    """An open run, and which of the measured run's training images it did not see, (N,) bool."""

    opened: DiffusionRun
    pipeline: Pipeline
    unseen: Tensor
    other_settings: list[str]  # keys in which its composition differs, besides the subset's seed

    @classmethod
    def open(cls, cfg: DictConfig, measured: DiffusionRun) -> "ControlRun":
        """Opens `cfg.control` beside the measured run, whose data have been read.

        Raises UserError if its samples cannot be the null of the measured run's.
        """
        beside = cfg.copy()
        beside.run = cfg.control
        opened = open_diffusion_run(beside)
        read_data(opened.saved, opened.datamodule)
        unseen = images_unseen(measured.datamodule, opened.datamodule, cfg.control)
        differing = other_settings(measured.saved, opened.saved)
        if differing:
            say(
                f"control={cfg.control} differs from this run in {', '.join(differing)}, so its "
                "samples may have other grain and blur"
            )
        return cls(opened, opened.pipeline(cfg), unseen, differing)

    def counted(
        self,
        cfg: DictConfig,
        spaces: CopySpaces,
        measured: Mapping[str, Neighbours],
        drawn: Views,
        test: Views,
    ) -> dict[str, object]:
        """Draws the control's samples, and counts copies by them, see `against_control`.

        `measured` are the neighbours of the run's samples among all training images, `drawn` and
        `test` the views of those samples and of the test images.
        """
        found, complete = {}, bool(self.unseen.all())
        told = "Drawing the control's samples"
        samples = self.opened.draw_all(self.pipeline, cfg, description=told)
        for name, views in spaces.views(samples).items():
            known = spaces.known[name][self.unseen]
            ours, beside = measured[name].generated, measured[name].test
            if not complete:  # the same training images for all three
                ours = nearest_view(drawn[name], known, 2)[0]
                beside = nearest_view(test[name], known, 1)[0][:, 0]
            found[name] = against_control(ours, beside, nearest_view(views, known, 2)[0])
        summaries = map(load_summary, (cfg.run, cfg.control))
        return {
            "run": str(cfg.control),
            "weights": self.opened.weights,
            "other_settings": self.other_settings,
            # by the run and by the control, null if unknown; another number means other grain
            "images_seen": [each.images_seen for each in summaries],
            "training_images": int(self.unseen.sum()),
            "shared_images": int((~self.unseen).sum()),
            "neighbours": found,
        }


def against_control(ours: Tensor, test: Tensor, theirs: Tensor) -> dict[str, float]:
    """Counts copies among the samples of a run and of its control, whose null is without copies.

    Distances to the two nearest training images that the control has not seen: `ours` (n, 2) of the
    run's samples and `theirs` (n, 2) of the control's; `test` (m,) to the nearest, of test images.
    `limit` is the usual one, from test images, and `control_limit` comes from the control in the
    same way. Copies are counted by the first, and `copies_by_control` by the second.
    """
    limit, own = (each.quantile(UNUSUAL).item() for each in (test, theirs[:, 0]))
    run, control = detected(ours, limit), detected(theirs, limit)
    by_control = detected(ours, own)["copies"]
    return {
        "limit": limit,
        "control_limit": own,
        **run,
        **{f"control_{name}": share for name, share in control.items()},
        "copies_by_control": by_control,
        "copy_ratio_by_control": by_control / expected_share(len(theirs)),
    }


def images_unseen(ours: ImageDataModule, theirs: ImageDataModule, control: str) -> Tensor:
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
    # by their content, since some data contain an image twice
    seen = {image.numpy().tobytes() for image in theirs.train_images()}
    unseen = torch.tensor([image.numpy().tobytes() not in seen for image in ours.train_images()])
    if (left := int(unseen.sum())) < 2:
        raise UserError(
            f"control={control} was trained on {len(unseen) - left} of this run's {len(unseen)} "
            "training images, but 2 must be new to it; give a run on another part of the data, by "
            "data.per_class=... data.subset_seed=..."
        )
    return unseen


def other_settings(ours: DictConfig, theirs: DictConfig) -> list[str]:
    """The keys of a composition, besides the subset's seed, in which two configurations differ."""
    first, second = (flat(OmegaConf.to_container(saved)) for saved in (ours, theirs))
    return sorted(
        key
        for key in first.keys() | second.keys()
        if Means.COMPOSITION in means(key) and key != SUBSET_SEED
        if first.get(key) != second.get(key)
    )
