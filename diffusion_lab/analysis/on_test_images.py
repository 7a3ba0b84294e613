"""The commands on test images: their likelihood, their encoding as noise, and inpainting."""

import math
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.nn import functional

from diffusion_lab.assembly.instantiate import check_keys, errors_at
from diffusion_lab.assembly.objects import read_data
from diffusion_lab.common.files import named
from diffusion_lab.common.images import save_png, to_uint8
from diffusion_lab.common.messages import UserError, say, track
from diffusion_lab.common.randomness import SampleNoise, mix_seed
from diffusion_lab.common.ranges import above, one_of, whole
from diffusion_lab.compute.distributed import gather_shards, on_rank_zero, own_batches
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import DenoiseFn, Given
from diffusion_lab.diffusion.guidance import keep_known
from diffusion_lab.diffusion.likelihood import GREY_STEP, bits_per_dim, log_likelihood
from diffusion_lab.diffusion.sampler import AdaptiveRungeKutta
from diffusion_lab.diffusion.sampler.runge_kutta import SMALLEST_RATIO, encode
from diffusion_lab.diffusion.sampler.time_grid import UniformLogSNR
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.runs.files import SAMPLES
from diffusion_lab.runs.opened import inherited

COUNTS = {"num_images": whole(1), "batch_size": whole(1), "seed": whole(0)}
PROBES = 0x70726F6265  # separates these draws from others with the same seed
# region -> whether (row, column), each in [0, 1), is missing
REGIONS = {
    "left": lambda row, column: column < 0.5,
    "right": lambda row, column: column >= 0.5,
    "top": lambda row, column: row < 0.5,
    "bottom": lambda row, column: row >= 0.5,
    "center": lambda row, column: ((row - 0.5).abs() < 0.25) & ((column - 0.5).abs() < 0.25),
    "outside": lambda row, column: ((row - 0.5).abs() >= 0.25) | ((column - 0.5).abs() >= 0.25),
}


def likelihood(cfg: DictConfig, overrides: list[str]) -> dict[str, float]:
    """Measures bits per dimension of the first `cfg.num_images` test images: mean and error."""
    check_keys(cfg, {"trace": one_of("hutchinson", "exact")})
    opened = open_pixels(cfg, "likelihood is defined for pixels")
    model, bits = opened.model, []
    for ids, _, labels, x0 in image_batches(cfg, opened):
        noise = SampleNoise(mix_seed(cfg.seed, PROBES), ids, opened.device)
        # dequantise by uniform noise: the normal CDF of each image's own normal noise
        x0 = x0 + GREY_STEP * (torch.special.ndtr(noise(x0.shape[1:])) - 0.5)
        probe = noise(x0.shape[1:]).sign() if cfg.trace == "hutchinson" else None
        denoise = function_of_state(model.denoiser, labels)
        with opened.autocast, errors_at(cfg, ""):
            nats = log_likelihood(denoise, x0, model.schedule, probe, cfg.tolerance, cfg.steps)
        # the bits of all numbers, padding among them, by the number of those that an image has
        numbers, native = x0[0].numel(), math.prod(opened.datamodule.native_shape)
        bits.append(bits_per_dim(nats, numbers) * numbers / native)
    each = gather_shards(bits)
    result = {"bits_per_dim": each.mean().item(), "num_images": len(each)}
    error = ""
    if len(each) > 1:
        result["standard_error"] = (each.std() / math.sqrt(len(each))).item()
        error = f" +- {result['standard_error']:.4f}"
    say(f"{result['bits_per_dim']:.4f}{error} bits per dimension on {len(each)} test images")
    return result


