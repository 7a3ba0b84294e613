"""Representation alignment: its formula, what it trains, and its runs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.compositions import assembled
from helpers.refusals import refused
from helpers.small_networks import small_dit
from helpers.tiny_runs import QUICK, curve, tiny_first_stage
from hydra.utils import instantiate

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone import AdaLNZero, ClassLabel, InContext
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective.prediction import Flow
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.families.diffusion.task import flatters
from diffusion_lab.metrics.extractor import EfficientNetLite0
from diffusion_lab.training.alignment import Alignment, Dispersive, chosen_layer

REPA = [*QUICK, "backbone.depth=3", "alignment=efficientnet_lite0", "alignment.width=16"]


class Corners:
    """Features by place of the frozen network: the image's means in 2 x 2 cells, and ones."""

    name, map_channels = "corners", 2

    def load(self, device):
        self.device = device

    def feature_map(self, images):
        cells = F.adaptive_avg_pool2d(images, 2)[:, :1]
        return torch.cat([cells, torch.ones_like(cells)], 1)


def denoiser(backbone) -> Denoiser:
    torch.manual_seed(0)
    model = Denoiser(backbone, ClassLabel, Flow(), (1, 8, 8), labels=Classes.numbered(3))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def dit(block=AdaLNZero, **settings):
    return small_dit(block, depth=3, **settings)


def aligned(model: Denoiser, **settings) -> Alignment:
    settings = {"layer": None, "weight": 0.5, "width": 8, "stop_images": None} | settings
    return Alignment(model, Rectified(), Corners(), **settings)


def watched(model: Denoiser, number: int = 1) -> list[torch.Tensor]:
    """The outputs of a layer in later calls."""
    seen = []
    layers_of(model.backbone)[number].register_forward_hook(lambda *found: seen.append(found[-1]))
    return seen


def call(model: Denoiser):
    torch.manual_seed(1)
    x = torch.randn(2, 1, 8, 8)
    return model(x, Rectified()(torch.tensor([0.3, 0.8])), Given(torch.tensor([0, 2]))).output


@pytest.mark.parametrize("registers", [0, 3])
@pytest.mark.parametrize("block", [AdaLNZero, InContext])
def test_similarity_is_the_mean_cosine_of_projected_patches_and_interpolated_features(
    block, registers
):
    model = denoiser(dit(block, registers=registers))
    alignment, seen = aligned(model), watched(model)
    images = torch.rand(2, 1, 8, 8)
    call(model)
    patches = seen[0][:, -16:]
    features = F.interpolate(alignment.extractor.feature_map(images), (4, 4), mode="bilinear")
    total = 0.0
    projected = alignment.projector(patches)
    for image in range(2):
        for row in range(4):
            for column in range(4):
                ours, theirs = projected[image, 4 * row + column], features[image, :, row, column]
                total += ours @ theirs / (ours.norm() * theirs.norm()) / 32
    torch.testing.assert_close(alignment(images), total)


def test_a_convolution_is_aligned_with_features_that_are_centred_over_the_image():
    model = denoiser(dit())
    alignment, seen = aligned(model, projector="convolution", centred=0.5), watched(model)
    images = torch.rand(2, 1, 8, 8)
    call(model)
    features = alignment.extractor.feature_map(images)
    flat = features.flatten(2)
    centred = (flat - 0.5 * flat.mean(2, keepdim=True)) / (flat.std(2, keepdim=True) + 1e-6)
    theirs = F.interpolate(centred.view_as(features), (4, 4), mode="bilinear")
    (kernel,) = alignment.projector
    assert kernel.weight.shape == (2, 16, 3, 3)
    ours = kernel(seen[0].mT.reshape(2, 16, 4, 4))
    torch.testing.assert_close(alignment(images), F.cosine_similarity(ours, theirs, dim=1).mean())
    call(model)
    alignment(None).backward()
    assert not kernel.weight.grad.any()


def test_outputs_that_are_dispersed_repel_one_another():
    model = denoiser(dit())
    settings = {"layer": 1, "weight": 0.5, "temperature": 0.7, "stop_images": 9}
    dispersive, seen = Dispersive(model, Rectified(), **settings), watched(model)
    assert dispersive.extractor is None
    call(model)
    value = dispersive(None if dispersive.active(9) else torch.rand(2, 1, 8, 8))
    total = 0.0
    for one in seen[0]:
        for other in seen[0]:
            total += (-(one - other).square().mean() / 0.7).exp() / 4
    torch.testing.assert_close(dispersive.loss(value), total.log())
    dispersive.loss(value).backward()
    reached = [block.mixer.qkv.weight.grad is not None for block in model.backbone.blocks]
    assert reached == [True, True, False]
    nearer = seen[0] - 0.01 * torch.autograd.grad(spread(seen[0], 0.7), seen[0])[0]
    assert spread(nearer, 0.7) < spread(seen[0], 0.7)
    call(model)
    assert dispersive(None) == 0


def spread(z, temperature):
    distances = (z[:, None] - z[None]).square().flatten(2).mean(2)
    return (-distances / temperature).exp().mean().log()


