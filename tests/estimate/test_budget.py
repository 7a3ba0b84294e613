"""Budgets make runs equal and are saved with the run; contradictions are refused."""

from pathlib import Path

import pytest
import yaml
from helpers.compositions import composed
from helpers.paths import ROOT
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import PLAIN, rows, summary_of
from hydra import compose, initialize_config_dir

from diffusion_lab.assembly.costs import counted, image_facts, sampling_calls
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.estimate.budget import ENDLESS, Budget, images_for, with_budget
from diffusion_lab.runs.files import load_record

QUICK = [*PLAIN, "callbacks.evaluation=null", "callbacks.sample_grid=null"]
NOTHING = {"reference": None, "by": "macs", "tolerance": 0.02, "images": None, "seconds": None}
EXPERIMENTS = ROOT / "experiments"
RUNS = EXPERIMENTS / "unet_vs_dit/published/runs"


def budget(**chosen) -> Budget:
    return Budget(**(NOTHING | {"solved": None} | chosen))


def test_lengths():
    limits = {"trainer.max_steps": 8, "trainer.max_time": "null"}
    assert budget(images=1000).length(128) == limits
    assert budget(images=1024).length(128) == limits
    assert budget(seconds=93_784).length(128) == {
        "trainer.max_steps": ENDLESS,
        "trainer.max_time": "'01:02:03:04'",
    }
    assert budget(reference="unet").length(128) == {}


@pytest.mark.parametrize(
    "options", [["backbone=dit", "alignment=irepa"], ["experiment=toy/score_matching"]]
)
def test_flops_that_are_not_all_counted_are_refused(options):
    with refused("budget.flops", "budget.images="):
        images_for(1e12, composed("train", "name=x", *options), None)


@pytest.mark.long
@pytest.mark.parametrize(
    ("guidance", "scale", "calls"),
    [
        ("classifier_free", None, 4),  # Heun's two calls, with labels and without
        ("classifier_free", 1, 2),
        ("classifier_free", 0, 2),
        ("none", None, 2),
    ],
)
def test_a_teacher_is_counted_as_its_own_guidance_asks_it(monkeypatch, guidance, scale, calls):
    theirs = composed("train", "name=x", "data=cifar10", f"guidance={guidance}").copy()
    monkeypatch.setattr("diffusion_lab.estimate.budget.load_diffusion_config", lambda _: theirs)
    student = ["objective=consistency_distillation", "schedule=edm", "objective.teacher.run=t"]
    given = "null" if scale is None else scale
    cfg = composed("train", "name=x", "backbone=dit", *student, f"objective.teacher.scale={given}")
    cost = 2 * 1000 * (images_for(1e12, cfg, 1000))
    alone = counted(cfg, image_facts(cfg)).passes
    assert 1e12 / cost == pytest.approx(alone + calls, rel=1e-3)


@pytest.mark.long
def test_flops_are_those_of_the_network_that_is_trained_and_of_its_teacher(monkeypatch):
    matched = ["budget=params", "budget.reference=unet_small", "budget.flops=1e15"]
    asked = ["name=x", "backbone=dit", *matched]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = with_budget(compose("train", overrides=asked, return_hydra_config=True), asked)
    cost = counted(cfg, image_facts(cfg))
    images = cfg.trainer.max_steps * cfg.batch_size
    assert 2 * cost.macs * cost.passes * images == pytest.approx(1e15, rel=0.01)
    theirs = composed("train", "name=x", "data=cifar10", "guidance=none").copy()
    monkeypatch.setattr("diffusion_lab.estimate.budget.load_diffusion_config", lambda _: theirs)
    student = ["objective=consistency_distillation", "schedule=edm", "objective.teacher.run=t"]
    cfg = composed("train", "name=x", "backbone=dit", *student, "objective.teacher.scale=null")
    own, teacher = counted(cfg, image_facts(cfg)), counted(theirs, image_facts(cfg)).macs
    assert own.macs != teacher
    each = 2 * (own.macs * own.passes + 2 * teacher)  # Heun's two calls
    assert images_for(1e15, cfg, None) == pytest.approx(1e15 / each, rel=1e-3)


def test_a_network_that_embeds_labels_is_sampled_as_others():
    cfg = composed("train", "conditioning=raw_labels", "guidance=classifier_free", "sampler=euler")
    cfg = cfg.copy()
    cfg.sampler.steps = 10
    assert sampling_calls(cfg, image_facts(composed("train", "name=x"))) == 20


