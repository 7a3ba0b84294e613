"""The claims of a verdict: no test without spread, and no best among untested compositions."""

from dataclasses import asdict

import pytest
from helpers.fake_runs import NAME, UNET, fake_group, fake_run, said

from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.fairness import notes
from diffusion_lab.analysis.comparison.groups import runs_of
from diffusion_lab.analysis.comparison.measurements import judged_by
from diffusion_lab.analysis.comparison.table import CompositionTable
from diffusion_lab.analysis.comparison.verdict import verdicts
from diffusion_lab.metrics import Quantity

MAMBA = {"backbone": {"_target_": "diffusion_lab.backbone.Mamba2"}}
BETTER, WORSE = [100.0, 101.0, 99.0], [150.0, 152.0, 151.0]


def test_differences_without_spread_are_not_tested_and_said(tmp_path):
    # the FIDs differ by 0.1 in every seed, up to rounding
    fake_group(tmp_path, "dit", [100.3, 200.7, 300.9])
    fake_group(tmp_path, "unet", [100.4, 200.8, 301.0], config=UNET)
    answer, text = said(tmp_path)
    assert answer == (
        "Nothing is tested: DiT and UNet differ in FID by 0.1 in each of 3 seeds, which is not "
        "tested: are these copies, or blind to the seed?"
    )
    assert "p = " not in text


