"""Autoregressive models of codes: causality, exact likelihood, the cache, and drawing."""

import itertools
import math
from functools import partial

import pytest
import torch
from helpers.refusals import out_of_range, refused
from helpers.tiny_runs import tiny_first_stage

from diffusion_lab.backbone import AdaLN, AdaLNZero, ClassLabel, CrossAttentionBlock, InContext
from diffusion_lab.backbone.block import AdaLNSingle
from diffusion_lab.backbone.conditioning import NumericLabel, Unconditional
from diffusion_lab.common.images import NotFinite
from diffusion_lab.common.labels import Classes, Numbers
from diffusion_lab.families.autoregressive import (
    CodePipeline,
    CodeSampler,
    CodeTransformer,
    LogitGuidance,
    NextCode,
)
from diffusion_lab.families.autoregressive.model import nats
from diffusion_lab.first_stage import TrainedVQ

CODES, TOKENS, CLASSES = 5, 6, 3
BLOCKS = [AdaLN, AdaLNZero, AdaLNSingle, CrossAttentionBlock, InContext]


LABELS = Classes.numbered(CLASSES)


def transformer(
    block=AdaLNZero, conditioning=ClassLabel, codes=CODES, tokens=TOKENS, labels=LABELS, **more
):
    torch.manual_seed(0)
    sizes = {"width": 16, "depth": 2, "heads": 2, "qk_norm": True}
    made = partial(block, mlp_ratio=2.0)
    return CodeTransformer(codes, tokens, labels, conditioning, block=made, **(sizes | more))


def shaken(model: CodeTransformer) -> CodeTransformer:
    """Gives every weight a value: at the start outputs and gates are 0."""
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def test_all_codes_are_equally_likely_at_the_start():
    codes = torch.randint(CODES, (2, TOKENS))
    found = nats(transformer(), codes, torch.tensor([0, 2]))
    torch.testing.assert_close(found, torch.full((2, TOKENS), math.log(CODES)))


@pytest.mark.parametrize("block", [AdaLNZero, AdaLNSingle])
def test_gates_are_closed_at_the_start(block):
    """So that without positions a code is predicted from the one before it alone."""
    model = transformer(block)
    torch.nn.init.normal_(model.out.weight)
    codes = torch.randint(CODES, (2, TOKENS - 1))
    codes[:, -1] = 3
    last = model(codes, torch.tensor([0, 1]))[:, -1]
    torch.testing.assert_close(last[0], last[1])


@pytest.mark.parametrize("block", BLOCKS)
def test_a_code_is_predicted_from_those_before_it_and_the_label_alone(block):
    model = shaken(transformer(block))
    codes = torch.randint(CODES, (1, TOKENS - 1))
    for place in range(TOKENS - 1):
        changed = codes.clone()
        changed[0, place] = (codes[0, place] + 1) % CODES
        before, after = (model(each, torch.tensor([1])) for each in (codes, changed))
        differs = (before != after).flatten(2).any(2)[0]
        assert not differs[: place + 1].any()
        assert differs[place + 1 :].any()
    assert not torch.equal(model(codes, torch.tensor([1])), model(codes, torch.tensor([2])))


def test_probabilities_of_all_sequences_sum_to_one():
    model = shaken(transformer(codes=3, tokens=4))
    every = torch.tensor(list(itertools.product(range(3), repeat=4)))
    found = nats(model, every, torch.full((len(every),), 2)).double().sum(1)
    assert found.neg().exp().sum().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("conditioning", [ClassLabel, Unconditional])
def test_the_cache_gives_what_the_whole_sequence_does(block, conditioning):
    model = shaken(transformer(block, conditioning))
    codes = torch.randint(CODES, (3, TOKENS))
    labels = torch.tensor([0, 1, CLASSES]) if conditioning is ClassLabel else None
    whole = model(codes[:, :-1], labels)
    with model.remembering():
        parts = [model(codes[:, :0], labels)]
        parts += [model(codes[:, i : i + 1], labels, begun=i + 1) for i in range(TOKENS - 1)]
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(model(codes[:, :-1], labels), whole)  # and it forgets


def test_the_loss_leaves_out_labels_and_its_smoothing_is_of_training_alone():
    model = shaken(transformer())
    codes, labels = torch.randint(CODES, (4, TOKENS)), torch.tensor([0, 1, 2, 0])
    null = torch.full((4,), CLASSES)
    dropped = NextCode(label_dropout=1.0)(model, codes, labels)
    torch.testing.assert_close(dropped, nats(model, codes, null).mean())
    kept = NextCode(label_dropout=0.0)(model, codes, labels)
    torch.testing.assert_close(kept, nats(model, codes, labels).mean())
    every = model(codes[:, :-1], labels).log_softmax(2)
    smooth = NextCode(label_dropout=0.0, smoothing=0.2)(model, codes, labels)
    torch.testing.assert_close(smooth, 0.8 * kept - 0.2 * every.mean())


