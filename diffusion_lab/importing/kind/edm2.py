"""EDM2's networks, as in NVlabs/edm2 (arXiv:2312.02696)."""

from pathlib import Path

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Count, settings
from diffusion_lab.importing.kind.base import (
    BACKBONE,
    LABELS,
    Imported,
    Kind,
    assigned,
    by_head,
    count,
    joined,
    numbers,
    renamed,
    with_null_row,
)
from diffusion_lab.importing.kind.dit import SIDE
from diffusion_lab.importing.reading import State, read

NAMES = {"emb_noise": "noise", "emb_fourier": "features", "out_conv": "out"}
IN_A_STAGE = {
    "conv_res0": "conv1",
    "emb_linear": "embedding",
    "conv_res1": "conv2",
    "conv_skip": "skip",
    "attn_qkv": "attention.qkv",
    "attn_proj": "attention.out",
}
LEAVES = {"emb_gain": "gain", "freqs": "frequencies"}
LABEL_WEIGHT, OUT_GAIN = "emb_label.weight", "out_gain"
LATENT_CHANNELS, LATENT_STD = 4, 0.5
# mean and deviation of the latents of Stable Diffusion's autoencoder, as in EDM2's code
RAW_MEAN, RAW_STD = (5.81, 3.25, 0.12, -2.15), (4.17, 4.62, 3.71, 3.28)


@settings
class EDM2Files(Kind):
    """EDM2's networks in pixels, or in latents of Stable Diffusion's VAE, which have 4 channels.

    A file does not say how many channels an attention head has. The weights of the learned
    uncertainty are left out: sampling does not need them.
    """

    recipe = (
        "backbone=edm2",
        "schedule=edm",
        "objective=edm",
        "objective.label_dropout=0.0",
        "sampler=heun",
        "sampler.steps=32",
        "sampler/time_grid=karras",
    )

    head_channels: Count = 64

    def read(self, path: Path) -> Imported:
        found = read(path)
        if found.name not in (None, "Precond"):
            raise UserError(
                f"{path} has a network in {found.name}; only networks in Precond can be imported"
            )
        tensors = {
            name.removeprefix("unet."): each
            for name, each in found.tensors.items()
            if not name.startswith("logvar_")
        }
        side = max(numbers(tensors, r"enc\.(\d+)x\d+_conv\."), default=0)
        if side < 1 or OUT_GAIN not in tensors:
            raise UserError(f"{path} has no network of EDM2; write another kind")
        ours, sizes = self.network(tensors, side)
        std = float(found.settings.get("sigma_data", 0.5))
        overrides = assigned("backbone", sizes)
        overrides += [f"denoiser.input_std={std}", f"objective.prediction.data_std={std}"]
        classes = len(ours[LABELS]) - 1 if LABELS in ours else 0
        if not classes:
            overrides.append("conditioning=none")
        shape = image_shape = (len(ours[f"{BACKBONE}out.weight"]), side, side)
        if shape[0] == LATENT_CHANNELS:
            image_shape = (3, SIDE * side, SIDE * side)
            scale = {"shift": [*RAW_MEAN], "scale": [LATENT_STD / each for each in RAW_STD]}
            overrides += ["first_stage=hub_vae", *assigned("first_stage", scale)]
        return Imported(path, ours, shape, image_shape, classes, overrides)

    def network(self, tensors: State, side: int) -> tuple[State, dict[str, object]]:
        """The weights under our names, and the sizes that they say."""
        extra = {f"{BACKBONE}gain": tensors.pop(OUT_GAIN)[None]}
        if LABEL_WEIGHT in tensors:
            extra[LABELS] = with_null_row(tensors.pop(LABEL_WEIGHT).T)
        levels = sum(f"dec.{side >> i}x{side >> i}_block0.emb_gain" in tensors for i in range(16))
        blocks = count(tensors, rf"enc\.{side}x{side}_block(\d+)\.")
        stages = stages_of(side, levels, blocks)
        first = f"enc.{side}x{side}_conv"
        ours = renamed(tensors, NAMES | {first: "entry"} | stages | joined(stages, IN_A_STAGE))
        for name in [*ours]:
            module, _, leaf = name.rpartition(".")
            if ".attention." in name:  # a convolution of one pixel
                ours[name] = ours[name].flatten(1)
            if ".qkv." in name:
                heads = len(ours[name]) // 3 // self.head_channels
                ours[name] = by_head(heads, "hd3", ours[name])
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


def stages_of(side: int, levels: int, blocks: int) -> dict[str, str]:
    """The table of all stages of a U-Net for images of this side."""
    stages: dict[str, str] = {}
    for level in range(levels):
        here = f"{side >> level}x{side >> level}"
        first, up = level * (blocks + 1), (levels - 1 - level) * (blocks + 2)
        stages |= {f"enc.{here}_block{i}": f"down.{first + i}" for i in range(blocks)}
        stages |= {f"dec.{here}_block{i}": f"up.{up + i}" for i in range(blocks + 1)}
        if level:
            stages[f"enc.{here}_down"] = f"down.{first - 1}"
        if level < levels - 1:
            stages[f"dec.{here}_up"] = f"up.{up - 1}"
        else:
            stages |= {f"dec.{here}_in0": "middle.0", f"dec.{here}_in1": "middle.1"}
    return stages
