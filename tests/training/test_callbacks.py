"""Callbacks are found by class, whatever their key in the configuration."""

from types import SimpleNamespace

import pytest
import torch
from helpers.tiny_runs import TINY, summary_of

from diffusion_lab.common.labels import Classes
from diffusion_lab.pipeline import LabelledGenerator
from diffusion_lab.training.callbacks import SampleGrid


class Shades(LabelledGenerator):
    """Draws a pixel for each sample: the class, in units of a hundredth of all classes."""

    def __init__(self, classes: int):
        self.kind = Classes.numbered(classes)

    @property
    def conditioning(self):
        return SimpleNamespace(conditional=True, labels=self.kind)

    def drawn(self, ids, seed, labels, on_step):
        return (labels * 100 // self.kind.classes).to(torch.uint8)[:, None, None, None]


@pytest.mark.parametrize(
    ("classes", "columns", "shape", "said"),
    [
        (10, 10, (10, 10), "one row per class"),
        (100, 10, (100, 10), "one row per class"),
        (1000, 10, (100, 10), "one row per class 0, 10, 20, ... of 1,000"),
        (10_000, 50, (20, 50), "one row per class 0, 500, 1000, ... of 10,000"),
        (150, 2, (75, 2), "one row per class 0, 2, 4, ... of 150"),
        (3, 2000, (1, 2000), "one row per class 0, ... of 3"),
    ],
)
def test_a_picture_of_many_classes_has_rows_of_some(classes, columns, shape, said):
    context = SimpleNamespace(sampling=lambda: Shades(classes))
    trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(context=context),
        datamodule=SimpleNamespace(labels=Classes.numbered(classes)),
    )
    images, caption = SampleGrid(columns=columns).draw(trainer)
    assert images.shape[:2] == shape
    assert caption == f"samples of seed 0, {said}"
    shades = images[:, :, 0, 0, 0]
    assert (shades == shades[:, :1]).all()
    assert len(shades[:, 0].unique()) == shape[0]  # spread over all classes


@pytest.mark.slow
def test_runs_with_callbacks_by_other_names_are_measured_and_compared(lab, tmp_path):
    renamed = ["callbacks.evaluation=null", "~callbacks.sample_grid"]
    ours = "_target_:diffusion_lab.training.callbacks"
    renamed += [f"+callbacks.mine={{{ours}.SampleEvaluation,seed:5}}"]
    renamed += [f"+callbacks.pictures={{{ours}.SampleGrid}}", "logger=none"]
    for seed in range(2):
        lab.done("train", *TINY, *renamed, f"seed={seed}", f"run_dir=run{seed}")
    summary = summary_of(tmp_path / "run0")
    (fid,) = (name for name in summary["metrics"] if name.startswith("fid/"))
    assert summary["protocol"]
    assert summary["sampling"]["seed"] == 5
    assert summary["sampling"]["sampler"]["steps"] == 3
    assert list((tmp_path / "run0/samples").glob("step_*.png"))
    lab.done("compare", "run0", "run1")
    result = lab.result("evaluate", "run=run0", "against=run1")
    assert result[fid] == pytest.approx(summary["metrics"][fid])


def test_samples_in_other_numbers_of_steps_are_measured_at_the_end(lab, tmp_path):
    also = ["callbacks.evaluation.also_steps=[5]", "logger=none"]
    also += ["optimizer.lr=1e-2", "lr_schedule.warmup_images=0", "callbacks.weight_averaging=null"]
    lab.done("train", *TINY, *also, "run_dir=run")
    summary = summary_of(tmp_path / "run")
    (record,) = summary["at_other_steps"]
    assert summary["sampling"]["sampler"]["steps"] == 3
    assert record["sampling"]["sampler"]["steps"] == 5
    assert record["sampling"] | {"sampler": summary["sampling"]["sampler"]} == summary["sampling"]
    (fid,) = (name for name in record["metrics"] if name.startswith("fid/"))
    assert record["metrics"][fid] != summary["metrics"][fid]
    measured = lab.result("evaluate", "run=run", "sampler.steps=5")
    assert measured[fid] == pytest.approx(record["metrics"][fid])