def test_temperature_and_limits_have_their_closed_forms():
    logits = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.1, 0.6, 0.1, 0.2]]).log()
    plain = CodeSampler().probabilities(logits)
    torch.testing.assert_close(plain, logits.exp().double())
    squared = CodeSampler(temperature=0.5).probabilities(logits)
    expected = logits.exp().double().square()
    torch.testing.assert_close(squared, expected / expected.sum(1, keepdim=True))
    for limited in (CodeSampler(top_k=2), CodeSampler(top_p=0.7)):
        expected = torch.tensor([[0, 0.75, 0, 0.25]]).double()
        torch.testing.assert_close(limited.probabilities(logits[1:]), expected)
    best = CodeSampler(top_p=0.01).probabilities(logits)
    assert best[1].tolist() == [0, 1, 0, 0]
    for argument, wrong in (("temperature", 0), ("top_k", 0), ("top_p", 1.5)):
        with out_of_range(argument):
            CodeSampler(**{argument: wrong})


def test_codes_are_drawn_as_often_as_they_are_likely():
    p = torch.tensor([0.5, 0.0, 0.3, 0.2])
    uniform = (torch.arange(1000) + 0.5) / 1000
    drawn = CodeSampler()(p.log().expand(1000, 4), uniform)
    assert drawn.bincount(minlength=4).tolist() == [500, 0, 300, 200]
    ends = CodeSampler()(p.log().expand(2, 4), torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0, 3]


def test_guidance_moves_logits_away_from_those_without_a_label():
    strong, weak = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 4.0]])
    assert LogitGuidance(1.0)(strong, weak).tolist() == [[1, 2]]
    assert LogitGuidance(0.0)(strong, weak).tolist() == [[0, 4]]
    assert LogitGuidance(3.0)(strong, weak).tolist() == [[3, -2]]


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    folder = tiny_first_stage(tmp_path_factory.mktemp("stage"), "vq")
    return TrainedVQ((1, 8, 8), str(folder), None, False, str(folder))


def drawing(stage, scale=1.0, **sampler) -> CodePipeline:
    _, height, width = stage.latent_shape
    model = shaken(transformer(codes=stage.num_codes, tokens=height * width))
    return CodePipeline(model, CodeSampler(**sampler), LogitGuidance(scale), stage)


def test_codes_come_back_as_the_images_that_the_autoencoder_decodes(stage):
    images = torch.randint(256, (3, 1, 8, 8), dtype=torch.uint8)
    moments = stage.moments(images)
    codes = stage.codes(moments)
    assert codes.shape == (3, *stage.latent_shape[1:])
    assert codes.min() >= 0
    assert codes.max() < stage.num_codes
    assert torch.equal(stage.from_codes(codes), stage.decode(stage.scaled(moments)))


def test_a_sample_is_fixed_by_its_seed_and_id(stage):
    pipeline = drawing(stage)
    together = pipeline([0, 1, 2, 3], 5)
    assert torch.equal(pipeline([2, 3], 5), together[2:])
    assert not torch.equal(pipeline([0, 1, 2, 3], 6), together)
    assert pipeline.labels([0, 1, 2, 3]).tolist() == [0, 1, 2, 0]
    steps = []
    pipeline([0], 0, on_step=lambda: steps.append(0))
    assert len(steps) == pipeline.steps == stage.latent_shape[1] * stage.latent_shape[2]


def test_codes_of_logits_that_are_not_finite_are_refused(stage):
    pipeline = drawing(stage)
    with torch.no_grad():
        pipeline.model.start.fill_(torch.nan)
    with refused("4 of 4", by=NotFinite):
        pipeline(range(4))


def test_drawn_codes_follow_the_likelihood(stage):
    """At a tiny temperature each code is the likeliest after those before it; so with guidance."""
    for scale in (1.0, 2.5):
        pipeline = drawing(stage, scale, temperature=1e-6)
        labels = torch.tensor([0, 1])
        codes = pipeline.codes([0, 1], 0, labels)
        strong = pipeline.model(codes[:, :-1], labels)
        weak = pipeline.model(codes[:, :-1], torch.full((2,), CLASSES))
        guided = LogitGuidance(scale)(strong, weak)
        assert torch.equal(codes, guided.argmax(2))


def test_labels_may_be_numbers():
    model = transformer(conditioning=NumericLabel, labels=Numbers(2))
    model.conditioning.labels.learn(torch.randn(20, 2))
    pipeline = CodePipeline(model, CodeSampler(), LogitGuidance(2.0), None)
    labels = pipeline.labels(range(4))
    assert labels.shape == (4, 2)
    assert pipeline.codes(range(4), 0, labels).shape == (4, TOKENS)
