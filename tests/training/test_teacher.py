"""Runs that learn from another run: by its pairs of noise and sample, or by asking it."""

import json
import shutil

import pytest
import torch
from helpers.refusals import assert_names, sentence_of
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

from diffusion_lab import runs
from diffusion_lab.assembly.objects import build_datamodule, build_model
from diffusion_lab.common.randomness import SampleNoise, mix_seed
from diffusion_lab.families.diffusion.teacher import Teacher
from diffusion_lab.pipeline.diffusion import PAIRS
from diffusion_lab.runs.current import sha256_of

QUICK = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
TEACHER = [*QUICK, "optimizer.lr=0.01", "sampler=heun", "run_dir=teacher"]
COUNT = 12
STUDENT = [
    *QUICK,
    "objective=reflow",
    "objective.teacher.run=teacher",
    f"objective.teacher.count={COUNT}",
    "objective.teacher.steps=2",
    "objective.teacher.cache_dir=pairs",
    "run_dir=student",
]
DISTILLED = [
    *QUICK,
    "objective=consistency_distillation",
    "objective.teacher.run=teacher",
    "objective.teacher.scale=2",
    "run_dir=student",
]


@pytest.fixture
def teacher(trained_once, tmp_path):
    """A copy of a trained run."""
    folder = trained_once("train", *TEACHER) / "teacher"
    return shutil.copytree(folder, tmp_path / "teacher")


def train(lab, *arguments: str) -> str:
    code, out, err = lab("train", *arguments)
    assert code == 0, err
    return out + err


def refused(lab, *arguments: str) -> str:
    code, _, err = lab("train", *arguments)
    assert code == 2, err
    return sentence_of(err)


@pytest.mark.slow
def test_a_student_trains_on_its_teacher_s_pairs_and_reopens_without_it(lab, teacher, tmp_path):
    train(lab, *STUDENT)
    (path,) = (tmp_path / "pairs").iterdir()
    kept = torch.load(path, weights_only=True)["tensors"]
    assert kept["pairs"].shape == (COUNT, 2, 8, 8)
    assert kept["labels"].tolist() == [i % 4 for i in range(COUNT)]
    noise = SampleNoise(mix_seed(0, PAIRS), range(COUNT))((1, 8, 8))
    assert torch.equal(kept["pairs"][:, 1:], noise)
    written = path.stat().st_mtime_ns
    saved = runs.load_config(tmp_path / "student")
    assert saved.objective.teacher.sha256 == sha256_of(teacher)
    summary = json.loads((tmp_path / "student/summary.json").read_text())
    assert summary["teacher_images"] == 4 * 8
    assert summary["teacher_calls"] == COUNT * 3  # Heun's last step is one call
    assert summary["teacher_macs"] == summary["macs"]
    checkpoint = torch.load(tmp_path / "student/checkpoints/last.ckpt", weights_only=True)
    assert not [name for name in checkpoint["current_model_state"] if "teacher" in name]

    train(lab, *STUDENT[:-1], "run_dir=again", "seed=1")
    assert path.stat().st_mtime_ns == written, "the pairs are drawn once"

    shutil.rmtree(teacher)
    for command in (["sample", "num_samples=4"], ["evaluate"], ["export", "output=shared"]):
        code, _, err = lab(command[0], "run=student", *command[1:])
        assert code == 0, err
    code, _, err = lab("sample", "run=shared", "num_samples=4", "output=drawn")
    assert code == 0, err
    longer = ["resume=student", "trainer.max_steps=6"]
    assert_names(refused(lab, *longer), "objective.teacher.run=teacher")


@pytest.mark.slow
def test_a_student_of_pairs_resumes_exactly(lab, teacher, tmp_path):
    train(lab, *STUDENT, "trainer.max_steps=2")
    train(lab, "resume=student", "trainer.max_steps=4")
    train(lab, *STUDENT[:-1], "run_dir=whole")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "student")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())


@pytest.mark.slow
def test_two_ranks_distil_the_model_of_one(lab, teacher, tmp_path):
    exact = ["trainer.precision=32-true", "micro_batch_size=2"]
    train(lab, *DISTILLED, *exact)
    several = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "run_dir=two"]
    train(lab, *DISTILLED[:-1], *several, *exact)
    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("student", "two")
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_changed_teacher_is_refused(lab, teacher, tmp_path):
    train(lab, *STUDENT)
    train(lab, f"resume={teacher}", "trainer.max_steps=5")
    longer = refused(lab, "resume=student", "trainer.max_steps=6")
    assert_names(longer, "objective.teacher.run=teacher", "sha256")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("objective.teacher.run=nowhere", "objective.teacher.run=nowhere"),
        ("augmentation=non_leaky", "augmentation=none"),
        ("conditioning=none", "conditioning"),
        ("data.fraction=0.5", "data.fraction"),  # it draws the images
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(lab, teacher, tmp_path, change, named):
    key = change.split("=")[0]
    changed = [word for word in STUDENT if not word.startswith(f"{key}=")]
    assert_names(refused(lab, *changed, change), named)
    assert not (tmp_path / "student").exists()


