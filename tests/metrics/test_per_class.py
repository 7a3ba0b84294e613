"""The FID of each class: which images are compared, how many, and which classes get no value."""

from types import SimpleNamespace

import torch

from diffusion_lab.metrics.built_in import ClassFID
from diffusion_lab.metrics.observer import ImageSet, place_in_class


def test_the_place_in_the_class():
    assert place_in_class(torch.tensor([1, 0, 1, 1, 0, 2])).tolist() == [0, 0, 1, 2, 1, 0]


def labelled(seed: int, *counts: int) -> ImageSet:
    """An image set with `counts` images of classes 0, 1, ..., shuffled."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.cat([torch.full((count,), label) for label, count in enumerate(counts)])
    labels = labels[torch.randperm(len(labels), generator=generator)]
    features = torch.randn(len(labels), 5, generator=generator)
    return ImageSet(SimpleNamespace(name="x", compares_on="cpu"), features, labels)


def both(generated: ImageSet, test: ImageSet, reference: ImageSet) -> dict[str, float]:
    """The FID of each class of samples, and that of equally many test images."""
    beside = test.matching(generated.labels)
    return ClassFID().results(generated, reference) | ClassFID().results(beside, reference, "_real")


def test_a_class_of_one_image_has_no_figure():
    values = both(labelled(2, 9, 9, 1), labelled(1, 9, 1, 9), labelled(0, 9, 9, 9))
    assert sorted(values) == [
        "fid_class0/x/train9-9",
        "fid_class0_real/x/train9-9",
        "fid_class1/x/train9-9",
    ]
    assert both(labelled(2, 9), labelled(1, 9), labelled(0, 1)) == {}
