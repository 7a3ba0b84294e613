"""Images that another program drew, measured as runs are, in run folders without a model."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.instantiate import errors_at
from diffusion_lab.assembly.objects import build_images
from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.common import hashing
from diffusion_lab.common.files import OUTPUTS, read_json
from diffusion_lab.common.images import save_png
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.randomness import random_places
from diffusion_lab.compute.device import device_and_precision
from diffusion_lab.data.source.drawn_images import read_drawn
from diffusion_lab.metrics.generative import GenerativeMetrics
from diffusion_lab.metrics.quantity import Protocol
from diffusion_lab.runs import published
from diffusion_lab.runs.current import CHECKPOINT
from diffusion_lab.runs.files import CONFIG, SAMPLES
from diffusion_lab.runs.folder import load_config, save_config, write_summary
from diffusion_lab.runs.opened import OpenRun, move_data, say_left_out
from diffusion_lab.runs.results import EVALUATIONS, IMAGES
from diffusion_lab.runs.summary import Summary
from diffusion_lab.runs.weights import WeightsChoice
from diffusion_lab.training.summary import environment_of

COLUMNS = 10  # of the picture, a square


@dataclass(frozen=True)
class DrawnImages(Generator):
    """Images (n, C, H, W) uint8 in the place of samples, and their classes (n,), if known."""

    images: Tensor
    classes: Tensor | None

    @property
    def conditional(self) -> bool:
        return self.classes is not None

    def labels(self, ids: Sequence[int]) -> Tensor | None:
        return None if self.classes is None else self.classes[list(ids)]

    def drawn(
        self, ids: Sequence[int], seed: int, labels: Tensor | None, on_step: Callable[[], None]
    ) -> Tensor:
        on_step()
        return self.images[list(ids)]


@dataclass(frozen=True)
class ImagesRun(OpenRun):
    """The images in a folder or file, with the data that they are measured against.

    `weights` has the checksum of the images in place of that of weights.
    """

    command: ClassVar[str] = "evaluate"
    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = (
        "the figures of another program's images, which only `evaluate`, `compare` and `publish` "
        "accept"
    )

    drawn: DrawnImages
    conditional = True  # metrics of classes are left out if the images have no labels

    @classmethod
    def open(cls, cfg: DictConfig, saved: DictConfig) -> Self:
        """Reads the images of the folder `cfg.run`, and sets `cfg.images` to their path.

        Raises UserError for images that cannot be measured, and for others than those that the
        folder's figures are of.
        """
        if IMAGES not in cfg:
            raise UserError(f"{cfg.run} is {cls.limits}; give a trained run")
        for key, own in (("average", None), ("step", None), ("seed", saved.seed)):
            if cfg[key] not in (None, own):
                raise UserError(
                    f"{key}={cfg[key]} is for runs, and {cfg.run} has images that another program "
                    f"drew; leave {key} out"
                )
        if cfg.data_root:
            move_data(saved.data.source, cfg.data_root)
        device, precision = device_and_precision(cfg.device, cfg.precision)
        fields = cls.load(WeightsChoice(Path(saved.images)), saved, device)
        drawn, cfg.images = fields["drawn"], saved.images
        parts = [drawn.images] if drawn.classes is None else [drawn.images, drawn.classes]
        weights: dict[str, object] = {CHECKPOINT: hashing.of_tensors(parts)}
        known = {published.facts_of(Path(cfg.run)).get(published.WEIGHTS)}
        # a folder whose writing was interrupted has no published.json
        records = (Path(cfg.run) / EVALUATIONS).glob("*.json")
        known |= {read_json(path).get(CHECKPOINT) for path in records}
        if known - {None, weights[CHECKPOINT]}:
            raise UserError(
                f"images={saved.images} are not the images whose figures are in {cfg.run}; give "
                "them another name, seed or run_dir"
            )
        return cls(saved, device, precision, weights, **fields)

    @classmethod
    def load(cls, choice: WeightsChoice, saved: DictConfig, device: torch.device) -> dict[str, Any]:
        datamodule = build_images(saved)
        with errors_at(saved, ""):
            shape, classes = datamodule.native_shape, datamodule.class_names
            images, labels = read_drawn(str(choice.folder), shape, classes)
        order = random_places(len(images), None)  # files may be sorted by class
        labels = None if labels is None else labels[order]
        return {"datamodule": datamodule, "drawn": DrawnImages(images[order], labels)}

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        return {}

    def pipeline(self, cfg: DictConfig) -> DrawnImages:
        return self.drawn

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        metrics, count = super().metrics(cfg), len(self.drawn.images)
        if metrics.num_samples > count:
            raise UserError(
                f"metrics.num_samples={metrics.num_samples} is more than the {count} images; write "
                f"metrics.num_samples={count}, here and for the runs to compare with"
            )
        if metrics.num_samples < count:
            say(f"Measuring {metrics.num_samples:,} of {count:,} images, chosen at random")
        if not self.drawn.conditional:
            say_left_out(metrics, "the images have no labels")
        return metrics

    def record(
        self,
        cfg: DictConfig,
        results: dict[str, float],
        protocol: Protocol,
        extra: Sequence[dict[str, object]],
        sampling_seconds: float | None = None,
    ) -> Path:
        """Writes the folder `cfg.run`, if it is new, and the evaluation into it.

        The seconds are those of reading the images, and left out.
        """
        folder = Path(cfg.run)
        folder.mkdir(parents=True, exist_ok=True)
        save_config(folder, self.saved)
        facts: dict[str, Any] = {
            "name": self.saved.name,
            "finished": True,
            "images": len(self.drawn.images),
            "labelled": self.drawn.conditional,
            "metrics": {},
            **environment_of(self.device),
            "ended_at": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        write_summary(folder, Summary(**facts))
        first = self.drawn.images[: COLUMNS**2]
        picture = self.datamodule.source.picture(first, COLUMNS)
        save_png(picture, folder / SAMPLES / "step_0000000.png")
        path = super().record(cfg, results, protocol, extra)
        published.mark(folder, str(self.weights[CHECKPOINT]), None)
        return path


RUN = ImagesRun


def open_images(cfg: DictConfig) -> ImagesRun:
    """Opens the images `cfg.images`, and sets `cfg.run` to the folder of their figures.

    Raises UserError if the folder has anything else.
    """
    if not OmegaConf.is_missing(cfg, "run"):
        raise UserError(f"run={cfg.run} and images={cfg.images} were given; give one of them")
    if "data" not in cfg:
        raise UserError(
            f"images={cfg.images} need data to be measured against; write data=..., as in "
            "data=cifar10"
        )
    place = Path(str(cfg.images))
    saved = OmegaConf.create(
        {
            "name": str(cfg.name or (place.name if place.is_dir() else place.stem)),
            "seed": cfg.seed or 0,
            IMAGES: str(cfg.images),
            "data": cfg.data,
            "metrics": cfg.metrics,
            "callbacks": {},
        }
    )
    cfg.run = str(cfg.run_dir or OUTPUTS / saved.name / f"seed{saved.seed}")
    folder = Path(cfg.run)
    others = folder.is_file() or (folder.is_dir() and any(folder.iterdir()))
    if others and not ((folder / CONFIG).is_file() and IMAGES in load_config(folder)):
        raise UserError(
            f"{folder} has something else than figures of images; choose another name or run_dir"
        )
    return ImagesRun.open(cfg, saved)
