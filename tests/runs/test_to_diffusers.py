"""Exports to diffusers: its networks answer the same, its schedulers draw our samples."""

import importlib.util
import re
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.compositions import assembled
from helpers.pairs import first_fast
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import summary_of

from diffusion_lab import runs
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.common.labels import Classes
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.sampler import Ancestral
from diffusion_lab.diffusion.sampler.time_grid import UniformGrid
from diffusion_lab.runs.to_diffusers.folder import convert
from diffusion_lab.runs.to_diffusers.scheduler import first_place

diffusers = pytest.importorskip("diffusers")
SHAPE, CLASSES = (1, 8, 8), 4
SIZES = ["backbone.channels=16", "backbone.multipliers=[1,2]", "backbone.attention=[1]"]
UNET = ["backbone=unet", *SIZES, "backbone.blocks=1", "backbone.norm.groups=4"]
UNET += ["backbone.stage.head_channels=8"]
THEIRS = ["backbone=diffusers_unet", *SIZES, "backbone.blocks=1", "backbone.norm_groups=4"]
THEIRS += ["backbone.head_channels=8"]
LAYERS = "{num_attention_heads: 2, attention_head_dim: 8, num_layers: 2, num_embeds_ada_norm: 4}"
DIT = ["backbone=diffusers_model", "backbone.name=DiTTransformer2DModel"]
DIT += [f"backbone.settings={LAYERS}", "conditioning=raw_labels"]
OURS = ["backbone=dit", "backbone.width=16", "backbone.heads=2", "backbone.patch=2"]
SETTINGS = (
    "{block_out_channels: [16, 32], down_block_types: [DownBlock2D, AttnDownBlock2D], "
    "up_block_types: [AttnUpBlock2D, UpBlock2D], norm_num_groups: 4, num_class_embeds: 5, "
    "flip_sin_to_cos: false}"
)
V = "objective=v_prediction"
COMPOSITIONS = {
    "unet": UNET,
    "unet_adm": [
        *UNET,
        *("backbone/stage=adm", "backbone.stage.head_channels=null", "backbone/resample=block"),
        *("backbone.embedding.closed=true", "backbone.embedding.width=24"),
        "backbone.norm.eps=1.0e-3",
        "backbone.multipliers=[1,2,2]",
        "backbone.blocks=2",
    ],
    "published_dit": [
        *OURS,
        "backbone.positions=sines_first",
        "backbone.block.activation=gelu_tanh",
        "schedule=ddpm_linear",
        "objective=improved_ddpm",
        "objective/prediction=v",  # with random weights, images from eps are huge
        "denoiser.noise_label=index",
    ],
    "attributes_cosine": [
        *UNET,
        *("conditioning=attributes", "conditioning.sizes=[2,2]", "schedule=ddpm_cosine"),
        *("objective=ddpm", "objective.label_dropout=0.0", "denoiser.clip=1"),
    ],
    "diffusers_unet_x0": [*THEIRS, "schedule=ddpm_linear", "objective/prediction=x0"],
    "no_labels_zero_snr": [*THEIRS, "conditioning=none", V, "schedule=zero_terminal_snr"],
    "dit_learned_variance": [
        *(*DIT, "schedule=ddpm_scaled_linear"),
        *("objective=improved_ddpm", "objective/prediction=v"),
    ],
    "clipped_flow": [*THEIRS, "denoiser.clip=0.7"],
    "dit_flow": DIT,
    "continuous_cosine": [*UNET, "schedule=cosine", V],
    "continuous_dit": [*DIT, "schedule=improved_cosine", "objective/prediction=x0"],
    "sines_first": [
        *("backbone=diffusers_model", f"backbone.settings={SETTINGS}", "conditioning=raw_labels"),
        *("schedule=linear", V),
    ],
    # the parts of `make train`
    "groups_by_channels": [
        "backbone=unet_small",
        *SIZES,
        "backbone.channels=32",
        "denoiser.clip=1",
    ],
    "dit": OURS,
    "dit_with_mup_continuous": [*OURS, "backbone.base_width=64", "schedule=cosine", V],
    "another_offset": [*UNET, "schedule=ddpm_cosine", "schedule.offset=0.02", V],
}


def randomised(cfg):
    """The model of a configuration with weights none of which is 0, for SHAPE and CLASSES."""
    model = build_model(cfg, SHAPE, Classes.numbered(CLASSES))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.denoiser.named_parameters():
        centre = float(parameter.ndim == 1 and name.endswith("weight"))
        std = 0.3 if "embeddings" in name or "class_emb" in name else 0.05
        torch.nn.init.normal_(parameter, centre, std, generator=generator)
    model.denoiser.eval().requires_grad_(False)
    return model


def loop_in(folder: Path):
    """The module sample.py of an export."""
    spec = importlib.util.spec_from_file_location("sample", folder / "sample.py")
    spec.loader.exec_module(module := importlib.util.module_from_spec(spec))
    return module


