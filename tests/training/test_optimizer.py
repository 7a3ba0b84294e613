"""Optimisers: Muon's update, what it trains, weight decay, rates by name, and exact resume."""

from copy import deepcopy

import pytest
import torch
import torch.distributed as dist
from helpers.compositions import composed
from helpers.pages import PAGES, blocks_of
from helpers.pairs import first_fast
from helpers.tiny_runs import (
    ADVERSARIAL,
    FAST,
    QUICK,
    TINY_AUTOENCODER,
    checkpoint_of,
    killed_after_two_steps,
    require_equal_training,
    same,
)
from lightning.fabric.plugins.precision.amp import _optimizer_handles_unscaling
from timm.optim.muon import muon as timm_muon
from torch import nn
from torch.distributed.fsdp import fully_shard

from diffusion_lab.assembly.parameter_groups import (
    GroupSettings,
    OptimizerFactory,
    for_training,
    matrices,
)
from diffusion_lab.compute.sharding import shared_as, whole
from diffusion_lab.training import optimizer
from diffusion_lab.training.module import unfuse
from diffusion_lab.training.optimizer import Muon
from diffusion_lab.training.task import build_task

NEWTON_SCHULZ = ["ns_steps", "ns_coefficients", "eps", "safety_factor", "adjust_lr_fn"]
NEWTON_SCHULZ += ["conv_mode", "normalize_spatial", "scale_eps"]
SETTINGS = {
    "lr": 0.1,
    "vector_lr": 0.01,
    "weight_decay": 0.5,
    "momentum": 0.9,
    "nesterov": True,
    "ns_steps": 5,
    "adjust_lr_fn": "original",
    "betas": (0.9, 0.999),
    "eps": 1e-8,
}


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3)
        self.kernel = nn.Conv2d(4, 6, 3)
        self.depthwise = nn.Conv2d(6, 6, 3, groups=6)
        self.inner = nn.Linear(6, 24)
        self.norm = nn.GroupNorm(2, 24)
        self.table = nn.Embedding(3, 24)


def muon(module: nn.Module, **settings) -> torch.optim.Optimizer:
    def make(parameters):
        return Muon(parameters, **SETTINGS | settings)

    hidden = [module.kernel.weight, module.inner.weight]
    return OptimizerFactory(make)(module, list(module.parameters()), hidden)


def module_of(command: str, *overrides: str):
    return build_task(composed(command, *overrides).copy()).module


@pytest.mark.parametrize(("scale", "factors"), [("original", (1, 2)), ("match_rms_adamw", (1, 1))])
def test_muon_moves_a_matrix_along_the_polar_factor_of_its_momentum(scale, factors):
    torch.manual_seed(0)
    module = Small()
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    optimizer = muon(module, adjust_lr_fn=scale, weight_decay=0.0)
    momentum = {name: torch.zeros_like(p) for name, p in module.named_parameters()}
    for _ in range(2):
        for name, p in module.named_parameters():
            p.grad = torch.randn_like(p)
            before[name] = p.detach().clone()
            momentum[name].lerp_(p.grad, 0.1)
        optimizer.step()
    for name, factor in zip(("kernel.weight", "inner.weight"), factors, strict=True):
        p = module.get_parameter(name)
        looked_ahead = p.grad.lerp(momentum[name], 0.9).double().flatten(1)
        u, _, v = torch.linalg.svd(looked_ahead, full_matrices=False)
        factor *= 1 if scale == "original" else 0.2 * max(looked_ahead.shape) ** 0.5
        moved = (before[name] - p.detach()).double().flatten(1) / (0.1 * factor)
        # five iterations bring singular values to about 0.7 to 1.2, along the same vectors
        sizes = torch.einsum("ij,ik,kj->j", u, moved, v.T)
        assert sizes.min() > 0.6
        assert sizes.max() < 1.3
        off = u.T @ moved @ v.T - sizes.diag()
        assert off.abs().max() < 0.05


