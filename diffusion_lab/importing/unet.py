"""The steps that all imports of a U-Net share, on its weights under our names."""

from diffusion_lab.common.messages import UserError
from diffusion_lab.importing.kind.base import assigned
from diffusion_lab.importing.names import BACKBONE, by_head, count
from diffusion_lab.importing.reading import State


def reorder_attention(ours: State, axes: str, head_channels: int | None, heads: int = 1) -> None:
    """Gives the projections of attention our shape and order of rows, in place; see `by_head`.

    None for `head_channels` is `heads` heads.
    """
    for name in [name for name in ours if ".attention.attention." in name]:
        if ours[name].ndim > 1:  # a convolution of one pixel
            ours[name] = ours[name].flatten(1)
        if ".qkv." in name:
            number = len(ours[name]) // 3 // head_channels if head_channels else heads
            ours[name] = by_head(number, axes, ours[name])


def overrides_of(ours: State) -> list[str]:
    """The overrides that give a U-Net the sizes of these weights, and its attention its levels.

    Raises UserError if the width of a level is not a multiple of the first layer's.
    """
    shapes = {name.removeprefix(BACKBONE): tensor.shape for name, tensor in ours.items()}
    levels = count(shapes, r"up\.(\d+)\.")
    blocks = count(shapes, r"up\.0\.stages\.(\d+)\.") - 1

    def stage(level: int, i: int) -> str:
        return f"up.{levels - 1 - level}.stages.{i}"

    channels = shapes["entry.weight"][0]
    widths = [shapes[f"{stage(level, 0)}.residual.conv2.weight"][0] for level in range(levels)]
    if odd := [width for width in widths if width % channels]:
        raise UserError(
            f"a level of {odd[0]} channels is no multiple of the first layer's {channels}, so this "
            "U-Net cannot be imported"
        )
    attends = [
        (level, i)
        for level in range(levels)
        for i in range(blocks + 1)
        if f"{stage(level, i)}.attention.norm.weight" in shapes
    ]
    embedding_width, frequencies = shapes["noise.0.weight"]
    modulation = shapes["down.0.residual.embedding.weight"][0]
    sizes = {
        "channels": channels,
        "multipliers": [width // channels for width in widths],
        "blocks": blocks,
        "attention": sorted({level for level, _ in attends}),
        "attend_once": bool(attends) and all(i == blocks for _, i in attends),
        "embedding.frequencies": frequencies,
        "embedding.width": embedding_width,
        "stage.scale_shift": modulation == 2 * shapes["down.0.residual.conv1.weight"][0],
    }
    return assigned("backbone", sizes)