@pytest.mark.long
@pytest.mark.parametrize("overrides", first_fast(COMPOSITIONS.values(), 6), ids=COMPOSITIONS)
def test_diffusers_draws_our_samples_from_the_same_noise(tmp_path, overrides):
    cfg = assembled(*overrides)
    model = randomised(cfg)
    convert(model, cfg, CLASSES).save(tmp_path)
    loop, noise = loop_in(tmp_path), torch.randn(4, *SHAPE)
    labels = torch.arange(4) if model.denoiser.conditioning.conditional else None

    def answer(x, level, labels=labels):
        return model.denoiser(x, level, Given(labels))

    level = model.schedule(torch.tensor([0.001, 0.25, 0.5, 1.0]))
    told = model.denoiser.noise_label(level).float() - first_place(model)
    theirs = loop.model(noise, told, class_labels=labels).sample[:, :1]
    torch.testing.assert_close(theirs, answer(noise, level).output, rtol=0, atol=1e-5)
    draw = partial(Ancestral(10, UniformGrid(), eta=0.0), noise=noise, schedule=model.schedule)
    ours = draw(answer)
    torch.testing.assert_close(loop.sample(noise, labels, steps=10), ours, rtol=0, atol=1e-4)
    assert 0.1 < ours.std() < 10
    if labels is not None:
        assert (draw(partial(answer, labels=labels.flip(0))) - ours).abs().max() > 1e-3


def test_schedules_that_diffusers_knows_keep_their_names():
    found = {}
    for schedule in ("ddpm_linear", "ddpm_cosine", "cosine", "zero_terminal_snr"):
        cfg = assembled(*UNET, f"schedule={schedule}", V)
        config = convert(randomised(cfg), cfg, CLASSES).scheduler.config
        named = config.trained_betas is None
        found[schedule] = (named and config.beta_schedule, config.rescale_betas_zero_snr)
    assert found == {
        "ddpm_linear": ("linear", False),
        "ddpm_cosine": ("squaredcos_cap_v2", False),
        "cosine": (False, False),
        "zero_terminal_snr": ("linear", True),
    }


def test_a_null_label_is_kept_if_it_was_trained():
    rows = {}
    for rate in (0.0, 0.1):
        cfg = assembled(*UNET, f"objective.label_dropout={rate}")
        rows[rate] = len(convert(randomised(cfg), cfg, CLASSES).network.class_embedding.weight)
    assert rows == {0.0: CLASSES, 0.1: CLASSES + 1}


REFUSED = {
    "backbone.patch=2": ["backbone.patch=2"],
    "backbone.pyramid=true": ["backbone.pyramid=true"],
    "backbone.attend_once=true": ["backbone.attend_once=true"],
    "backbone.multipliers=[2, 2]": ["backbone.multipliers=[2,2]"],
    "backbone.stage.skip_scale=0.5": ["backbone.stage.skip_scale=0.5"],
    "backbone.stage.qk_norm=true": ["backbone.stage.qk_norm=true"],
    "backbone.stage.heads=2": ["backbone.stage.heads=2", "backbone.stage.head_channels=null"],
    "backbone/resample": ["backbone/resample=fir"],
    "backbone/embedding": ["backbone.embedding.frequencies=8"],
    "backbone.registers=1": [*OURS, "backbone.registers=1"],
    "backbone.positions=rotary": [*OURS, "backbone.positions=rotary"],
    "this backbone.block": [*OURS, "backbone/block=adaln"],
    "this conditioning": [*OURS, "conditioning=none"],
    "DiffusersDiT": ["backbone=diffusers_dit", "backbone.width=16", "backbone.heads=2"],
    "MLP": ["backbone=mlp"],
    "VarianceExploding": ["schedule=edm", "objective=edm"],
    "SubVP": ["schedule=sub_vp", V],
    "Shifted": ["schedule=shifted"],
    "DDPMLinear": ["schedule=ddpm_linear", "schedule.steps=100", "objective=ddpm"],
    "objective/prediction=flow": ["schedule=ddpm_linear"],
    "objective/prediction=v": [V],
    "denoiser.noise_label=data_time": ["denoiser.noise_label=data_time"],
    "denoiser.noise_label=log_sigma": ["denoiser.noise_label=log_sigma", "schedule=cosine", V],
    "denoiser.self_conditioning=true": ["denoiser.self_conditioning=true"],
    "denoiser.input_std=0.5": ["denoiser.input_std=0.5"],
    "augmentation=non_leaky": ["augmentation=non_leaky", "schedule=ddpm_linear", "objective=ddpm"],
    "objective/loss": ["objective/loss=shortcut"],
    "this objective/loss": ["objective/loss=consistency"],  # its answer is no mean
}


