"""Models of few steps are better than flow matching in one call or two, on points in the plane."""

import pytest
import torch
from helpers.compositions import composed

from diffusion_lab.assembly.objects import build_model
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.source import TwoMoons
from diffusion_lab.diffusion.sampler import Euler, FlowMap, UniformGrid

STEPS, BATCH, POINTS = 1000, 256, 4000
PARTS = ["experiment=toy/two_moons", "backbone.width=64", "backbone.depth=3", "conditioning=none"]


def points(count: int, seed: int) -> torch.Tensor:
    return TwoMoons(noise=0.04).points(count, torch.Generator().manual_seed(seed))[0]


def trained(objective: str, *overrides: str):
    """A model after STEPS steps of Adam with a cosine schedule, seeded."""
    torch.manual_seed(0)
    cfg = composed("train", "name=x", *PARTS, f"objective={objective}", *overrides)
    model = build_model(cfg.copy(), (2, 1, 1), Classes.numbered(2))
    optimizer = torch.optim.Adam(model.denoiser.parameters(), 2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
    data = points(20_000, seed=0)[:, :, None, None]
    for step in range(STEPS):
        x0 = data[torch.randint(len(data), (BATCH,))]
        loss = model.objective(model.denoiser, x0, images_seen=step * BATCH).minimised.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.denoiser.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model


def distance(model, sampler) -> float:
    """The sliced Wasserstein distance of samples to the data."""
    torch.manual_seed(1)
    noise, real = torch.randn(POINTS, 2, 1, 1), points(POINTS, seed=1)
    with torch.no_grad():
        drawn = sampler(model.denoiser, noise, model.schedule).flatten(1)
    angle = torch.linspace(0, torch.pi, 101)[:-1]
    directions = torch.stack([angle.cos(), angle.sin()])
    gaps = (drawn @ directions).sort(0).values - (real @ directions).sort(0).values
    return float(gaps.square().mean().sqrt())


@pytest.mark.slow
def test_jumps_are_nearer_to_the_data_than_as_many_steps_of_flow_matching():
    flow = trained("flow_matching")
    steps = {calls: distance(flow, Euler(calls, UniformGrid(0.0))) for calls in (1, 2, 50)}
    assert steps[50] < 0.06
    found = {}
    short = {"alpha_flow": ["objective.loss.end_images=192_000"]}  # of 256,000
    kinds = ("improved_mean_flow", "alpha_flow", "lagrangian", "mean_flow", "shortcut")
    for objective in kinds:
        model = trained(objective, *short.get(objective, []))
        for calls in (1, 2):
            # measured: 0.041 to 0.073, and 0.19 and 0.25 for flow matching
            found[objective, calls] = distance(model, FlowMap(calls, UniformGrid(0.0)))
            assert found[objective, calls] < steps[calls] / 2
    # measured: 0.061 and 0.043; jumps between those that a shortcut model was trained to make
    assert distance(model, FlowMap(3, UniformGrid(0.0))) < 1.5 * found["shortcut", 2]
    assert distance(model, FlowMap(16, UniformGrid(0.1))) < 1.1 * found["shortcut", 2]
    # measured: 0.047 and 0.16; a derivative with respect to 1000 t is hard to learn from
    steep = trained("mean_flow", "denoiser.noise_label=time")
    assert distance(steep, FlowMap(1, UniformGrid(0.0))) > 2 * found["mean_flow", 1]