def test_equal_values_are_not_tested_beside_a_pair_that_is(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    fake_group(tmp_path, "unet", BETTER, config=UNET)
    fake_group(tmp_path, "mamba", WORSE, config=MAMBA)
    answer, text = said(tmp_path)
    # neither DiT nor UNet is best: their difference was not tested
    assert answer == (
        "2 of 2 pairs differ significantly in FID, but none is shown to be better than all others; "
        "1 other pair untested"
    )
    assert text.count("Holm") == 2
    assert "differ in FID by nothing in each of 3 seeds" in text


def test_values_that_are_all_the_same_are_equal_and_no_copies(tmp_path):
    """Shares of 0 in all seeds of both are no reason to suspect copied runs."""
    for name, config in (("dit", {}), ("unet", UNET)):
        fake_group(tmp_path, name, BETTER, config=config, metrics={f"recall/{NAME}": 0.0})
    answer, _ = said(tmp_path, "recall")
    assert answer == (
        "Nothing is tested: DiT and UNet are equal in Recall, 0, in each of 3 seeds, which is not "
        "tested"
    )


def test_the_best_of_those_that_were_tested_is_not_the_best_of_all(tmp_path):
    for width, fids in ((1, BETTER), (2, WORSE), (3, [151.0, 151.0, 152.0])):
        fake_group(tmp_path, f"w{width}", fids, config={"backbone": {"width": width}})
    fake_run(tmp_path / "w4", 20.0, config={"backbone": {"width": 4}})
    answer, text = said(tmp_path)
    assert answer == (
        "width=1 is better by FID than each of the other 2 that were tested, and nothing is said "
        "about width=4"
    )
    assert "width=4 shares fewer than 2 seeds with any other" in text


def test_one_difference_is_told_with_what_was_not_tested(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    fake_group(tmp_path, "unet", WORSE, config=UNET)
    fake_run(tmp_path / "mamba", 20.0, 7, config=MAMBA)
    answer, _ = said(tmp_path)
    assert answer.startswith("DiT is better than UNet: FID lower by 51 (95 % interval ")
    assert answer.endswith("; 2 other pairs untested")


def test_a_composition_without_the_metric_is_named(tmp_path):
    recall = {f"recall/{NAME}": 0.5}
    fake_group(tmp_path, "dit", BETTER, metrics=recall)
    fake_group(tmp_path, "unet", WORSE, config=UNET)
    answer, text = said(tmp_path, "recall")
    assert answer == "Recall was measured for DiT only: nothing to compare"
    assert "Recall was not measured for UNet" in text


@pytest.mark.parametrize(("network", "flattered"), [("EfficientNetLite0", 1), ("DINOv2", 0)])
def test_a_composition_that_was_aligned_to_its_judge_is_named(tmp_path, network, flattered):
    judge = {"extractor": {"_target_": "diffusion_lab.metrics.extractor.EfficientNetLite0"}}
    guide = {"extractor": {"_target_": f"diffusion_lab.metrics.extractor.{network}"}}
    fake_group(tmp_path, "dit", BETTER, config={"metrics": judge, "alignment": guide})
    fake_group(tmp_path, "unet", WORSE, config=UNET | {"metrics": judge, "alignment": None})
    assert said(tmp_path)[1].count("flatters it") == flattered


def test_gaps_of_shares_are_in_points(tmp_path):
    for name, config, shares in (("dit", {}, (0.7, 0.72)), ("unet", UNET, (0.64, 0.6599))):
        for seed, share in enumerate(shares):
            accuracy = {f"accuracy/{NAME}": share}
            fake_run(tmp_path / f"{name}_{seed}", 100.0, seed, config, metrics=accuracy)
    # differences of 6 and 6.01 points
    answer, _ = said(tmp_path, "accuracy")
    assert answer == (
        "DiT is better than UNet: Accuracy higher by 6 points (95 % interval 5.94 to 6.07 points)"
    )
    fake_run(tmp_path / "mamba", 100.0, 7, MAMBA, metrics={f"accuracy/{NAME}": 0.8})
    assert "Accuracy of one run each: Mamba2 80 %" in said(tmp_path, "accuracy")[1]
    found = collect([tmp_path])
    assert "71.0 ± 12.7 %" in CompositionTable(found.groups, found.names).markdown()


def test_an_interval_beside_a_corrected_test_is_said_to_be_uncorrected(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    fake_group(tmp_path, "unet", WORSE, config=UNET)
    assert "(95 % interval 48.5 to 53.5)" in said(tmp_path)[0]
    fake_group(tmp_path, "mamba", [200.0, 202.1, 202.0], config=MAMBA)
    words = "(95 % interval 48.5 to 53.5, uncorrected)"
    assert f"DiT is better than UNet: FID lower by 51 {words}" in said(tmp_path)[1]


@pytest.mark.parametrize("images", [[6400, 12_800], [6400, 32_000]])
def test_unequal_images_are_said_of_runs_whose_means_are_equal(tmp_path, images):
    """Both compositions saw the same mean number of images, but the two runs of a seed did not."""
    for seed, (ours, theirs) in enumerate((images, images[::-1])):
        fake_run(tmp_path / f"dit_{seed}", 100.0 + seed, seed, summary={"images_seen": ours})
        fake_run(
            tmp_path / f"unet_{seed}", 90.0 + 2 * seed, seed, UNET, summary={"images_seen": theirs}
        )
    _, text = said(tmp_path)
    assert "Budgets are unequal: runs saw 6.4k to" in text
    assert f"Runs saw 6,400 to {images[1]:,} images" in notes(collect([tmp_path]).groups)


def test_equal_images_are_said_once(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    fake_group(tmp_path, "unet", WORSE, config=UNET)
    assert notes(collect([tmp_path]).groups) == [
        "Every run saw 6,400 images",
        "Training took 2 min of wall-clock time",
    ]


def test_unequal_operations_at_equal_images_are_said(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    fake_group(tmp_path, "unet", WORSE, config=UNET, summary={"macs": 2_090_000})
    assert "Operations" not in said(tmp_path)[1]
    fake_group(tmp_path, "mamba", WORSE, config=MAMBA, summary={"macs": 3_000_000})
    assert (
        "Operations are unequal: compositions take 12M to 18M FLOPs to train on an image, at "
        "equal numbers of images"
    ) in said(tmp_path)[1]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"device": "gpu"}, "cpu, 1 thread, 1 process; gpu, 1 thread, 1 process"),
        ({"threads": 2}, "cpu, 1 thread, 1 process; cpu, 2 threads, 1 process"),
        ({"ranks": 4}, "cpu, 1 thread, 1 process; cpu, 1 thread, 4 processes"),
        ({"precision": "32-true"}, "cpu, 1 thread, 1 process; cpu, 32-true, 1 thread, 1 process"),
        ({}, None),
    ],
)
def test_equal_time_on_unequal_machines_is_said(tmp_path, other, words):
    budget = {"budget": {"seconds": 90}}
    here = {"threads": 1, "ranks": 1}
    fake_group(tmp_path, "dit", BETTER, config=budget, summary=here)
    fake_group(tmp_path, "unet", WORSE, config=UNET | budget, summary=here | other)
    _, text = said(tmp_path)
    if words:
        assert f"The time is equal but the machines are not: {words}" in text
    else:
        assert "machines" not in text


def test_unequal_machines_are_said_of_costs_at_equal_images(tmp_path):
    fake_group(tmp_path, "dit", BETTER)
    assert "machines" not in said(tmp_path)[1]
    fake_group(tmp_path, "unet", WORSE, config=UNET, summary={"device": "gpu"})
    words = "Time, speed and memory were measured on different machines: cpu; gpu"
    assert words in said(tmp_path)[1]


@pytest.mark.parametrize(("seconds", "limit"), [(120, 126), (120, 300)])
def test_training_that_left_much_of_its_time_to_other_things_is_said(tmp_path, seconds, limit):
    budget = {"budget": {"seconds": limit}}
    fake_group(tmp_path, "dit", BETTER, config=budget, summary={"training_seconds": limit})
    summary = {"training_seconds": seconds}
    fake_group(tmp_path, "unet", WORSE, config=UNET | budget, summary=summary)
    words = "Training itself took 120 to 300 of the 300 seconds: the limit includes evaluations"
    assert (words in said(tmp_path)[1]) == (limit == 300)
    assert ("Training itself" in said(tmp_path)[1]) == (limit == 300)


def test_a_metric_of_other_code_judges_as_it_describes_itself(tmp_path):
    gap = Quantity("gap", "Gap", "how far off", higher_is_better=True, percent=True)
    summary = {"extra_quantities": [asdict(gap)]}
    for name, config, value in (("a", None, 0.2), ("b", UNET, 0.6)):
        for seed in range(3):
            values = {"gap/x/1k": value + 0.01 * seed * (value + 1), "gap_real/x/1k": 0.9}
            fake_run(tmp_path / f"{name}{seed}", 100.0 + seed, seed, config, summary, values)
    groups = collect([tmp_path]).groups
    (judged,) = (each for each in judged_by(runs_of(groups)) if each.name == "gap")
    assert judged == gap
    assert verdicts(groups, [judged])["gap"].answer.startswith(
        "UNet is better than DiT: Gap higher by 40"
    )
    assert "| Gap |" in CompositionTable(groups, {}).markdown()
