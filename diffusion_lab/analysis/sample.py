"""The command `sample`: draws images from a trained run into files."""

import re
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.pipeline import Generator
from diffusion_lab.assembly.sentences import key_of, parse
from diffusion_lab.common import hashing
from diffusion_lab.common.files import named, replacing
from diffusion_lab.common.images import most_rows, save_png
from diffusion_lab.common.labels import Labels
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import one_of, whole
from diffusion_lab.compute.distributed import on_rank_zero
from diffusion_lab.runs.averages import name_of
from diffusion_lab.runs.files import SAMPLES
from diffusion_lab.runs.opened import inherited, open_run

NAMED = ("eta", "temperature", "top_k", "top_p")  # settings of samplers that file names have
BEFORE_VALUE = r".*[./]|^(sampler|guidance)$"  # of a key, what file names leave out
LONGEST = 40  # characters of a value in a file name
ALWAYS_NAMED = ("sampler.steps", "guidance.scale", *(f"sampler.{key}" for key in NAMED))


def sample(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Draws `cfg.num_samples` images of `cfg.run`; returns where they were written."""
    least = {"num_samples": 1, "batch_size": 1, "columns": 1, "seed": 0}
    counts = {key: whole(number) for key, number in least.items()}
    check_keys(cfg, counts | {"save": one_of("grid", "png", "npz")})
    opened = open_run(cfg)
    cfg = inherited(cfg, opened.saved, ("sampler", "guidance"), overrides)
    output = output_of(cfg, overrides)
    extra = output / f"{cfg.num_samples:06d}.png"
    if cfg.save == "png" and extra.exists():
        raise UserError(
            f"{output} has images of more samples, as {extra.name}, which would stay among these; "
            "delete it, or write another output="
        )
    datamodule, pipeline = opened.datamodule, opened.pipeline(cfg)
    labels = wanted_labels(cfg, pipeline, datamodule.labels)
    images = opened.draw_all(pipeline, cfg, labels)
    shown = images[: most_rows(cfg.columns) * cfg.columns]
    picture = datamodule.source.picture(shown, cfg.columns)
    if len(shown) < len(images):
        say(f"The grid shows the first {len(shown):,} of {len(images):,} samples")
    return on_rank_zero(lambda: write(cfg, output, images, labels, picture))


def wanted_labels(cfg: DictConfig, pipeline: Generator, kind: Labels) -> Tensor | None:
    """The labels (n, ...): one, a repeated list, or all in turn; None without."""
    if cfg.labels is None:
        return pipeline.labels(range(cfg.num_samples))
    if not pipeline.conditional:
        raise UserError("labels were given, but this run is unconditional; leave labels out")
    try:
        asked = OmegaConf.to_container(OmegaConf.create({"": as_list(cfg.labels)}))
        given = kind.parse(asked[""])  # type: ignore[call-overload,index]
    except ValueError as error:
        raise UserError(f"labels={cfg.labels} {error}") from error
    return given[[i % len(given) for i in range(cfg.num_samples)]]


def way(cfg: DictConfig) -> str:
    """The sampler, how it draws, and the guidance scale, as text for file names."""
    if "sampler" not in cfg:
        return "prior"
    sampler = str(cfg.sampler._target_).rsplit(".", 1)[-1].lower()
    named = [key for key in NAMED if cfg.sampler.get(key) is not None]
    given = "".join(f"_{key}{cfg.sampler[key]:g}" for key in named)
    steps = f"_{cfg.sampler.steps}" if "steps" in cfg.sampler else ""
    return f"{sampler}{given}{steps}_scale{cfg.guidance.scale:g}"


def also_asked(overrides: list[str]) -> str:
    """The labels, and settings that `way` does not name, as text for file names."""
    given = [(key_of(each), each.get_value_element_as_str()) for each in parse(overrides)]
    texts = [
        f"_{re.sub(BEFORE_VALUE, '', key)}{short(re.sub('[^-+.0-9A-Za-z_]+', '-', value))}"
        for key, value in given
        if re.match("sampler|guidance|labels", key) and key not in ALWAYS_NAMED
    ]
    return "".join(sorted(texts))


def short(text: str) -> str:
    """The text, or the beginning of its checksum if it is too long for a file name."""
    return text if len(text) <= LONGEST else hashing.of_text(text)[:8]


def output_of(cfg: DictConfig, overrides: list[str]) -> Path:
    """The folder of the images, whose name the grid and an array of them have, too."""
    average = "" if cfg.average is None else f"_average{name_of(cfg.average)}"
    step = "" if cfg.step is None else f"_step{cfg.step}"
    name = f"{way(cfg)}{also_asked(overrides)}{average}{step}_seed{cfg.seed}_n{cfg.num_samples}"
    output = named(Path(cfg.output or Path(cfg.run) / SAMPLES / name))
    return output.with_name(output.name.removesuffix(".png"))  # of a picture that was named


def write(
    cfg: DictConfig, output: Path, images: Tensor, labels: Tensor | None, picture: Tensor
) -> dict[str, object]:
    """Writes the grid, and on request every image or one array; returns their paths."""
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
        with replacing(array) as file:
            np.savez(file, images=images.permute(0, 2, 3, 1).numpy(), **known)  # (N, H, W, C) uint8
        result["array"] = str(array)
    for what, path in result.items():
        say(f"{what}: {path}")
    return result
