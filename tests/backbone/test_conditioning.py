"""Labels as vectors and tokens: the null label, several attributes, and label dropout."""

import pytest
import torch

from diffusion_lab.backbone.conditioning import (
    Attributes,
    ClassLabel,
    RawLabels,
    Unconditional,
)
from diffusion_lab.common.labels import Classes

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
    expected = [
        table.weight[value] for table, value in zip(module.embeddings, (1, 2, 3), strict=True)
    ]
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
    assert condition.vector is None
    assert condition.tokens is None
    assert module.drop(labels, 1.0).tolist() == [6, 6, 6]
    assert not module.state_dict()