@pytest.mark.parametrize("together", [2**22, 36, 1])  # all that are alike, two by two, one by one
@pytest.mark.parametrize("nesterov", [True, False])
def test_matrices_of_one_size_are_moved_as_timm_moves_each_alone(monkeypatch, together, nesterov):
    monkeypatch.setattr(optimizer, "STACKED", together)
    torch.manual_seed(0)
    shapes = [(6, 3), (6, 3), (6, 3), (6, 1, 1, 3), (3, 8)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs, momenta = deepcopy(ours), [torch.zeros(shape) for shape in shapes]
    own = Muon(ours, **SETTINGS | {"nesterov": nesterov})
    known = ["lr", "weight_decay", "momentum", "nesterov", *NEWTON_SCHULZ]
    settings = {key: own.param_groups[0][key] for key in known}
    for _ in range(3):
        grads = [torch.randn(shape) for shape in shapes]
        for parameter, grad in zip(ours, grads, strict=True):
            parameter.grad = grad.clone()
        own.step()
        with torch.no_grad():
            timm_muon(theirs, grads, momenta, **settings)
        for pair in zip(ours, theirs, strict=True):
            torch.testing.assert_close(*pair, rtol=1e-6, atol=1e-6)
        assert all(torch.equal(each.grad, grad) for each, grad in zip(ours, grads, strict=True))


def test_muon_trains_by_adamw_what_is_no_hidden_matrix():
    torch.manual_seed(0)
    module, twin = Small(), Small()
    twin.load_state_dict(module.state_dict())
    optimizer = muon(module, weight_decay=0.0)
    adamw = torch.optim.AdamW(twin.parameters(), lr=0.01, weight_decay=0.0)
    for _ in range(3):
        for p, other in zip(module.parameters(), twin.parameters(), strict=True):
            p.grad = torch.randn_like(p)
            other.grad = p.grad.clone()
        optimizer.step()
        adamw.step()
    others = dict(twin.named_parameters())
    for name, p in module.named_parameters():
        alike = torch.allclose(p, others[name], atol=1e-6)
        assert alike == (name not in ("kernel.weight", "inner.weight")), name


def test_a_gpu_skips_a_step_of_muon_bit_for_bit():
    modules = []
    for bad in (False, True):
        torch.manual_seed(0)
        module = Small()
        optimizer = muon(module)
        for step in range(3):
            spoilt = bad and step == 1  # a step more than the other module
            optimizer.found_inf = torch.tensor(float(spoilt)) if bad else None
            for p in () if step == 1 and not bad else module.parameters():
                p.grad = torch.full_like(p, torch.nan) if spoilt else torch.randn_like(p)
            if bad or step != 1:
                optimizer.step()
        modules.append((module, optimizer))
    (one, its), (other, others) = modules
    for ours, theirs in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert same(its.state[ours], others.state[theirs])


def test_the_layout_of_kernels_changes_no_step_of_muon():
    moved = []
    for layout in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        module = Small().to(memory_format=layout)
        optimizer = muon(module)
        for p in module.parameters():
            p.grad = torch.empty_like(p).copy_(torch.randn(p.shape))
        optimizer.step()
        moved.append(module.kernel.weight.detach())
    torch.testing.assert_close(*moved, rtol=1e-6, atol=1e-6)


def by_muon(module: nn.Module, sharded: bool) -> dict[str, torch.Tensor]:
    """The weights after three steps, with gradients that any rank makes alike."""
    torch.manual_seed(0)
    if sharded:
        fully_shard(module)
    optimizer = muon(module)
    for _ in range(3):
        for p in module.parameters():
            p.grad = shared_as(torch.randn(p.shape), p)
        optimizer.step()
    assert all((p.grad is None) == sharded for p in optimizer.param_groups[0]["params"])
    return {name: whole(p.detach()) for name, p in module.named_parameters()}


def compare_on_rank(rank: int, world: int, module: nn.Module, folder: str) -> None:
    """Raises an error unless sharded weights are those of one process, to the last bits."""
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    torch.testing.assert_close(
        by_muon(deepcopy(module), sharded=True), by_muon(module, sharded=False), rtol=0, atol=1e-7
    )
    dist.destroy_process_group()


@pytest.mark.long
@pytest.mark.parametrize("world", first_fast([2, 4]))
def test_sharded_matrices_move_as_whole_ones_do(tmp_path, world):
    module = Small()  # with fewer rows than ranks, too
    arguments = (world, module, str(tmp_path))
    torch.multiprocessing.start_processes(
        compare_on_rank, arguments, nprocs=world, start_method="fork"
    )


@pytest.mark.parametrize("make", [muon, None])
def test_weight_decay_shrinks_matrices_and_kernels_alone(make):
    module = Small()
    if make:
        optimizer = make(module, lr=0.1, vector_lr=0.1)
    else:
        factory = OptimizerFactory(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.5))
        optimizer = factory(module, list(module.parameters()), [])
    nn.init.ones_(module.norm.bias)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for p in module.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    decayed = {"first.weight", "kernel.weight", "inner.weight"}
    for name, p in module.named_parameters():
        expected = before[name] * (0.95 if name in decayed else 1)
        torch.testing.assert_close(p.detach(), expected, msg=name)


