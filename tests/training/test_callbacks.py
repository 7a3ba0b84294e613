"""Pictures of training, callbacks under any name, ways of debugging, and exact products."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.compositions import assembled
from helpers.refusals import assert_names
from helpers.seen_images import SEEN, seen
from helpers.tiny_runs import EVALUATED, FAST, QUICK, TINY, summary_of
from lightning.pytorch.callbacks import Callback
from PIL import Image

from diffusion_lab.assembly.objects import build_model, build_pipeline
from diffusion_lab.assembly.pipeline import Generator, Pipeline
from diffusion_lab.common.images import to_uint8
from diffusion_lab.common.labels import Classes
from diffusion_lab.common.randomness import SampleNoise
from diffusion_lab.compute.device import float32_precision, float32_products
from diffusion_lab.metrics.extractor import EfficientNetLite0
from diffusion_lab.training.callbacks import SampleGrid
from diffusion_lab.training.callbacks.evaluation import denoising


class Shades(Generator):
    """Draws a pixel for each sample: the class, in units of a hundredth of all classes."""

    def __init__(self, classes: int):
        self.kind = Classes.numbered(classes)

    @property
    def known(self):
        return self.kind

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
    renamed = ["callbacks.evaluation=null", "~callbacks.sample_grid", "logger=none"]
    ours = "_target_:diffusion_lab.training.callbacks"
    renamed.append(f"+callbacks.mine={{{ours}.SampleEvaluation,seed:5}}")
    renamed.append(f"+callbacks.pictures={{{ours}.SampleGrid}}")
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


@pytest.mark.long
def test_samples_in_other_numbers_of_steps_are_measured_at_the_end(lab, tmp_path):
    also = [*FAST, "callbacks.evaluation.also_steps=[5]", "callbacks.weight_averaging=null"]
    lab.done("train", *EVALUATED, *also, "run_dir=run")
    summary = summary_of(tmp_path / "run")
    (record,) = summary["at_other_steps"]
    assert summary["sampling"]["sampler"]["steps"] == 3
    assert record["sampling"]["sampler"]["steps"] == 5
    assert record["sampling"] | {"sampler": summary["sampling"]["sampler"]} == summary["sampling"]
    (fid,) = (name for name in record["metrics"] if name.startswith("fid/"))
    assert record["metrics"][fid] != summary["metrics"][fid]
    measured = lab.result("evaluate", "run=run", "sampler.steps=5")
    assert measured[fid] == pytest.approx(record["metrics"][fid])


def pipeline_of(steps: int) -> Pipeline:
    """A pipeline whose network is not trained, but says something."""
    cfg = assembled("sampler=ddim", f"sampler.steps={steps}")
    torch.manual_seed(0)
    model = build_model(cfg, (1, 8, 8), Classes.numbered(4))
    for parameter in model.denoiser.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return build_pipeline(cfg, model, Classes.numbered(4))


def test_a_strip_goes_from_noise_to_the_sample():
    pipeline, ids = pipeline_of(8), range(3)
    strips = denoising(pipeline, ids, seed=5, columns=5)
    assert strips.shape == (6, 5, 1, 8, 8)
    noisy, estimates = strips.unflatten(0, (3, 2)).unbind(1)  # (3, 5, 1, 8, 8) each
    samples = pipeline(ids, 5)
    assert torch.equal(noisy[:, -1], samples)
    assert torch.equal(estimates[:, -1], samples)
    noise = SampleNoise(5, ids, "cpu")((1, 8, 8))
    sampler, schedule = pipeline.sampler, pipeline.schedule
    levels, denoise = sampler.levels(schedule), pipeline.bound(pipeline.labels(ids))
    with torch.inference_mode():
        states = [levels[0].sigma * noise]
        states += sampler.walk(denoise, states[0], levels, schedule, torch.randn_like)
        for column, step in enumerate((0, 2, 5, 7)):  # of the eight calls
            here = levels[step]
            unit = states[step] / (here.alpha**2 + here.sigma**2).sqrt()
            assert torch.equal(noisy[:, column], to_uint8(unit))
            assert torch.equal(estimates[:, column], to_uint8(denoise(states[step], here).x0))


def test_a_strip_of_few_calls_is_short():
    assert denoising(pipeline_of(2), range(1), 0, columns=10).shape[:2] == (2, 3)


def test_a_strip_is_drawn_beside_the_samples(finished_run):
    pictures = {"denoising_0000004.png", "step_0000002.png", "step_0000004.png"}
    assert {path.name for path in (finished_run / "samples").iterdir()} == pictures
    with Image.open(finished_run / "samples/denoising_0000004.png") as strip:
        cells = 2 + 4 * (8 + 2), 2 + 8 * (8 + 2)  # three calls and the sample; two rows of each
        assert strip.size == (2 * cells[0], 2 * cells[1])


@pytest.mark.slow
def test_points_in_the_plane_have_no_strip(lab, tmp_path):
    few = ["trainer.max_steps=2", "batch_size=8", "logger=none", "run_dir=run"]
    lab.done("train", "experiment=toy/two_moons", "trainer.accelerator=cpu", *few)
    assert [path.name for path in (tmp_path / "run/samples").iterdir()] == ["step_0000002.png"]


@pytest.mark.slow
def test_a_profile_has_a_trace_and_the_operators(lab, tmp_path):
    profile = "_target_:diffusion_lab.training.callbacks.OperatorProfile,skip:1,steps:2"
    profiled = [f"+callbacks.operator_profile={{{profile}}}", "micro_batch_size=4"]
    err = lab.done("train", *QUICK, *profiled, "run_dir=run")
    folder = tmp_path / "run/profile"
    events = json.loads((folder / "trace_rank0.json").read_text())["traceEvents"]
    names = {event["name"] for event in events}
    steps = {name for name in names if name.startswith("ProfilerStep")}
    assert steps == {"ProfilerStep#2", "ProfilerStep#3"}
    assert "aten::addmm" in names
    table = (folder / "operators_rank0.md").read_text().splitlines()[2:]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table]
    milliseconds = [float(ms) for _, _, ms, _ in rows]
    assert milliseconds == sorted(milliseconds, reverse=True)
    assert sum(float(share.split()[0]) for *_, share in rows) == pytest.approx(100, abs=3)
    # a step has two micro-batches, and the optimiser takes it once
    calls = {name.strip("`"): float(count) for name, count, _, _ in rows}
    assert calls["Optimizer.step#AdamW.step"] == 1
    assert "aten::addmm" in err


@pytest.mark.long
def test_overfitting_takes_the_same_images_in_every_step(lab, tmp_path):
    common = [*(each for each in QUICK if each != "+debug=fast"), "data.flip=true"]
    common += ["+debug=overfit", *SEEN, "data.validate_on=20", "batch_size=8", "micro_batch_size=4"]
    lab.done("train", *common, "trainer.max_steps=2", "run_dir=run")
    lab.done("train", "resume=run", "trainer.max_steps=4")
    steps = seen(tmp_path / "seen")
    assert sorted(steps) == [0, 1, 2, 3]
    assert len(set(steps[0])) == 8
    assert all(images == steps[0] for images in steps.values())


@pytest.mark.slow
def test_the_other_ways_of_debugging_end_with_a_summary(lab, tmp_path):
    common = [*(each for each in TINY if each != "+debug=fast"), "logger=none"]
    common += ["sampler.steps=3", "metrics.num_samples=16", "metrics.reference_size=64"]
    summaries = []
    for name in ("profile", "limit"):
        lab.done("train", *common, f"+debug={name}", f"run_dir={name}")
        summaries.append(summary_of(tmp_path / name))
    profiled, limited = summaries
    assert (tmp_path / "profile/profile/trace_rank0.json").exists()
    assert not any(key.startswith("fid") for key in profiled["metrics"])
    assert any(key.startswith("fid/") for key in limited["metrics"])
    assert limited["images_seen"] == 5 * 128


EARLY = "lightning.pytorch.callbacks.EarlyStopping,monitor:val/loss,stopping_threshold:1e6"
SUMMARY = "+callbacks.shown._target_=lightning.pytorch.callbacks.ModelSummary"


class Satisfied(Callback):
    """Ends a run after a step."""

    def __init__(self, step: int):
        self.step = step

    def on_train_batch_end(self, trainer, *_):
        trainer.should_stop = trainer.global_step >= self.step


@pytest.mark.parametrize(
    ("callback", "arguments", "ended_by", "steps"),
    [
        (EARLY, [], "EarlyStopping", 2),
        (EARLY, [SUMMARY], "EarlyStopping", 2),
        (f"{__name__}.Satisfied,step:3", [], "Satisfied", 3),
        (f"{__name__}.Satisfied,step:4", [], None, 4),
    ],
)
def test_a_run_that_a_callback_ends_early_says_so(
    lab, tmp_path, callback, arguments, ended_by, steps
):
    own = f"+callbacks.early={{_target_:{callback}}}"
    err = lab.done("train", *QUICK, own, *arguments, "run_dir=run")
    summary = summary_of(tmp_path / "run")
    assert (summary["finished"], summary["steps"], summary["ended_by"]) == (True, steps, ended_by)
    said = [line for line in err.splitlines() if " early" in line]
    assert len(said) == (ended_by is not None)
    for line in said:
        assert_names(line, ended_by, f"step {steps} of 4")


def test_a_time_limit_is_no_callback_that_ends_a_run_early(lab, tmp_path):
    lab.done(
        "train", *QUICK, SUMMARY, "trainer.max_steps=99999", "trainer.max_time=0.1s", "run_dir=run"
    )
    summary = summary_of(tmp_path / "run")
    assert summary["steps"] < 99999
    assert summary["ended_by"] is None


# ----------------------------------------------------------------------------------------------
# the precision of float32 products


@pytest.mark.slow
def test_the_precision_of_products_is_set_for_a_run_and_kept(lab, tmp_path):
    before = float32_precision()
    for precision in ("medium", "highest", "null"):
        chosen = [f"matmul_precision={precision}", f"run_dir=of_{precision}", "trainer.max_steps=1"]
        lab.done("train", *QUICK, *chosen)
        assert float32_precision() == before
        summary = summary_of(tmp_path / f"of_{precision}")
        tf32 = {"matmul_precision": precision, "convolutions_in_tf32": precision != "highest"}
        expected = before if precision == "null" else tf32
        assert {key: summary[key] for key in before} == expected


def test_features_are_in_float32_whatever_a_run_has_chosen():
    extractor = EfficientNetLite0()
    extractor.device = torch.device("cpu")
    with float32_products("medium"):
        with extractor.in_float32():
            assert float32_precision()["matmul_precision"] == "highest"
            assert not float32_precision()["convolutions_in_tf32"]
        assert float32_precision()["matmul_precision"] == "medium"
