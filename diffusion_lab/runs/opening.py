"""A trained run opened again, to be sampled from and measured."""

from dataclasses import dataclass
from pathlib import Path

import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from diffusion_lab.build.instantiate import errors_at, instantiate
from diffusion_lab.build.objects import Model, build_datamodule, build_model, build_pipeline
from diffusion_lab.common.errors import UserError
from diffusion_lab.compute.device import autocast, pick_device, pick_precision
from diffusion_lab.data import ImageDataModule
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.metrics import GenerativeMetrics
from diffusion_lab.pipeline import Pipeline
from diffusion_lab.runs import weights
from diffusion_lab.runs.config import load_config
from diffusion_lab.runs.folder import CONFIG
from diffusion_lab.runs.weights import identity, require_unchanged


@dataclass(frozen=True)
class OpenRun:
    """A trained run, ready to be sampled from on a device."""

    saved: DictConfig  # its configuration
    datamodule: ImageDataModule  # unread
    model: Model
    device: torch.device
    precision: str
    weights: dict[str, object]  # which they are
    weak: dict[str | None, Denoiser | None]  # those of weak runs asked for, by folder

    @property
    def autocast(self) -> torch.autocast:
        """The block in which the network is asked."""
        return autocast(self.precision, self.device)

    @property
    def first_stage_figures(self) -> dict[str, float]:
        """Of reconstructed test images, where latents are diffused; once the data are read."""
        return self.model.first_stage.figures(self.datamodule)

    def metrics(self, cfg: DictConfig) -> GenerativeMetrics:
        """The metrics that `cfg.metrics` says, loaded, to be prepared."""
        conditional = self.model.denoiser.conditioning.conditional
        return loaded_metrics(cfg, conditional, self.datamodule, self.device)

    def pipeline(self, cfg: DictConfig) -> Pipeline:
        """Sampling as `cfg.sampler` and `cfg.guidance` say."""
        folder = cfg.guidance.get("weak_run")
        if folder not in self.weak:
            self.weak[folder] = load_weak(folder, self.saved)
        return build_pipeline(cfg, self.model, self.datamodule.num_classes, self.weak[folder])


def open_run(cfg: DictConfig) -> OpenRun:
    """The run `cfg.run` with averaged weights; `cfg.data_root` is the folder of its data, if moved.

    Raises UserError for what is missing, damaged or impossible on this machine.
    """
    saved = load_config(cfg.run)
    if "autoencoder" in saved:
        raise UserError(
            f"{cfg.run} is an autoencoder, which only `sample` and `evaluate` draw from; give the "
            "run of a diffusion model"
        )
    if cfg.data_root:
        move_data(saved.data, cfg.data_root)
    device = pick_device(cfg.device)
    precision = pick_precision(cfg.precision, device)
    autocast(precision, device)  # to hear now what it has to say
    found = identity(cfg.run)
    datamodule, model = load(cfg.run, saved)
    require_unchanged(cfg.run, found)
    model.denoiser.to(device).eval().requires_grad_(False)
    return OpenRun(saved, datamodule, model, device, precision, found, {})


def load(folder: str | Path, cfg: DictConfig | None = None) -> tuple[ImageDataModule, Model]:
    """A trained run: its data (unread) and its model with averaged weights.

    Nothing about the model needs to be said again; `cfg` is the run's configuration, if it has been
    read already. A folder that `export` made is such a run, too. Raises UserError if the weights
    are missing or damaged.
    """
    return with_weights(folder, cfg or load_config(folder), weights.read(folder))


def with_weights(
    folder: str | Path, cfg: DictConfig, state: dict[str, Tensor]
) -> tuple[ImageDataModule, Model]:
    """The data (unread) and the model of a run whose denoiser has the weights `state`.

    Raises UserError if they are of another model.
    """
    datamodule = build_datamodule(cfg)
    model = build_model(cfg, datamodule.image_shape, datamodule.num_classes)
    try:
        model.denoiser.load_state_dict(state)
    except RuntimeError as error:
        raise UserError(
            f"the weights in {folder} do not fit its {CONFIG}: they are of another model"
        ) from error
    return datamodule, model


def loaded_metrics(
    cfg: DictConfig, conditional: bool, datamodule: ImageDataModule, device: torch.device
) -> GenerativeMetrics:
    """The metrics that `cfg.metrics` says, and the data read: all but reference and floor."""
    metrics = instantiate(cfg, "metrics")
    with errors_at(cfg, "metrics"):
        metrics.check(conditional, datamodule.num_classes)
    with errors_at(cfg, "data"):
        datamodule.prepare_data()
        datamodule.setup("fit")
    with errors_at(cfg, "metrics"):
        metrics.load(datamodule, device)
    return metrics


def move_data(data: DictConfig, folder: str) -> None:
    """Sets a data set's root to `folder`, or looks there for its path and test_path."""
    if "root" in data:
        data.root = folder
        return
    paths = [key for key in ("path", "test_path") if data.get(key)]
    if not paths:
        raise UserError(f"data_root={folder}, but this run's data are in no files; leave it out")
    for key in paths:
        data[key] = str(Path(str(folder)) / Path(str(data[key])).name)


def load_weak(folder: str | None, saved: DictConfig) -> Denoiser | None:
    """The denoiser of `guidance.weak_run`, if any, for a run whose configuration is `saved`.

    Raises UserError if it was trained on other data, labels or noise levels.
    """
    if folder is None:
        return None
    other = load_config(folder)
    for part in ("schedule", "first_stage", "conditioning"):
        if lasting(other[part]) != lasting(saved[part]):
            raise UserError(
                f"guidance.weak_run={folder} was trained with another {part}; give a run that "
                "differs in size or training time only"
            )
    datamodule, model = load(folder, other)
    ours = build_datamodule(saved)
    facts = [(data.image_shape, data.num_classes) for data in (datamodule, ours)]
    if facts[0] != facts[1]:
        raise UserError(
            f"guidance.weak_run={folder} was trained on images of shape {facts[0][0]} in "
            f"{facts[0][1]} classes, this run on {facts[1][0]} in {facts[1][1]}; "
            "give a run on the same data"
        )
    return model.denoiser.eval().requires_grad_(False)


def lasting(part: DictConfig) -> dict:
    """What a part of a configuration says, but for where its files are."""
    places = ("run", "path", "cache", "cache_dir")
    return {key: value for key, value in part.items() if key not in places}


def inherit(
    cfg: DictConfig, saved: DictConfig, groups: tuple[str, ...], overrides: list[str]
) -> None:
    """Gives `cfg` the choice of a run, `saved`, in each group, unless `overrides` choose another.

    Single values in `overrides`, as in sampler.steps=20, change the run's choice.
    """
    parsed = OverridesParser.create().parse_overrides(overrides)
    keys = {override.key_or_group: override for override in parsed}
    with open_dict(cfg):
        cfg.data = saved.data
        for group in groups:
            if "autoencoder" in saved and group != "metrics":  # its prior is drawn from at once
                if chosen := [key for key in keys if key.split(".")[0].split("/")[0] == group]:
                    raise UserError(f"this run has no {group}; leave {chosen[0]}=... out")
                del cfg[group]
                continue
            if group in keys:
                continue
            parts = [key.replace("/", ".") for key in keys if key.startswith(f"{group}/")]
            chosen = {part: OmegaConf.select(cfg, part) for part in parts}
            cfg[group] = saved[group]
            for part, option in chosen.items():
                OmegaConf.update(cfg, part, option, merge=False)
            for key, override in keys.items():
                if key.startswith(f"{group}."):
                    OmegaConf.update(cfg, key, override.value())