def test_a_run_is_dispersed_without_another_network(lab, tmp_path):
    lab.done("train", *QUICK, "backbone.depth=3", "alignment=dispersive", "run_dir=run")
    losses, parts, dispersion = (
        curve(tmp_path / "run", f"train/{name}")
        for name in ("loss", "denoising_loss", "dispersion")
    )
    assert len(losses) == 4
    for loss, part, value in zip(losses, parts, dispersion, strict=True):
        assert loss == pytest.approx(part + 0.5 * value, rel=1e-5)


def test_an_image_shaped_layer_is_aligned_pixel_by_pixel():
    settings = ["channels=16", "multipliers=[1,2]", "blocks=1", "attention=[]"]
    cfg = assembled("backbone=unet", *(f"backbone.{each}" for each in settings))
    model = denoiser(instantiate(cfg.backbone))
    alignment, seen = aligned(model, layer=0), watched(model, 0)
    call(model)
    images = torch.rand(2, 1, 8, 8)
    features = F.interpolate(alignment.extractor.feature_map(images), (8, 8), mode="bilinear")
    projected = alignment.projector(seen[0].movedim(1, -1)).movedim(-1, 1)
    expected = F.cosine_similarity(projected, features, dim=1).mean()
    torch.testing.assert_close(alignment(images), expected)


U_NET = ["backbone.channels=16", "backbone.multipliers=[1,2]", "backbone.attention=[1]"]
DIFFUSERS_UNET = [*U_NET, "backbone.norm_groups=4", "backbone.head_channels=8"]
EVERY_LAYER = {  # of each backbone, and the channels of its first and its last layer
    "edm2": ([*U_NET, "backbone.head_channels=16"], 16, 16),
    "mamba2": (["backbone.width=32", "backbone.state_space.head_channels=16"], 32, 32),
    "diffusers_unet": (DIFFUSERS_UNET, 16, 16),
    "diffusers_dit": (["backbone.width=16", "backbone.heads=2"], 16, 16),
}


@pytest.mark.parametrize("name", EVERY_LAYER)
def test_each_layer_of_a_backbone_can_be_aligned(name):
    overrides, first, last = EVERY_LAYER[name]
    cfg = assembled(f"backbone={name}", *overrides)
    model = build_model(cfg, (1, 8, 8), Classes.numbered(3)).denoiser
    layers, widths = layers_of(model.backbone), []
    for number, layer in enumerate(layers):
        alignment = aligned(model, layer=number)
        call(model)
        assert -1 <= alignment(torch.rand(2, 1, 8, 8)) <= 1
        widths.append(alignment.projector[0].in_features)
        layer._forward_hooks.clear()
    assert (widths[0], widths[-1], len(widths)) == (first, last, len(layers))


def test_the_patches_of_a_dit_of_diffusers_are_those_of_its_image():
    dit = ["backbone=diffusers_dit", "backbone.width=16", "backbone.heads=2", "backbone.patch=4"]
    backbone = build_model(assembled(*dit), (1, 16, 16), Classes.numbered(3)).denoiser.backbone
    assert (backbone.rows, backbone.tokens) == (4, 16)


@pytest.mark.parametrize("layer", [0, 1, 2, None])
def test_gradients_reach_the_layers_up_to_the_chosen_one(layer):
    model = denoiser(dit())
    alignment = aligned(model, layer=layer)
    call(model)
    alignment(torch.rand(2, 1, 8, 8)).backward()
    reached = [block.mixer.qkv.weight.grad is not None for block in model.backbone.blocks]
    chosen = 1 if layer is None else layer
    assert reached == [number <= chosen for number in range(3)]
    assert all(parameter.grad is not None for parameter in alignment.parameters())
    assert not any(name.startswith("backbone") for name in alignment.state_dict())


def test_without_images_all_gradients_are_zero():
    model = denoiser(dit())
    alignment = aligned(model)
    call(model)
    nothing = alignment(None)
    assert nothing == 0
    nothing.backward()
    assert not any(parameter.grad.any() for parameter in alignment.parameters())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_calls_without_gradients_are_not_looked_at():
    model = denoiser(dit())
    alignment = aligned(model)
    images = torch.rand(2, 1, 8, 8)
    call(model)
    expected = alignment(images)
    call(model)
    with torch.no_grad():
        model(torch.zeros(5, 1, 8, 8), Rectified()(torch.tensor(0.5)))
    torch.testing.assert_close(alignment(images), expected)


@pytest.mark.long
def test_the_feature_map_is_the_fifth_stage_of_the_network():
    extractor = EfficientNetLite0()
    extractor.load("cpu")
    images = torch.randint(256, (18, 1, 28, 28), dtype=torch.uint8)  # two parts
    found = extractor.feature_map(images / 127.5 - 1)
    assert found.shape == (18, extractor.map_channels, 6, 6)
    pixels = images.expand(-1, 3, -1, -1).float()
    x = F.interpolate(pixels, (96, 96), mode="bilinear", antialias=True) / 127.5 - 1
    network = extractor.network[1].network
    (expected,) = network.forward_intermediates(x, indices=[3], intermediates_only=True)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


