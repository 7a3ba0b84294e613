"""Opens trained runs, to sample from them and measure them, and gives commands their settings.

Each family of models has its own kind of `OpenRun`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from diffusion_lab.assembly import families
from diffusion_lab.assembly.config_keys import verbatim
from diffusion_lab.assembly.instantiate import errors_at, instantiate
from diffusion_lab.assembly.objects import build_images, read_data
from diffusion_lab.assembly.pipeline import Generator, draw
from diffusion_lab.assembly.sentences import parse
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.compute.device import autocast, device_and_precision
from diffusion_lab.compute.distributed import gather_shards, rank_and_world, shard
from diffusion_lab.data import ImageData
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.metrics.quantity import Protocol
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.averages import length_and_step, name_of
from diffusion_lab.runs.current import EXPORTED, identify, require_unchanged
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.results import save_evaluation
from diffusion_lab.runs.weights import WeightsChoice, load_into, load_weights


@dataclass(frozen=True)
class OpenRun(ABC):
    """A trained run on a device; each subclass is a kind of run."""

    command: ClassVar[str] = "train"  # the name of the command that trains runs of this kind
    results: ClassVar[tuple[str, ...]] = ()  # files of a finished run, besides the summary
    groups_without_choice: ClassVar[tuple[str, ...]] = ()  # groups that this kind does not have
    limits: ClassVar[str] = ""  # what else than a diffusion model it is, and who accepts it

    saved: DictConfig  # the run's configuration
    device: torch.device
    precision: str
    weights: dict[str, object]  # checksum and file stamp of the weights
    datamodule: ImageData  # its images are not read yet

    @classmethod
    def open(cls, cfg: DictConfig, saved: DictConfig) -> Self:
        """Opens the run `cfg.run`, whose configuration is `saved`, on the device of `cfg`.

        `cfg.average` names the average of the weights; None is the one that the run evaluates.
        `cfg.step` is the step of a kept checkpoint, and is set to null if it is the newest one's.
        `cfg.data_root` is the new folder of the run's data, if they were moved. Raises
        UserError for anything that is missing, damaged or impossible on this machine.
        """
        if cfg.data_root:
            move_data(saved.data.source, cfg.data_root)
        device, precision = device_and_precision(cfg.device, cfg.precision)
        choice = weights_choice(cfg)
        weights = identify(cfg.run, choice.checkpoint)
        fields = cls.load(choice, saved, device)
        require_unchanged(cfg.run, weights, choice.checkpoint)
        return cls(saved, device, precision, weights, **fields)

    @classmethod
    @abstractmethod
    def load(cls, choice: WeightsChoice, saved: DictConfig, device: torch.device) -> dict[str, Any]:
        """Returns `datamodule` and the subclass's fields, networks on `device`; may raise."""

    @property
    @abstractmethod
    def conditional(self) -> bool:
        """Whether the model draws samples of given classes."""

    @property
    @abstractmethod
    def reconstruction_metrics(self) -> dict[str, float]:
        """The metrics of test images reconstructed by the first stage; the data must be read."""

    @abstractmethod
    def pipeline(self, cfg: DictConfig) -> Generator:
        """Builds the sampling call with the sampler and guidance of `cfg`; may raise UserError."""

    def draw_all(
        self,
        pipeline: Generator,
        cfg: DictConfig,
        labels: Tensor | None = None,
        description: str = "Drawing samples",
    ) -> Tensor:
        """Draws `cfg.num_samples` samples, uint8 (n, C, H, W) of native size.

        Each rank draws a share and returns all; `labels` (n,) replace the cycling classes.
        """
        ids = shard(cfg.num_samples, *rank_and_world())
        labels = None if labels is None else labels[ids]
        with self.autocast:
            batches = draw(pipeline, ids, cfg.batch_size, cfg.seed, labels, description)
            parts = [self.datamodule.to_native(batch.cpu()) for batch in batches]
        return gather_shards(parts)

    def record(
        self,
        cfg: DictConfig,
        results: dict[str, float],
        protocol: Protocol,
        extra: Sequence[dict[str, object]],
        sampling_seconds: float | None = None,
    ) -> Path:
        """Writes an evaluation into the folder `cfg.run`; returns its file."""
        facts = self.weights | {"sampling_seconds": sampling_seconds}
        return save_evaluation(cfg.run, results, protocol, cfg, facts, extra)

    @property
    def autocast(self) -> torch.autocast:
        """The autocast context in which to call the networks."""
        return autocast(self.precision, self.device)

    def metrics(self, cfg: DictConfig) -> Any:
        """Builds the `GenerativeMetrics` of `cfg.metrics`, not prepared yet; reads the data.

        Their class is not imported here: torchmetrics takes seconds, and samples need none.
        """
        metrics = instantiate(cfg, "metrics")
        guided = OmegaConf.select(cfg, "guidance.classifier") is not None
        with errors_at(cfg, "metrics"):
            by_class = (self.conditional or guided) and self.datamodule.num_classes > 0
            metrics.check(by_class, self.datamodule.num_classes)
        read_data(self.saved, self.datamodule)
        with errors_at(cfg, "metrics"):
            metrics.reference_split(self.datamodule)  # raises if there are no such images
            metrics.load(self.datamodule, self.device)
        return metrics


