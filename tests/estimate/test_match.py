"""Matching finds backbones of equal cost, with the settings that were asked for."""

import json

import pytest
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.common.messages import UserError
from diffusion_lab.estimate.budget import Size, Sizes

PAIRS = [
    ("dit", "unet_small", "params"),
    ("dit", "unet", "macs"),
    ("unet", "dit", "params"),
    ("unet_small", "dit_s_2", "macs"),
    ("mlp", "unet_small", "params"),
]


def sizes(cost, **backbone: int) -> Sizes:
    """Returns the Sizes of a backbone with these keys; `cost` is a function of the keys."""
    return Sizes(OmegaConf.create({"backbone": backbone}), "own", lambda cfg: cost(**cfg.backbone))


@pytest.mark.slow
@pytest.mark.parametrize(("backbone", "reference", "by"), PAIRS)
def test_what_is_pasted_has_the_costs_that_were_said(lab, backbone, reference, by):
    asked = [f"backbone={backbone}", f"reference={reference}", f"by={by}", "data=cifar10"]
    if "unet" in backbone:
        asked.append("backbone.stage.dropout=0.1")
    code, out, err = lab("match", *asked, "json=true")
    assert code == 0, err
    paste, last = out.splitlines()[-2:]
    result = json.loads(last)
    assert paste == " ".join(result["overrides"])
    assert paste.startswith(f"backbone={backbone} ")
    found = {}
    for who, overrides in (("reference", [f"backbone={reference}"]), ("match", paste.split())):
        found[who] = lab.result("profile", *overrides, "data=cifar10", "device=meta")
        for cost in ("params", "macs", "flops"):
            assert found[who][cost] == result[who][cost]
    assert found["match"][by] == pytest.approx(found["reference"][by], rel=0.02)
    assert result["difference"] == pytest.approx(found["match"][by] / found["reference"][by] - 1)


def test_the_depth_is_kept_where_a_width_agrees():
    size, agrees = sizes(lambda width, depth: width**2 * depth, width=32, depth=3).solve(4805, 0.02)
    assert agrees
    assert size == Size({"width": 40, "depth": 3}, 4800)


def test_else_width_and_depth_keep_their_ratio():
    # at depth 4 widths 20 and 24 give 1600 and 2304; 32 x 2 and 16 x 8 give 2048, 20 x 5 2000
    own = sizes(lambda width, depth: width**2 * depth, width=8, depth=4)
    assert own.solve(2000, 0.03) == (Size({"width": 16, "depth": 8}, 2048), True)
    assert own.solve(2000, 0.01) == (Size({"width": 20, "depth": 5}, 2000), True)
    assert own.solve(1999, 1e-6) == (Size({"width": 20, "depth": 5}, 2000), False)


def test_sizes_that_a_backbone_refuses_are_passed_over():
    def cost(width, depth):
        if width % 12:
            raise UserError("multiples of 12 only")
        return width * depth

    found = sizes(cost, width=24, depth=1).around(500, 1)
    assert [size.settings["width"] for size in found] == [492, 504]
    # if heads as wide as before allow no size so small, the smallest allowed one is taken
    own = sizes(lambda width, heads: width, width=384, heads=2)
    assert [size.settings for size in own.around(8, None)] == [{"width": 128, "heads": 1}]


def test_one_key_alone_is_enough():
    assert sizes(lambda channels: channels, channels=8).solve(100, 0.02)[0].cost == 100
    assert sizes(lambda blocks: blocks * 7, blocks=1).solve(71, 0.02)[0].settings == {"blocks": 10}
    size, agrees = sizes(lambda blocks: blocks * 7, blocks=1).solve(74, 0.02)
    assert not agrees
    assert size.cost == 77
    with refused("backbone=own", "width, channels, depth"):
        sizes(lambda levels: 1, levels=3)


def test_heads_keep_about_their_width():
    own = sizes(lambda width, heads: width, width=384, heads=6)
    assert own.heads({"width": 384})[0] == {"heads": 6}
    assert own.heads({"width": 312})[0] == {"heads": 6}
    assert own.heads({"width": 320})[0] == {"heads": 5}
    assert own.heads({"width": 4}) == []


@pytest.mark.slow
def test_what_is_written_beside_a_run_is_not_the_runs(lab, run_folder):
    here = ["data=cifar10", "conditioning=none"]
    expected = lab.result("profile", "run=run", *here, "device=meta")
    asked = ["backbone=mlp", "reference=run", *here, "tolerance=0.2", "device=meta"]
    code, out, err = lab("match", *asked, "json=true")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1])["reference"]["params"] == expected["params"]
    (said,) = [line for line in err.splitlines() if "first_stage" in line]
    assert not {"data", "conditioning"} & set(said.replace(",", " ").split())


@pytest.mark.slow
@pytest.mark.parametrize("reference", ["unet_small", "'backbone=unet_small backbone.blocks=1'"])
def test_an_experiments_values_of_the_backbone_are_not_the_references(lab, reference):
    recipe = ["experiment=fashion_mnist/latent_unet", "first_stage=pixels", "by=macs"]
    asked = [*recipe, f"reference={reference}", "tolerance=0.5", "device=meta"]
    found = lab.result("match", *asked)
    own = ["backbone=unet_small", *(["backbone.blocks=1"] if "blocks" in reference else [])]
    expected = lab.result("profile", *own, "data=fashion_mnist", "device=meta")
    assert found["reference"]["macs"] == expected["macs"]


@pytest.mark.slow
def test_a_reference_may_be_a_composition_with_another_block(lab):
    wanted = ["backbone=dit", "backbone.width=96", "backbone.heads=2", "backbone/block=adaln"]
    result = lab.result(
        "match", "backbone=dit", "backbone/block=in_context", f'reference="{" ".join(wanted)}"'
    )
    assert "backbone/block=in_context" in result["overrides"]
    for who, overrides in (("reference", wanted), ("match", result["overrides"])):
        assert lab.result("profile", *overrides, "device=meta")["params"] == result[who]["params"]


@pytest.mark.slow
def test_what_no_module_claims_is_matched_too(lab):
    arguments = ["backbone=dit", "backbone.patch=2", "image_shape=[3,32,32]", "device=meta"]
    result = lab.result(
        "match", *arguments, "reference='backbone=diffusers_dit backbone.patch=2'", "by=macs"
    )
    assert "backbone.width=384" in result["overrides"]
    assert result["reference"]["macs"] == pytest.approx(result["match"]["macs"], rel=0.005)
