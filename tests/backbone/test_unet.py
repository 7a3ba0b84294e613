"""The U-Nets: their sizes, their blocks, their resampling and the effect of each option."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.paths import CONF
from hydra import compose, initialize_config_dir
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
from diffusion_lab.backbone.resample import (
    BlockResampling,
    ConvResampling,
    FilterDouble,
    FilterHalve,
    FilterResampling,
    Unconditioned,
    Upsample,
)
from diffusion_lab.backbone.stage import PixelAttention, PixelResidual, Stage, check_embeddings
from diffusion_lab.common.labels import Classes
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.objective import Flow, Objective, UniformTime
from diffusion_lab.diffusion.objective.loss import Denoising
from diffusion_lab.diffusion.schedule import Rectified

RESAMPLING = {"conv": ConvResampling, "block": BlockResampling, "fir": FilterResampling}


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
    with initialize_config_dir(str(CONF), version_base="1.3"):
        changes = [f"backbone.{key}={value}" for key, value in overrides.items()]
        cfg = compose(overrides=[f"+backbone={name}", *changes])
    backbone = with_bandwidths(cfg, "log_sigma").backbone
    return instantiate(backbone)(shape[0], outputs, shape[1:])


def randomised(network: nn.Module, std: float = 0.1) -> nn.Module:
    """Replaces initial zeros by random numbers."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return network