@dataclass(frozen=True)
class NetworkRun(OpenRun):
    """An open run of a model that can be exported."""

    model: Any
    first_stage: FirstStage | None

    @classmethod
    @abstractmethod
    def built(cls, saved: DictConfig, datamodule: ImageData) -> tuple[Any, FirstStage | None]:
        """Builds the model that a configuration describes, and its first stage, if any."""

    @staticmethod
    def network_of(model: Any) -> Any:
        """The part of a model whose weights are saved."""
        return model

    @classmethod
    def with_weights(
        cls, folder: Path, saved: DictConfig, state: dict[str, Tensor]
    ) -> dict[str, Any]:
        """Returns `datamodule` (unread), and `model` and `first_stage` with the weights `state`.

        The network is on the CPU, in evaluation mode. Raises UserError if the weights belong to
        another model.
        """
        datamodule = build_images(saved)
        model, first_stage = cls.built(saved, datamodule)
        network = cls.network_of(model)
        load_into(network, state, folder)
        network.eval()
        return {"datamodule": datamodule, "model": model, "first_stage": first_stage}

    @classmethod
    def load(cls, choice: WeightsChoice, saved: DictConfig, device: torch.device) -> dict[str, Any]:
        tensors, _ = load_weights(choice)
        fields = cls.with_weights(choice.folder, saved, tensors)
        cls.network_of(fields["model"]).to(device).requires_grad_(False)
        return fields

    @property
    def conditional(self) -> bool:
        return bool(self.network_of(self.model).conditioning.conditional)

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        if self.first_stage is None:
            return {}
        return self.first_stage.reconstruction_metrics(self.datamodule)


def kind_of(saved: DictConfig) -> type[OpenRun]:
    """The kind of the run with the configuration `saved`."""
    return families.part(saved, "run").RUN


def open_run(cfg: DictConfig) -> OpenRun:
    """Opens the run `cfg.run`, whatever its kind; raises UserError."""
    saved = load_config(cfg.run)
    return kind_of(saved).open(cfg, saved)


def load_diffusion_config(folder: str) -> DictConfig:
    """Reads the configuration of a diffusion model's run; raises UserError for another kind."""
    saved = load_config(folder)
    if families.family_of(saved) != families.DIFFUSION:
        raise UserError(f"{folder} is {kind_of(saved).limits}; give the run of a diffusion model")
    return saved


def load_trained_config(folder: str | Path) -> DictConfig:
    """Reads the configuration of a run that was trained; raises UserError for images alone."""
    saved = load_config(folder)
    if families.family_of(saved) == families.IMAGES:
        raise UserError(f"{folder} is {kind_of(saved).limits}; give a trained run")
    return saved


def inherited(
    cfg: DictConfig, saved: DictConfig, groups: tuple[str, ...], overrides: list[str]
) -> DictConfig:
    """A copy of `cfg` with the data and `groups` of a run, `saved`, except what `overrides` have.

    The data are the run's whatever `overrides` say, unless they are one of `groups`. Single values
    in `overrides`, as in sampler.steps=20, change the run's option. A group that this kind of run
    does not have is removed; an override of it raises UserError.
    """
    cfg, keys = cfg.copy(), {override.key_or_group: override for override in parse(overrides)}
    with open_dict(cfg):
        if "data" not in groups:
            cfg.data = saved.data
        for group in groups:
            if group in kind_of(saved).groups_without_choice:
                if chosen := [key for key in keys if key.split(".")[0].split("/")[0] == group]:
                    raise UserError(f"this run has no {group}; leave {chosen[0]}=... out")
                del cfg[group]
            elif group not in keys:
                parts = [key.replace("/", ".") for key in keys if key.startswith(f"{group}/")]
                options = {part: OmegaConf.select(cfg, part) for part in parts}
                cfg[group] = saved[group]
                for part, option in options.items():
                    OmegaConf.update(cfg, part, option, merge=False)
                for key, override in keys.items():
                    if key.startswith(f"{group}."):
                        OmegaConf.update(cfg, key, override.value())
    return cfg


def say_left_out(metrics: Any, why: str) -> None:
    """Says which metrics of classes are left out of an evaluation, if there are any."""
    wanted = [m.quantities[0].title for m in metrics.metrics if m.needs_labels]
    if wanted:
        say(f"Left out, as {why}: {', '.join(wanted)}")


def weights_choice(cfg: DictConfig) -> WeightsChoice:
    """The weights of the run `cfg.run` that `cfg.average` and `cfg.step` choose.

    The step becomes a number, or null if it is the newest one's. Raises UserError if the run does
    not keep its checkpoint.
    """
    average = cfg.get("average")
    choice = WeightsChoice(Path(cfg.run), None if average is None else name_of(average))
    if cfg.get("step") is None:
        return choice
    require_steps(cfg)
    asked = cfg.step
    cfg.step, path = checkpoints.chosen(cfg.run, asked) or (None, None)
    length, made_at = length_and_step(choice.average or "")
    if made_at and made_at != str(cfg.step or checkpoints.step_of(cfg.run)):
        raise UserError(
            f"average={choice.average} is one of step {made_at}, but step={asked} chooses another; "
            f"leave step out, or write average={length}"
        )
    return replace(choice, checkpoint=path)


def require_steps(cfg: DictConfig) -> None:
    """Raises UserError if `cfg.step` chooses a checkpoint of an export, which has none."""
    if (Path(cfg.run) / EXPORTED).is_file():
        raise UserError(
            f"step={cfg.step} cannot be chosen in {cfg.run}, an export, which has one set of "
            "weights; leave step out"
        )


def move_data(source: DictConfig, folder: str) -> None:
    """Sets the root of a data source to `folder`, or moves its path and test_path there."""
    keys = [key for key in ("path", "test_path") if source.get(key)]
    moved = {key: str(Path(folder) / Path(source[key]).name) for key in keys}
    if "root" in source:
        moved = {"root": folder}
    if not moved:
        raise UserError(f"data_root={folder}, but this run's data are not in files; leave it out")
    source.update(verbatim(moved))
