"""Imports have the heads, labels, time grids and limits of their authors, beside the weights."""

import pytest
import torch
from helpers.reference_networks import Reference
from helpers.refusals import refused
from helpers.tiny_vae import save_vae
from safetensors.torch import save_file

from diffusion_lab import runs
from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.backbone.embedding import grid_positions
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.importing.kind import DiTFiles
from diffusion_lab.importing.kind.base import LABELS


def imported(lab, tmp_path, kind: str, *settings: str):
    """The configuration of a stored network of this kind, imported to net/."""
    save_file(Reference.stored(kind).state, f"{kind}.safetensors")
    lab.done("import", f"{kind}.safetensors", f"kind={kind}", *settings, "output=net")
    return runs.load_config(tmp_path / "net")


def transformer(width: int, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first and last weights of a DiT of this width for latents of 4 x 4, in five classes."""
    return {
        "x_embedder.proj.weight": torch.zeros(width, 4, 2, 2),
        "pos_embed": grid_positions(2, 2, width, sines_first=True)[None],
        "y_embedder.embedding_table.weight": torch.ones(6, width),
        "final_layer.linear.weight": torch.zeros(32, width),
        "final_layer.linear.bias": torch.zeros(32),
        **others,
    }


def test_sit_walks_to_the_end_of_the_path_in_even_steps(lab, tmp_path):
    vae = save_vae(tmp_path / "vae")
    cfg = imported(lab, tmp_path, "sit", "kind.heads=2", f"first_stage.path={vae}")
    levels = instantiate(cfg, "sampler").levels(Rectified())
    torch.testing.assert_close(levels.t, torch.linspace(1, 0, 126, dtype=torch.float64))


def test_estimates_of_adm_are_clamped_as_in_its_code(lab, tmp_path):
    settings = ["kind.head_channels=16", "denoiser.clip=null"]
    assert imported(lab, tmp_path, "adm", *settings).denoiser.clip is None
    (tmp_path / "net").rename(tmp_path / "free")
    assert imported(lab, tmp_path, "adm", settings[0]).denoiser.clip == 1


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (384, 6), (1024, 16), (32, 1)])
def test_heads_have_64_channels_but_in_the_size_xl(tmp_path, width, heads):
    save_file(transformer(width), path := tmp_path / "dit.safetensors")
    assert f"backbone.heads={heads}" in DiTFiles().read(path).overrides


def test_all_labels_are_classes_of_a_network_that_dropped_none(tmp_path):
    save_file(transformer(32), path := tmp_path / "dit.safetensors")
    dropped, kept = DiTFiles().read(path), DiTFiles(null_label=False).read(path)
    assert (dropped.num_classes, kept.num_classes) == (5, 6)
    assert kept.tensors[LABELS].shape == (7, 32)
    assert not kept.tensors[LABELS][-1].any()
    assert "objective.label_dropout=0.0" in {*kept.overrides} - {*dropped.overrides}


def test_a_layer_of_a_large_number_is_refused_at_once(tmp_path):
    name = "blocks.2000000000.attn.qkv.weight"
    save_file(transformer(32, **{name: torch.zeros(96, 32)}), path := tmp_path / "dit.safetensors")
    with refused(name):
        DiTFiles().read(path)
