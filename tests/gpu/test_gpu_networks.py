"""Networks and metrics on a GPU give what they give on a CPU."""

import pytest
import torch
from helpers.fake_metrics import FakeExtractor, generated
from helpers.gpu import DEVICE

from diffusion_lab.backbone import state_space
from diffusion_lab.metrics import distances
from diffusion_lab.metrics.built_in import FID, KID, MMD
from diffusion_lab.metrics.distances import FeatureSet, frechet
from diffusion_lab.metrics.extractor import EfficientNetLite0
from diffusion_lab.metrics.neighbours import Coverage
from diffusion_lab.metrics.observer import ImageSet

pytestmark = pytest.mark.gpu


def scan_inputs(device: str) -> list[torch.Tensor]:
    """x, dt, a, b and c of a scan over 64 tokens, with gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, 64, 32), (2, 64, 32), (32, 16), (2, 64, 16), (2, 64, 16)]
    x, dt, a, b, c = (torch.randn(shape, generator=generator) for shape in shapes)
    inputs = [x, dt.abs() / 10, -a.abs(), b, c]
    return [each.to(device).requires_grad_() for each in inputs]


def scanned(device: str) -> list[torch.Tensor]:
    """The output of a scan and its gradients, on the CPU."""
    inputs = scan_inputs(device)
    output = state_space.selective_scan(*inputs)
    output.square().sum().backward()
    return [each.detach().cpu() for each in (output, *(each.grad for each in inputs))]


def test_the_scan_is_that_of_a_cpu(monkeypatch):
    monkeypatch.setattr(state_space, "_cuda_kernel", lambda: None)
    for ours, cpu in zip(scanned(DEVICE), scanned("cpu"), strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-3, atol=1e-4)


def test_the_kernel_of_mamba_ssm_scans_as_ours_does():
    pytest.importorskip("mamba_ssm")
    for kernel, ours in zip(scanned(DEVICE), scanned("cpu"), strict=True):
        torch.testing.assert_close(kernel, ours, rtol=1e-3, atol=1e-3)


def test_metrics_of_features_are_those_of_a_cpu(monkeypatch):
    monkeypatch.setattr(distances, "BLOCK", 20)
    generator = torch.Generator().manual_seed(0)
    found = []
    ours, theirs = (torch.randn(count, 24, generator=generator) for count in (90, 70))
    for device in ("cpu", DEVICE):
        extractor = FakeExtractor()
        extractor.load(device)
        sides = [ImageSet(extractor, features) for features in (ours, theirs)]
        stored = FeatureSet(theirs).statistics()
        vars(sides[1].statistics).update(stored)  # as a reference is read from a file
        metrics = (FID(), KID(), MMD(), Coverage())
        found.append([each.measure(*sides) for each in metrics])
        found[-1].append({"few": frechet(FeatureSet(ours[:9], device), sides[1].statistics)})
        found[-1].append({"own": FeatureSet(theirs, device).statistics()["self_kernel"].item()})
    for here, there in zip(*found, strict=True):
        assert here == pytest.approx(there, rel=1e-8)


def test_features_are_those_of_a_cpu_also_under_autocast():
    found = []
    for device in ("cpu", DEVICE):
        extractor = EfficientNetLite0()
        extractor.load(device)
        with torch.autocast(device, torch.bfloat16):
            found.append(extractor(generated(8)).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
