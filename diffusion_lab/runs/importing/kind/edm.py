"""EDM's networks, as in NVlabs/edm (arXiv:2206.00364) and NVlabs/edm2 (arXiv:2312.02696)."""

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.runs.importing.kind import base
from diffusion_lab.runs.importing.kind.base import BACKBONE, LABELS, Imported, Kind
from diffusion_lab.runs.importing.kind.dit import SIDE
from diffusion_lab.runs.importing.reading import State, read

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
TRAINED = ("schedule=edm", "objective=edm", "objective.label_dropout=0.0")
SAMPLED = ("sampler=heun", "sampler/time_grid=karras")


@settings
class EDMFiles(Kind):
    """EDM's networks in pixels, whose data have the deviation in the pickle, or 0.5.

    Weights of augmentation labels are left out: they add nothing to images that are not augmented.
    """

    recipe = ("backbone=unet", "backbone.norm.groups=32", *TRAINED, *SAMPLED)

    def read(self, path: Path) -> Imported:
        tensors, side, deviation = read_wrapped(path, "EDMPrecond", "model.")
        if side < 1:
            raise UserError(f"{path} has no network of EDM; write another kind")
        tensors.pop("map_augment.weight", None)
        filters = {len(tensors.pop(n)[0, 0]) for n in [*tensors] if n.endswith("resample_filter")}
        ours, overrides = (of_adm if "out_conv.weight" in tensors else of_song)(tensors, side)
        overrides += deviation
        overrides += [f"backbone/resample={FILTERS[length]}" for length in filters]
        classes = len(ours[LABELS]) - 1 if LABELS in ours else 0
        shape = (ours[f"{BACKBONE}entry.weight"].shape[1], side, side)
        return Imported(path, ours, shape, shape, classes, [*base.overrides_of(ours), *overrides])


def of_adm(tensors: State, side: int) -> tuple[State, list[str]]:
    """The weights and overrides of EDM's version of ADM."""
    extra = {}
    if LABEL_WEIGHT in tensors:
        extra[LABELS] = base.with_null_row(tensors.pop(LABEL_WEIGHT).T)
    ours = base.renamed(tensors, NAMES | modules_of(tensors, side)) | extra
    base.reorder_attention(ours, "hd3", ADM_HEAD)
    return ours, base.assigned("backbone", {"stage.head_channels": ADM_HEAD, "norm.eps": 1e-5})


def of_song(tensors: State, side: int) -> tuple[State, list[str]]:
    """The weights and overrides of DDPM++ or NCSN++."""
    extra, embedding = {}, "ddpmpp"
    if LABEL_WEIGHT in tensors:
        weight, null = tensors.pop(LABEL_WEIGHT), tensors.pop(LABEL_BIAS)  # (D, K), (D,)
        extra[LABELS] = sines_last(
            base.with_null_row(weight.T * weight.shape[1] ** 0.5 + null, null)
        )
    if FREQUENCIES in tensors:
        extra[f"{BACKBONE}noise.cycles"], embedding = tensors.pop(FREQUENCIES), "fourier"
    ours = base.renamed(tensors, NAMES | modules_of(tensors, side)) | extra
    ours[f"{BACKBONE}noise.0.weight"] = sines_last(ours[f"{BACKBONE}noise.0.weight"])
    base.reorder_attention(ours, "hd3", None)
    pyramid = any(name.startswith(f"{BACKBONE}pyramid.") for name in ours)
    values = {
        "pyramid": pyramid,
        "stage.head_channels": None,
        "stage.skip_scale": 0.5**0.5,
        "resample.projection": True,
    }
    return ours, [f"backbone/embedding={embedding}", *base.assigned("backbone", values)]


