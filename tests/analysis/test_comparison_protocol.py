"""Comparisons of studies with a protocol and with tuning: the test that decides, and the words."""

import csv
import re

import numpy as np
import pytest
from helpers.fake_runs import NAME, STUDY_PROTOCOL, UNET, fake_group, fake_run, said
from helpers.pairs import first_fast
from helpers.refusals import refused
from scipy import stats

from diffusion_lab.analysis.comparison import compare
from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.joint import joint_model
from diffusion_lab.analysis.comparison.pairs import by_data_size
from diffusion_lab.analysis.comparison.tuning import distinct
from diffusion_lab.analysis.comparison.verdict import verdicts
from diffusion_lab.metrics.quantities import QUANTITIES

FID, KID = (next(each for each in QUANTITIES if each.name == name) for name in ("fid", "kid"))
MAMBA = {"backbone": {"_target_": "diffusion_lab.backbone.Mamba2"}}
ONE, TWO, THREE = [100.0, 104.0, 99.0], [150.0, 152.0, 157.0], [151.0, 158.0, 149.0]
PROTOCOL = STUDY_PROTOCOL | {"metric": "kid", "test": "welch"}
KIDS = ((0.1, 0.12, 0.11), (0.2, 0.23, 0.22))
MOST_WORDS = 30


def with_kid(root, config):
    """Runs of DiT and a U-Net with KIDS and different FIDs."""
    for name, own, kids in zip(("dit", "unet"), ({}, UNET), KIDS, strict=True):
        for seed, kid in enumerate(kids):
            fid = 100.0 + seed**2 + len(name) * seed
            more = {f"kid/{NAME}": kid}
            fake_run(root / f"{name}_{seed}", fid, seed, own | config, metrics=more)


def compared(root):
    """The comparison of the runs in a folder: its result, its text, and its pairs by metric."""
    result = compare([str(root / "runs")], str(root / "out"))
    rows = list(csv.DictReader((root / "out/pairs.csv").open()))
    return result, (root / "out/table.md").read_text(), {row["metric"]: row for row in rows}


def test_the_metric_of_the_protocol_decides_first_by_its_test(tmp_path):
    with_kid(tmp_path / "runs", {"protocol": PROTOCOL})
    result, text, rows = compared(tmp_path)
    assert next(iter(result["verdict"])) == "kid"
    expected = stats.ttest_ind(*KIDS, equal_var=False)
    row = rows["kid"]
    assert (row["test"], row["tests"]) == ("welch", "1")
    assert float(row["p"]) == pytest.approx(expected.pvalue)
    assert float(row["holm"]) == float(row["p"])  # the primary metric is a family by itself
    assert int(rows["fid"]["tests"]) > 1
    interval = expected.confidence_interval()
    assert float(row["half_width"]) == pytest.approx((interval.high - interval.low) / 2)
    assert PROTOCOL["question"] in text
    assert "seeds 0, 1, 2" in text


def test_without_a_protocol_all_metrics_share_the_correction(tmp_path):
    with_kid(tmp_path / "runs", {})
    _, text, rows = compared(tmp_path)
    assert rows["kid"]["test"] == "paired"
    assert float(rows["kid"]["p"]) == pytest.approx(stats.ttest_rel(*KIDS).pvalue)
    assert "No protocol was fixed" in text
    found = verdicts(collect([tmp_path / "runs"]).groups, [FID, KID])
    assert found["kid"].pairs[0].tested.tests == found["kid"].tests + found["fid"].tests == 2


def test_another_protocol_in_some_runs_is_none(tmp_path):
    with_kid(tmp_path / "runs", {"protocol": PROTOCOL})
    fake_run(tmp_path / "runs/other", 90.0, 5, {"protocol": PROTOCOL | {"metric": "fid"}} | MAMBA)
    assert "different protocols" in compared(tmp_path)[1]


@pytest.mark.parametrize(
    ("commit", "words"),
    [
        ("a" * 40, f"Commit {'a' * 9} was checked out"),
        (f"{'a' * 40}-dirty", "not committed"),
        (None, "No commit"),
    ],
)
def test_the_commit_that_held_the_protocol_is_named(tmp_path, commit, words):
    for seed in range(3):
        summary = {"git_commit": commit}
        fake_run(tmp_path / f"runs/{seed}", 100.0 + seed, seed, {"protocol": PROTOCOL}, summary)
    assert words in compared(tmp_path)[1]


