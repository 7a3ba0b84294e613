"""Runs that learn from another run: by its pairs of noise and sample, or by asking it."""

import json
import shutil

import pytest
import torch
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, checkpoint_of, same, summary_of
from omegaconf import OmegaConf

from diffusion_lab import runs
from diffusion_lab.assembly.objects import build_images, build_model
from diffusion_lab.assembly.pipeline.diffusion import PAIRS
from diffusion_lab.common.randomness import SampleNoise, mix_seed
from diffusion_lab.families.diffusion.teacher import Teacher
from diffusion_lab.runs.current import sha256_of

TEACHER = [*QUICK, "optimizer.lr=0.01", "sampler=heun", "run_dir=teacher"]
COUNT = 12
STUDENT = [*QUICK, "objective=reflow", "objective.teacher.run=teacher"]
STUDENT += [f"objective.teacher.count={COUNT}", "objective.teacher.steps=2"]
STUDENT += ["objective.teacher.cache_dir=pairs", "run_dir=student"]
DISTILLED = [
    *QUICK,
    *("objective=consistency_distillation", "objective.teacher.run=teacher"),
    *("objective.teacher.scale=2", "run_dir=student"),
]


@pytest.fixture
def teacher(trained_once, tmp_path):
    """A copy of a trained run."""
    folder = trained_once("train", *TEACHER) / "teacher"
    return shutil.copytree(folder, tmp_path / "teacher")


@pytest.mark.slow
def test_a_student_trains_on_its_teacher_s_pairs_and_reopens_without_it(
    lab, refusal, teacher, tmp_path
):
    lab.done("train", *STUDENT)
    (path,) = (tmp_path / "pairs").iterdir()
    kept = torch.load(path, weights_only=True)["tensors"]
    assert kept["pairs"].shape == (COUNT, 2, 8, 8)
    assert kept["labels"].tolist() == [i % 4 for i in range(COUNT)]
    noise = SampleNoise(mix_seed(0, PAIRS), range(COUNT))((1, 8, 8))
    assert torch.equal(kept["pairs"][:, 1:], noise)
    written = path.stat().st_mtime_ns
    saved = runs.load_config(tmp_path / "student")
    assert saved.objective.teacher.sha256 == sha256_of(teacher)
    summary = summary_of(tmp_path / "student")
    assert summary["teacher_images"] == 4 * 8
    assert summary["teacher_calls"] == COUNT * 3  # Heun's last step is one call
    assert summary["teacher_macs"] == summary["macs"]
    checkpoint = checkpoint_of(tmp_path / "student")
    assert not [name for name in checkpoint["current_model_state"] if "teacher" in name]

    lab.done("train", *STUDENT[:-1], "run_dir=again", "seed=1")
    assert path.stat().st_mtime_ns == written, "the pairs are drawn once"

    lab.done("train", f"resume={teacher}", "trainer.max_steps=5")
    longer = ["resume=student", "trainer.max_steps=6"]
    assert_names(refusal("train", *longer), "objective.teacher.run=teacher", "sha256")

    shutil.rmtree(teacher)
    for command in (["sample", "num_samples=4"], ["evaluate"], ["export", "output=shared"]):
        lab.done(command[0], "run=student", *command[1:])
    lab.done("sample", "run=shared", "num_samples=4", "output=drawn")
    assert_names(refusal("train", *longer), "objective.teacher.run=teacher")


@pytest.mark.slow
@pytest.mark.parametrize("student", [STUDENT, DISTILLED], ids=["pairs", "distilled"])
def test_a_student_resumes_exactly(lab, teacher, tmp_path, student):
    lab.done("train", *student, "trainer.max_steps=2")
    lab.done("train", "resume=student", "trainer.max_steps=4")
    lab.done("train", *student[:-1], "run_dir=whole")
    whole, parts = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("whole", "student"))
    assert same(whole, parts)
    assert not [name for name in whole if "teacher" in name]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("objective.teacher.run=nowhere", "objective.teacher.run=nowhere"),
        ("augmentation=non_leaky", "augmentation=none"),
        ("conditioning=none", "conditioning"),
        ("data.fraction=0.5", "data.fraction"),  # it draws the images
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(refusal, teacher, tmp_path, change, named):
    key = change.split("=")[0]
    changed = [word for word in STUDENT if not word.startswith(f"{key}=")]
    assert_names(refusal("train", *changed, change), named)
    assert not (tmp_path / "student").exists()


