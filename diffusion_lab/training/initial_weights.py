"""Weights of another model from which a run starts: all that fit the run's own network."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.common import hashing
from diffusion_lab.common.formats import some
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.runs import weights
from diffusion_lab.runs.folder import CONFIG, load_summary


@dataclass(frozen=True)
class InitialWeights:
    """The weights in a run, an export, or a safetensors file, from which a new run starts.

    Of a run they are those that it evaluates. `sha256` is of the file that holds them, and `images`
    the number of training images behind them, if it is known.
    """

    source: Path
    tensors: dict[str, Tensor]
    sha256: str
    images: int | None

    @classmethod
    def configured(cls, cfg: DictConfig) -> "InitialWeights | None":
        """The weights of `cfg.init_from`; None if there are none, or for a run that is resumed.

        Raises UserError if they cannot be read, or are not those that a saved run started from.
        """
        if cfg.get("init_from") is None or cfg.resume:
            return None
        source, images = Path(cfg.init_from), None
        if (source / CONFIG).is_file():
            tensors, _ = weights.load_weights(weights.WeightsChoice(source))
            sha256, images = weights.sha256_of(source), images_behind(load_summary(source))
        elif source.is_file() and source.suffix == ".safetensors":
            found = weights.read(source, f"give another file than init_from={source}")
            tensors = {name.removeprefix(weights.PREFIX): v for name, v in found.items()}
            sha256 = hashing.of_file(source)
        else:
            raise UserError(
                f"init_from={source} is neither a run folder nor a .safetensors file; give the "
                "folder of a run or of an export, or such a file"
            )
        if cfg.init_sha256 not in (None, sha256):
            raise UserError(
                f"init_from={source} has other weights than this run started from: their sha256 "
                f"begins with {sha256[:12]}, not with {cfg.init_sha256[:12]}"
            )
        return cls(source, tensors, sha256, images)

    @torch.no_grad()
    def load_into(self, denoiser: Denoiser) -> None:
        """Copies the weights whose names and shapes are those of the network; says which do not.

        Raises UserError if none are.
        """
        own = denoiser.state_dict()
        fits = [name for name in own if name in self.tensors]
        reshaped = [name for name in fits if own[name].shape != self.tensors[name].shape]
        copied = [name for name in fits if name not in reshaped]
        if not copied:
            raise UserError(
                f"init_from={self.source} has no weights that fit this network, such as "
                f"{next(iter(own))}; train with the backbone of that run"
            )
        for name in copied:
            own[name].copy_(self.tensors[name])
        say(f"Initial weights: {len(copied)} of {len(own)} tensors, from {self.source}")
        left = {
            "of another shape there": reshaped,
            "not there": [name for name in own if name not in self.tensors],
            "only there": [name for name in self.tensors if name not in own],
        }
        for reason, names in left.items():
            if names:
                say(f"  {reason}: {some(names)}")


def images_behind(summary: Mapping[str, Any]) -> int | None:
    """The training images of a run, of the one that it began from, and of its teacher.

    None if the run's summary does not have its own.
    """
    if not summary.get("images_seen"):
        return None
    return sum(
        summary.get(key) or 0 for key in ("images_seen", "began_from_images", "teacher_images")
    )
