"""The study of what metrics see damages real images, and nothing else."""

import runpy

import torch
from helpers.paths import ROOT

SANITY = runpy.run_path(str(ROOT / "experiments/metrics/sanity.py"))


def test_dropped_classes_are_replaced_by_fresh_images_of_the_others():
    images = torch.arange(400).reshape(-1, 1, 1, 1)
    labels = torch.arange(400) % 10
    unused = images + 1000, labels
    for classes in (1, 5):
        changed, classified = SANITY["without"](unused, classes, images[:200], labels[:200])
        assert len(changed) == len(classified) == len(changed.unique()) == 200
        assert classified.unique().tolist() == list(range(classes, 10))
        assert torch.equal(changed.flatten() % 10, classified)
        assert set(images[:200][labels[:200] >= classes].flatten().tolist()) <= set(
            changed.flatten().tolist()
        )
