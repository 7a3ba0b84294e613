"""The runs of models that are no diffusion models: an autoregressive one's, and a GAN's."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from omegaconf import DictConfig
from torch import Tensor, nn

from diffusion_lab.build import families
from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.data import ImageDataModule
from diffusion_lab.families.autoregressive import CodePipeline
from diffusion_lab.families.gan import GANPipeline
from diffusion_lab.first_stage import FirstStage, TrainedVQ
from diffusion_lab.runs.open_run import OpenRun
from diffusion_lab.runs.weights import load_into, load_weights


@dataclass(frozen=True)
class FamilyRun(OpenRun):
    """An open run whose network draws images without diffusion."""

    command: ClassVar[str] = "train"

    model: Any
    first_stage: FirstStage | None

    @classmethod
    @abstractmethod
    def built(
        cls, saved: DictConfig, datamodule: ImageDataModule
    ) -> tuple[nn.Module, FirstStage | None]:
        """Builds the network that a configuration describes, and its first stage, if any."""

    @classmethod
    def load(
        cls,
        folder: Path,
        saved: DictConfig,
        device: torch.device,
        average: str | None,
        checkpoint: Path | None,
    ) -> dict[str, Any]:
        state = load_weights(folder, average, checkpoint)
        datamodule, model, first_stage = cls.with_weights(folder, saved, state)
        model.to(device).requires_grad_(False)
        return {"datamodule": datamodule, "model": model, "first_stage": first_stage}

    @classmethod
    def with_weights(
        cls, folder: str | Path, saved: DictConfig, state: dict[str, Tensor]
    ) -> tuple[ImageDataModule, nn.Module, FirstStage | None]:
        """Builds the data module (unread) and the network of a run with the weights `state`.

        Raises UserError if the weights belong to another network.
        """
        datamodule = build_datamodule(saved)
        model, first_stage = cls.built(saved, datamodule)
        load_into(model, state, folder)
        return datamodule, model.eval(), first_stage

    @property
    def conditional(self) -> bool:
        return bool(self.model.conditioning.conditional)

    @property
    def reconstruction_metrics(self) -> dict[str, float]:
        if self.first_stage is None:
            return {}
        return self.first_stage.reconstruction_metrics(self.datamodule)


class AutoregressiveRun(FamilyRun):
    """The open run of an autoregressive model of codes."""

    limits: ClassVar[str] = "an autoregressive model"

    @classmethod
    def built(
        cls, saved: DictConfig, datamodule: ImageDataModule
    ) -> tuple[nn.Module, FirstStage | None]:
        return families.build_code_model(saved, datamodule)

    def pipeline(self, cfg: DictConfig) -> CodePipeline:
        stage = cast(TrainedVQ, self.first_stage)
        return families.build_code_pipeline(
            cfg, self.saved, self.model, stage, self.datamodule.num_classes
        )


class GANRun(FamilyRun):
    """The open run of a GAN; the discriminator is not loaded."""

    groups_without_choice: ClassVar[tuple[str, ...]] = ("sampler", "guidance")
    limits: ClassVar[str] = "a GAN"

    @classmethod
    def built(
        cls, saved: DictConfig, datamodule: ImageDataModule
    ) -> tuple[nn.Module, FirstStage | None]:
        return families.build_generator(saved, datamodule), None

    def pipeline(self, cfg: DictConfig) -> GANPipeline:
        return GANPipeline(self.model, self.datamodule.num_classes)
