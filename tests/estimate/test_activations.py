"""A forward pass on "meta" keeps the bytes that a real one keeps, in the types of a GPU."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.compositions import composed
from helpers.held_bytes import saved_bytes
from helpers.pairs import each_once
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from diffusion_lab.assembly.costs import ImageFacts, counted
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone.base import layers_of
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.estimate.run_cost import GPUTypes, activations, kept_bytes

SHAPE, CLASSES = (1, 8, 8), 4
FACTS = ImageFacts(SHAPE, Classes.numbered(CLASSES))
SMALL = {
    "dit": ["width=32", "heads=2", "depth=3", "patch=2"],
    "mamba": ["width=32", "depth=2"],
    "mamba2": ["width=32", "depth=2"],
    "unet": ["channels=16", "multipliers=[1,2]", "attention=[1]", "stage.head_channels=8"],
    "mlp": ["width=32", "depth=2"],
}
PAIRS = torch.randn(4, 4, device="meta"), torch.randn(4, 4, device="meta")
LEARNED = ["schedule=ddpm_linear", "objective=improved_ddpm", "sampler=ddpm"]


def config(backbone: str, *overrides: str):
    sizes = [f"backbone.{each}" for each in SMALL[backbone]]
    return composed("train", "name=x", f"backbone={backbone}", *sizes, *overrides)


def model_on(device: str, backbone: str, *overrides: str):
    return build_model(config(backbone, *overrides), *FACTS, device)


def loss_of(model) -> torch.Tensor:
    """The loss of four images."""
    x0, labels = torch.randn(4, *SHAPE), torch.zeros(4, dtype=torch.int64)
    return model.objective(model.denoiser, x0, Given(labels)).minimised


def assert_kept_as_planned(backbone: str, *overrides: str) -> None:
    planned = kept_bytes(model_on("meta", backbone, *overrides), 4, "32-true").all
    model = model_on("cpu", backbone, *overrides)
    parameters = [*model.denoiser.parameters(), *model.objective.parameters()]
    really = saved_bytes(lambda: loss_of(model).mean(), parameters)
    assert planned == pytest.approx(really, rel=0.1)


MODELS = {name: (name, []) for name in SMALL} | {
    "learned variance": ("dit", LEARNED),
    "window": ("dit", ["backbone.window=1", "backbone.qk_norm=true", "denoiser.clip=1"]),
    "shortcut": ("unet", ["objective=shortcut"]),
    "uncertainty": ("mlp", ["objective/loss/uncertainty=learned"]),
    "ect": ("dit", ["objective=ect", "schedule=edm"]),
}


@pytest.mark.long
@pytest.mark.parametrize(("model", "again"), each_once(MODELS, {"kept": False, "again": True}))
def test_a_real_forward_pass_keeps_what_was_planned(model, again):
    backbone, overrides = model
    overrides = [*overrides, f"activation_checkpointing={again}"]
    assert_kept_as_planned(backbone, *overrides)


@pytest.mark.long
def test_a_forward_mode_derivative_keeps_what_was_planned():
    assert_kept_as_planned("unet", "objective=mean_flow")


def tracked(backbone: str, *overrides: str) -> int:
    """The activations that PyTorch's MemTracker finds at the end of a forward pass."""
    model = model_on("cpu", backbone, *overrides)
    tracker = MemTracker()
    tracker.track_external(model.denoiser)
    with tracker:
        losses = loss_of(model)
        (held,) = tracker.get_tracker_snapshot().values()
    assert losses.requires_grad
    return next(size for kind, size in held.items() if "act" in str(kind).lower())


@pytest.mark.long
def test_pytorchs_tracker_agrees_and_has_no_forward_mode_which_ours_has():
    planned = kept_bytes(model_on("meta", "dit"), 4, "32-true").all
    assert planned == pytest.approx(tracked("dit"), rel=0.02)
    with pytest.raises(NotImplementedError):
        tracked("unet", "objective=mean_flow")


@pytest.mark.skipif(torch.backends.cuda.is_built(), reason="of a build without CUDA")
def test_pytorchs_fake_tensors_on_a_gpu_need_a_build_for_it():
    with FakeTensorMode(), pytest.raises(RuntimeError, match="not linked with support for cuda"):
        torch.nn.Linear(4, 4, device="cuda")


