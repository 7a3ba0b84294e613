"""Run folders record their format: those of the one before are read as today's, others refused."""

import numpy
import pytest
import torch
import yaml
from helpers.compositions import assembled
from helpers.paths import ROOT
from helpers.refusals import refused
from helpers.tiny_runs import summary_of
from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab import runs
from diffusion_lab.assembly.objects import known_loss
from diffusion_lab.diffusion.objective import Denoising
from diffusion_lab.diffusion.objective.loss import (
    Consistency,
    Distillation,
    MeanFlow,
    ScoreMatching,
    Shortcut,
    VelocityWeight,
)
from diffusion_lab.estimate.budget import Budget
from diffusion_lab.runs import migrate
from diffusion_lab.runs.files import FORMAT, WRITTEN_BY, Loader, load_record
from diffusion_lab.runs.folder import save_config


def test_a_configuration_is_read_back_without_its_format(tmp_path):
    save_config(tmp_path, OmegaConf.create({"seed": 3}))
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved[WRITTEN_BY] == {"format": FORMAT, "version": diffusion_lab.__version__}
    assert runs.load_config(tmp_path) == {"seed": 3}


@pytest.mark.parametrize(
    ("written_by", "version"),
    [({}, "0.1"), ({WRITTEN_BY: {"format": FORMAT + 1, "version": "9.8.7"}}, "9.8.7")],
)
def test_a_folder_of_another_format_is_refused_by_both_versions(tmp_path, written_by, version):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written_by | {"seed": 3}))
    with refused(f"diffusion-lab {version}", diffusion_lab.__version__):
        runs.load_config(tmp_path)


PLACE = "diffusion_lab.diffusion.objective."
FEW_STEPS = "few_steps/published/runs/backbone-dit_objective-{}_seed-0"
ADDED = "additions/published/runs/additions_{}/backbone-{}_seed-0"
PUBLISHED = {
    FEW_STEPS.format("mean_flow"): MeanFlow,
    FEW_STEPS.format("shortcut"): Shortcut,
    FEW_STEPS.format("ect"): Consistency,
    FEW_STEPS.format("consistency_distillation"): Distillation,
    ADDED.format("x0", "dit"): Denoising,
    ADDED.format("huber", "unet_small"): Denoising,
}


def as_before(cfg, **parts):
    """A configuration with its objective, and `parts` of it, as format 3 had them."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg))
    loss = cfg.objective.pop("loss")
    keys = ("weighting", "variance_loss", "uncertainty", "jump_loss", "score_loss", "huber")
    cfg.objective.update(dict.fromkeys(keys) | {"huber": loss.get("huber")} | parts)
    cfg.pop("loss_facts", None)
    return OmegaConf.merge(cfg, {"written_by": {"format": 3, "version": "0.2"}})


@pytest.mark.parametrize("folder", PUBLISHED)
def test_published_runs_have_the_loss_they_were_trained_by(folder):
    loss = known_loss(runs.load_config(ROOT / "experiments" / folder))
    assert type(loss) is PUBLISHED[folder]
    if "x0" in folder:
        assert isinstance(loss.weighting, VelocityWeight)
    assert ("huber" in folder) == (loss.huber == 5.4e-4)


@pytest.mark.parametrize(
    ("parts", "option"),
    [
        ({"score_loss": {"_target_": f"{PLACE}score_loss.ExactScoreMatching"}}, "exact"),
        ({"jump_loss": {"_target_": f"{PLACE}jump_loss.mean_flow.MeanFlow"}}, "mean_flow"),
        ({"variance_loss": {"_target_": f"{PLACE}variance_loss.Hybrid"}}, "variance"),
        ({"uncertainty": {"_target_": f"{PLACE}uncertainty.LearnedUncertainty"}}, "uncertainty"),
    ],
)
def test_each_part_of_the_loss_has_its_place(parts, option):
    parts |= {"weighting": {"_target_": f"{PLACE}weighting.SNR"}}
    loss = known_loss(migrate.config(as_before(assembled(), **parts)))
    assert isinstance(loss, ScoreMatching) == (option == "exact")
    assert isinstance(loss, MeanFlow) == (option == "mean_flow")
    assert (loss.weighting is not None) == (option != "mean_flow")
    assert (loss.variance is not None) == (option == "variance")
    assert (getattr(loss, "uncertainty", None) is not None) == (option == "uncertainty")


@pytest.mark.long
def test_a_run_of_before_draws_and_is_resumed_and_one_of_a_loss_that_is_gone_draws(lab, run_folder):
    def draw():
        return lab.drawn("run=run", "num_samples=4")["images"]

    images = draw()
    saved = OmegaConf.load(run_folder / "config.yaml")
    gone = OmegaConf.merge(saved, {"objective": {"loss": {"_target_": f"{PLACE}loss.Gone"}}})
    OmegaConf.save(gone, run_folder / "config.yaml")
    assert numpy.array_equal(draw(), images)
    (run_folder / "config.yaml").write_text(OmegaConf.to_yaml(as_before(saved)))
    assert numpy.array_equal(draw(), images)
    steps = summary_of(run_folder)["steps"]
    lab.done("train", "resume=run", f"trainer.max_steps={steps + 1}")
    assert OmegaConf.load(run_folder / "config.yaml").written_by.format == 4


def test_learned_weights_of_a_checkpoint_get_their_names():
    weight, other = torch.ones(2), torch.zeros(2)
    state = {"objective.uncertainty.weight": weight, "denoiser.x": other}
    content = {"state_dict": state, "current_model_state": dict(state), "averages": {"1": {}}}
    for _ in range(2):  # those of today stay
        migrate.checkpoint(content)
        for key in ("state_dict", "current_model_state"):
            assert content[key] == {
                "denoiser.x": other,
                "objective.loss.uncertainty.weight": weight,
            }


@pytest.mark.parametrize("written_by", [{"format": 3}, {"format": 4}])
def test_a_budget_of_before_has_its_place(tmp_path, written_by):
    budget = {"_target_": "diffusion_lab.profiling.budget.Budget", "images": 8}
    OmegaConf.save({"budget": budget, "written_by": written_by}, tmp_path / "config.yaml")
    assert load_record(tmp_path).budget == budget | {"_target_": f"{Budget.__module__}.Budget"}


TEXTS = [
    *("1e3", "1e-3", "1.5e3", "-1.e-4", ".5e+3", "1.0e-05", "1e3x", "e3", "1.2.3e4", "${a.b}"),
    *("08", "012", "0x1e3", "1_000", "12", "1:30", "12:30:45", ".", ".inf", "-.INF", "'1e3'"),
    *("2024-01-01", "2024-01-01T10:00:00", "on", "yes", "~", "null", "[1,2e4,{b:c}]"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_read_as_omegaconf_reads_it(text):
    ours = yaml.load(f"x: {text}", Loader)
    theirs = OmegaConf.to_container(OmegaConf.create(f"x: {text}"))
    assert repr(ours) == repr(theirs)


def test_a_key_may_not_stand_twice():
    with pytest.raises(ValueError, match="twice"):
        yaml.load("a: {b: 1, b: 2}", Loader)
