"""The base class of open runs whose network draws images, of whatever family of models."""

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.build.objects import build_datamodule
from diffusion_lab.data import ImageDataModule
from diffusion_lab.first_stage import FirstStage
from diffusion_lab.runs.base_run import OpenRun
from diffusion_lab.runs.weights import WeightsChoice, load_into, load_weights


@dataclass(frozen=True)
class NetworkRun(OpenRun):
    """An open run of a model that can be exported."""

    model: Any
    first_stage: FirstStage | None

    @classmethod
    @abstractmethod
    def built(cls, saved: DictConfig, datamodule: ImageDataModule) -> tuple[Any, FirstStage | None]:
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
        datamodule = build_datamodule(saved)
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
