"""GANs: the relativistic loss and its penalties, the players' gradients, and the discriminator."""

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from helpers.refusals import refused
from torch import nn

from diffusion_lab.backbone import ClassLabel
from diffusion_lab.backbone.conditioning import NumericLabel, Unconditional
from diffusion_lab.backbone.discriminator import Discriminator
from diffusion_lab.common.images import NotFinite
from diffusion_lab.common.labels import Classes, Numbers
from diffusion_lab.families.gan import ConvGenerator, GANPipeline, RelativisticLoss
from diffusion_lab.first_stage.reconstruction.discriminator import PatchDiscriminator

CLASSES = 3


class Linear(nn.Module):
    """The judgement w . x of an image."""

    def __init__(self, **facts):
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, 64).view(1, 1, 8, 8))

    def forward(self, images, labels=None):
        return (images * self.weight).flatten(1).sum(1)[:, None, None, None]


def loss_of(discriminator=None, gamma=1.0) -> RelativisticLoss:
    torch.manual_seed(0)
    made = discriminator or partial(Discriminator, channels=4, layers=2, normalised=False)
    return RelativisticLoss(1, Classes.numbered(CLASSES), ClassLabel, gamma, made)


def images():
    torch.manual_seed(1)
    return torch.randn(4, 1, 8, 8), torch.randn(4, 1, 8, 8), torch.tensor([0, 1, 2, 0])


def test_the_loss_has_its_closed_form_for_a_linear_discriminator():
    real, fake, labels = images()
    loss = loss_of(Linear, gamma=0.6)
    total, parts = loss(real, fake, labels)
    weight = loss.discriminator.weight
    gap = ((real - fake) * weight).flatten(1).sum(1)
    torch.testing.assert_close(parts["discriminator"], F.softplus(-gap).mean())
    torch.testing.assert_close(parts["generator"], F.softplus(gap).mean())
    square = weight.square().sum()
    torch.testing.assert_close(parts["real_gradient"], square)
    torch.testing.assert_close(parts["fake_gradient"], square)
    expected = F.softplus(-gap).mean() + F.softplus(gap).mean() + 0.6 * square
    torch.testing.assert_close(total, expected)


def test_each_player_gets_the_gradient_of_its_own_loss():
    real, fake, labels = images()
    fake.requires_grad_()
    loss = loss_of(gamma=0.3)
    total, _ = loss(real, fake, labels)
    of_fake, *of_judge = torch.autograd.grad(total, [fake, *loss.parameters()])

    judge = loss.discriminator
    fooled = F.softplus(judge(real, labels) - judge(fake, labels)).mean()
    torch.testing.assert_close(of_fake, torch.autograd.grad(fooled, fake)[0])

    seen = [real.clone().requires_grad_(), fake.detach().clone().requires_grad_()]
    judged = [judge(each, labels) for each in seen]
    found = F.softplus(judged[1] - judged[0]).mean()
    for each, said in zip(seen, judged, strict=True):
        (slope,) = torch.autograd.grad(said.flatten(1).mean(1).sum(), each, create_graph=True)
        found = found + 0.15 * slope.square().sum() / len(each)
    expected = torch.autograd.grad(found, list(loss.parameters()))
    for ours, theirs in zip(of_judge, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_equal_images_are_told_apart_no_better_than_by_chance():
    real, _, labels = images()
    found = loss_of().found(real, real, labels)
    torch.testing.assert_close(found, torch.full((4,), math.log(2)))


def test_a_label_changes_the_judgement_only_of_a_conditional_discriminator():
    real, _, _ = images()
    settings = {"normalised": False, "labels": Classes.numbered(CLASSES)}
    for conditioning, hears in ((ClassLabel, True), (Unconditional, False)):
        judge = Discriminator(1, 4, 2, conditioning=conditioning, **settings)
        first, second = (judge(real, torch.full((4,), label)) for label in (0, 1))
        assert first.shape == (4, 1, 2, 2)
        assert torch.equal(first, second) != hears


def test_labels_may_be_numbers():
    judge = Discriminator(1, 4, 2, normalised=False, labels=Numbers(2), conditioning=NumericLabel)
    model = generator(conditioning=NumericLabel, labels=Numbers(2))
    model.conditioning.labels.learn(torch.randn(20, 2))
    pipeline = GANPipeline(model)
    labels = pipeline.labels(range(4))
    assert labels.shape == (4, 2)
    made = pipeline(range(4), 0, labels)
    assert not torch.equal(made, pipeline(range(4), 0, labels + 1))
    assert not torch.equal(judge(made.float(), labels), judge(made.float(), labels + 1))


def test_the_adversary_of_a_first_stage_is_the_same_network():
    torch.manual_seed(0)
    ours = Discriminator(1, 8, 2)
    torch.manual_seed(0)
    theirs = PatchDiscriminator(1, 8, 2, weight=0.5, start=0)
    assert isinstance(theirs, Discriminator)
    images = torch.randn(2, 1, 8, 8)
    assert torch.equal(ours(images), theirs(images))


def generator(shape=(1, 8, 8), **more) -> ConvGenerator:
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": [1, 2], "blocks": 1, "latent_size": 6}
    facts = {"image_shape": shape, "labels": Classes.numbered(CLASSES), "conditioning": ClassLabel}
    return ConvGenerator(**(facts | sizes | more))


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 12, 8), (1, 28, 28)])
def test_a_generator_makes_images_of_any_shape(shape):
    noise = torch.randn(2, 6)
    model = generator(shape)
    made = model(noise, torch.tensor([0, 1]))
    assert made.shape == (2, *shape)
    assert made.dtype == torch.float32
    assert not torch.equal(made, model(noise, torch.tensor([1, 1])))


def test_too_many_levels_are_refused():
    with refused("multipliers", "3", by=ValueError):
        generator((1, 12, 12), multipliers=[1, 1, 1, 1])


def test_a_sample_is_fixed_by_its_seed_and_id():
    pipeline = GANPipeline(generator())
    together = pipeline([0, 1, 2, 3], 5)
    assert together.dtype == torch.uint8
    assert torch.equal(pipeline([2, 3], 5), together[2:])
    assert not torch.equal(pipeline([0, 1, 2, 3], 6), together)
    assert pipeline.labels([0, 1, 2, 3]).tolist() == [0, 1, 2, 0]
    assert pipeline.steps == 1


def test_samples_that_are_not_finite_are_refused():
    model = generator()
    for parameter in model.parameters():
        nn.init.constant_(parameter, math.nan)
    with refused("4 of 4", by=NotFinite):
        GANPipeline(model)(range(4))