def sines_last(rows: Tensor) -> Tensor:
    """Swaps the halves of rows (n, D), which are for sines and then cosines in these networks."""
    return rows.roll(rows.shape[1] // 2, dims=1)


def modules_of(tensors: State, side: int) -> dict[str, str]:
    """The table of all modules of a U-Net for images of this side, except its embedding."""
    levels = sum(f"dec.{side >> i}x{side >> i}_block0.conv0.weight" in tensors for i in range(16))
    blocks = base.count(tensors, rf"enc\.{side}x{side}_block(\d+)\.")

    def up(level: int, i: int) -> str:
        return f"up.{level}." + (f"stages.{i}" if i <= blocks else "upsample")

    first, last = f"enc.{side}x{side}", f"dec.{side}x{side}_aux"
    others = {f"{first}_conv": "entry", f"{last}_norm": "norm", f"{last}_conv": "out"}
    for level in range(1, levels):
        residual = f"enc.{side >> level}x{side >> level}_aux_residual"
        others[residual] = f"pyramid.{level * (blocks + 1) - 1}.0"
    return base.joined(stages_of(side, levels, blocks, up), IN_A_STAGE) | others


def stages_of(side: int, levels: int, blocks: int, up: Callable[[int, int], str]) -> dict[str, str]:
    """The table of all stages of a U-Net for images of this side.

    `up` names stage i of a decoder's level, counted from the coarsest; the one after the last
    doubles the sides.
    """
    stages: dict[str, str] = {}
    for level in range(levels):
        here = f"{side >> level}x{side >> level}"
        first, above = level * (blocks + 1), levels - 1 - level
        stages |= {f"enc.{here}_block{i}": f"down.{first + i}" for i in range(blocks)}
        stages |= {f"dec.{here}_block{i}": up(above, i) for i in range(blocks + 1)}
        if level:
            stages[f"enc.{here}_down"] = f"down.{first - 1}"
        if level < levels - 1:
            stages[f"dec.{here}_up"] = up(above - 1, blocks + 1)
        else:
            stages |= {f"dec.{here}_in0": "middle.0", f"dec.{here}_in1": "middle.1"}
    return stages


def read_wrapped(path: Path, wrapper: str, prefix: str) -> tuple[State, int, list[str]]:
    """The weights in this wrapper of EDM, the side of images, and overrides of their deviation."""
    found, owner = read(path)
    if owner is not None and owner.name != wrapper:
        raise UserError(
            f"{path} has a network in {owner.name}; only networks in {wrapper} can be imported"
        )
    tensors = {name.removeprefix(prefix): each for name, each in found.items()}
    side = max(base.numbers(tensors, r"enc\.(\d+)x\d+_conv\."), default=0)
    std = float(owner.state.get("sigma_data", 0.5)) if owner else 0.5
    return tensors, side, [f"denoiser.input_std={std}", f"objective.prediction.data_std={std}"]


EDM2_NAMES = {"emb_noise": "noise", "emb_fourier": "features", "out_conv": "out"}
IN_AN_EDM2_STAGE = {
    "conv_res0": "conv1",
    "emb_linear": "embedding",
    "conv_res1": "conv2",
    "conv_skip": "skip",
    "attn_qkv": "attention.qkv",
    "attn_proj": "attention.out",
}
LEAVES = {"emb_gain": "gain", "freqs": "frequencies"}
EDM2_LABEL_WEIGHT, OUT_GAIN = "emb_label.weight", "out_gain"
LATENT_CHANNELS, LATENT_STD = 4, 0.5
# mean and deviation of the latents of Stable Diffusion's autoencoder, as in EDM2's code
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


@settings
class EDM2Files(Kind):
    """EDM2's networks in pixels, or in latents of Stable Diffusion's VAE, which have 4 channels.

    A file does not say how many channels an attention head has. The weights of the learned
    uncertainty are left out: sampling does not need them.
    """

    recipe = ("backbone=edm2", *TRAINED, *SAMPLED, "sampler.steps=32")

    head_channels: Count = 64

    def read(self, path: Path) -> Imported:
        tensors, side, deviation = read_wrapped(path, "Precond", "unet.")
        tensors = {name: each for name, each in tensors.items() if not name.startswith("logvar_")}
        if side < 1 or OUT_GAIN not in tensors:
            raise UserError(f"{path} has no network of EDM2; write another kind")
        ours, sizes = self.network(tensors, side)
        overrides = [*base.assigned("backbone", sizes), *deviation]
        classes = len(ours[LABELS]) - 1 if LABELS in ours else 0
        shape = image_shape = (len(ours[f"{BACKBONE}out.weight"]), side, side)
        if shape[0] == LATENT_CHANNELS:
            image_shape = (3, SIDE * side, SIDE * side)
            scale = {"shift": [*RAW_MEAN], "scale": [LATENT_STD / each for each in RAW_STD]}
            overrides += ["first_stage=hub_vae", *base.assigned("first_stage", scale)]
        return Imported(path, ours, shape, image_shape, classes, overrides)

    def network(self, tensors: State, side: int) -> tuple[State, dict[str, object]]:
        """The weights under our names, and the sizes that they say."""
        extra = {f"{BACKBONE}gain": tensors.pop(OUT_GAIN)[None]}
        if EDM2_LABEL_WEIGHT in tensors:
            extra[LABELS] = base.with_null_row(tensors.pop(EDM2_LABEL_WEIGHT).T)
        levels = sum(f"dec.{side >> i}x{side >> i}_block0.emb_gain" in tensors for i in range(16))
        blocks = base.count(tensors, rf"enc\.{side}x{side}_block(\d+)\.")
        stages = stages_of(side, levels, blocks, lambda up, i: f"up.{(blocks + 2) * up + i}")
        first = f"enc.{side}x{side}_conv"
        ours = base.renamed(
            tensors, EDM2_NAMES | {first: "entry"} | stages | base.joined(stages, IN_AN_EDM2_STAGE)
        )
        base.reorder_attention(ours, "hd3", self.head_channels)
        for name in [*ours]:
            module, _, leaf = name.rpartition(".")
            if leaf in LEAVES:
                value = ours.pop(name)
                ours[f"{module}.{LEAVES[leaf]}"] = value[None] if value.ndim == 0 else value
        channels = len(ours[f"{BACKBONE}entry.weight"])
        ends = [ours[f"{BACKBONE}up.{(blocks + 2) * i}.conv2.weight"] for i in range(levels)]
        attention = [
            level
            for level in range(levels)
            if f"enc.{side >> level}x{side >> level}_block0.attn_qkv.weight" in tensors
        ]
        return ours | extra, {
            "channels": channels,
            "multipliers": [len(weight) // channels for weight in reversed(ends)],
            "blocks": blocks,
            "attention": attention,
            "head_channels": self.head_channels,
        }
