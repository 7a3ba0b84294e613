"""Labels as vectors and tokens: the null label, several attributes, and label dropout."""

import math

import pytest
import torch

from diffusion_lab.backbone.conditioning import (
    Attributes,
    ClassLabel,
    NumericLabel,
    RawLabels,
    Unconditional,
)
from diffusion_lab.common.labels import EXAMPLES, Classes, Numbers

LABELLED = {
    "class_label": lambda: ClassLabel(Classes.numbered(6), 8),
    "one attribute": lambda: Attributes(Classes.numbered(6), 8, None),
    "two attributes": lambda: Attributes(Classes.numbered(6), 8, [2, 3]),
}
each = pytest.mark.parametrize("build", LABELLED.values(), ids=LABELLED)


@each
def test_each_label_has_its_own_vector_and_none_is_the_null_label(build):
    module = build()
    condition = module(torch.arange(7), 7)
    assert len(condition.vector.unique(dim=0)) == 7
    assert module.labels.null(2).tolist() == [6, 6]
    unlabelled = module(None, 2)
    assert torch.equal(unlabelled.vector, condition.vector[[6, 6]])
    assert torch.equal(unlabelled.tokens, condition.tokens[[6, 6]])
    assert unlabelled.labels.tolist() == [6, 6]


@each
def test_a_vector_is_the_sum_of_its_tokens(build):
    condition = build()(torch.arange(7), 7)
    torch.testing.assert_close(condition.tokens.sum(1), condition.vector)


def test_labels_that_share_an_attribute_share_its_token():
    tokens = Attributes(Classes.numbered(6), 8, [2, 3])(torch.arange(6), 6).tokens  # (6, 2, D)
    first, second = tokens.unbind(1)
    for label in range(6):
        for other in range(6):
            assert torch.equal(first[label], first[other]) == (label // 3 == other // 3)
            assert torch.equal(second[label], second[other]) == (label % 3 == other % 3)


def test_three_attributes_are_digits_of_the_label():
    module = Attributes(Classes.numbered(24), 4, [2, 3, 4])
    tokens = module(torch.tensor([1 * 12 + 2 * 4 + 3]), 1).tokens[0]
    expected = [module.embeddings[i].weight[value] for i, value in enumerate((1, 2, 3))]
    assert torch.equal(tokens, torch.stack(expected))


@each
def test_labels_are_dropped_sample_by_sample_at_the_rate(build):
    module, labels = build(), torch.arange(6).repeat(5000)
    dropped = module.drop(labels, 0.1, torch.Generator().manual_seed(0))
    null = dropped == 6
    assert null.float().mean().item() == pytest.approx(0.1, abs=0.005)
    assert torch.equal(dropped[~null], labels[~null])
    assert torch.equal(module.drop(labels, 0.0), labels)
    assert (module.drop(labels, 1.0) == 6).all()


def test_vectors_start_small():
    thousand = Classes.numbered(1000)
    for module in (ClassLabel(thousand, 64), Attributes(thousand, 64, [500, 2])):
        assert module.embeddings[0].weight.std().item() == pytest.approx(0.02, rel=0.02)


def test_without_labels_there_is_nothing():
    module = Unconditional(Classes.numbered(6), 8)
    condition = module(torch.arange(6), 6)
    assert condition.vector is condition.tokens is condition.labels is None
    assert not module.conditional


def test_raw_labels_are_passed_on_and_missing_ones_are_the_null_label():
    module = RawLabels(labels=Classes.numbered(6), width=8)
    labels = torch.tensor([0, 5, 6])
    assert torch.equal(module(labels, 3).labels, labels)
    condition = module(None, 2)
    assert condition.labels.tolist() == [6, 6]
    assert condition.vector is condition.tokens is None
    assert module.drop(labels, 1.0).tolist() == [6, 6, 6]
    assert not module.state_dict()


def learned(size: int = 1, count: int = 5000) -> tuple[NumericLabel, torch.Tensor]:
    torch.manual_seed(0)
    labels = 300 + 40 * torch.randn(count, size)
    label = NumericLabel(Numbers(size), 8)
    label.labels.learn(labels)
    return label, labels


@pytest.mark.parametrize("size", [1, 3])
def test_the_scale_of_numbers_does_not_matter(size):
    label, labels = learned(size)
    torch.testing.assert_close(label.labels.mean, labels.mean(0))
    torch.testing.assert_close(label.labels.std, labels.std(0, correction=0))
    other = NumericLabel(Numbers(size), 8)
    other.load_state_dict(label.state_dict())
    other.labels.learn(labels / 1000 - 7)  # in other units
    ours, theirs = label(labels[:9], 9), other(labels[:9] / 1000 - 7, 9)
    torch.testing.assert_close(ours.vector, theirs.vector, atol=1e-4, rtol=0)
    assert len(ours.vector.unique(dim=0)) == 9


def test_numbers_that_are_all_equal_are_no_division_by_zero():
    label = NumericLabel(Numbers(1), 8)
    label.labels.learn(torch.full((20, 1), 5.0))
    assert label(torch.full((2, 1), 5.0), 2).vector.isfinite().all()


def test_no_label_is_the_null_label_and_has_a_vector_of_its_own():
    label, labels = learned(2)
    null = torch.full((4, 2), math.nan)
    for vector in (label(null, 4).vector, label(None, 4).vector):
        assert torch.equal(vector, label.null.expand(4, -1))
    assert label(null, 4).tokens.shape == (4, 1, 8)
    assert not torch.isclose(label(labels[:4], 4).vector, label.null).all(1).any()
    mixed = torch.cat([labels[:1], null[:1]])
    assert label.labels.is_null(mixed).tolist() == [False, True]
    label(mixed, 2).vector.sum().backward()
    assert label.null.grad.abs().sum() > 0
    assert all(weight.grad.isfinite().all() for weight in label.parameters())


def test_dropout_replaces_a_share_of_labels_as_a_whole():
    label, labels = learned(3)
    dropped = label.drop(labels, 0.2, torch.Generator().manual_seed(0))
    lost = dropped.isnan()
    assert torch.equal(lost.all(1), lost.any(1))
    assert lost.any(1).double().mean() == pytest.approx(0.2, abs=0.02)
    assert torch.equal(dropped[~lost.any(1)], labels[~lost.any(1)])
    assert torch.equal(label.drop(labels, 0.0), labels)


def test_samples_have_labels_of_training_images_and_grids_their_range():
    label, labels = learned()
    typical = label.labels.in_turn(range(2 * EXAMPLES))
    assert torch.equal(typical[:EXAMPLES], typical[EXAMPLES:])
    assert set(typical.flatten().tolist()) <= set(labels.flatten().tolist())
    assert typical.mean() == pytest.approx(300, abs=5)
    assert typical.std() == pytest.approx(40, abs=4)
    rows = label.labels.grid(5).flatten()
    assert torch.equal(rows, rows.sort().values)
    assert rows[[0, 2, 4]].tolist() == pytest.approx([300 - 66, 300, 300 + 66], abs=8)
    vector, of_vectors = learned(2)
    assert set(map(tuple, vector.labels.grid(6).tolist())) <= set(map(tuple, of_vectors.tolist()))


def test_few_training_labels_are_repeated():
    label, labels = learned(count=7)
    assert set(label.labels.examples.flatten().tolist()) == set(labels.flatten().tolist())
