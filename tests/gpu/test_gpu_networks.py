"""Networks and metrics on a GPU give what they give on a CPU."""

import pytest
import torch
from helpers.fake_metrics import generated
from helpers.gpu import DEVICE

from diffusion_lab.backbone import scan
from diffusion_lab.metrics.extractor import EfficientNetLite0

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
    output = scan.selective_scan(*inputs)
    output.square().sum().backward()
    return [each.detach().cpu() for each in (output, *(each.grad for each in inputs))]


def test_the_scan_is_that_of_a_cpu(monkeypatch):
    monkeypatch.setattr(scan, "_cuda_kernel", lambda: None)
    for ours, cpu in zip(scanned(DEVICE), scanned("cpu"), strict=True):
        torch.testing.assert_close(ours, cpu, rtol=1e-3, atol=1e-4)


def test_the_kernel_of_mamba_ssm_scans_as_ours_does():
    pytest.importorskip("mamba_ssm")
    for kernel, ours in zip(scanned(DEVICE), scanned("cpu"), strict=True):
        torch.testing.assert_close(kernel, ours, rtol=1e-3, atol=1e-3)


def test_features_are_those_of_a_cpu_also_under_autocast():
    found = []
    for device in ("cpu", DEVICE):
        extractor = EfficientNetLite0()
        extractor.load(device)
        with torch.autocast(device, torch.bfloat16):
            found.append(extractor(generated(8)).cpu())
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
