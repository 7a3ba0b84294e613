"""Networks of diffusers as backbones: how to wrap a network that knows nothing of this package.

A wrapper makes the network from the three facts and its own settings, says how wide a condition it
takes, starts at an output of zero, and passes on what it is called with. B batch, D width.
"""

import inspect
from collections.abc import Mapping, Sequence
from typing import Annotated, Any

from torch import Tensor, nn

from diffusion_lab.backbone.attention import check_heads, heads_of
from diffusion_lab.backbone.conditioning import Condition
from diffusion_lab.backbone.embedding import NoiseEmbedding
from diffusion_lab.backbone.patches import FREQUENCIES, patch_grid
from diffusion_lab.backbone.unet import check_levels
from diffusion_lab.common.messages import package
from diffusion_lab.common.ranges import (
    Count,
    Range,
    between,
    one_of,
    optional,
    ranges,
    whole,
    whole_list,
)

PUBLISHED = ("UNet2DModel", "DiTTransformer2DModel")  # classes of published networks
OF_THE_DATA = ("in_channels", "out_channels", "sample_size")  # their settings that data decide
MAPPING = Range("a mapping", lambda value: isinstance(value, Mapping))


def network_class(name: str) -> Any:
    """Imports a class of diffusers only when needed; raises ValueError if it is not installed."""
    return getattr(package("diffusers", "diffusers", name), name)


def settings_of(name: str) -> dict[str, Any]:
    """The settings of a class of diffusers and their defaults, except those that data decide."""
    parameters = inspect.signature(network_class(name)).parameters
    return {key: each.default for key, each in parameters.items() if key not in OF_THE_DATA}


def zero(layer: nn.Module) -> None:
    """Sets a layer's weight and bias to 0."""
    nn.init.zeros_(layer.get_parameter("weight"))
    nn.init.zeros_(layer.get_parameter("bias"))


class DiffusersNetwork(nn.Module):
    """A U-Net or a DiT of diffusers, `network`, and its parts."""

    network: Any

    @property
    def ends(self) -> tuple[nn.Module, nn.Module]:
        network = self.network
        if hasattr(network, "conv_in"):
            return network.conv_in, network.conv_out
        return network.pos_embed.proj, network.proj_out_2

    @property
    def layers(self) -> list[nn.Module]:
        network = self.network
        if hasattr(network, "transformer_blocks"):
            return [*network.transformer_blocks]
        middle = [network.mid_block] if network.mid_block is not None else []
        return [*network.down_blocks, *middle, *network.up_blocks]

    @property
    def rows(self) -> int:
        """The number of rows of a DiT's patches."""
        return self.network.pos_embed.height

    @property
    def tokens(self) -> int:
        """The number of a DiT's patches."""
        return self.rows * self.network.pos_embed.width


class DiffusersUNet(DiffusersNetwork):
    """UNet2DModel of diffusers, with the condition's vector added to its embedding of the noise."""

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        channels: Count,
        multipliers: Annotated[Sequence[int], whole_list(1, shortest=1)],
        blocks: Count,
        attention: Annotated[Sequence[int], whole_list(0)],
        head_channels: Annotated[int | None, optional(whole(1))],
        norm_groups: Count,
        dropout: Annotated[float, between(0, 1)],
    ):
        super().__init__()
        check_levels(image_size, len(multipliers), attention)
        if norm_groups == channels * min(multipliers):
            raise ValueError(
                f"norm_groups={norm_groups} leaves groups of one channel, whose norm takes away "
                f"the embedding that is added before it; write a smaller divisor of {channels}"
            )
        attends = [level in attention for level in range(len(multipliers))]
        if head_channels is not None:
            for level in {*attention, len(multipliers) - 1}:  # the middle attends, too
                heads_of(channels * multipliers[level], head_channels)
        self.condition_width = 4 * channels
        self.network = network_class("UNet2DModel")(
            sample_size=tuple(image_size),
            in_channels=in_channels,
            out_channels=out_channels,
            time_embedding_dim=self.condition_width,
            block_out_channels=[channels * multiplier for multiplier in multipliers],
            layers_per_block=blocks,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            attention_head_dim=head_channels,
            norm_num_groups=norm_groups,
            dropout=dropout,
            class_embed_type="identity",  # class_labels take a vector, which is added
        )
        zero(self.network.conv_out)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        vector = condition.vector  # (B, D)
        if vector is None:
            vector = noise.new_zeros(len(x), self.condition_width)
        return self.network(x, noise, class_labels=vector, return_dict=False)[0]