def test_seeds_that_the_protocol_does_not_have_are_named(tmp_path):
    own = {"protocol": STUDY_PROTOCOL}
    for name, config, shift in (("dit", {}, 0.0), ("unet", UNET, 50.0)):
        for seed in (0, 1, 7):
            fid = 100.0 + shift + seed**2
            fake_run(tmp_path / f"runs/{name}{seed}", fid, seed, config | own)
    _, text, rows = compared(tmp_path)
    assert "no run of seed 2" in text
    assert "seeds beyond the protocol" in text
    assert rows["fid"]["seeds"] == "0 1"
    assert rows["test_loss"]["seeds"] == "0 1 7"  # not the primary metric


def test_a_composition_without_a_seed_of_the_protocol_is_in_no_test_of_its_metric(tmp_path):
    own = {"protocol": PROTOCOL | {"metric": "fid"}}
    for name, config, seeds in (("dit", {}, (0, 1)), ("unet", UNET, (0, 1)), ("m", MAMBA, (5, 6))):
        for seed in seeds:
            fid = 100.0 + 20 * len(name) + seed**2
            fake_run(tmp_path / f"runs/{name}{seed}", fid, seed, config | own)
    compared(tmp_path)
    rows = list(csv.DictReader((tmp_path / "out/pairs.csv").open()))
    pairs = {kind: [row for row in rows if row["metric"] == kind] for kind in ("fid", "test_loss")}
    assert [(row["ahead"], row["behind"]) for row in pairs["fid"]] == [("DiT", "UNet")]
    assert len(pairs["test_loss"]) == 3
    assert "which FID does not count: 5, 6" in (tmp_path / "out/table.md").read_text()


def test_all_seeds_count_if_no_run_has_one_of_the_protocol(tmp_path):
    """The tuning runs of a study have seeds of their own."""
    own = {"protocol": PROTOCOL | {"metric": "fid"}}
    for name, config in (("dit", {}), ("unet", UNET)):
        for seed in (100, 101):
            fid = 100.0 + 20 * len(name) + seed % 3
            fake_run(tmp_path / f"runs/{name}{seed}", fid, seed, config | own)
    _, text, rows = compared(tmp_path)
    assert rows["fid"]["seeds"] == "100 101"
    assert "which FID counts, since no run has its seeds: 100, 101" in text


def test_a_metric_of_the_protocol_that_was_not_measured_is_named(tmp_path):
    own = {"protocol": PROTOCOL | {"metric": "accuracy"}}
    for seed in range(3):
        fake_run(tmp_path / f"runs/{seed}", 100.0 + seed, seed, own)
    assert "Accuracy was not measured, so the protocol decides nothing" in compared(tmp_path)[1]


def test_welch_needs_no_common_seeds_and_differs_in_degrees(tmp_path):
    fids = ([10.0, 12.0, 11.0, 15.0], [20.0, 26.0])
    fake_group(tmp_path, "dit", fids[0])
    for seed, fid in zip((7, 8), fids[1], strict=True):
        fake_run(tmp_path / f"unet_{seed}", fid, seed, UNET)
    groups = collect([tmp_path]).groups
    assert by_data_size(groups, FID, "paired")[0].pairs == ()
    (pair,) = by_data_size(groups, FID, "welch")[0].pairs
    expected = stats.ttest_ind(*fids, equal_var=False)
    assert pair.p == pytest.approx(expected.pvalue)
    assert pair.error_and_degrees[1] == pytest.approx(expected.df)
    assert pair.gap == pytest.approx(11.0)


def test_the_joint_model_is_the_analysis_of_variance_of_a_randomised_block(tmp_path):
    rows = np.array([ONE, TWO, THREE])
    for name, config, fids in zip("abc", ({}, UNET, MAMBA), rows, strict=True):
        fake_group(tmp_path, name, list(map(float, fids)), config=config)
    (size,) = by_data_size(collect([tmp_path]).groups, FID)
    model = joint_model(size, FID)
    # by hand: the sums of squares of compositions, of seeds, and of the rest
    total = ((rows - rows.mean()) ** 2).sum()
    between, blocks = (3 * ((rows.mean(axis) - rows.mean()) ** 2).sum() for axis in (1, 0))
    noise = (total - blocks - between) / 4
    assert model.p == pytest.approx(stats.f.sf(between / 2 / noise, 2, 4))
    assert model.half_width == pytest.approx(stats.t.ppf(0.975, 4) * (2 * noise / 3) ** 0.5)
    two = [group for group in size.groups if group.name != "Mamba2"]
    assert joint_model(type(size)("", tuple(two)), FID) is None
    assert "Joint model of 3 compositions and 3 seeds" in " ".join(
        map(str, verdicts(collect([tmp_path]).groups, [FID])["fid"].joint)
    )


