"""Models of few steps are trained from the command line, resumed exactly, and on several ranks."""

import json

import pytest
import torch
from helpers.pairs import first_fast
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY, rows
from omegaconf import OmegaConf

from diffusion_lab import runs

PLAIN = [*TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
PLAIN += ["optimizer.lr=0.01", "lr_schedule.warmup_images=0"]
OBJECTIVES = {
    "mean_flow": ["objective=mean_flow", "objective.loss.guidance=1.5"],
    "shortcut": ["objective=shortcut"],
    "ect": ["objective=ect", "schedule=edm", "objective.loss.stage_images=16"],
}
TARGET = "denoiser.target.last.weight"
JUMPS = "diffusion_lab.diffusion.objective.loss."


def checkpoint_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["current_model_state"]


@pytest.mark.parametrize("name", first_fast(OBJECTIVES))
def test_a_resumed_run_is_the_unbroken_one_and_is_sampled_by_its_own_sampler(lab, tmp_path, name):
    common = [*PLAIN, *OBJECTIVES[name]]
    for folder, steps in (("whole", 4), ("parts", 2)):
        code, _, err = lab("train", *common, f"run_dir={folder}", f"trainer.max_steps={steps}")
        assert code == 0, err
    code, _, err = lab("train", "resume=parts", "trainer.max_steps=4")
    assert code == 0, err
    whole, parts = checkpoint_of(tmp_path / "whole"), checkpoint_of(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    for weight, value in whole.items():
        assert torch.equal(value, parts[weight]), weight
    assert (TARGET in whole) == (name != "ect")
    assert name == "ect" or whole[TARGET].abs().sum() > 0
    sampler = runs.load_config(tmp_path / "whole").sampler._target_.rpartition(".")[2]
    assert sampler == ("FewStep" if name == "ect" else "FlowMap")
    code, _, err = lab("sample", "run=whole", "num_samples=4", "output=drawn", "sampler.steps=1")
    assert code == 0, err


@pytest.mark.parametrize("command", ["likelihood", "encode"])
def test_a_solver_of_the_mean_is_refused_for_a_model_of_samples(refusal, run_folder, command):
    saved = OmegaConf.load(run_folder / "config.yaml")
    saved.objective.loss = {"_target_": JUMPS + "Consistency"}
    OmegaConf.save(saved, run_folder / "config.yaml")
    before = set(run_folder.rglob("*"))
    assert_names(refusal(command, "run=run", "device=cpu"), "consistency", "another objective")
    assert set(run_folder.rglob("*")) == before


def test_a_network_that_cannot_be_told_where_to_jump_is_refused(refusal, tmp_path):
    pytest.importorskip("diffusers")
    network = ["backbone=diffusers_model", "conditioning=raw_labels", "objective=shortcut"]
    network += [each for each in PLAIN if not each.startswith("backbone")]
    network += ["backbone.settings={block_out_channels:[8,8],norm_num_groups:4}", "run_dir=run"]
    assert_names(refusal("train", *network), "backbone")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["objective.teacher=somewhere"], "objective/teacher="),
        (["objective.loss=mean_flow"], "objective/loss="),
        (
            [*OBJECTIVES["mean_flow"], "objective.label_dropout=0"],
            "objective.label_dropout=0.1",
        ),
        (
            ["objective=mean_flow", "objective.loss.guidance=1.5", "conditioning=none"],
            "conditioning=class_label",
        ),
        ([*OBJECTIVES["ect"], "objective/prediction=x0"], "objective/prediction=edm"),
    ],
)
def test_what_does_not_fit_jumps_is_refused(refusal, tmp_path, overrides, said):
    assert said in refusal("train", *PLAIN, *overrides, "run_dir=run")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_objectives_and_backbones_are_swept_together(lab, tmp_path):
    plain = ["data.source._target_=helpers.tiny_data.TinyData", "data.validation_size=20"]
    plain += ["trainer.accelerator=cpu", "logger=none"]
    sweep = ["objective=mean_flow,ect", "backbone=unet,dit,mamba2", "+debug=fast"]
    code, _, err = lab("train", "-m", *plain, *sweep, "study_name=swept")
    assert code == 0, err
    summaries = [
        json.loads(path.read_text()) for path in (tmp_path / "outputs").rglob("summary.json")
    ]
    assert sorted(each["jumps"] for each in summaries) == [False] * 3 + [True] * 3
    assert all(each["finished"] and each["metrics"] for each in summaries)


@pytest.mark.slow
def test_jumps_and_solvers_are_swept_on_one_axis_of_calls(lab):
    code, _, err = lab("train", *PLAIN, *OBJECTIVES["mean_flow"], "run_dir=run")
    assert code == 0, err
    sweep = ["sampler=few_step,flow_map,unipc", "steps=1,2", "batch_size=16", "json=true"]
    code, out, err = lab("sample-sweep", "run=run", *sweep)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])["rows"]
    calls = {(row["sampler"], row["steps"]): row["calls"] for row in found}
    samplers = ("few_step", "flow_map", "unipc")
    assert calls == {(name, str(n)): n for name in samplers for n in (1, 2)}


@pytest.mark.slow
def test_jumps_that_a_shortcut_model_never_made_are_named(lab):
    code, _, err = lab("train", *PLAIN, *OBJECTIVES["shortcut"], "sampler.steps=3", "run_dir=run")
    assert code == 0, err
    assert "sampler.steps=2" in err
    even = ["sampler/time_grid=uniform", "sampler.time_grid.sigma_min=0"]
    for steps, more, said in ((6, [], "sampler.steps=4"), (16, [], even[1]), (16, even, None)):
        code, _, err = lab("sample", "run=run", f"sampler.steps={steps}", *more)
        assert code == 0, err
        assert (said is None) == ("objective/loss=shortcut" not in err)
        assert (said or "") in err


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_ranks_train_the_model_of_one(lab, tmp_path, name, strategy):
    exact = ["trainer.precision=32-true", "batch_size=8", "micro_batch_size=2"]
    common = [*PLAIN, *OBJECTIVES[name], *exact]
    code, _, err = lab("train", *common, "run_dir=one")
    assert code == 0, err
    several = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2"]
    code, _, err = lab("train", *common, *several, *exact, "run_dir=two")
    assert code == 0, err
    assert json.loads((tmp_path / "two/summary.json").read_text())["ranks"] == 2
    losses = [
        [row["train/loss"] for row in rows(tmp_path / run) if "train/loss" in row]
        for run in ("one", "two")
    ]
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    one, two = checkpoint_of(tmp_path / "one"), checkpoint_of(tmp_path / "two")
    for weight, value in one.items():
        torch.testing.assert_close(two[weight], value, rtol=1e-3, atol=1e-4, msg=weight)


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_trains_close_to_float32(lab, tmp_path, name):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        run = ["optimizer.lr=1e-3", f"trainer.precision={precision}", f"run_dir={precision}"]
        common = [word for word in PLAIN if not word.startswith("optimizer.lr")]
        code, _, err = lab("train", *common, *OBJECTIVES[name], *run)
        assert code == 0, err
        losses.append(
            [row["train/loss"] for row in rows(tmp_path / precision) if "train/loss" in row]
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
