"""The U-Nets: their sizes, their blocks, their resampling and the effect of each option."""

import copy
from functools import partial

import pytest
import torch
from helpers.compositions import composed
from helpers.paths import CONF
from helpers.refusals import refused
from helpers.small_networks import inputs_of, randomised
from hydra.utils import instantiate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion_lab.assembly.model import check_network
from diffusion_lab.assembly.objects import with_bandwidths
from diffusion_lab.backbone import UNet
from diffusion_lab.backbone.attention import CrossAttention
from diffusion_lab.backbone.conditioning import ClassLabel, Condition
from diffusion_lab.backbone.embedding import FourierEmbedding, UNetEmbedding
from diffusion_lab.backbone.norm import GroupNorm
from diffusion_lab.backbone.resample import BlockResampling, ConvResampling, FilterResampling
from diffusion_lab.backbone.stage import PixelAttention, PixelResidual, Stage
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective import Flow, Objective, UniformTime
from diffusion_lab.diffusion.objective.loss import Denoising
from diffusion_lab.diffusion.schedule import Rectified


def small(resample=None, attend_once=False, **settings) -> UNet:
    """Makes a small network; `settings` may be those of its stages."""
    sizes = {
        "in_channels": 1,
        "out_channels": 1,
        "image_size": (28, 28),
        "channels": 16,
        "multipliers": [1, 2, 2],
        "blocks": 1,
        "attention": [1],
        "patch": 1,
        "pyramid": False,
        "embedding": UNetEmbedding,
        "norm": GroupNorm,
    }
    own = {key: settings.pop(key) for key in sizes if key in settings}
    stage = partial(Stage, **{"head_channels": 16, **settings})
    resample = resample or ConvResampling()
    return UNet(**sizes | own, attend_once=attend_once, stage=stage, resample=resample)


OPTIONS = {
    "block": {"resample": BlockResampling()},
    "projection": {"resample": BlockResampling(projection=True)},
    "fir": {"resample": FilterResampling()},
    "scale_shift": {"scale_shift": True},
    "skip_scale": {"skip_scale": 0.5},
    "attend_once": {"attend_once": True},
    "cross_attention": {"cross_attention": True},
    "qk_norm": {"qk_norm": True},
    "pyramid": {"pyramid": True},
    "heads": {"head_channels": None, "heads": 2},
    "condition_first": {"embedding": partial(UNetEmbedding, closed=True, condition_first=True)},
    "fourier": {"embedding": partial(FourierEmbedding, frequencies=24, width=40)},
    "norm": {"norm": partial(GroupNorm, groups=8, least=1, eps=1e-5)},
    "everything": {
        "resample": FilterResampling(projection=True),
        "scale_shift": True,
        "skip_scale": 0.5,
        "attend_once": True,
        "cross_attention": True,
        "qk_norm": True,
        "pyramid": True,
        "embedding": FourierEmbedding,
        "norm": partial(GroupNorm, groups=16, least=1),
    },
}


def configured(name: str, shape: tuple[int, int, int], outputs: int, **overrides):
    """Builds the network of a configuration for images of this shape."""
    changes = [f"backbone.{key}={value}" for key, value in overrides.items()]
    cfg = copy.deepcopy(composed(None, f"+backbone={name}", *changes))
    backbone = with_bandwidths(cfg, "log_sigma").backbone
    return instantiate(backbone)(shape[0], outputs, shape[1:])


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def attentions(network: nn.Module) -> list[PixelAttention]:
    return [module for module in network.modules() if isinstance(module, PixelAttention)]


def conditions(width: int, batch: int = 2) -> Condition:
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(batch, width, generator=generator)
    return Condition(vector, torch.randn(batch, 3, width, generator=generator))


@pytest.mark.long
@pytest.mark.parametrize(
    ("name", "parameters", "macs"),
    [
        ("unet_ddpm", 35.7e6, 6.22e9),
        ("unet_ddpmpp", 55.73e6, 21.19e9),
        ("unet_ncsnpp", 56.40e6, 21.40e9),
    ],
)
def test_published_networks_for_cifar_have_their_parameters_and_macs(name, parameters, macs):
    with torch.device("meta"):
        network = configured(name, (3, 32, 32), 3)
        with FlopCounterMode(display=False) as counter:
            network(torch.zeros(1, 3, 32, 32), torch.zeros(1), Condition())
    assert size(network) == pytest.approx(parameters, rel=0.002)
    assert counter.get_total_flops() / 2 == pytest.approx(macs, rel=0.002)