@pytest.mark.parametrize("named", REFUSED)
def test_what_has_no_counterpart_is_named(named):
    cfg = assembled(*UNET, *REFUSED[named])
    model = build_model(cfg, SHAPE, Classes.numbered(CLASSES))
    with refused(named, "format=diffusers"):
        convert(model, cfg, CLASSES)


def test_parts_from_outside_that_answer_otherwise_are_refused():
    cfg = assembled(*UNET)
    model = randomised(cfg)
    model.denoiser.backbone.up[0].stages[0].register_forward_hook(lambda *args: args[-1] + 1)
    with refused("UNet", "format=diffusers"):
        convert(model, cfg, CLASSES)


TRAINED = [
    "data.source._target_=helpers.tiny_data.TinyData",
    "data.validation_size=20",
    "trainer.accelerator=cpu",
    "+debug=fast",
    "callbacks.sample_grid=null",
    *UNET,
    "backbone.norm.groups=null",  # so that config.json cannot say all
]


def draw_by_its_command(lab, run, card):
    """Draws four samples, uint8 (4, C, H, W), by the command that a card names."""
    command = re.search("`diffusion-lab (sample .*)`", card)[1].replace("RUN", str(run)).split()
    result = lab.result(*command, "seed=3", "num_samples=4", "save=npz")
    with np.load(result["array"]) as arrays:
        return arrays["images"].transpose(0, 3, 1, 2)


@pytest.mark.long
def test_a_trained_run_is_exported_with_a_card(lab, refusal, tmp_path, trained_once):
    run = trained_once("train", *TRAINED, "run_dir=run", "logger=none") / "run"
    export = ["export", f"run={run}", "format=diffusers"]
    result = lab.result(*export, "output=models/mine")
    assert result["step"] == "4"
    folder = tmp_path / "models/mine"
    assert {path.name for path in folder.iterdir()} == {
        "unet",
        "scheduler",
        "sample.py",
        "README.md",
    }
    assert [path.name for path in folder.parent.iterdir()] == ["mine"]
    _, model = runs.load(run)
    own = model.denoiser.backbone.entry.weight
    assert torch.equal(loop_in(folder).model.conv_in.weight, own)
    card, summary = ((folder / "README.md").read_text(), summary_of(run))
    fid = next(value for name, value in summary["metrics"].items() if name.startswith("fid/"))
    real = next(value for name, value in summary["metrics"].items() if name.startswith("fid_real/"))
    assert_names(card, f"{fid:.4g}", f"{real:.4g}", "num_samples", "TinyData", "UNet2DModel", "32")
    assert_names(card, "from sample import model, scheduler")
    drawn = draw_by_its_command(lab, run, card)
    noise = SampleNoise(3, range(4))(SHAPE)
    theirs = loop_in(folder).sample(noise, torch.arange(4)).clamp(-1, 1)
    assert ((theirs + 1) * 127.5 - torch.from_numpy(drawn)).abs().max() < 0.51
    for part in ("mine", "mine/unet"):  # sample.py has what its config.json has not
        said = refusal("import", f"models/{part}", "kind=diffusers", "output=back", "data=absent")
        assert f"models/{part}" in said
    lab.done(*export, "output=raw", "average=trained")
    raw = (tmp_path / "raw/README.md").read_text()
    assert f"{fid:.4g}" not in raw.split()  # its digits may be those of a checksum
    lab.done("export", f"run={run}", "average=trained", "output=shared")
    own = lab.result("evaluate", "run=shared", "device=cpu")
    lab.done("export", "run=shared", "format=diffusers", "output=again")
    fid = next(value for name, value in own.items() if name.startswith("fid/"))
    assert f"{fid:.4g}" in (tmp_path / "again/README.md").read_text()


@pytest.mark.slow
def test_figures_are_those_of_the_exported_step(lab, tmp_path, trained_once):
    kept = ["callbacks.checkpoint.keep_every_n_steps=2", "logger=none", "run_dir=run"]
    run = trained_once("train", *TRAINED, *kept) / "run"
    for step, figures in ((2, 0), (4, 1)):
        chosen = [f"step={step}", f"output=at_{step}"]
        lab.done("export", f"run={run}", "format=diffusers", *chosen)
        card = (tmp_path / f"at_{step}/README.md").read_text()
        assert card.count("num_samples") == figures
        assert f"| weights: step | {step} |" in card


def test_a_full_disk_leaves_nothing(refusal, tmp_path, finished_run, small_files):
    export = ["export", f"run={finished_run}", "format=diffusers", "output=models/mine"]
    assert_names(refusal(*export), "output=models/mine")
    assert list((tmp_path / "models").iterdir()) == []


def test_without_diffusers_the_extra_is_named(refusal, tmp_path, finished_run, monkeypatch):
    monkeypatch.setitem(sys.modules, "diffusers", None)
    sentence = refusal("export", f"run={finished_run}", "format=diffusers", "output=mine")
    assert_names(sentence, "diffusion-lab[diffusers]")
    assert not (tmp_path / "mine").exists()