def test_rates_and_decay_by_name_reach_the_optimiser():
    module = Small()
    overrides = [GroupSettings("table.*", lr=0.3), GroupSettings("*.bias", weight_decay=0.2)]
    factory = OptimizerFactory(lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.5), overrides)
    optimizer = factory(module, list(module.parameters()), [])
    names = {p: name for name, p in module.named_parameters()}
    found = {}
    for group in optimizer.param_groups:
        found |= {names[p]: (group["lr"], group["weight_decay"]) for p in group["params"]}
    assert found.keys() == set(names.values())
    assert found["table.weight"] == (0.3, 0.0)
    assert found["first.bias"] == found["norm.bias"] == (0.1, 0.2)
    assert found["norm.weight"] == (0.1, 0.0)
    assert found["inner.weight"] == (0.1, 0.5)


def test_without_decay_there_is_one_group_as_in_older_checkpoints():
    module = Small()
    factory = OptimizerFactory(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0))
    (group,) = factory(module, list(module.parameters()), []).param_groups
    assert all(a is b for a, b in zip(group["params"], module.parameters(), strict=True))


DATA = ["data.source._target_=helpers.tiny_data.TinyData", "name=x", "trainer.accelerator=cpu"]
SMALL = ["backbone.width=32", "backbone.depth=2", "backbone.patch=4"]
# the matrices that are not hidden, and how small a network is
ENDS = {
    "unet_small": ({"entry.weight", "out.weight"}, []),
    "dit": ({"embed.weight", "out.weight"}, [*SMALL, "backbone.heads=2"]),
    "mamba2": ({"embed.weight", "out.weight"}, SMALL),
    "mamba": ({"embed.weight", "out.weight"}, SMALL),
    "mlp": ({"embed.weight", "out.weight"}, ["backbone.width=32", "backbone.depth=2"]),
    "diffusers_dit": (
        {"network.pos_embed.proj.weight", "network.proj_out_2.weight"},
        [*SMALL, "backbone.heads=2"],
    ),
    "diffusers_unet": (
        {"network.conv_in.weight", "network.conv_out.weight"},
        ["backbone.channels=8", "backbone.norm_groups=4", "backbone.head_channels=4"],
    ),
}


def partition(module) -> tuple[set[str], set[str]]:
    """The names of the hidden matrices, and of the other matrices."""
    names = {p: name for name, p in module.named_parameters()}
    hidden = {names[p] for p in module.hidden_matrices()}
    return hidden, {names[p] for p in matrices(module)} - hidden


@pytest.mark.parametrize("backbone", ENDS)
def test_muon_has_the_matrices_inside_of_a_backbone(backbone):
    ends, sizes = ENDS[backbone]
    module = module_of("train", *DATA, f"backbone={backbone}", *sizes)
    hidden, others = partition(module)
    assert {name.removeprefix("denoiser.backbone.") for name in others} == ends
    assert len(hidden) > 4


def test_muon_has_the_matrices_inside_of_encoder_decoder_and_discriminator():
    adversary = ["reconstruction=perceptual_adversarial", "reconstruction.perceptual.size=16"]
    module = module_of("train_autoencoder", *TINY_AUTOENCODER, *adversary)
    hidden, others = partition(module)
    ends = {name for name in others if "perceptual" not in name}
    parts = ("autoencoder.encoder", "autoencoder.decoder", "loss.discriminator.layers")
    assert len(ends) == 2 * len(parts)
    for part in parts:
        numbers = [int(name.split(".")[len(part.split("."))]) for name in ends if part in name]
        assert min(numbers) == 0
        assert all(f"{part}.0." not in name for name in hidden)
        assert any(name.startswith(part) for name in hidden)
    assert all(p.ndim == 4 for p in module.hidden_matrices())


SGD = ["optimizer=any", "optimizer._target_=torch.optim.SGD"]
OPTIMIZERS = {  # and their rates; the first is an option of one's own
    "lion": (["--config-dir", "my_conf", "optimizer=lion"], 1e-4),
    "momentum": ([*SGD, "+optimizer.momentum=0.9", "optimizer.lr=0.01"], 0.01),
    "adam": (["optimizer=adam", "optimizer.lr=0.01"], 0.01),
    "sgd": ([*SGD, "optimizer.lr=0.01"], 0.01),
}