def test_a_consistency_model_and_another_family_teach_nothing(refusal, teacher):
    cfg = OmegaConf.load(teacher / "config.yaml")
    cfg.objective.loss = {"_target_": "diffusion_lab.diffusion.objective.loss.Consistency"}
    cfg.sampler = {"_target_": "diffusion_lab.diffusion.sampler.FewStep", "steps": 2}
    cfg.sampler.time_grid = {"_target_": "diffusion_lab.diffusion.sampler.UniformGrid"}
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refusal("train", *DISTILLED), "objective.teacher.run=teacher", "objective=edm")
    cfg.family = "gan"
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refusal("train", *STUDENT), "teacher", "diffusion model")


@pytest.mark.long
def test_doctor_times_the_steps_of_a_student_and_its_teacher(lab, teacher, tmp_path):
    code, out, err = lab("doctor", *DISTILLED, "json=true")
    assert code in (0, 1), err
    result = json.loads(out.splitlines()[-1])
    assert result["facts"]["training_seconds"] > 0
    assert result["facts"]["memory_bytes"] > 0
    said = {check["name"]: check["message"] for check in result["checks"]}
    assert "sampler.steps" not in said["sampling"], "two steps are what such a model is for"
    assert not (tmp_path / "student").exists()


def test_no_sample_has_the_noise_of_a_pair_with_its_seed():
    seeds = (mix_seed(0, PAIRS), 0)
    drawn, measured = (SampleNoise(seed, range(COUNT))((1, 8, 8)) for seed in seeds)
    assert not any(torch.equal(a, b) for a in drawn for b in measured)


@pytest.mark.long
def test_a_sampler_with_fresh_noise_gives_no_pairs(refusal, teacher):
    cfg = runs.load_config(teacher)
    data = build_images(cfg)
    model = build_model(cfg, data.image_shape, data.labels)
    assert Teacher.opened(model, data, cfg) is None
    text = (teacher / "config.yaml").read_text()
    (teacher / "config.yaml").write_text(text.replace("churn: 0.0", "churn: 40.0"))
    assert_names(refusal("train", *STUDENT), "Heun", "unipc")


@pytest.mark.slow
@pytest.mark.parametrize("student", [STUDENT, DISTILLED], ids=["pairs", "distilled"])
def test_two_ranks_train_the_student_of_one(lab, teacher, tmp_path, student):
    exact = ["trainer.precision=32-true", "micro_batch_size=2"]
    lab.done("train", *student, *exact)
    several = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "run_dir=two"]
    changed = [word for word in student if "cache_dir" not in word and "run_dir" not in word]
    others = ["objective.teacher.cache_dir=others"] if student == STUDENT else []
    lab.done("train", *changed, *several, *exact, *others)
    if others:
        first, second = (
            torch.load(next((tmp_path / name).iterdir()), weights_only=True)["tensors"]
            for name in ("pairs", "others")
        )
        torch.testing.assert_close(first, second)
    one, two = (checkpoint_of(tmp_path / name)["state_dict"] for name in ("student", "two"))
    torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_a_distilled_model_reopens_without_its_teacher(lab, refusal, teacher, tmp_path):
    lab.done("train", *DISTILLED)
    summary = summary_of(tmp_path / "student")
    assert summary["teacher_calls"] == 4 * 8 * 2 * 2  # two of Heun, each with labels and without
    other = [*DISTILLED[:-1], "run_dir=new", "schedule=cosine"]
    assert_names(refusal("train", *other), "schedule")
    lab.done("train", f"resume={teacher}", "trainer.max_steps=5")
    assert_names(refusal("train", "resume=student", "trainer.max_steps=6"), "sha256")
    shutil.rmtree(teacher)
    lab.done("sample", "run=student", "num_samples=4", "output=drawn")


@pytest.mark.parametrize(
    ("kind", "named"), [("PlusPlusGuidance", "CFG++"), ("ClassifierGuidance", "classifier")]
)
def test_guidance_that_no_student_can_follow_is_refused(refusal, teacher, kind, named):
    cfg = OmegaConf.load(teacher / "config.yaml")
    cfg.guidance._target_ = f"diffusion_lab.diffusion.guidance.{kind}"
    if kind == "ClassifierGuidance":
        cfg.guidance.classifier = "guide.safetensors"
    grid = cfg.sampler.time_grid
    cfg.sampler = {"_target_": "diffusion_lab.diffusion.sampler.Euler", "steps": 3}
    cfg.sampler.time_grid = grid
    OmegaConf.save(cfg, teacher / "config.yaml")
    assert_names(refusal("train", *DISTILLED, "objective.teacher.scale=0.6"), named)
