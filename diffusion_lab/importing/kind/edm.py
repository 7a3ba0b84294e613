"""EDM's networks, as in NVlabs/edm (arXiv:2206.00364): DDPM++, NCSN++ and ADM."""

from pathlib import Path

from torch import Tensor

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import settings
from diffusion_lab.importing.kind.base import (
    BACKBONE,
    LABELS,
    Imported,
    Kind,
    assigned,
    count,
    joined,
    numbers,
    overrides_of,
    renamed,
    reorder_attention,
    with_null_row,
)
from diffusion_lab.importing.reading import State, read

NAMES = {
    "map_layer0": "noise.0",
    "map_layer1": "noise.2",
    "out_norm": "norm",  # of ADM
    "out_conv": "out",
}
IN_A_STAGE = {
    "norm0": "residual.norm1",
    "conv0": "residual.conv1",
    "affine": "residual.embedding",
    "norm1": "residual.norm2",
    "conv1": "residual.conv2",
    "skip": "residual.skip",
    "norm2": "attention.norm",
    "qkv": "attention.attention.qkv",
    "proj": "attention.attention.out",
}
FILTERS = {2: "block", 4: "fir"}  # the option of backbone/resample by the filter's length
FREQUENCIES, LABEL_WEIGHT, LABEL_BIAS = "map_noise.freqs", "map_label.weight", "map_label.bias"
ADM_HEAD = 64  # channels


@settings
class EDMFiles(Kind):
    """EDM's networks in pixels, whose data have the deviation in the pickle, or 0.5.

    Weights of augmentation labels are left out: they add nothing to images that are not augmented.
    """

    recipe = (
        "backbone=unet",
        "backbone.norm.groups=32",
        "schedule=edm",
        "objective=edm",
        "objective.label_dropout=0.0",
        "sampler=heun",
        "sampler/time_grid=karras",
    )

    def read(self, path: Path) -> Imported:
        found = read(path)
        if found.name not in (None, "EDMPrecond"):
            raise UserError(
                f"{path} has a network in {found.name}; only networks in EDMPrecond can be imported"
            )
        tensors = {name.removeprefix("model."): each for name, each in found.tensors.items()}
        side = max(numbers(tensors, r"enc\.(\d+)x\d+_conv\."), default=0)
        if side < 1:
            raise UserError(f"{path} has no network of EDM; write another kind")
        tensors.pop("map_augment.weight", None)
        filters = {len(tensors.pop(n)[0, 0]) for n in [*tensors] if n.endswith("resample_filter")}
        ours, overrides = (of_adm if "out_conv.weight" in tensors else of_song)(tensors, side)
        std = float(found.settings.get("sigma_data", 0.5))
        overrides += [f"denoiser.input_std={std}", f"objective.prediction.data_std={std}"]
        overrides += [f"backbone/resample={FILTERS[length]}" for length in filters]
        classes = len(ours[LABELS]) - 1 if LABELS in ours else 0
        if not classes:
            overrides.append("conditioning=none")
        shape = (ours[f"{BACKBONE}entry.weight"].shape[1], side, side)
        return Imported(path, ours, shape, shape, classes, [*overrides_of(ours), *overrides])


def of_adm(tensors: State, side: int) -> tuple[State, list[str]]:
    """The weights and overrides of EDM's version of ADM."""
    extra = {}
    if LABEL_WEIGHT in tensors:
        extra[LABELS] = with_null_row(tensors.pop(LABEL_WEIGHT).T)
    ours = renamed(tensors, NAMES | modules_of(tensors, side)) | extra
    reorder_attention(ours, "hd3", ADM_HEAD)
    return ours, assigned("backbone", {"stage.head_channels": ADM_HEAD, "norm.eps": 1e-5})


def of_song(tensors: State, side: int) -> tuple[State, list[str]]:
    """The weights and overrides of DDPM++ or NCSN++."""
    extra, embedding = {}, "ddpmpp"
    if LABEL_WEIGHT in tensors:
        weight, null = tensors.pop(LABEL_WEIGHT), tensors.pop(LABEL_BIAS)  # (D, K), (D,)
        extra[LABELS] = sines_last(with_null_row(weight.T * weight.shape[1] ** 0.5 + null, null))
    if FREQUENCIES in tensors:
        extra[f"{BACKBONE}noise.cycles"], embedding = tensors.pop(FREQUENCIES), "fourier"
    ours = renamed(tensors, NAMES | modules_of(tensors, side)) | extra
    ours[f"{BACKBONE}noise.0.weight"] = sines_last(ours[f"{BACKBONE}noise.0.weight"])
    reorder_attention(ours, "hd3", None)
    pyramid = any(name.startswith(f"{BACKBONE}pyramid.") for name in ours)
    values = {
        "pyramid": pyramid,
        "stage.head_channels": None,
        "stage.skip_scale": 0.5**0.5,
        "resample.projection": True,
    }
    return ours, [f"backbone/embedding={embedding}", *assigned("backbone", values)]


def sines_last(rows: Tensor) -> Tensor:
    """Swaps the halves of rows (n, D), which are for sines and then cosines in these networks."""
    return rows.roll(rows.shape[1] // 2, dims=1)


def modules_of(tensors: State, side: int) -> dict[str, str]:
    """The table of all modules of a U-Net for images of this side, except its embedding."""
    levels = sum(f"dec.{side >> i}x{side >> i}_block0.conv0.weight" in tensors for i in range(16))
    blocks = count(tensors, rf"enc\.{side}x{side}_block(\d+)\.")
    stages: dict[str, str] = {}
    others: dict[str, str] = {}
    for level in range(levels):
        here = f"{side >> level}x{side >> level}"
        first, up = level * (blocks + 1), levels - 1 - level
        stages |= {f"enc.{here}_block{i}": f"down.{first + i}" for i in range(blocks)}
        stages |= {f"dec.{here}_block{i}": f"up.{up}.stages.{i}" for i in range(blocks + 1)}
        if level == 0:
            others[f"enc.{here}_conv"] = "entry"
            others |= {f"dec.{here}_aux_norm": "norm", f"dec.{here}_aux_conv": "out"}
        else:
            stages[f"enc.{here}_down"] = f"down.{first - 1}"
            others[f"enc.{here}_aux_residual"] = f"pyramid.{first - 1}.0"
        if level < levels - 1:
            stages[f"dec.{here}_up"] = f"up.{up - 1}.upsample"
        else:
            stages |= {f"dec.{here}_in0": "middle.0", f"dec.{here}_in1": "middle.1"}
    return joined(stages, IN_A_STAGE) | others
