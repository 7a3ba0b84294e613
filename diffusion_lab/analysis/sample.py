"""The command `sample`: draws images from a trained run into files."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, ListConfig
from torch import Tensor

from diffusion_lab import runs
from diffusion_lab.build.instantiate import check_keys
from diffusion_lab.common.images import save_png
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import one_of, whole
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.pipeline import Generator
from diffusion_lab.runs.averages import name_of


def sample(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Draws `cfg.num_samples` images of `cfg.run`; returns where they were written.

    Sampler and guidance are the run's own, unless `overrides` say otherwise.
    """
    least = {"num_samples": 1, "batch_size": 1, "columns": 1, "seed": 0}
    counts = {key: whole(number) for key, number in least.items()}
    check_keys(cfg, counts | {"save": one_of("grid", "png", "npz")})
    opened = runs.open_run(cfg)
    runs.inherit(cfg, opened.saved, ("sampler", "guidance"), overrides)
    datamodule, pipeline = opened.datamodule, opened.pipeline(cfg)
    labels = wanted_labels(cfg, pipeline, datamodule.num_classes)
    images = opened.draw_all(pipeline, cfg, labels)
    picture = datamodule.source.picture(images, cfg.columns)
    return on_rank_zero(lambda: write(cfg, images, labels, picture))


def wanted_labels(cfg: DictConfig, pipeline: Generator, num_classes: int) -> Tensor | None:
    """The labels (n,): one class, a repeated list, or all in turn; None without classes."""
    asked, ids = cfg.labels, range(cfg.num_samples)
    if asked is None:
        return pipeline.labels(ids)
    if not pipeline.conditional:
        raise UserError("labels were given, but this run is unconditional; leave labels out")
    classes = list(asked) if isinstance(asked, ListConfig) else [asked]
    wrong = [c for c in classes if not isinstance(c, int) or not 0 <= c < num_classes]
    if wrong or not classes:
        raise UserError(f"labels={asked} must be classes between 0 and {num_classes - 1}")
    return torch.tensor([classes[i % len(classes)] for i in ids])


def way(cfg: DictConfig) -> str:
    """The sampler, its steps and the guidance scale, as text for file names."""
    if "sampler" not in cfg:
        return "prior"
    sampler = str(cfg.sampler._target_).rsplit(".", 1)[-1].lower()
    eta = f"_eta{cfg.sampler.eta:g}" if "eta" in cfg.sampler else ""
    return f"{sampler}{eta}_{cfg.sampler.steps}_scale{cfg.guidance.scale:g}"


def write(
    cfg: DictConfig, images: Tensor, labels: Tensor | None, picture: Tensor
) -> dict[str, object]:
    """Writes the grid, and on request every image or one array; returns their paths."""
    average = "" if cfg.average is None else f"_average{name_of(cfg.average)}"
    step = "" if cfg.step is None else f"_step{cfg.step}"
    name = f"{way(cfg)}{average}{step}_seed{cfg.seed}_n{cfg.num_samples}"
    output = Path(cfg.output or Path(cfg.run) / runs.SAMPLES / name)
    grid = output.with_name(f"{output.name}.png")
    save_png(picture, grid)
    result = {"grid": str(grid), "num_samples": len(images)}
    if cfg.save == "png":
        for index, image in enumerate(images):
            save_png(image, output / f"{index:06d}.png", scale=1)
        result["images"] = str(output)
    if cfg.save == "npz":
        known: dict[str, Any] = {} if labels is None else {"labels": labels.numpy()}
        array = output.with_name(f"{output.name}.npz")
        np.savez(array, images=images.permute(0, 2, 3, 1).numpy(), **known)  # (N, H, W, C) uint8
        result["array"] = str(array)
    for what, path in result.items():
        say(f"{what}: {path}")
    return result