def size(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def attentions(network: nn.Module) -> list[PixelAttention]:
    return [module for module in network.modules() if isinstance(module, PixelAttention)]


def conditions(width: int, batch: int = 2) -> Condition:
    generator = torch.Generator().manual_seed(1)
    vector = torch.randn(batch, width, generator=generator)
    return Condition(vector, torch.randn(batch, 3, width, generator=generator))


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
    seen = []
    for block in attentions(network):
        block.register_forward_hook(lambda _, args, __: seen.append(args[0].shape[-1]))
    network(torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    assert seen == sizes
    if once:
        attend = [stage.attention is not None for level in network.up for stage in level.stages]
        assert attend == [False, False, True, False, False, False, False, False, True]


def test_a_residual_block_starts_as_nothing_but_its_skip():
    block = next(m for m in small().modules() if isinstance(m, PixelResidual))
    x = torch.randn(2, 16, 8, 8)
    assert torch.equal(block(x, torch.randn(2, 64)), x)


def test_attention_starts_as_nothing_added():
    block = next(m for m in small().modules() if isinstance(m, PixelAttention))
    x = torch.randn(2, 32, 8, 8)
    assert torch.equal(block(x), x)


def test_upsampling_repeats_pixels_before_it_convolves():
    up = Upsample(2)
    with torch.no_grad():
        up.weight.zero_()
        up.weight[[0, 1], [0, 1], 1, 1] = 1  # makes the convolution the identity
    x = torch.randn(1, 2, 3, 4)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    torch.testing.assert_close(up(x), expected + up.bias[:, None, None])


@pytest.mark.parametrize(
    ("resample", "halve", "double"),
    [
        (BlockResampling(), nn.AvgPool2d, nn.Upsample),
        (FilterResampling(), FilterHalve, FilterDouble),
    ],
)
def test_stages_resample_as_they_are_told(resample, halve, double):
    network = small(resample=resample)
    down = [type(stage.residual.resample) for stage in network.down]
    up = [type(level.upsample.residual.resample) for level in network.up if level.upsample]
    assert [kind for kind in down if kind is not nn.Identity] == [halve] * 2
    assert up == [double] * 2
    assert not any(isinstance(module, Unconditioned) for module in network.modules())


def test_block_resampling_averages_and_repeats_pixels():
    x = torch.randn(1, 2, 4, 6)
    rows = (x[:, :, ::2] + x[:, :, 1::2]) / 2
    expected = (rows[..., ::2] + rows[..., 1::2]) / 2
    torch.testing.assert_close(BlockResampling.halving()(x), expected)
    expected = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
    assert torch.equal(BlockResampling.doubling()(x), expected)


def test_the_filter_is_1_3_3_1_along_both_sides():
    def along(length: int) -> torch.Tensor:
        """Returns the filter at every second pixel as a matrix (length / 2, length)."""
        matrix = torch.zeros(length // 2, length + 2)  # a pixel of padding at both ends
        for row in range(length // 2):
            matrix[row, 2 * row : 2 * row + 4] = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 8
        return matrix[:, 1:-1]

    x = torch.randn(2, 3, 8, 12)
    torch.testing.assert_close(FilterHalve()(x), along(8) @ x @ along(12).T)
    torch.testing.assert_close(FilterDouble()(x), 4 * along(16).T @ x @ along(24))


def test_the_filter_keeps_a_constant_and_spreads_a_point():
    constant = torch.full((1, 2, 8, 8), 3.0)
    for resample in (FilterHalve(), FilterDouble()):
        inner = resample(constant)[..., 1:-1, 1:-1]  # beyond the border there are zeros
        torch.testing.assert_close(inner, torch.full_like(inner, 3.0))
    point = torch.zeros(1, 1, 5, 5)
    point[..., 2, 2] = 1
    taps = torch.tensor([1.0, 3.0, 3.0, 1.0]) / 4
    torch.testing.assert_close(FilterDouble()(point)[0, 0, 3:7, 3:7], torch.outer(taps, taps))
    assert FilterDouble()(point).count_nonzero() == 16


@pytest.mark.parametrize("project", [False, True])
@pytest.mark.parametrize("choice", ["halving", "doubling"])
@pytest.mark.parametrize("resampling", [BlockResampling, FilterResampling])
def test_a_residual_block_resamples_both_branches(resampling, choice, project):
    resample = getattr(resampling, choice)()
    block = randomised(PixelResidual(16, 16, 8, 0.0, resample=resample, project=project))
    x, embedding = torch.randn(2, 16, 8, 8), torch.randn(2, 8)
    h = block.conv1(
        resample(F.silu(F.group_norm(x, 4, block.norm1.weight, block.norm1.bias, 1e-6)))
    )
    h = block.conv2(block.norm2(h + block.embedding(embedding)[:, :, None, None]))
    skip = resample(x)
    if project:
        skip = F.conv2d(skip, block.skip.weight, block.skip.bias)
    torch.testing.assert_close(block(x, embedding), skip + h)


def test_the_embedding_scales_and_shifts_the_second_norm():
    block = randomised(PixelResidual(16, 32, 8, 0.0, scale_shift=True))
    x, embedding = torch.randn(2, 16, 8, 8), torch.randn(2, 8)
    scale, shift = (embedding @ block.embedding.weight.T + block.embedding.bias).split(32, dim=1)
    h = F.group_norm(block.conv1(block.norm1(x)), 8, block.norm2.weight, block.norm2.bias, 1e-6)
    h = F.silu(h * (1 + scale[:, :, None, None]) + shift[:, :, None, None])
    torch.testing.assert_close(block(x, embedding), block.skip(x) + block.conv2(h))


@pytest.mark.parametrize(
    ("build", "extra"),
    [
        (partial(PixelResidual, 16, 32, 8, 0.0), torch.randn(2, 8)),
        (partial(PixelAttention, 16, 8), None),
        (partial(PixelAttention, 16, 8, context_width=12), torch.randn(2, 3, 12)),
    ],
    ids=["residual", "attention", "cross"],
)
def test_the_skip_scale_multiplies_the_output_of_a_block(build, extra):
    plain, halved = randomised(build()), randomised(build(skip_scale=0.5))
    inputs = [torch.randn(2, 16, 8, 8), *([] if extra is None else [extra])]
    assert torch.equal(halved(*inputs), 0.5 * plain(*inputs))


def test_a_unet_gives_its_skip_scale_to_all_its_blocks():
    network = small(skip_scale=0.5, resample=BlockResampling(), cross_attention=True)
    scales = [module.skip_scale for module in network.modules() if hasattr(module, "skip_scale")]
    assert set(scales) == {0.5}
    assert len(scales) == 3 + 2 + 6 + 4 + 8  # residual: down, middle, up, resampling; attention


def test_cross_attention_without_tokens_to_choose_from_is_refused():
    with pytest.raises(ValueError, match="condition_first=false"):
        small(cross_attention=True, embedding=partial(UNetEmbedding, condition_first=True))


@pytest.mark.parametrize("scale_shift", [False, True])
def test_a_norm_that_takes_an_added_embedding_away_is_not_trained(scale_shift):
    network = small(norm=partial(GroupNorm, groups=16, least=1), scale_shift=scale_shift)
    if scale_shift:
        check_embeddings(network)
        return
    with pytest.raises(ValueError, match="scale_shift=true"):
        check_embeddings(network)
    denoiser = Denoiser(
        lambda **_: network, ClassLabel, Flow(), (1, 16, 16), labels=Classes.numbered(3)
    )
    objective = Objective(Rectified(), Flow(), UniformTime(), Denoising())
    with pytest.raises(ValueError, match="scale_shift=true"):
        check_network(denoiser, objective)


def test_normalised_queries_and_keys_of_a_unet_do_not_depend_on_their_scale():
    network = randomised(small(qk_norm=True))
    attention = [module for module in network.modules() if isinstance(module, PixelAttention)]
    inputs = torch.randn(2, 1, 16, 16), torch.zeros(2), Condition()
    before = network(*inputs)
    with torch.no_grad():
        for module in attention:
            module.attention.qkv.weight[: 2 * module.attention.out.in_features] *= 50
            module.attention.qkv.bias[: 2 * module.attention.out.in_features] *= 50
    assert len(attention) == 4
    torch.testing.assert_close(network(*inputs), before, rtol=1e-3, atol=1e-3)


def test_cross_attention_is_softmax_over_the_tokens():
    block = randomised(PixelAttention(16, 8, context_width=12))
    x, tokens = torch.randn(1, 16, 2, 3), torch.randn(1, 5, 12)
    module = block.attention
    pixels = block.norm(x).flatten(2).mT  # (1, 6, 16)
    heads = []
    for q, k, v in zip(
        module.q(pixels).split(8, 2),
        module.kv(tokens)[..., :16].split(8, 2),
        module.kv(tokens)[..., 16:].split(8, 2),
        strict=True,
    ):
        heads.append((q @ k.mT / 8**0.5).softmax(2) @ v)
    expected = x + module.out(torch.cat(heads, 2)).mT.unflatten(2, (2, 3))
    torch.testing.assert_close(block(x, tokens), expected)


def test_cross_attention_hears_every_token_and_starts_as_nothing():
    network = small(cross_attention=True)
    condition = conditions(network.condition_width)
    noise = torch.zeros(2)
    x = torch.randn(2, 1, 28, 28)
    nn.init.normal_(network.out.weight, std=0.1)
    before = network(x, noise, condition)
    assert torch.equal(before, network(x, noise, Condition(condition.vector)))
    randomised(network)
    before = network(x, noise, condition)
    for token in range(3):
        tokens = condition.tokens.clone()
        tokens[0, token] += 1
        after = network(x, noise, Condition(condition.vector, tokens))
        assert (after - before)[0].abs().mean() > 1e-3
        torch.testing.assert_close(after[1], before[1])


def test_cross_attention_looks_at_the_noise_level_and_then_the_tokens():
    network = small(cross_attention=True)
    condition, noise = conditions(network.condition_width), torch.tensor([3.0, 700.0])
    seen = []
    for layer in (
        m for m in network.modules() if isinstance(getattr(m, "attention", None), CrossAttention)
    ):
        layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[1]))
    network(torch.randn(2, 1, 28, 28), noise, condition)
    network(torch.randn(2, 1, 28, 28), noise, Condition())
    embedded = network.noise(noise)[:, None]
    for context in seen[: len(seen) // 2]:
        torch.testing.assert_close(context, torch.cat([embedded, condition.tokens], dim=1))
    for context in seen[len(seen) // 2 :]:
        torch.testing.assert_close(context, embedded)


@pytest.mark.parametrize(
    ("settings", "heads"),
    [
        ({"head_channels": None}, [1, 1]),
        ({"head_channels": None, "heads": 2}, [2, 2]),
        ({"head_channels": 16, "heads": 2}, [1, 2]),
    ],
)
def test_heads_are_given_by_their_number_or_by_their_channels(settings, heads):
    network = small(multipliers=[1, 2], attention=[0, 1], attend_once=True, **settings)
    found = {m.attention.out.in_features: m.attention.heads for m in attentions(network)}
    assert found == dict(zip([16, 32], heads, strict=True))


def test_the_condition_is_added_before_or_after_the_mlp_of_the_embedding():
    condition, noise = conditions(16), torch.tensor([3.0, 700.0])
    network = randomised(small(embedding=partial(UNetEmbedding, condition_first=True)))
    seen = []
    network.down[0].register_forward_hook(lambda _, inputs, __: seen.append(inputs[1:]))
    network(torch.randn(2, 1, 28, 28), noise, condition)
    first, _, second = network.noise
    expected = second(F.silu(first(network.noise.waves(noise) + condition.vector)))
    torch.testing.assert_close(seen[0][0], F.silu(expected))
    torch.testing.assert_close(seen[0][1], expected[:, None])
    assert network.condition_width == 16


def test_a_pyramid_adds_the_halved_image_at_each_level():
    network = randomised(small(pyramid=True, image_size=(16, 16)))
    seen = {}

    def see(name: str, _, inputs: tuple, output: torch.Tensor) -> None:
        seen[name] = inputs[0], output

    parts = [*network.pyramid.items(), *((f"down {i}", m) for i, m in enumerate(network.down))]
    for name, part in parts:
        part.register_forward_hook(partial(see, name))
    x = torch.randn(2, 1, 16, 16)
    network(x, torch.zeros(2), Condition())
    assert [*network.pyramid] == ["1", "3"]
    assert torch.equal(seen["1"][0], x)
    joined = (seen["down 1"][1] + seen["1"][1]) * 0.5**0.5
    torch.testing.assert_close(seen["down 2"][0], joined)
    torch.testing.assert_close(seen["3"][0], joined)  # it is halved again a level further down
    assert seen["3"][1].shape[2:] == (4, 4)


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
    network = small(dropout=0.5)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    call = partial(network, torch.randn(1, 1, 28, 28), torch.zeros(1), Condition())
    assert not torch.equal(call(), call())
    network.eval()
    assert torch.equal(call(), call())


def test_a_rectangular_image_in_patches():
    network = small(image_size=(24, 16), multipliers=[1, 2], patch=4)
    assert network.entry.in_channels == 16
    assert network(torch.randn(2, 1, 24, 16), torch.zeros(2), Condition()).shape == (2, 1, 24, 16)