class GivenVector(nn.Module):
    """Replaces diffusers' embedding of timestep and label by the vector given as the label."""

    def forward(self, timestep: None, label: Tensor, hidden_dtype=None) -> Tensor:
        """Returns the vector (B, D) unchanged."""
        return label


class DiffusersDiT(DiffusersNetwork):
    """DiTTransformer2DModel of diffusers, with its noise embeddings, one a block, replaced by ours.

    diffusers' own would embed and drop class labels; now all blocks take the same vector, the sum
    of the noise's and the condition's. Raises ValueError unless the image is square and patches
    tile it.
    """

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        patch: Count,
        width: Count,
        depth: Count,
        heads: Count,
        dropout: Annotated[float, between(0, 1)],
    ):
        super().__init__()
        rows, columns = patch_grid(image_size, patch)
        if rows != columns:
            raise ValueError(
                f"DiTTransformer2DModel of diffusers takes square images only, but these have "
                f"{image_size[0]}x{image_size[1]} pixels; use DiT"
            )
        check_heads(width, heads)
        self.condition_width = width
        self.noise = NoiseEmbedding(FREQUENCIES, width)
        self.network = network_class("DiTTransformer2DModel")(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=in_channels,
            out_channels=out_channels,
            num_layers=depth,
            dropout=dropout,
            sample_size=image_size[0],
            patch_size=patch,
            num_embeds_ada_norm=1,  # number of labels; these embeddings are replaced
        )
        for block in self.network.transformer_blocks:
            block.norm1.emb = GivenVector()
            zero(block.norm1.linear)  # the zero of adaLN-Zero, which diffusers leaves to its users
        zero(self.network.proj_out_1)
        zero(self.network.proj_out_2)

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        vector, _ = condition.after(self.noise(noise))  # (B, D)
        return self.network(x, class_labels=vector, return_dict=False)[0]


class DiffusersModel(DiffusersNetwork):
    """A U-Net or DiT of diffusers with any of its own settings, which embeds labels itself.

    `name` is its class. It takes raw labels. Raises ValueError for a setting that the class does
    not have, or that follows from the data.
    """

    condition_width = 1  # of a vector that is not used
    embeds_labels = True

    @ranges()
    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        image_size: tuple[int, int],
        name: Annotated[str, one_of(*PUBLISHED)],
        settings: Annotated[Mapping[str, Any], MAPPING],
    ):
        super().__init__()
        if wrong := sorted(set(settings) - set(settings_of(name))):
            raise ValueError(f"settings has {wrong[0]}, which is not a setting of {name}")
        side = image_size[0] if image_size[0] == image_size[1] else tuple(image_size)
        facts = {"in_channels": in_channels, "out_channels": out_channels, "sample_size": side}
        self.network = network_class(name)(**settings, **facts)
        for module in self.network.modules():
            if hasattr(module, "dropout_prob"):
                module.dropout_prob = 0.0  # of labels, which the conditioning drops
        zero(self.ends[1])

    def forward(self, x: Tensor, noise: Tensor, condition: Condition) -> Tensor:
        """x (B, C_in, H, W), noise (B,) float32 -> (B, C_out, H, W).

        Raises ValueError for a condition that is a vector, which this network cannot hear.
        """
        if condition.vector is not None:
            raise ValueError(
                "a network of diffusers with its own settings hears raw labels alone: no embedded "
                "condition, augmentation or jumps"
            )
        return self.network(x, noise, class_labels=condition.labels, return_dict=False)[0]