NETWORKS = {
    "dit": [each for each in REPA if each.startswith("backbone")],
    "mamba2": ["backbone=mamba2", "backbone.width=32", "backbone.state_space.head_channels=16"],
    "unet": ["backbone=unet_small", "backbone.channels=16", "backbone.attention=[]"],
}
ALIGNED_ALONE = [each for each in REPA if not each.startswith("backbone")]


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_run_becomes_more_similar(lab, tmp_path, name):
    training = ["optimizer.lr=3e-3", "lr_schedule.warmup_images=0", "trainer.max_steps=30"]
    lab.done("train", *ALIGNED_ALONE, *NETWORKS[name], *training, "run_dir=run")
    similarity = curve(tmp_path / "run", "train/alignment")
    assert -0.5 < similarity[0] < 0.5
    assert similarity[-1] > similarity[0] + 0.2
    losses = curve(tmp_path / "run", "train/loss")
    parts = curve(tmp_path / "run", "train/denoising_loss")
    for loss, part, cosine in zip(losses, parts, similarity, strict=True):
        assert loss == pytest.approx(part + 0.5 * (1 - cosine), rel=1e-5)
    lab.done("sample", "run=run", "num_samples=4", "output=grid")


@pytest.mark.long
def test_an_aligned_run_stops_to_be_aligned_and_says_so(lab, refusal, tmp_path, monkeypatch):
    seen = []
    original = EfficientNetLite0.map_of

    def map_of(self, pixels):
        seen.append(pixels)
        return original(self, pixels)

    monkeypatch.setattr(EfficientNetLite0, "map_of", map_of)
    settings = [*REPA, "alignment.stop_images=16", "denoiser.self_conditioning=true"]
    lab.done("train", *settings, "run_dir=whole")
    pixels = torch.cat(seen)  # of the training images
    torch.testing.assert_close(pixels, pixels.round().clamp(0, 255), rtol=0, atol=1e-3)
    assert pixels.min() < 1
    assert pixels.max() > 200
    assert len(curve(tmp_path / "whole", "train/loss")) == 4
    assert len(curve(tmp_path / "whole", "train/alignment")) == 2
    measured = ["metrics.num_samples=8", "metrics.reference_size=16", "sampler.steps=2"]
    said = lab.done("evaluate", "run=whole", *measured, "batch_size=8")
    assert "aligned to features of efficientnet_lite0" in said
    assert "alignment.weight" in refusal("train", "resume=whole", "alignment.weight=1")


@pytest.mark.slow
def test_latents_that_are_not_cached_are_aligned_to_their_images(lab, tmp_path):
    tiny_first_stage(tmp_path / "stage")
    latents = ["first_stage=kl", "first_stage.run=stage", "backbone.patch=1"]
    sentence = lab("train", *REPA, *latents, "run_dir=run")[2]
    assert "first_stage.cache=false" in sentence
    lab.done("train", *REPA, *latents, "first_stage.cache=false", "run_dir=run")
    assert curve(tmp_path / "run", "train/alignment")


@pytest.mark.long
def test_pairs_of_latents_are_not_aligned_to_images(refusal, tmp_path):
    tiny_first_stage(tmp_path / "stage")
    latents = ["first_stage=kl", "first_stage.run=stage", "first_stage.cache=false"]
    pairs = ["objective=reflow", "objective.teacher.run=x", "backbone.patch=1"]
    assert "alignment=none" in refusal("train", *REPA, *latents, *pairs, "run_dir=run")


@pytest.mark.parametrize("network", ["efficientnet_lite0", "classifier"])
def test_who_judges_by_the_same_features_is_told(network):
    metrics = SimpleNamespace(extractor=SimpleNamespace(name=network))
    alignment = SimpleNamespace(extractor=SimpleNamespace(name="efficientnet_lite0"))
    dispersive = SimpleNamespace(extractor=None)
    said = flatters(alignment, metrics)
    assert (said is not None) == (network == "efficientnet_lite0")
    assert flatters(None, metrics) is flatters(alignment, None) is None
    assert flatters(dispersive, metrics) is None


def test_features_without_places_and_a_network_without_layers_are_refused(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Corners, "map_channels", 0)
        with refused("alignment=efficientnet_lite0", by=ValueError):
            aligned(denoiser(dit()))
    with refused("alignment=none", by=ValueError):
        chosen_layer(torch.nn.Linear(1, 1), None)
    for name in ("mlp", "energy"):
        model = build_model(assembled(f"backbone={name}"), (1, 8, 8), Classes.numbered(3)).denoiser
        with refused("alignment=none", type(model.backbone).__name__, by=ValueError):
            aligned(model)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_compiled_network_is_aligned(lab, tmp_path, name):
    for compiled in ("true", "false"):
        chosen = ["trainer.precision=32-true", f"compile={compiled}"]
        run = f"run_dir=compile-{compiled}"
        lab.done("train", *ALIGNED_ALONE, *NETWORKS[name], *chosen, run)
    folders = tmp_path / "compile-true", tmp_path / "compile-false"
    one, other = (curve(folder, "train/alignment") for folder in folders)
    assert one == pytest.approx(other, rel=1e-3)
