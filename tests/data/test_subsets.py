"""Choices of images: nested, stratified, the same everywhere, and not trained on if held out."""

import itertools
import math
from collections import Counter

import pytest
import torch
from helpers.data_modules import data_of
from helpers.refusals import out_of_range, refused
from helpers.tiny_data import tiny_data

from diffusion_lab.data.images import stratified, subset, validation_and_rest
from diffusion_lab.data.loader import TensorLoader
from diffusion_lab.data.source import FashionMNIST

LABELS = torch.arange(1000) % 7 % 4  # classes of 286, 286, 285 and 143 images


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


@pytest.mark.parametrize(
    ("fraction", "per_class", "sizes"),
    [
        (0.001, None, [1, 1, 1, 1]),
        (0.1, None, [29, 29, 28, 14]),
        (0.5, None, [143, 143, 142, 72]),
        (0.999, None, [286, 286, 285, 143]),
        (None, 50, [50, 50, 50, 50]),
    ],
)
def test_a_subset_has_a_share_or_so_many_of_every_class(fraction, per_class, sizes):
    index = subset(LABELS, fraction, per_class, 0)
    assert LABELS[index].bincount().tolist() == sizes
    assert index.tolist() == sorted(set(index.tolist()))


def test_another_seed_is_another_subset_of_the_same_sizes():
    assert len(chosen(fraction=0.1)) == len(chosen(fraction=0.1, seed=1))
    assert len(chosen(fraction=0.1) & chosen(fraction=0.1, seed=1)) < 40


def test_choices_are_the_same_on_every_machine():
    labels = torch.zeros(1000, dtype=torch.int64)
    assert subset(labels, None, 5, 0).tolist() == [16, 325, 486, 771, 969]
    assert validation_and_rest(labels, 3)[0].tolist() == [170, 619, 867]


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
    with out_of_range(argument):
        data_of(FashionMNIST, root="nowhere", **{argument: value})


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
    assert module.fingerprint == everything.fingerprint


EVEN = torch.arange(6000) % 10
UNEVEN = torch.arange(1000).sqrt().long() // 4  # classes of 16 to 240 images


def digests(images: torch.Tensor) -> Counter[bytes]:
    return Counter(image.numpy().tobytes() for image in images)


@pytest.mark.parametrize("labels", [EVEN, UNEVEN])
@pytest.mark.parametrize("size", [1, 37, 100, 400])
def test_each_class_has_its_share(labels, size):
    chosen, _ = validation_and_rest(labels, size)
    assert len(chosen) == len(set(chosen.tolist())) == size
    sizes = labels.bincount()
    found = labels[chosen].bincount(minlength=len(sizes))
    assert (found - size * sizes / len(labels)).abs().max() <= 1


def test_chosen_images_and_the_rest_are_all_images():
    chosen, rest = validation_and_rest(UNEVEN, 100)
    assert rest.tolist() == sorted(set(range(1000)) - set(chosen.tolist()))


def test_a_smaller_choice_begins_a_larger_one():
    assert torch.equal(validation_and_rest(UNEVEN, 30)[0], validation_and_rest(UNEVEN, 200)[0][:30])


def test_classes_do_not_come_in_turns():
    # a validation image is measured at the noise level of its place modulo 10
    labels = EVEN[stratified(EVEN, "validation")[:1000]]
    for level in range(10):
        assert labels[level::10].bincount(minlength=10).min() >= 2


@pytest.mark.parametrize(
    ("size", "images", "kept"),
    [("auto", 60_000, 5000), ("auto", 300, 30), ("auto", 9, 0), (0, 9, 0), (None, 9, 0), (8, 9, 8)],
)
def test_how_many_are_kept(size, images, kept):
    chosen, rest = validation_and_rest(torch.arange(images) % 10, size)
    assert (len(chosen), len(rest)) == (kept, images - kept)


@pytest.mark.parametrize(
    ("settings", "trained"),
    [
        ({}, [16] * 4),
        ({"fraction": 0.25}, [4] * 4),
        ({"fraction": 0.25, "subset_seed": 3}, [4] * 4),
        ({"per_class": 16, "flip": True}, [16] * 4),
    ],
)
def test_validation_images_do_not_depend_on_what_is_trained_on(settings, trained):
    data, other = tiny_data(**settings), tiny_data()
    assert torch.equal(data.validation_rows()[:], other.validation_rows()[:])
    assert data.validation_labels().bincount().tolist() == [5] * 4
    assert data.train_labels().bincount().tolist() == trained
    assert not digests(data.train_images()) & digests(data.validation_rows()[:])
    everything = digests(data.train_images()) + digests(data.validation_rows()[:])
    assert everything <= digests(data.reference_images())


def test_the_loss_is_measured_on_as_many_of_each_class():
    data = tiny_data(validate_on=8, pad=10)
    rows, labels = data.validated_on()
    images = rows[:]
    assert images.shape == (8, 1, 10, 10)
    assert labels.tolist() == data.validation_labels()[:8].tolist()
    assert labels.bincount().tolist() == [2] * 4


def test_an_epoch_holds_each_chosen_image_once_and_no_other():
    data = tiny_data(fraction=0.5)
    chosen = torch.tensor([0, 3, 5, 9])
    stream = TensorLoader(data.reference_images(), data.reference_labels(), 2, 0, chosen=chosen)
    for _ in range(3):
        seen = torch.cat([images for images, _ in itertools.islice(stream, 2)])
        assert digests(seen) == digests(data.reference_images()[chosen])
