"""Weights of another model from which a run starts: all that fit the run's own network."""

from contextlib import suppress
from dataclasses import dataclass
from os.path import abspath
from pathlib import Path

import torch
from hydra.utils import get_class
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.assembly.objects import noise_label
from diffusion_lab.common import hashing
from diffusion_lab.common.formats import joined, some
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.runs import checkpoints, current, weights
from diffusion_lab.runs.files import CONFIG
from diffusion_lab.runs.folder import load_config
from diffusion_lab.runs.summary import load_summary

EXAMPLES = "conditioning.labels.examples"  # labels of the run's own data, which no weights replace
# mean and standard deviation of numbers, and the layer that was trained on numbers of that scale
SCALE = "conditioning.labels.mean", "conditioning.labels.std"
HEARS_NUMBERS = "conditioning.first.weight"


@dataclass(frozen=True)
class InitialWeights:
    """The weights in a run, an export, or a safetensors file, from which a new run starts.

    Of a run they are those that it evaluates. `sha256` is of the file that holds them. `images` and
    `flops` are what the training behind them took, as far as it is known.
    """

    source: Path
    tensors: dict[str, Tensor]
    sha256: str
    images: int | None
    flops: float | None
    unlike: tuple[str, ...] = ()  # keys in which their training differs

    @classmethod
    def configured(cls, cfg: DictConfig) -> "InitialWeights | None":
        """The weights of `cfg.init_from`; None if there are none, or a checkpoint to resume from.

        Raises UserError if they cannot be read, or are not those that a saved run started from.
        """
        if cfg.get("init_from") is None or (cfg.resume and checkpoints.exists(Path(cfg.resume))):
            return None
        source, images, flops = Path(cfg.init_from), None, None
        unlike: tuple[str, ...] = ()
        if (source / CONFIG).is_file():
            tensors, _ = weights.load_weights(weights.WeightsChoice(source))
            sha256, before = current.sha256_of(source), load_summary(source)
            theirs = load_config(source)
            anew = starts_anew(theirs)
            images, flops = before.images_behind(anew), before.flops_behind(anew)
            unlike = differences(cfg, theirs)
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
        return cls(source, tensors, sha256, images, flops, unlike)

    @property
    def facts(self) -> dict[str, object]:
        """The values of the keys of a configuration that are filled in."""
        return {f"init_{key}": getattr(self, key) for key in ("sha256", "images", "flops")}

    @torch.no_grad()
    def load_into(self, denoiser: Denoiser) -> None:
        """Copies the weights whose names and shapes are those of the network; says which do not.

        Raises UserError if none are.
        """
        own = denoiser.state_dict()
        own.pop(EXAMPLES, None)
        fits = [name for name in own if name in self.tensors]
        reshaped = [name for name in fits if own[name].shape != self.tensors[name].shape]
        copied = [name for name in fits if name not in reshaped]
        if HEARS_NUMBERS not in copied:
            copied = [name for name in copied if name not in SCALE]
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
            "only there": [name for name in self.tensors if name not in {*own, EXAMPLES}],
        }
        for reason, names in left.items():
            if names:
                say(f"  {reason}: {some(names)}")
        if self.unlike:
            say(
                f"  trained with another {joined(self.unlike)}, to which they must get used; if "
                "that is not meant, train with those of that run"
            )


def differences(ours: DictConfig, theirs: DictConfig) -> tuple[str, ...]:
    """The keys of what a network answers and is told in which two configurations differ.

    Only `ours` is built; a schedule and labels of `theirs` are known if the schedules are equal.
    """
    prediction = "objective.prediction._target_"
    found = []
    if OmegaConf.select(theirs, prediction) not in (None, OmegaConf.select(ours, prediction)):
        found.append("objective/prediction")
    if theirs.get("schedule") is None:
        return tuple(found)
    if theirs.schedule != ours.schedule:
        return (*found, "schedule")
    schedule, labels = instantiate(ours, "schedule"), []
    for cfg in (ours, theirs):
        differentiated, loss = False, OmegaConf.select(cfg, "objective.loss._target_")
        with suppress(Exception):  # a saved run may name a class that is not installed here
            differentiated = getattr(get_class(loss), "differentiates_time", False)
        auto = noise_label(schedule, differentiated=differentiated)
        label = OmegaConf.select(cfg, "denoiser.noise_label")
        labels.append(auto if label == "auto" else label)
    return (*found, "denoiser.noise_label") if labels[0] != labels[1] else tuple(found)


def starts_anew(cfg: DictConfig) -> bool:
    """Whether a run starts from no weights, or from those of its teacher, which count as its."""
    start, teacher = cfg.get("init_from"), OmegaConf.select(cfg, "objective.teacher.run")
    return start is None or (teacher is not None and abspath(start) == abspath(teacher))