def encode_images(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Encodes test images to noise and back; returns PSNR and a picture of all three."""
    check_keys(cfg, {"columns": whole(1), "steps": whole(2)})
    path = named(Path(cfg.output or Path(cfg.run) / SAMPLES / "encode.png"))
    opened = open_pixels(cfg, "encode shows noise as a picture")
    model = opened.model
    solver = AdaptiveRungeKutta(cfg.steps, UniformLogSNR(SMALLEST_RATIO), cfg.tolerance)
    rows, errors = [], []
    for _, images, labels, x0 in image_batches(cfg, opened):
        denoise = function_of_state(model.denoiser, labels)
        with torch.inference_mode(), opened.autocast, errors_at(cfg, ""):
            noise = encode(denoise, x0, model.schedule, cfg.tolerance, cfg.steps)
            back = solver(denoise, noise, model.schedule)
        errors.append(opened.datamodule.to_native((back - x0).square()).flatten(1).mean(1))
        # two standard deviations of noise span the grey scale
        shown = to_uint8(noise / 2)[:, : images.shape[1]]
        rows.append(torch.stack([images, shown, model.first_stage.decode(back)], 1))
    parts = gather_shards(rows).transpose(0, 1)
    white = functional.pad(parts, [0] * 7 + [-parts.shape[1] % cfg.columns], value=255)
    lines = white.unflatten(1, (-1, cfg.columns)).transpose(0, 1).flatten(0, 2)
    picture = opened.datamodule.source.picture(opened.datamodule.to_native(lines), cfg.columns)
    on_rank_zero(lambda: save_png(picture, path))
    mean_error = gather_shards(errors).mean().item()
    # 4 is the squared range of images in [-1, 1]
    result = {"psnr": 10 * math.log10(4 / max(mean_error, 1e-12)), "picture": str(path)}
    say(f"images, noise and reconstructions: {path}")
    say(f"PSNR of the reconstructions: {result['psnr']:.1f} dB")
    return result


def inpaint(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Redraws a region of test images; each row shows an image, its known part, and variants."""
    check_keys(cfg, COUNTS | {"region": one_of(*REGIONS), "variants": whole(1)})
    path = named(Path(cfg.output or Path(cfg.run) / SAMPLES / f"inpaint_{cfg.region}.png"))
    opened = open_diffusion_run(cfg)
    cfg = inherited(cfg, opened.saved, ("sampler", "guidance"), overrides)
    pipeline = opened.pipeline(cfg)
    data = opened.datamodule
    # masks of the known part, and padding, in pixels for the picture and in the diffused space
    gap = data.padded(missing(cfg.region, *data.native_shape[1:])[None, None].float())
    factors = (1, opened.model.first_stage.factor)
    shown, known = (known_in(gap, factor).to(opened.device) for factor in factors)
    pictures = []
    for ids, images, labels, x0 in image_batches(cfg, opened, "Inpainting"):
        columns = [images, torch.where(shown, images, 127).to(torch.uint8)]
        filling = replace(pipeline, constrain=partial(keep_known, known=x0, mask=known))
        for variant in range(cfg.variants):
            with opened.autocast:
                seed = mix_seed(cfg.seed, variant)
                columns.append(filling(ids, seed, labels))
        pictures.append(torch.stack(columns, 1))
    tiles = data.to_native(gather_shards(pictures).flatten(0, 1))
    picture = data.source.picture(tiles, 2 + cfg.variants)
    on_rank_zero(lambda: save_png(picture, path))
    say(f"image, known part, and {cfg.variants} variants: {path}")
    return {"picture": str(path)}


def open_pixels(cfg: DictConfig, reason: str) -> DiffusionRun:
    """Opens a run for the adaptive solver; raises UserError for latents, or no mean of samples."""
    check_keys(cfg, COUNTS | {"steps": whole(1), "tolerance": above(0).as_in(1e-3)})
    opened = open_diffusion_run(cfg)
    if not opened.model.first_stage.of_pixels:
        raise UserError(f"{reason}; this run diffuses the latents of an encoder")
    if opened.model.loss.of_samples:
        raise UserError(
            f"{cfg.run} is a consistency model, whose estimate is a sample, and the solver follows "
            "the mean of the samples that an image may become; give the run of another objective"
        )
    return opened


def function_of_state(denoiser: Denoiser, labels: Tensor) -> DenoiseFn:
    """The conditional model as a function of x and level alone, because an ODE has no memory."""
    return lambda x, level: denoiser(x, level, Given(labels))


def missing(region: str, height: int, width: int) -> Tensor:
    """The mask of the region that is redrawn, (height, width) bool."""
    row = (torch.arange(height) + 0.5) / height
    column = (torch.arange(width) + 0.5) / width
    return REGIONS[region](row[:, None].expand(height, width), column.expand(height, width))


def known_in(gap: Tensor, factor: int) -> Tensor:
    """The mask (h, w) of what a gap (1, 1, H, W) leaves known, in latents `factor` pixels wide.

    A latent that stands for any missing pixel is missing; the last ones stand for padding, too.
    """
    return functional.max_pool2d(gap, factor, ceil_mode=True)[0, 0] == 0


def image_batches(
    cfg: DictConfig, opened: DiffusionRun, description: str = "Test images"
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yields ids, images (b, C, H, W) uint8, labels and x0 of this rank's first test images."""
    read_data(opened.saved, opened.datamodule)
    with errors_at(cfg, ""):
        opened.datamodule.require_test_images(cfg.num_images, "num_images")
    images, labels = opened.datamodule.first_tests(cfg.num_images)
    for ids in track(own_batches(cfg.num_images, cfg.batch_size), description):
        part, classes = images[ids].to(opened.device), labels[ids].to(opened.device)
        yield ids, part, classes, opened.model.first_stage.encode(part)