def test_a_consistency_model_teaches_no_distillation(lab, teacher):
    cfg = OmegaConf.load(teacher / "config.yaml")
    cfg.objective.loss = {"_target_": "diffusion_lab.diffusion.objective.loss.Consistency"}
    cfg.sampler = {"_target_": "diffusion_lab.diffusion.sampler.FewStep", "steps": 2}
    cfg.sampler.time_grid = {"_target_": "diffusion_lab.diffusion.sampler.UniformGrid"}
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refused(lab, *DISTILLED), "objective.teacher.run=teacher", "objective=edm")


def test_a_teacher_of_another_family_is_refused(lab, teacher):
    cfg = OmegaConf.load(teacher / "config.yaml")
    cfg.family = "gan"
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refused(lab, *STUDENT), "teacher", "diffusion model")


def test_doctor_times_the_steps_of_a_student_and_its_teacher(lab, teacher, tmp_path):
    code, out, err = lab("doctor", *DISTILLED, "json=true")
    assert code in (0, 1), err
    result = json.loads(out.splitlines()[-1])
    assert result["facts"]["training_seconds"] > 0
    assert result["facts"]["memory_bytes"] > 0
    said = {check["name"]: check["message"] for check in result["checks"]}
    assert "sampler.steps" not in said["sampling"], "two steps are what such a model is for"
    assert not (tmp_path / "student").exists()


def test_no_sample_has_the_noise_of_a_pair_with_its_seed(lab, teacher, tmp_path):
    train(lab, *STUDENT)
    (file,) = (tmp_path / "pairs").iterdir()
    noise = torch.load(file, weights_only=True)["tensors"]["pairs"].chunk(2, 1)[1]
    measured = SampleNoise(0, range(COUNT))(noise.shape[1:])
    assert not any(torch.equal(a, b) for a in noise.float() for b in measured)


def test_a_sampler_with_fresh_noise_gives_no_pairs(lab, teacher):
    cfg = runs.load_config(teacher)
    data = build_datamodule(cfg)
    model = build_model(cfg, data.image_shape, data.labels)
    assert Teacher.opened(model, data, cfg) is None
    text = (teacher / "config.yaml").read_text()
    (teacher / "config.yaml").write_text(text.replace("churn: 0.0", "churn: 40.0"))
    assert_names(refused(lab, *STUDENT), "Heun", "unipc")


@pytest.mark.slow
def test_two_ranks_draw_the_same_pairs_and_train_the_same_student(lab, teacher, tmp_path):
    exact = ["trainer.precision=32-true", "micro_batch_size=2"]
    train(lab, *STUDENT, *exact)
    several = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "run_dir=two"]
    changed = [word for word in STUDENT if "cache_dir" not in word and "run_dir" not in word]
    train(lab, *changed, *several, *exact, "objective.teacher.cache_dir=others")
    first, second = (
        torch.load(next((tmp_path / name).iterdir()), weights_only=True)["tensors"]
        for name in ("pairs", "others")
    )
    torch.testing.assert_close(first, second)
    one, two = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("student", "two")
    )
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_distilled_model_resumes_exactly_and_reopens_without_its_teacher(lab, teacher, tmp_path):
    train(lab, *DISTILLED, "trainer.max_steps=2")
    train(lab, "resume=student", "trainer.max_steps=4")
    train(lab, *DISTILLED[:-1], "run_dir=whole")
    whole, parts = (
        torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
        for name in ("whole", "student")
    )
    assert whole.keys() == parts.keys()
    assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert not [name for name in whole if "teacher" in name]
    summary = json.loads((tmp_path / "student/summary.json").read_text())
    assert summary["teacher_calls"] == 4 * 8 * 2 * 2  # two of Heun, each with labels and without
    assert_names(refused(lab, *DISTILLED[:-1], "run_dir=new", "schedule=cosine"), "schedule")
    train(lab, f"resume={teacher}", "trainer.max_steps=5")
    assert_names(refused(lab, "resume=student", "trainer.max_steps=6"), "sha256")
    shutil.rmtree(teacher)
    code, _, err = lab("sample", "run=student", "num_samples=4", "output=drawn")
    assert code == 0, err


@pytest.mark.parametrize(
    ("kind", "named"), [("PlusPlusGuidance", "CFG++"), ("ClassifierGuidance", "classifier")]
)
def test_guidance_that_no_student_can_follow_is_refused(lab, teacher, kind, named):
    cfg = OmegaConf.load(teacher / "config.yaml")
    cfg.guidance._target_ = f"diffusion_lab.diffusion.guidance.{kind}"
    if kind == "ClassifierGuidance":
        cfg.guidance.classifier = "guide.safetensors"
    grid = cfg.sampler.time_grid
    cfg.sampler = {"_target_": "diffusion_lab.diffusion.sampler.Euler", "steps": 3}
    cfg.sampler.time_grid = grid
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refused(lab, *DISTILLED, "objective.teacher.scale=0.6"), named)