def test_adm_for_imagenet_64_has_its_parameters():
    with torch.device("meta"):
        network = configured("unet_adm", (3, 64, 64), 6)  # twice 3, for a learned variance
        labels = ClassLabel(Classes.numbered(1000), network.condition_width)
    assert size(network) + size(labels) == pytest.approx(296e6, rel=0.002)
    heads = {m.attention.out.in_features // m.attention.heads for m in attentions(network)}
    assert heads == {64}


@pytest.mark.parametrize("name", sorted(path.stem for path in (CONF / "backbone").glob("unet*")))
def test_every_configured_unet_starts_at_zero(name):
    network = configured(name, (1, 16, 16), 1, channels=32, blocks=1, **{"stage.head_channels": 32})
    x, condition = torch.randn(2, 1, 16, 16), conditions(network.condition_width)
    assert torch.equal(network(x, torch.tensor([3.0, 700.0]), condition), torch.zeros_like(x))


@pytest.mark.parametrize(
    ("once", "sizes"),
    [
        # two blocks down and three up at levels 0 and 2, and one in the middle
        (False, [28, 28, 7, 7, 7, 7, 7, 7, 28, 28, 28]),
        (True, [28, 28, 7, 7, 7, 7, 28]),
    ],
)
def test_attention_is_where_it_is_asked_for(once, sizes):
    network = small(attention=[0, 2], blocks=2, attend_once=once)
    seen = inputs_of(*attentions(network))
    network(torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    assert [x.shape[-1] for (x,) in seen] == sizes
    if once:
        attend = [stage.attention is not None for level in network.up for stage in level.stages]
        assert attend == [False, False, True, False, False, False, False, False, True]


def test_residual_blocks_and_attention_start_as_nothing_added():
    modules = list(small().modules())
    block, attention = (
        next(m for m in modules if isinstance(m, kind)) for kind in (PixelResidual, PixelAttention)
    )
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(attention(x), x)
    assert torch.equal(block(x[:, :16], torch.randn(2, 64)), x[:, :16])


def test_a_norm_that_takes_an_added_embedding_away_is_not_trained():
    def check(scale_shift: bool) -> None:
        norm = partial(GroupNorm, groups=16, least=1)
        network = small(norm=norm, scale_shift=scale_shift)
        labels = Classes.numbered(3)
        denoiser = Denoiser(lambda **_: network, ClassLabel, Flow(), (1, 28, 28), labels=labels)
        check_network(denoiser, Objective(Rectified(), Flow(), UniformTime(), Denoising()))

    check(scale_shift=True)
    with refused("scale_shift=true", by=ValueError):
        check(scale_shift=False)


def test_cross_attention_looks_at_the_noise_level_and_then_the_tokens():
    network = small(cross_attention=True)
    condition, noise = conditions(network.condition_width), torch.tensor([3.0, 700.0])
    seen = inputs_of(
        *(m for m in network.modules() if isinstance(getattr(m, "attention", None), CrossAttention))
    )
    embedded = network.noise(noise)[:, None]
    for given, expected in (
        (condition, torch.cat([embedded, condition.tokens], dim=1)),
        (Condition(), embedded),
    ):
        seen.clear()
        network(torch.randn(2, 1, 28, 28), noise, given)
        assert seen
        for _, context in seen:
            torch.testing.assert_close(context, expected)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_parameter_of_every_option_has_a_gradient_after_two_steps(options):
    torch.manual_seed(0)
    network = small(image_size=(8, 8), **options)
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    condition = conditions(network.condition_width)
    x, noise = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    for _ in range(3):
        optimizer.zero_grad()
        (network(x, noise, condition) - 1).square().mean().backward()
        optimizer.step()
    without = [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_option_works_in_bfloat16(options):
    network = randomised(small(image_size=(8, 8), **options)).eval()
    inputs = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 700.0])
    exact = network(*inputs, conditions(network.condition_width))
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(*inputs, conditions(network.condition_width))
    assert (rounded.float() - exact).norm() < 0.02 * exact.norm()


def test_dropout_is_for_training_only():
    network = randomised(small(dropout=0.5))
    call = partial(network, torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    assert not torch.equal(call(), call())
    network.eval()
    assert torch.equal(call(), call())


def test_a_rectangular_image_in_patches():
    network = small(image_size=(24, 16), multipliers=[1, 2], patch=4)
    assert network.entry.in_channels == 16
    assert network(torch.randn(2, 1, 24, 16), torch.zeros(2), Condition()).shape == (2, 1, 24, 16)