@pytest.mark.long
@pytest.mark.parametrize("name", first_fast(OPTIMIZERS))
def test_any_optimiser_trains_without_keys_of_adamw_and_resumes(lab, tmp_path, name):
    folder = tmp_path / "my_conf/optimizer"
    folder.mkdir(parents=True)
    text = blocks_of(PAGES / "training.md", "yaml")["my_conf/optimizer/lion.yaml"]
    (folder / "lion.yaml").write_text(text)
    arguments, rate = OPTIMIZERS[name]
    lab.done("train", *arguments, *QUICK, "run_dir=run", "trainer.max_steps=1")
    before = checkpoint_of(tmp_path / "run")
    lab.done("train", "resume=run", "trainer.max_steps=2")
    after = checkpoint_of(tmp_path / "run")
    for checkpoint in (before, after):
        (group, *_) = checkpoint["optimizer_states"][0]["param_groups"]
        assert group["initial_lr"] == rate
        assert name != "lion" or "fused" not in group
    assert not same(after["current_model_state"], before["current_model_state"])


def test_a_key_that_an_experiment_sets_can_be_removed():
    asked = ["experiment=fashion_mnist/ncsn", *SGD, "~optimizer.betas"]
    cfg = composed("train", *asked)
    assert set(cfg.optimizer) == {"_target_", "_partial_", "lr"}


@pytest.mark.slow
def test_an_autoencoder_and_its_adversary_train_by_muon(lab, tmp_path):
    muon = ["optimizer=muon", "run_dir=run", "callbacks.evaluation=null"]
    muon.append("reconstruction.discriminator.start=1")
    lab.done("train-autoencoder", *TINY_AUTOENCODER, *ADVERSARIAL, *muon)
    (state,) = checkpoint_of(tmp_path / "run")["optimizer_states"]
    assert sum("momentum_buffer" in each for each in state["state"].values()) > 10


def test_the_gradients_of_float16_are_scaled_back_before_their_norm_is_taken():
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    unfuse(optimizer)
    scaler.scale(weight.sum()).backward()
    assert not _optimizer_handles_unscaling(optimizer)  # as Lightning asks
    scaler.unscale_(optimizer)
    assert weight.grad.tolist() == [1.0, 1.0, 1.0]
    scaler.step(optimizer)
    assert weight.tolist() == pytest.approx([0.9, 0.9, 0.9], abs=2e-3)


def test_a_gradient_scaler_skips_steps_of_muon():
    module = Small()
    optimizer = muon(module)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for size, taken in ((torch.inf, False), (1.0, True)):
        scaler.scale(torch.ones(()))  # makes the scale
        for p in module.parameters():
            p.grad = torch.full_like(p, size)
        scaler.step(optimizer)
        scaler.update()
        moved = {name: not torch.equal(p, before[name]) for name, p in module.named_parameters()}
        assert all(value == taken for value in moved.values())


@pytest.mark.long
def test_a_schedule_free_optimizer_is_judged_by_its_average_and_resumed(lab, tmp_path):
    schedule_free = pytest.importorskip("schedulefree")
    run = [*QUICK, "optimizer=any", "optimizer._target_=schedulefree.AdamWScheduleFree"]
    run += [*FAST, "trainer.max_steps=4"]
    run += ["callbacks.weight_averaging=null", "callbacks.checkpoint.keep_every_n_steps=2"]
    lab.done("train", *run, "run_dir=whole")
    whole = checkpoint_of(tmp_path / "whole")
    (state,) = whole["optimizer_states"]
    assert not any(group["train_mode"] for group in state["param_groups"])
    # the weights that count are the mean of the points z that the optimiser went through
    parameter = nn.Parameter(torch.zeros(3))
    plain = schedule_free.AdamWScheduleFree([parameter], lr=0.01)
    points = []
    for _ in range(3):
        for_training(plain, True)
        parameter.grad = parameter.detach() - 1
        plain.step()
        points.append(plain.state[parameter]["z"].clone())
        for_training(plain, False)
    torch.testing.assert_close(parameter.detach(), torch.stack(points).mean(0))
    parts = killed_after_two_steps(tmp_path / "whole")
    lab.done("train", f"resume={parts.name}")
    require_equal_training(tmp_path / "whole", parts)