@pytest.mark.long
@pytest.mark.parametrize(
    ("overrides", "passes"),
    [
        ([], 3),
        (["objective=mean_flow"], 4),  # the derivative is a pass more
        (["objective=mean_flow", "objective.loss.guidance=2"], 5),
        (["objective=improved_mean_flow"], 5),
        (["objective=improved_mean_flow", "objective.loss.guidance=8"], 6),
        (["objective=alpha_flow"], 4),
        (["objective=shortcut"], 3 + 2 / 4),  # two half jumps for a quarter of the images
        (["objective=ect", "schedule=edm"], 4),
        (["objective=scm", "schedule=cosine"], 4),
    ],
)
def test_passes_are_those_that_a_loss_asks_for(overrides, passes):
    cfg = config("dit", "backbone.depth=1", *overrides)
    assert counted(cfg, FACTS).passes == pytest.approx(passes)
    model, asked = build_model(cfg, *FACTS, "meta"), []
    model.denoiser.backbone.register_forward_pre_hook(
        lambda _, inputs: asked.append(len(inputs[0]) * (1 + 2 * torch.is_grad_enabled()))
    )
    kept_bytes(model, 4, "32-true")
    assert sum(asked) / 4 + model.objective.loss.forward_mode == pytest.approx(passes)


@pytest.mark.long
def test_activations_grow_with_the_images_and_checkpointing_adds_one_layer():
    cfg, recomputed = (config("dit", f"activation_checkpointing={each}") for each in (False, True))
    whole, less = (activations(each, FACTS, "32-true") for each in (cfg, recomputed))
    plain, again = (build_model(each, *FACTS, "meta") for each in (cfg, recomputed))
    assert [whole.of(n) for n in (3, 7)] == [kept_bytes(plain, n, "32-true").all for n in (3, 7)]
    inside = kept_bytes(plain, 6, "32-true").layers
    assert len(inside) == len(layers_of(plain.denoiser.backbone)) == 3
    inputs = kept_bytes(again, 6, "32-true").all
    assert less.of(6) == inputs + max(inside)
    # a layer's input is counted twice
    assert sum(inside) < whole.of(6) < inputs + sum(inside)
    assert less.of(6) < whole.of(6)


def test_attention_keeps_no_scores():
    q = torch.randn(1, 2, 1000, 8, device="meta", requires_grad=True)
    scores = 4 * 2 * 1000**2
    attend = partial(F.scaled_dot_product_attention, q, q, q)
    assert saved_bytes(attend, []) > scores
    with GPUTypes():
        assert saved_bytes(attend, []) < scores / 20


def test_parameters_are_cast_once_and_kept():
    model = model_on("meta", "mlp")
    kept = kept_bytes(model, 3, "bf16-mixed")
    matrices = [each for each in model.denoiser.modules() if isinstance(each, torch.nn.Linear)]
    assert kept.casts == 2 * sum(p.numel() for each in matrices for p in each.parameters())
    assert kept_bytes(model, 3, "32-true").casts == 0
    assert kept.all < kept_bytes(model, 3, "32-true").all + kept.casts


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (F.linear, torch.bfloat16),
        (torch.matmul, torch.bfloat16),
        (lambda a, b: a @ b, torch.bfloat16),
        (lambda a, b: torch.einsum("ij,jk->ik", a, b), torch.bfloat16),
        (lambda a, b: F.conv2d(a[None, None], b[None, None]), torch.bfloat16),
        (lambda a, b: F.scaled_dot_product_attention(*[a[None, None]] * 3), torch.bfloat16),
        (lambda a, b: F.layer_norm(a.bfloat16(), (4,)), torch.float32),
        (lambda a, b: F.group_norm(a.bfloat16(), 2), torch.float32),
        (lambda a, b: a.bfloat16().softmax(1), torch.float32),
        (lambda a, b: a.bfloat16().exp(), torch.float32),
        (lambda a, b: a.bfloat16() ** 2, torch.float32),
        (lambda a, b: F.softplus(a.bfloat16()), torch.float32),
        (lambda a, b: F.silu(a.bfloat16()), torch.bfloat16),
        (lambda a, b: a + b.bfloat16(), torch.float32),
        (lambda a, b: a.double() @ b.double(), torch.float64),
    ],
)
def test_types_are_those_of_autocast_on_a_gpu(operation, dtype):
    with GPUTypes():
        with torch.autocast("cpu", torch.bfloat16):
            assert operation(*PAIRS).dtype == dtype
        assert F.linear(*PAIRS).dtype == torch.float32