def test_the_joint_model_covers_the_true_gap_in_19_of_20_draws(tmp_path):
    for name, config in zip("abc", ({}, UNET, MAMBA), strict=True):
        fake_group(tmp_path, name, [1.0, 2.0, 3.0], config=config)
    (size,) = by_data_size(collect([tmp_path]).groups, FID)
    rng, held = np.random.default_rng(0), []
    for _ in range(400):
        values = rng.normal(size=(3, 3)) + 5 * rng.normal(size=3)  # a seed shifts all compositions
        for group, row in zip(size.groups, values, strict=True):
            for run, value in zip(group.runs, row, strict=True):
                run.values["fid"] = float(value)
        gap = values[0].mean() - values[1].mean()
        held.append(abs(gap) < joint_model(size, FID).half_width)
    assert np.mean(held) == pytest.approx(0.95, abs=0.03)


def sampled_with(seed: int) -> dict:
    evaluation = "diffusion_lab.training.callbacks.SampleEvaluation"
    return {"callbacks": {"evaluation": {"_target_": evaluation, "seed": seed}}}


def test_runs_that_each_sample_with_their_training_seed_are_sampled_alike(tmp_path):
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        for seed, fid in enumerate(fids):
            fake_run(tmp_path / f"runs/{name}{seed}", fid, seed, config | sampled_with(seed))
    _, text, rows = compared(tmp_path)
    assert rows["fid"]["seeds"] == "0 1 2"
    assert "each run sampled with its training seed" in text
    assert (tmp_path / "out/plots/fid_against_images.svg").exists()
    fake_run(tmp_path / "runs/other", 100.0, 3, sampled_with(1))
    with refused("seed"):
        compared(tmp_path)


def tuned(best: float, results: dict[float, float | None], **facts: object) -> dict:
    """The tuning in the configuration of a run, with the results of learning rates."""
    tried = [
        {"values": {"optimizer.lr": rate}, "results": {"100": result}}
        for rate, result in results.items()
    ]
    node = {
        "file": "outputs/mine/tune/tuning.json",
        "values": {"optimizer.lr": list(results)},
        "metric": "fid",
        "images": 20_000,
        "seeds": [100],
        "chosen": {"optimizer.lr": best},
        "tried": tried,
    }
    return {"tuning": node | facts, "optimizer": {"lr": best}}


@pytest.mark.usefixtures("real_plots")
def test_tuning_is_said_and_drawn(tmp_path):
    inside = tuned(2e-3, {1e-3: 120.0, 2e-3: 110.0, 4e-3: 130.0, 8e-3: None})
    fake_group(tmp_path / "runs", "dit", ONE, config=inside)
    at_the_end = tuned(4e-3, {1e-3: 120.0, 2e-3: 115.0, 4e-3: 110.0})
    fake_group(tmp_path / "runs", "unet", TWO, config=UNET | at_the_end)
    result, text, _ = compared(tmp_path)
    assert sorted(result["compositions"]) == ["DiT", "UNet"]  # named without the rate
    assert "optimizer.lr, at 3 to 4 values, each on 20,000 images, with seed 100" in text
    assert "The best optimizer.lr of UNet, 0.004, is at an end" in text
    assert "The best optimizer.lr of DiT" not in text  # a rate above it diverged
    assert "DiT" in (tmp_path / "out/plots/tuning_optimizer_lr.svg").read_text()
    assert 'id="tuning"' in (tmp_path / "out/index.html").read_text()


def test_the_length_of_tuning_runs_is_said_where_it_is_no_number_of_images(tmp_path):
    facts = {"images": None, "overrides": ["budget.seconds=90"], "of": ["backbone", "first_stage"]}
    for name, own, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        grid = {1e-3: 120.0, 2e-3: 110.0 + len(own), 4e-3: 130.0}
        fake_group(tmp_path / "runs", name, fids, config=own | tuned(2e-3, grid, **facts))
    text = compared(tmp_path)[1]
    assert "Tuned for each network and first_stage by FID to validation images" in text
    assert "at 3 values, each with budget.seconds=90, with seed 100" in text
    assert "unequal budgets" not in text


def test_a_curve_is_named_by_what_was_tuned_by_itself(tmp_path):
    """Networks were tuned on all of the data, and are compared on parts of it, too."""
    of_both = {"of": ["backbone"], "overrides": ["data.fraction=1.0"]}
    for number, (name, own) in enumerate((("dit", {}), ("unet", UNET))):
        config = own | tuned(1e-3, {1e-3: 110.0 + number, 2e-3: 120.0}, **of_both)
        for fraction in (0.001, 1.0):
            part = config | {"data": {"fraction": fraction}}
            facts = {"training_images": int(60_000 * fraction)}
            fake_group(tmp_path / "runs", f"{name}{fraction}", ONE, config=part, summary=facts)
    groups = collect([tmp_path / "runs"]).groups
    assert len(groups) == 4
    assert [each.group.name for each in distinct(groups)] == ["DiT", "UNet"]
    _, text, _ = compared(tmp_path)
    assert "The best optimizer.lr of UNet, 0.001, is at an end" in text
    page = (tmp_path / "out/index.html").read_text()
    section = page.partition('id="tuning"')[2].partition("</section>")[0]
    assert "fraction" not in section
    one = [group for group in groups if "UNet" in group.name]
    assert [each.group.name for each in distinct(one)] == ["UNet"]


