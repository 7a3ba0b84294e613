"""Subsets of a training split: nested, stratified, the same everywhere, refused if too large."""

import math

import pytest
import torch
from helpers.data_modules import data_of
from helpers.refusals import refused
from helpers.tiny_data import tiny_data

from diffusion_lab.common.ranges import RangeError
from diffusion_lab.data.images import subset
from diffusion_lab.data.source import FashionMNIST

LABELS = torch.arange(1000) % 7 % 4  # classes of unequal sizes


def chosen(**size) -> set[int]:
    return set(subset(LABELS, **({"fraction": None, "per_class": None, "seed": 0} | size)).tolist())


@pytest.mark.parametrize(
    ("small", "large"),
    [
        ({"fraction": 0.1}, {"fraction": 0.2}),
        ({"fraction": 0.01}, {"fraction": 0.99}),
        ({"per_class": 5}, {"per_class": 50}),
        ({"per_class": 10}, {"fraction": 0.1}),
    ],
)
def test_a_smaller_subset_lies_inside_a_larger_one(small, large):
    assert chosen(**small) < chosen(**large)


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.5, 0.999])
def test_a_fraction_is_one_of_every_class(fraction):
    index = subset(LABELS, fraction, None, 0)
    sizes = LABELS.bincount().tolist()
    assert LABELS[index].bincount().tolist() == [max(1, round(fraction * n)) for n in sizes]
    assert index.tolist() == sorted(set(index.tolist()))


def test_so_many_of_each_class():
    assert LABELS[subset(LABELS, None, 50, 0)].bincount().tolist() == [50] * 4


def test_another_seed_is_another_subset_of_the_same_sizes():
    assert len(chosen(fraction=0.1)) == len(chosen(fraction=0.1, seed=1))
    assert len(chosen(fraction=0.1) & chosen(fraction=0.1, seed=1)) < 40


def test_the_choice_is_the_same_on_every_machine():
    assert subset(torch.zeros(1000, dtype=torch.int64), None, 5, 0).tolist() == KNOWN


KNOWN = [16, 325, 486, 771, 969]


def test_all_is_no_subset():
    assert subset(LABELS, None, None, 0) is None
    assert subset(LABELS, 1.0, None, 0) is None


def test_more_than_there_are_is_refused():
    with refused("per_class=144", "label 3", "at most 143", by=ValueError):
        subset(LABELS, None, 144, 0)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("fraction", value) for value in (0, 1.5, -0.1, "0.1", True, math.nan)),
        *(("per_class", value) for value in (0, 2.5, True, "50")),
        *(("subset_seed", value) for value in (-1, 0.5, "a", None)),
    ],
)
def test_sizes_that_mean_nothing_are_refused_before_anything_is_read(argument, value):
    with pytest.raises(RangeError) as caught:
        data_of(FashionMNIST, root="nowhere", **{argument: value})
    assert caught.value.argument == argument


def test_two_sizes_of_one_subset_are_refused():
    with refused("fraction=0.1", "per_class=3", by=ValueError):
        data_of(FashionMNIST, root="nowhere", fraction=0.1, per_class=3)


def test_a_model_trains_on_the_subset_and_metrics_compare_with_the_whole():
    module = tiny_data(per_class=3)
    module.setup("fit")
    assert module.train_images().shape == (12, 1, 8, 8)
    assert module.train_labels().bincount().tolist() == [3] * 4
    assert module.reference_images().shape == (84, 1, 8, 8)
    everything = tiny_data()
    index = subset(everything.train_labels(), None, 3, 0)
    assert torch.equal(module.train_images(), everything.train_images()[index])
    assert module.fingerprint == tiny_data().fingerprint
