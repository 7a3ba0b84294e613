"""DiT, as in facebookresearch/DiT (arXiv:2212.09748)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, ClassVar

from torch import Tensor

from diffusion_lab.backbone.embedding import grid_positions
from diffusion_lab.common.messages import UserError
from diffusion_lab.common.ranges import Flag, optional, settings, whole
from diffusion_lab.runs.importing.kind import base
from diffusion_lab.runs.importing.kind.base import BACKBONE, LABELS, Imported, Kind
from diffusion_lab.runs.importing.reading import read

NAMES = {
    "x_embedder.proj": "embed",
    "t_embedder.mlp.0": "noise.0",
    "t_embedder.mlp.2": "noise.2",
    "final_layer.adaLN_modulation.1": "modulation.1",
    "final_layer.linear": "out",
}
IN_A_BLOCK = {
    "attn.qkv": "mixer.qkv",
    "attn.proj": "mixer.out",
    "mlp.fc1": "mlp.0",
    "mlp.fc2": "mlp.2",
    "adaLN_modulation.1": "modulation.1",
}
TABLE = "y_embedder.embedding_table.weight"
POSITIONS = "pos_embed"
NETWORK = (
    "first_stage=hub_vae",
    "backbone=dit",
    "backbone.positions=sines_first",
    "backbone.block.activation=gelu_tanh",
)
HEADS = {1152: 16}  # heads of DiT-XL; those of other widths have 64 channels
SIDE = 8  # pixels of an image to a number of its latent, in the VAE of Stable Diffusion


@settings
class DiTFiles(Kind):
    """DiT in the latents of Stable Diffusion's VAE, with a learned variance.

    None for `heads` is 16 for DiT-XL, and heads of 64 channels for other widths. Without
    `null_label`, the last row of the table is a class: the network was trained with
    class_dropout_prob=0, which a file does not say.
    """

    recipe: ClassVar[Sequence[str]] = (*NETWORK, *base.IMPROVED_DDPM)
    unlearned: ClassVar[Sequence[str]] = base.FIXED_VARIANCE  # overrides without a learned variance

    heads: Annotated[int | None, optional(whole(1))] = None
    null_label: Flag = True

    def read(self, path: Path) -> Imported:
        tensors, _ = read(path)
        if missing := {POSITIONS, TABLE, "x_embedder.proj.weight"} - tensors.keys():
            raise UserError(f"{path} has no {min(missing)}, so it is no DiT; write another kind")
        table, positions = tensors.pop(TABLE), tensors.pop(POSITIONS)[0]  # (K + 1, D), (N, D)
        width, channels, patch, _ = tensors["x_embedder.proj.weight"].shape
        rows = round(len(positions) ** 0.5)
        fixed = grid_positions(rows, rows, width, sines_first=True)
        if positions.shape != fixed.shape or (positions - fixed).abs().max() > 1e-4:
            raise UserError(
                f"{path} has a {POSITIONS} that is not the fixed one of DiT for square images, so "
                "it cannot be imported"
            )
        depth = base.count(tensors, r"blocks\.(\d+)\.")
        blocks = base.joined({f"blocks.{i}": f"blocks.{i}" for i in range(depth)}, IN_A_BLOCK)
        ours = base.renamed(tensors, NAMES | blocks)
        ours[LABELS] = table if self.null_label else base.with_null_row(table)
        ours[f"{BACKBONE}embed.weight"] = ours[f"{BACKBONE}embed.weight"].flatten(1)
        for name in (f"{BACKBONE}out.weight", f"{BACKBONE}out.bias"):
            outputs = ours[name].unflatten(0, (patch, patch, -1)).movedim(2, 0)  # (c, p, p, ...)
            ours[name] = self.used(outputs, channels).flatten(0, 2)
        learned = len(ours[f"{BACKBONE}out.bias"]) > channels * patch**2
        side = rows * patch
        heads = self.heads or HEADS.get(width, max(1, width // 64))
        sizes = {"patch": patch, "width": width, "depth": depth, "heads": heads}
        overrides = [*base.assigned("backbone", sizes), *([] if learned else self.unlearned)]
        overrides += [] if self.null_label else ["objective.label_dropout=0.0"]
        shape, image_shape = (channels, side, side), (3, SIDE * side, SIDE * side)
        return Imported(path, ours, shape, image_shape, len(ours[LABELS]) - 1, overrides)

    def used(self, outputs: Tensor, channels: int) -> Tensor:
        """The last layer's outputs (c, p, p, ...) that our network has, for so many channels."""
        return outputs


@settings
class SiTFiles(DiTFiles):
    """SiT on the straight path (willisma/SiT, arXiv:2401.08740), in Stable Diffusion's latents.

    Its time runs from noise to data, and so does its velocity, data - noise; ours is noise - data.
    """

    recipe = (
        *NETWORK,
        "schedule=rectified",
        "objective=flow_matching",
        "objective/time_sampler=uniform",
        "denoiser.noise_label=data_time",
        "sampler=heun",
        "sampler.steps=125",
        "sampler.time_grid.sigma_min=0.0",  # to the end of the path, in even steps
    )
    unlearned = ()

    def used(self, outputs: Tensor, channels: int) -> Tensor:
        # the published networks have twice the outputs, and their code drops the second half
        return -outputs[:channels]
