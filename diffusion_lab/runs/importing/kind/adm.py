"""ADM's U-Net, as in openai/guided-diffusion (arXiv:2105.05233)."""

import re
from pathlib import Path
from typing import Annotated

from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Count, Flag, optional, settings, whole
from diffusion_lab.runs.importing.kind import base
from diffusion_lab.runs.importing.kind.base import BACKBONE, LABELS, Imported, Kind
from diffusion_lab.runs.importing.reading import State, read

NAMES = {
    "time_embed.0": "noise.0",
    "time_embed.2": "noise.2",
    "input_blocks.0.0": "entry",
    "out.0": "norm",
    "out.2": "out",
}
IN_A_RESIDUAL = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "embedding",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "skip",
}
IN_AN_ATTENTION = {"norm": "norm", "qkv": "attention.qkv", "proj_out": "attention.out"}
LABEL = "label_emb.weight"
COARSEST = 8  # side of the coarsest level of published networks


@settings
class ADMFiles(Kind):
    """ADM's U-Net in pixels; a file says neither its image size nor its heads.

    Attention has `heads` heads, or heads of `head_channels` channels if that is null.
    None for `image_size` is the size at which the coarsest level has 8 x 8 pixels.
    `new_attention_order` is the flag of that name with which the network was trained.
    """

    recipe = (
        "backbone=unet",
        "backbone/stage=adm",
        "backbone/norm=adm",
        *base.IMPROVED_DDPM,
        "objective.label_dropout=0.0",
        "denoiser.clip=1.0",  # as their code does while sampling
    )

    heads: Annotated[int | None, optional(whole(1))] = None
    head_channels: Count = 64
    image_size: Annotated[int | None, optional(whole(1))] = None
    new_attention_order: Flag = False

    def read(self, path: Path) -> Imported:
        tensors, _ = read(path)
        if not {"input_blocks.0.0.weight", "output_blocks.0.0.in_layers.0.weight"} <= {*tensors}:
            raise UserError(f"{path} has no U-Net of ADM; write another kind")
        labels = tensors.pop(LABEL, None)
        ours = base.renamed(tensors, NAMES | modules_of(tensors))
        if labels is not None:
            ours[LABELS] = base.with_null_row(labels)
        head_channels = None if self.heads else self.head_channels
        order = "3hd" if self.new_attention_order else "h3d"
        base.reorder_attention(ours, order, head_channels, self.heads or 1)
        channels = ours[f"{BACKBONE}entry.weight"].shape[1]
        outputs = len(ours[f"{BACKBONE}out.weight"])
        if outputs not in (channels, 2 * channels):
            raise UserError(
                f"{path} turns {channels} channels into {outputs}: it enlarges images, or is no "
                "diffusion model, so it cannot be imported"
            )
        heads = {"stage.head_channels": head_channels, "stage.heads": self.heads or 1}
        overrides = [*base.overrides_of(ours), *base.assigned("backbone", heads)]
        convolves = any(name.startswith(f"{BACKBONE}up.0.upsample.module.") for name in ours)
        overrides.append(f"backbone/resample={'conv' if convolves else 'block'}")
        overrides += [] if outputs > channels else base.FIXED_VARIANCE
        levels = base.count(ours, rf"{BACKBONE}up\.(\d+)\.")
        side = self.image_size or COARSEST * 2 ** (levels - 1)
        classes = 0 if labels is None else len(labels)
        shape = (channels, side, side)
        return Imported(path, ours, shape, shape, classes, overrides)


def modules_of(tensors: State) -> dict[str, str]:
    """The table of all modules of a U-Net, except its first and last ones and its embedding."""
    entries = base.count(tensors, r"input_blocks\.(\d+)\.")
    exits = base.count(tensors, r"output_blocks\.(\d+)\.")
    is_up = re.compile(r"output_blocks\.\d+\.[12]\.(in_layers\.0|conv)\.weight").fullmatch
    stages = exits // (1 + sum(is_up(name) is not None for name in tensors))  # of a decoder level
    residual = {"middle_block.0": "middle.0.residual", "middle_block.2": "middle.1.residual"}
    attention = {"middle_block.1": "middle.0.attention"}
    others = {}
    for i in range(1, entries):
        residual[f"input_blocks.{i}.0"] = f"down.{i - 1}.residual"
        attention[f"input_blocks.{i}.1"] = f"down.{i - 1}.attention"
        others[f"input_blocks.{i}.0.op"] = f"down.{i - 1}.module"
    for i in range(exits):
        up = f"up.{i // stages}"
        residual[f"output_blocks.{i}.0"] = f"{up}.stages.{i % stages}.residual"
        attention[f"output_blocks.{i}.1"] = f"{up}.stages.{i % stages}.attention"
        for last in (1, 2):  # after attention, where there is any
            residual[f"output_blocks.{i}.{last}"] = f"{up}.upsample.residual"
            others[f"output_blocks.{i}.{last}.conv"] = f"{up}.upsample.module"
    return base.joined(residual, IN_A_RESIDUAL) | base.joined(attention, IN_AN_ATTENTION) | others
