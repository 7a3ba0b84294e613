"""Models of few steps are trained and sampled from the command line."""

import pytest
from helpers.pairs import first_fast
from helpers.refusals import assert_names
from helpers.tiny_runs import QUICK, rows
from omegaconf import OmegaConf

from diffusion_lab import runs

PLAIN = [*QUICK, "optimizer.lr=0.01", "lr_schedule.warmup_images=0"]
OBJECTIVES = {
    "mean_flow": ["objective=mean_flow", "objective.loss.guidance=1.5"],
    "shortcut": ["objective=shortcut"],
    "improved_mean_flow": ["objective=improved_mean_flow", "objective.loss.guidance=8"],
    "alpha_flow": ["objective=alpha_flow", "objective.loss.end_images=24"],
    "lagrangian": ["objective=lagrangian"],
    "ect": ["objective=ect", "schedule=edm", "objective.loss.stage_images=16"],
}
JUMPS = "diffusion_lab.diffusion.objective.loss."


@pytest.mark.parametrize("name", first_fast(OBJECTIVES))
def test_a_run_is_sampled_by_its_own_sampler(lab, tmp_path, name):
    lab.done("train", *PLAIN, *OBJECTIVES[name], "run_dir=run", "trainer.max_steps=1")
    sampler = runs.load_config(tmp_path / "run").sampler._target_.rpartition(".")[2]
    assert sampler == ("FewStep" if name == "ect" else "FlowMap")
    lab.done("sample", "run=run", "num_samples=4", "output=drawn", "sampler.steps=1")


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


@pytest.mark.slow
def test_jumps_and_solvers_are_swept_on_one_axis_of_calls(lab):
    lab.done("train", *PLAIN, *OBJECTIVES["mean_flow"], "run_dir=run")
    sweep = ["sampler=few_step,flow_map,unipc", "steps=1,2", "batch_size=16"]
    found = lab.result("sample-sweep", "run=run", *sweep)["rows"]
    calls = {(row["sampler"], row["steps"]): row["calls"] for row in found}
    samplers = ("few_step", "flow_map", "unipc")
    assert calls == {(name, str(n)): n for name in samplers for n in (1, 2)}


@pytest.mark.slow
def test_jumps_that_a_shortcut_model_never_made_are_named(lab):
    err = lab.done("train", *PLAIN, *OBJECTIVES["shortcut"], "sampler.steps=3", "run_dir=run")
    assert "sampler.steps=2" in err
    even = ["sampler/time_grid=uniform", "sampler.time_grid.sigma_min=0"]
    for steps, more, said in ((6, [], "sampler.steps=4"), (16, [], even[1]), (16, even, None)):
        err = lab.done("sample", "run=run", f"sampler.steps={steps}", *more)
        assert (said is None) == ("objective/loss=shortcut" not in err)
        assert (said or "") in err


@pytest.mark.slow
@pytest.mark.parametrize("name", OBJECTIVES)
def test_bf16_trains_close_to_float32(lab, tmp_path, name):
    losses = []
    for precision in ("32-true", "bf16-mixed"):
        run = ["optimizer.lr=1e-3", f"trainer.precision={precision}", f"run_dir={precision}"]
        common = [word for word in PLAIN if not word.startswith("optimizer.lr")]
        lab.done("train", *common, *OBJECTIVES[name], *run)
        losses.append(
            [row["train/loss"] for row in rows(tmp_path / precision) if "train/loss" in row]
        )
    assert losses[1] == pytest.approx(losses[0], rel=0.05)