@pytest.mark.slow
def test_a_run_as_reference_is_measured_on_the_data_to_train_on(lab, run_folder):
    here = ["data=cifar10", "device=meta"]
    sized = ["backbone=mlp", "budget=params", "budget.reference=run", "budget.tolerance=0.2"]
    run, own = (lab.result("profile", *each, *here)["params"] for each in (["run=run"], sized))
    assert own == pytest.approx(run, rel=0.2)


@pytest.mark.slow
def test_what_is_solved_is_in_the_run_which_reopens_without_solving(lab, tmp_path, monkeypatch):
    chosen = ["backbone=dit", "budget=macs", "budget.reference=mlp", "budget.tolerance=0.1"]
    err = lab.done("train", *QUICK, *chosen, "run_dir=run")
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    solved = dict(each.split("=") for each in config["budget"]["solved"])
    assert_names(err, *config["budget"]["solved"])
    for key, value in solved.items():
        assert config["backbone"][key.removeprefix("backbone.")] == int(value)
    counted = {}
    for name, asked in {"dit": ["run=run"], "mlp": ["backbone=mlp", QUICK[0]]}.items():
        counted[name] = lab.result("profile", *asked, "device=meta")["macs"]
    assert counted["dit"] == pytest.approx(counted["mlp"], rel=0.1)
    monkeypatch.setattr("diffusion_lab.estimate.budget.find_match", None)
    lab.done("train", "resume=run", "trainer.max_steps=5")


@pytest.mark.slow
def test_seconds_end_a_run(lab, tmp_path):
    asked = [*(a for a in QUICK if a != "+debug=fast"), "data.validation_size=20", "batch_size=8"]
    asked += ["trainer.log_every_n_steps=1", "backbone=mlp", "lr_schedule=cosine", "run_dir=run"]
    lab.done("train", *asked, "budget=seconds", "budget.seconds=2")
    summary = summary_of(tmp_path / "run")
    assert summary["finished"]
    assert 1.5 < summary["wall_seconds"] < 10
    rates = [row["train/lr"] for row in rows(tmp_path / "run") if "train/lr" in row]
    assert rates[-1] < 0.2 * max(rates)  # the schedule follows the clock


@pytest.mark.long
def test_images_make_steps_of_any_batch(lab, tmp_path):
    for batch, steps in ((8, 4), (16, 2)):
        asked = ["backbone=mlp", "budget=images", "budget.images=32", f"batch_size={batch}"]
        lab.done("train", *QUICK, *asked, f"run_dir=run{batch}")
        summary = summary_of(tmp_path / f"run{batch}")
        assert (summary["steps"], summary["images_seen"]) == (steps, 32)


def assert_costs_as_recorded(folder: Path) -> None:
    summary, cfg = summary_of(folder), load_record(folder)
    cost = counted(cfg, image_facts(cfg))
    assert (cost.parameters, cost.macs) == (summary["parameters"], summary["macs"]), folder


@pytest.mark.parametrize("backbone", ["dit", "unet_small"])
def test_a_published_network_costs_what_its_summary_says(backbone):
    assert_costs_as_recorded(RUNS / f"backbone-{backbone}_seed-0")


@pytest.mark.slow
def test_all_published_networks_cost_what_their_summaries_say():
    networks = {}
    for path in sorted(EXPERIMENTS.glob("*/published*/**/summary.json")):
        summary, cfg = summary_of(path.parent), load_record(path.parent)
        if summary.get("macs") and "run" not in (cfg.get("first_stage") or {}):
            key = str(cfg.backbone), str(cfg.conditioning), summary["macs"], summary["parameters"]
            networks[key] = path.parent
    assert len(networks) > 20
    for folder in networks.values():
        assert_costs_as_recorded(folder)


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["dit", "unet_small", "mamba2"])
def test_a_budget_finds_the_size_of_a_published_network(backbone):
    saved = load_record(RUNS / f"backbone-{backbone}_seed-0").budget
    overrides = [
        *("name=x", "data=fashion_mnist", f"backbone={backbone}", f"budget={saved.by}"),
        *(f"budget.reference='{saved.reference}'", f"budget.tolerance={saved.tolerance}"),
        f"budget.images={saved.images}",
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = with_budget(compose("train", overrides), overrides)
    solved = [each for each in saved.solved if each.startswith("backbone.")]
    assert solved
    assert [each for each in cfg.budget.solved if each.startswith("backbone.")] == solved