def test_curves_that_this_does_not_tell_apart_have_the_names_of_their_compositions(tmp_path):
    for number, (name, clip) in enumerate((("a", 1.0), ("b", 2.0))):
        own = {"trainer": {"gradient_clip_val": clip}}
        own |= tuned(2e-3, {1e-3: 110.0 + number, 2e-3: 100.0, 4e-3: 120.0})
        fake_group(tmp_path, name, ONE, config=own)
    groups = collect([tmp_path]).groups
    assert [each.group.name for each in distinct(groups)] == [group.name for group in groups]


def test_networks_that_were_tuned_unequally_or_not_at_all_are_named(tmp_path):
    grid = {1e-3: 120.0, 2e-3: 110.0, 4e-3: 130.0}
    other = tuned(2e-3, {1e-3: 121.0, 2e-3: 110.0, 4e-3: 130.0}, images=40_000)
    for folder, ours, theirs, words in (
        ("one", tuned(2e-3, grid), {}, "Only 1 of 2 compositions were tuned"),
        ("unequal", tuned(2e-3, grid), other, "unequal budgets"),
        ("none", {}, {}, "Nothing was tuned for each network"),
    ):
        fake_group(tmp_path / folder / "runs", "dit", ONE, config=ours)
        fake_group(tmp_path / folder / "runs", "unet", TWO, config=UNET | theirs)
        assert words in compared(tmp_path / folder)[1]
    assert not (tmp_path / "none/out/plots/tuning_optimizer_lr.svg").exists()


def test_what_else_is_unequal_is_a_reservation(tmp_path):
    dit = {"backbone": {"patch": 4}}
    fake_group(tmp_path, "dit", ONE, config=dit, summary={"precision": "bf16-mixed"})
    more = {"parameters": 5_000_000, "precision": "32-true"}
    fake_group(tmp_path, "unet", TWO, config=UNET, summary=more)
    text = said(tmp_path)[1]
    assert "Parameters are unequal: compositions have 1M to 5M" in text
    assert "Output layers are unequal" in text
    assert "4 x 4 patches" in text
    assert "Precision is unequal: 32-true and bf16-mixed" in text


def test_a_patch_network_that_smooths_its_output_is_no_other_output_layer(tmp_path):
    fake_group(tmp_path, "dit", ONE, config={"backbone": {"patch": 4, "smooth": True}})
    fake_group(tmp_path, "unet", TWO, config=UNET)
    assert "Output layers" not in said(tmp_path)[1]


def sentences_of(root) -> list[str]:
    """Every sentence of a comparison below its first line, without the table."""
    text = compared(root)[1].partition("\n\n")[2]
    lines = [line for line in text.splitlines() if line and not line.startswith("|")]
    return [part for line in lines for part in re.split(r"(?<=[.?]) ", line.removeprefix("* "))]


def study(root, compositions: int, seeds: int, sizes=(1.0,), spread: float = 1.0, **config):
    rng = np.random.default_rng(compositions + seeds)
    for width in range(compositions):
        for size in sizes:
            own = {"backbone": {"width": 8 * (width + 1)}, "data": {"fraction": size}} | config
            facts = {"training_images": int(60_000 * size), "parameters": 10**6 * (width + 1)}
            for seed in range(seeds):
                fid = 100.0 + 5 * width + spread * rng.normal()
                fake_run(root / f"runs/w{width}_{size}_{seed}", fid, seed, own, summary=facts)


@pytest.mark.parametrize(
    "facts",
    first_fast(
        [
            {"compositions": 6, "seeds": 1},
            {"compositions": 2, "seeds": 1},
            {"compositions": 3, "seeds": 3},
            {"compositions": 4, "seeds": 3, "protocol": PROTOCOL},
            {"compositions": 6, "seeds": 2, "protocol": PROTOCOL | {"sampling": "own"}},
            {"compositions": 6, "seeds": 3, "spread": 20.0},
            {"compositions": 3, "seeds": 3, "sizes": (0.01, 0.1, 1.0)},
            {"compositions": 3, "seeds": 2, "sizes": (0.01, 0.1, 1.0), "spread": 50.0},
        ],
        5,
    ),
)
def test_no_sentence_is_longer_than_thirty_words(tmp_path, facts):
    study(tmp_path, **facts)
    assert [each for each in sentences_of(tmp_path) if len(each.split()) > MOST_WORDS] == []
