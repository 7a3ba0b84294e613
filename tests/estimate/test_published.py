"""Published runs cost what their records say, and budgets find the sizes that they have."""

import json
from pathlib import Path

import pytest
from helpers.paths import ROOT
from hydra import compose, initialize_config_dir

from diffusion_lab.assembly.costs import counted, image_facts
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.estimate import budget
from diffusion_lab.runs.files import load_record

EXPERIMENTS = ROOT / "experiments"
RUNS = EXPERIMENTS / "unet_vs_dit/published/runs"


def assert_costs_as_recorded(folder: Path) -> None:
    summary, cfg = json.loads((folder / "summary.json").read_text()), load_record(folder)
    cost = counted(cfg, image_facts(cfg))
    assert (cost.parameters, cost.macs) == (summary["parameters"], summary["macs"]), folder


@pytest.mark.parametrize("backbone", ["dit", "unet_small"])
def test_a_published_network_costs_what_its_summary_says(backbone):
    assert_costs_as_recorded(RUNS / f"backbone-{backbone}_seed-0")


@pytest.mark.slow
def test_all_published_networks_cost_what_their_summaries_say():
    networks = {}
    for path in sorted(EXPERIMENTS.glob("*/published*/**/summary.json")):
        summary = json.loads(path.read_text())
        cfg = load_record(path.parent)
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
        cfg = budget.with_budget(compose("train", overrides), overrides)
    solved = [each for each in saved.solved if each.startswith("backbone.")]
    assert solved
    assert [each for each in cfg.budget.solved if each.startswith("backbone.")] == solved
