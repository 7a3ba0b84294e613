"""Our DiT as diffusers' DiTTransformer2DModel, whose blocks embed noise level and label each."""

from typing import Any

from omegaconf import DictConfig
from torch import Tensor

from diffusion_lab.backbone import AdaLNZero, DiT
from diffusion_lab.runs.to_diffusers.scheduler import without_counterpart

# what the DiT of diffusers has in place of each option of `backbone`
FIXED = {"window": None, "registers": 0}
FIXED |= dict.fromkeys(("qk_norm", "long_skips", "overlap", "smooth", "fused"), False)
ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu-approximate"}
FREQUENCIES = """
for module in model.modules():  # frequencies of the noise level, which config.json cannot say
    if hasattr(module, "downscale_freq_shift"):
        module.downscale_freq_shift = 0
"""
COSINES_FIRST = """\
positions = model.pos_embed.pos_embed.unflatten(-1, (2, 2, -1))
model.pos_embed.pos_embed = positions.flip(-2).flatten(-3)  # cosines come first
"""


def settings_of_dit(dit: DiT, cfg: DictConfig) -> tuple[dict[str, Any], str]:
    """The settings of DiTTransformer2DModel, and the code that makes it compute what this DiT does.

    Raises UserError, which names an option of the run's configuration, if there are none.
    """
    own = cfg.backbone
    for key, value in FIXED.items():
        if (given := own.get(key, value)) != value:
            option = f"backbone.{key}={given}".replace("True", "true")
            raise without_counterpart(option, "the DiT of diffusers has no such part")
    if own.positions not in ("sincos", "sines_first"):
        raise without_counterpart(
            f"backbone.positions={own.positions}", "positions in the DiT of diffusers are sinusoids"
        )
    block = dit.blocks[0]
    known = own.block.get("activation", "gelu") in ACTIVATIONS and own.block.mlp_ratio == 4
    if type(block) is not AdaLNZero or own.block.get("norm", "layer") != "layer" or not known:
        raise without_counterpart(
            "this backbone.block",
            "the DiT of diffusers has adaln_zero with mlp_ratio=4, layer norms and GELU alone",
        )
    if dit.rows**2 != dit.tokens:
        raise without_counterpart(
            "images that are not square", "the DiT of diffusers has as many rows as columns"
        )
    settings = {
        "num_attention_heads": own.heads,
        "attention_head_dim": own.width // own.heads,
        "num_layers": own.depth,
        "patch_size": own.patch,
        "activation_fn": ACTIVATIONS[own.block.get("activation", "gelu")],
        "norm_eps": 1e-6,
    }
    return settings, FREQUENCIES + (COSINES_FIRST if own.positions == "sincos" else "")


def renamed_dit(dit: DiT, table: Tensor) -> dict[str, Tensor]:
    """The weights of a DiT under the names of DiTTransformer2DModel.

    `table` (K + 1, D) has the vector of each label and of the null label.
    """
    tensors = dit.state_dict()
    patch, found = dit.patch, {}

    def layer(theirs: str, ours: str) -> None:
        found.update({f"{theirs}.{leaf}": tensors[f"{ours}.{leaf}"] for leaf in ("weight", "bias")})

    layer("pos_embed.proj", "embed")
    layer("proj_out_1", "modulation.1")
    layer("proj_out_2", "out")
    kernel = found["pos_embed.proj.weight"]
    found["pos_embed.proj.weight"] = kernel.unflatten(1, (-1, patch, patch))
    for name in ("proj_out_2.weight", "proj_out_2.bias"):  # channels come last in their patches
        found[name] = found[name].unflatten(0, (-1, patch**2)).transpose(0, 1).flatten(0, 1)
    blocks: Any = dit.blocks
    for i, block in enumerate(blocks):
        ours, theirs = f"blocks.{i}", f"transformer_blocks.{i}"
        layer(f"{theirs}.norm1.emb.timestep_embedder.linear_1", "noise.0")
        layer(f"{theirs}.norm1.emb.timestep_embedder.linear_2", "noise.2")
        found[f"{theirs}.norm1.emb.class_embedder.embedding_table.weight"] = table
        layer(f"{theirs}.norm1.linear", f"{ours}.modulation.1")
        layer(f"{theirs}.attn1.to_out.0", f"{ours}.mixer.out")
        layer(f"{theirs}.ff.net.0.proj", f"{ours}.mlp.0")
        layer(f"{theirs}.ff.net.2", f"{ours}.mlp.2")
        for leaf in ("weight", "bias"):
            q, k, v = tensors[f"{ours}.mixer.qkv.{leaf}"].chunk(3)
            if (scale := block.mixer.scale) is not None:  # of muP; theirs is 1 / sqrt(d)
                q = q * scale * (len(q) // block.mixer.heads) ** 0.5
            parts = {"to_q": q, "to_k": k, "to_v": v}
            found |= {f"{theirs}.attn1.{name}.{leaf}": part for name, part in parts.items()}
    return found
