"""The FID of each class: which images are compared, how many, and which classes get no value."""

from types import SimpleNamespace

import pytest
import torch

from diffusion_lab.metrics import FeatureSet, frechet
from diffusion_lab.metrics.feature_distances import ClassFID
from diffusion_lab.metrics.image_set import ImageSet, place_in_class


def test_the_place_in_the_class():
    assert place_in_class(torch.tensor([1, 0, 1, 1, 0, 2])).tolist() == [0, 0, 1, 2, 1, 0]


def labelled(seed: int, *counts: int) -> ImageSet:
    """An image set with `counts` images of classes 0, 1, ..., shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = torch.randn(len(labels), 5, generator=generator)
    return ImageSet(SimpleNamespace(name="x"), features, labels)


def both(generated: ImageSet, test: ImageSet, reference: ImageSet) -> dict[str, float]:
    """The FID of each class of samples, and that of equally many test images."""
    beside = test.matching(generated.labels)
    return ClassFID().results(generated, reference) | ClassFID().results(beside, reference, "_real")


def test_both_sides_are_of_the_class_and_real_values_of_as_many():
    reference, test, ours = (
        labelled(0, 2000, 70, 9),
        labelled(1, 30, 30, 30),
        labelled(2, 20, 40, 3),
    )
    values = both(ours, test, reference)
    assert sorted(values) == [
        "fid_class0/x/train2k-20",
        "fid_class0_real/x/train2k-20",
        "fid_class1/x/train70-40",
        "fid_class1_real/x/train70-30",
        "fid_class2/x/train9-3",
        "fid_class2_real/x/train9-3",
    ]
    for label, count in ((0, 20), (1, 30), (2, 3)):
        real = FeatureSet(reference.features[reference.labels == label])
        sides = (ours.features[ours.labels == label], test.features[test.labels == label][:count])
        own, beside_it = (
            value
            for kind in ("/", "_real/")
            for name, value in values.items()
            if name.startswith(f"fid_class{label}{kind}")
        )
        assert own == pytest.approx(frechet(FeatureSet(sides[0]), real), rel=1e-9)
        assert beside_it == pytest.approx(frechet(FeatureSet(sides[1]), real), rel=1e-9)


def test_a_class_of_one_image_has_no_figure():
    values = both(labelled(2, 9, 9, 1), labelled(1, 9, 1, 9), labelled(0, 9, 9, 9))
    assert sorted(values) == [
        "fid_class0/x/train9-9",
        "fid_class0_real/x/train9-9",
        "fid_class1/x/train9-9",
    ]
    assert both(labelled(2, 9), labelled(1, 9), labelled(0, 1)) == {}
