"""Guidance: the identities of its scale, and how many network calls it costs."""

import pytest
import torch
from torch import nn

from diffusion_lab.conditioning import ClassLabel, Unconditional
from diffusion_lab.denoiser import Estimate
from diffusion_lab.guidance import Guidance
from diffusion_lab.schedule import Cosine

LEVEL = Cosine()(torch.tensor(0.5))


class Recorder(nn.Module):
    """x0 = 0.5 x + label, the null label 3 being one of them; records its calls."""

    def __init__(self, conditioning):
        super().__init__()
        self.conditioning = conditioning
        self.calls = []

    def forward(self, x, level, labels=None):
        self.calls.append(None if labels is None else labels.tolist())
        labels = torch.full((len(x),), 3) if labels is None else labels
        return Estimate(0.5 * x + labels[:, None])


@pytest.fixture
def model():
    return Recorder(ClassLabel(num_classes=3, width=4))


X = torch.linspace(-0.3, 0.7, 8).reshape(4, 2)
LABELS = torch.tensor([0, 1, 2, 1])


def test_scale_1_is_exactly_the_conditional_model_in_one_call(model):
    x0 = Guidance().bind(model, LABELS)(X, LEVEL).x0
    assert torch.equal(x0, 0.5 * X + LABELS[:, None])
    assert model.calls == [LABELS.tolist()]


def test_scale_0_is_exactly_the_unconditional_model_in_one_call(model):
    x0 = Guidance(0.0).bind(model, LABELS)(X, LEVEL).x0
    assert torch.equal(x0, 0.5 * X + 3)
    assert model.calls == [None]


@pytest.mark.parametrize("scale", [-0.5, 0.5, 2.0, 7.5])
def test_other_scales_extrapolate_in_one_call_of_twice_the_batch(model, scale):
    x0 = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    weak, strong = 0.5 * X + 3, 0.5 * X + LABELS[:, None]
    torch.testing.assert_close(x0, weak + scale * (strong - weak))
    assert model.calls == [LABELS.tolist() + [3] * 4]


def test_without_labels_the_model_is_unconditional(model):
    assert torch.equal(Guidance().bind(model, None)(X, LEVEL).x0, 0.5 * X + 3)
    assert model.calls == [None]


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.0])
def test_clip_clamps_the_guided_estimate(model, scale):
    free = Guidance(scale).bind(model, LABELS)(X, LEVEL).x0
    clipped = Guidance(scale, clip=1.2).bind(model, LABELS)(X, LEVEL).x0
    assert torch.equal(clipped, free.clamp(-1.2, 1.2))
    assert not torch.equal(clipped, free)


def test_an_unconditional_model_cannot_be_guided(model):
    bare = Recorder(Unconditional(0, 4))
    for scale in (0.0, 1.0):
        Guidance(scale).bind(bare, None)(X, LEVEL)
    for denoiser, labels in ((bare, None), (bare, LABELS), (model, None)):
        with pytest.raises(ValueError, match=r"guidance\.scale=2\.0 needs a model trained on"):
            Guidance(2.0).bind(denoiser, labels)


def test_clip_must_be_positive():
    with pytest.raises(ValueError, match="clip=0"):
        Guidance(clip=0)
