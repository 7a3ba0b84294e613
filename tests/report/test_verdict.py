"""The answer of a comparison: who is ahead and by how much, and what it does not claim."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
from helpers.fake_runs import NAME, STUDY_PROTOCOL, UNET, fake_group, fake_run, said

from diffusion_lab.metrics.quantity import Quantity
from diffusion_lab.report.comparison import Report, asked_about, judge
from diffusion_lab.report.facts import setting
from diffusion_lab.report.figures import along
from diffusion_lab.report.frame import collect
from diffusion_lab.report.tests import JOINT, PAIRED, WELCH
from diffusion_lab.report.words import TESTS
from diffusion_lab.training.study import TESTS as OF_PROTOCOLS

BETTER, WORSE, WORST = [100.0, 101.0, 99.0], [150.0, 152.0, 151.0], [171.0, 171.0, 172.0]
MAMBA = {"backbone": {"_target_": "diffusion_lab.backbone.Mamba2"}}


def panel_of(root, metric="fid"):
    """The means and tests of the runs in a folder, which have the same data."""
    (panel,) = judge(collect([root]), metric)
    return panel


def three(root, better=BETTER, worse=WORSE, worst=WORST, config=None):
    for name, own, fids in (("dit", {}, better), ("unet", UNET, worse), ("m", MAMBA, worst)):
        if fids:
            fake_group(root, name, fids, config=own | (config or {}))


def asked(**more) -> dict:
    return {"protocol": STUDY_PROTOCOL | more}


def test_the_answer_has_both_numbers_and_the_relative_gap_above_real_images(tmp_path):
    three(tmp_path, [196.3, 197.3, 195.3], [296.3, 298.3, 294.3], None)
    answer, _ = said(tmp_path)
    # real images have 96.3: 100 above them instead of 200
    for words in ("DiT is better than UNet", "FID 196", "real images 96.3", "50 % closer", "296"):
        assert words in answer
    assert re.search(r"95 % interval 4\d.* to 5\d.* %", answer)


def test_real_images_of_another_number_are_no_floor(tmp_path):
    more = {f"fid_real/{NAME}": None, f"fid_real/{NAME.replace('-1k', '-10k')}": 50.0}
    for name, config, fids in (("dit", {}, BETTER), ("unet", UNET, WORSE)):
        for folder in fake_group(tmp_path, name, fids, config=config):
            path = folder / "summary.json"
            facts = json.loads(path.read_text())
            facts["metrics"] = {k: v for k, v in (facts["metrics"] | more).items() if v is not None}
            path.write_text(json.dumps(facts))
    answer, text = said(tmp_path)
    assert "FID 100, 51 lower" in answer
    assert "real images 50" not in answer
    assert "judge by KID" not in text


def test_the_best_is_named_if_it_is_shown_to_be_ahead_of_each_of_the_others(tmp_path):
    three(tmp_path)
    assert panel_of(tmp_path).best == "DiT"
    answer, text = said(tmp_path)
    assert answer.startswith("DiT is best: FID 100")
    assert "every run of DiT is better than every other run" in answer
    assert "better in 9 of 9 pairs of runs; p < 0.001" in text
    # in every seed, but not in every pair of runs
    seeds = [100.0, 120.0, 140.0], [103.0, 123.5, 144.0], [110.0, 131.0, 150.5]
    three(tmp_path / "paired", *seeds, asked(test="paired"))
    answer, _ = said(tmp_path / "paired")
    assert answer.startswith("DiT is best: FID 120")
    assert "every run" not in answer
    # none is, where one is not tested
    fake_run(tmp_path / "w4", 20.0, config={"backbone": {"width": 4}})
    panel = panel_of(tmp_path)
    assert panel.best is None
    assert panel.arms[0] == "DiT · width=4"
    answer, text = said(tmp_path)
    assert answer.startswith("No arm is shown to be best")
    assert "DiT · width=4 cannot be tested" in text


@pytest.mark.parametrize(
    ("better", "worse", "worst", "words"),
    [
        ([100.0, 110.0, 95.0], [101.0, 95.0, 112.0], None, "No difference of "),
        ([100.0, 110.0, 95.0], [101.0, 95.0, 112.0], [96.0, 111.0, 102.0], "No difference is sh"),
        (BETTER, [100.5, 101.5, 99.0], WORST, "no lead over UNet is shown"),
        ([100.0], [120.0], None, "a test needs two runs"),
        (BETTER, None, None, "the only arm"),
    ],
)
def test_no_difference_is_claimed_that_is_not_shown(tmp_path, better, worse, worst, words):
    three(tmp_path, better, worse, worst)
    assert words in said(tmp_path)[0]


def test_values_that_differ_by_the_same_in_every_seed_are_suspect_if_paired(tmp_path):
    three(tmp_path, [100.3, 200.7, 300.9], [100.4, 200.8, 301.0], None, asked())
    assert "blind to the seed" in said(tmp_path)[0]
    fake_group(tmp_path / "apart", "dit", BETTER, config=asked())
    for seed in (2, 3):
        fake_run(tmp_path / f"apart/unet{seed}", 150.0 + seed, seed, UNET | asked(seeds=[2, 3]))
    assert "needs two seeds that both arms have: FID" in said(tmp_path / "apart")[0]
    shares = {f"recall/{NAME}": 0.0}
    fake_group(tmp_path / "equal", "dit", BETTER, metrics=shares)
    fake_group(tmp_path / "equal", "unet", BETTER, config=UNET, metrics=shares)
    assert panel_of(tmp_path / "equal", "recall").tested.empty


def test_the_test_is_that_of_the_protocol_and_others_stand_beside_it(tmp_path):
    """Seeds move FID by far more than networks do, and by about the same in both."""
    fids = [100.0, 300.0, 500.0], [105.0, 306.0, 505.0]
    three(tmp_path / "paired", *fids, None, asked(test="paired"))
    (pair,) = panel_of(tmp_path / "paired").pairs.itertuples()
    assert (pair.test, pair.significant) == (PAIRED, True)
    answer, text = said(tmp_path / "paired")
    assert answer.startswith("DiT is better than UNet")
    assert "not so by Welch's test" in text
    plain = {key: value for key, value in STUDY_PROTOCOL.items() if key != "test"}
    three(tmp_path / "plain", *fids, None, {"protocol": plain})
    (pair,) = panel_of(tmp_path / "plain").pairs.itertuples()
    assert (pair.test, pair.significant) == (WELCH, False)
    three(tmp_path / "none")
    assert set(panel_of(tmp_path / "none").pairs.test) == {JOINT}
    assert {*TESTS} == {*OF_PROTOCOLS}


def test_pairs_of_some_runs_are_told_from_all_runs(tmp_path):
    """UNet wins each pair of seeds by 2; a fourth run of DiT makes its mean the better one."""
    fids = [112.0, 112.1, 112.2, 96.0], [110.0, 110.2, 110.15]
    three(tmp_path / "paired", *fids, None, asked(test="paired", seeds=[0, 1, 2, 3]))
    answer, text = said(tmp_path / "paired")
    assert answer.startswith("UNet is better than DiT over the 3 seeds that both have")
    assert "108" not in answer  # the mean of all four
    # the best of three, though the first pair does not differ
    fids = [151.0, 149.5, 152.0, 150.0], [150.0, 151.0, 151.5], BETTER
    three(tmp_path / "best", *fids, asked(test="paired", seeds=[0, 1, 2, 3]))
    answer, _ = said(tmp_path / "best")
    assert answer.startswith("Mamba2 is best: Mamba2 is better than ")
    fids = [112.0, 112.1, 112.2, 96.0], [110.0, 110.2, 110.15]
    three(tmp_path / "welch", *fids, None)
    answer, text = said(tmp_path / "welch")
    assert answer.startswith("No difference of DiT and UNet")
    assert "it is UNet that is ahead of DiT" in text


def test_the_pairs_and_seeds_are_those_of_the_protocol(tmp_path):
    arms = {"DiT": ({}, BETTER), "U-Net": (UNET, WORSE), "Mamba-2": (MAMBA, WORST)}
    for name, (config, fids) in arms.items():
        own = config | {"arm": name} | asked(contrasts=[["U-Net", "DiT"]], test="welch")
        fake_group(tmp_path, name, [*fids, 7.0], config=own)  # seed 3 is not of the protocol
    panel = panel_of(tmp_path)
    (pair,) = panel.pairs.itertuples()
    assert (pair.ahead, pair.behind, pair.seeds, pair.tests) == ("DiT", "U-Net", "0 1 2", 1)
    assert panel.arms == ["DiT", "U-Net", "Mamba-2"]
    assert said(tmp_path)[0].startswith("DiT is better than U-Net")


def test_contrasts_are_of_arms_with_equal_values_on_the_other_axes(tmp_path):
    own = asked(contrasts=[["MeanFlow", "Teacher"]], test="welch")
    for arm, kind in (("Teacher", {}), ("MeanFlow", {"objective": {"_target_": "m.MeanFlow"}})):
        for network, more, shift in (("DiT", {}, 0.0), ("U-Net", UNET, 9.0)):
            fids = [each + shift for each in (BETTER if arm == "Teacher" else WORSE)]
            named = {"arm": f"{arm} \N{MIDDLE DOT} {network}"} | own
            fake_group(tmp_path, f"{arm}-{network}", fids, config=kind | more | named)
    pairs = panel_of(tmp_path).pairs
    assert {(pair.ahead, pair.behind) for pair in pairs.itertuples()} == {
        (f"Teacher \N{MIDDLE DOT} {network}", f"MeanFlow \N{MIDDLE DOT} {network}")
        for network in ("DiT", "U-Net")
    }


def test_a_name_with_the_dot_of_two_axes_is_found_as_a_whole():
    whole = "A \N{MIDDLE DOT} B"
    assert asked_about([[whole, "C"]], [whole, "C", "B"]) == [(whole, "C")]


def test_a_pair_that_is_asked_about_twice_is_tested_once():
    pairs = [["B", "A"], ["A", "C"], ["A", "B"], ["A", "C"]]
    assert {*asked_about(pairs, "ABC")} == {("B", "A"), ("A", "C")}


def test_a_metric_that_chance_takes_below_zero_has_no_relative_gap(tmp_path):
    for name, config, values in (("dit", {}, (-0.001, 0.001)), ("unet", UNET, (0.01, 0.0125))):
        for seed, value in enumerate(values):
            own = config | asked(metric="kid")
            fake_run(tmp_path / f"{name}{seed}", 100.0, seed, own, metrics={f"kid/{NAME}": value})
    answer, _ = said(tmp_path, "kid")
    assert answer.startswith("DiT is better than UNet")
    assert "95 % interval" in answer
    assert "% lower" not in answer


def test_runs_without_an_arm_that_contrasts_name_are_not_said_to_be_too_few(tmp_path):
    for name, config, fids in (("DiT", {}, BETTER), ("U-Net", UNET, WORSE)):
        own = config | {"arm": name} | asked(contrasts=[["U-Net", "Mamba-2"]], test="welch")
        fake_group(tmp_path, name, fids, config=own)
    answer, _ = said(tmp_path)
    assert "contrasts" in answer
    assert "two runs" not in answer


def test_all_seeds_count_if_no_run_has_one_of_the_protocol(tmp_path):
    for name, config in (("dit", {}), ("unet", UNET)):
        for seed in (100, 101):
            fid = 100.0 + 20 * len(name) + seed % 3
            fake_run(tmp_path / f"{name}{seed}", fid, seed, config | asked(test="welch"))
    assert [*panel_of(tmp_path).pairs.seeds] == ["100 101"]


def test_the_metric_of_the_protocol_decides_and_others_have_intervals_alone(tmp_path):
    for name, own, kids in (("dit", {}, (0.1, 0.12, 0.11)), ("unet", UNET, (0.2, 0.23, 0.22))):
        for seed, kid in enumerate(kids):
            config = own | asked(metric="kid", test="welch")
            measured = {f"kid/{NAME}": kid}
            fake_run(tmp_path / f"{name}{seed}", 100.0 + seed, seed, config, metrics=measured)
    report = Report(collect([tmp_path]))
    assert next(iter(report.answers)) == report.panels[0].metric.name == "kid"
    assert set(report.others) == {"fid", "test_loss"}
    assert "p = " not in report.answers["fid"]
    assert "95 % interval" in report.answers["fid"]


def test_gaps_of_shares_are_in_points(tmp_path):
    for name, config, shares in (("dit", {}, (0.7, 0.72)), ("unet", UNET, (0.64, 0.6599))):
        for seed, share in enumerate(shares):
            own = config | asked(metric="accuracy")
            accuracy = {f"accuracy/{NAME}": share}
            fake_run(tmp_path / f"{name}{seed}", 100.0, seed, own, metrics=accuracy)
    # differences of 6 and 6.01 points
    assert [arm.name for arm in collect([tmp_path]).arms] == ["DiT", "UNet"]  # the best first
    answer, _ = said(tmp_path, "accuracy")
    for words in ("Accuracy 71 %", "6 points higher", "than 65 %"):
        assert words in answer


def test_a_metric_of_other_code_judges_as_it_describes_itself(tmp_path):
    gap = Quantity("gap", "Gap", "how far off", higher_is_better=True, percent=True)
    summary = {"extra_quantities": [asdict(gap)]}
    for name, config, value in (("a", None, 0.2), ("b", UNET, 0.6)):
        for seed in range(3):
            values = {"gap/x/1k": value + 0.01 * seed * (value + 1), "gap_real/x/1k": 0.9}
            fake_run(tmp_path / f"{name}{seed}", 100.0 + seed, seed, config, summary, values)
    panel = panel_of(tmp_path, "gap")
    assert (panel.metric, panel.arms[0], panel.real) == (gap, "UNet", 0.9)
    assert list(panel.pairs.ahead) == ["UNet"]


FIDS = {  # the U-Net is best on the least data, DiT on the most
    "UNet": (300, 200, 150, 130),
    "DiT": (400, 260, 152, 100),
    "Mamba2": (450, 280, 180, 140),
}
FRACTIONS = {0.001: 60, 0.01: 600, 0.1: 6000, 1.0: 60_000}
NOISE = {"UNet": (0, 3, -2), "DiT": (1, 2, -3), "Mamba2": (-1, 4, -2)}


def over_data(root, fids):
    """Writes runs of backbone x data.fraction x 3 seeds; DiT has null for all of the data."""
    for name, means in fids.items():
        for (fraction, images), mean in zip(FRACTIONS.items(), means, strict=True):
            whole = fraction == 1 and name == "DiT"
            config = {
                "backbone": {"_target_": f"diffusion_lab.backbone.{name}"},
                "data": {"fraction": None if whole else fraction},
            }
            own = [mean + each for each in NOISE[name]]
            summary = {"training_images": images}
            fake_group(root, f"{name}_{fraction}", own, config=config, summary=summary)


@pytest.mark.long
def test_each_size_of_the_data_has_its_own_answer_and_correction(tmp_path):
    over_data(tmp_path, FIDS)
    found = collect([tmp_path])
    panels = judge(found, "fid")
    assert [panel.data for panel in panels] == ["60", "600", "6,000", "60,000"]
    assert [panel.best for panel in panels] == ["UNet", "UNet", None, "DiT"]
    assert {int(count) for panel in panels for count in panel.pairs.tests} == {3}
    # an arm has one colour at all sizes
    assert {len({arm.colour for arm in found.arms if arm.line == line}) for line in FIDS} == {1}
    answer, text = said(tmp_path)
    assert "UNet is best at 60 and 600 training images" in answer
    assert "none is shown to be best at 6,000" in answer
    assert "overtakes" not in text


def test_one_arm_at_each_size_is_not_tested(tmp_path):
    over_data(tmp_path, {"DiT": FIDS["DiT"]})
    assert all(panel.pairs.empty for panel in judge(collect([tmp_path]), "fid"))
    assert "is best" not in said(tmp_path)[0]


def test_fid_infinity_and_large_biases_are_not_read_into_few_samples(tmp_path):
    more = {f"fid_infinity/{NAME}": 80.0, f"kid/{NAME}": 0.1}
    fake_group(tmp_path, "dit", [100.0, 104.0], metrics=more)
    fake_group(tmp_path, "unet", [110.0, 117.0], config=UNET, metrics=more)
    found = collect([tmp_path])
    assert "fid_infinity" not in set(found.frame.metric)
    assert "few_for_infinity" in [fact.kind for fact in found.omitted]
    assert "judge by KID" in said(tmp_path)[1]  # real images have 96.3


def test_the_runs_that_a_gap_needs_and_the_parts_of_their_variance_are_said(tmp_path):
    own = asked(sampling_seeds=[0, 1])
    for name, config, mean in (("dit", {}, 200.0), ("unet", UNET, 250.0)):
        for seed in range(3):
            folder = tmp_path / f"{name}{seed}"
            fake_run(folder, mean + 8 * seed, seed, config | own)
            again(folder, mean + 8 * seed + 2, sampling_seed=1)
    found = collect([tmp_path])
    values = found.ends()[found.ends().metric == "fid"]
    assert {*values.sampling_seed} == {0, 1}
    assert list(judge(found, "fid")[0].means["mean"]) == [209.0, 259.0]
    drawn = along(found, found.metrics["fid"], "fid", "images")
    assert "At the end: DiT 209; UNet 259" in drawn.words
    text = said(tmp_path)[1]
    assert "98 % is due to training" in text  # of the means of two samplings
    assert re.search(r"To find a gap of 5 % .* takes \d+ runs", text)
    assert "sampling seeds 0 and 1" in str(setting(found))


def test_the_figure_of_test_losses_says_of_what_images_its_points_are(tmp_path):
    (folder,) = fake_group(tmp_path, "dit", [200.0])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 50, "images": 3200, "seconds": 50.0, "val/loss": 0.3}\n')
    found = collect([tmp_path])
    words = {
        name: along(found, found.metrics[name], on_the_way, "images").words
        for name, on_the_way in (("test_loss", "validation_loss"), ("fid", "fid"))
    }
    assert "validation images" in words["test_loss"]
    assert "validation images" not in words["fid"]


def test_sampling_seeds_that_one_run_lacks_are_left_out_aloud(tmp_path):
    own = asked(sampling_seeds=[1, 2])
    for seed in range(3):
        fake_run(tmp_path / f"dit{seed}", 200.0 + seed, seed, own)
        fake_run(tmp_path / f"unet{seed}", 250.0 + seed, seed, UNET | own)
        for sampling_seed in (1, 2):
            again(tmp_path / f"dit{seed}", 190.0 + seed, sampling_seed)
            if (seed, sampling_seed) != (2, 2):
                again(tmp_path / f"unet{seed}", 240.0 + seed, sampling_seed)
    found = collect([tmp_path])
    (fact,) = [fact for fact in found.omitted if fact.kind == "lacking_seeds"]
    assert [Path(run).name for run in fact.values["runs"]] == ["unet2"]
    assert found.seeds == [0]


def again(folder, fid: float, sampling_seed: int) -> None:
    """Keeps another evaluation of a run, with another sampling seed."""
    from diffusion_lab.runs.current import identify
    from diffusion_lab.runs.files import load_record
    from diffusion_lab.runs.results import save_evaluation
    from diffusion_lab.runs.summary import load_summary

    cfg = load_record(folder)
    cfg.seed = sampling_seed
    summary = load_summary(folder)
    save_evaluation(folder, {f"fid/{NAME}": fid}, summary.protocol, cfg, identify(folder))


def test_sizes_of_the_data_have_each_their_own_number_of_runs(tmp_path):
    for size, spread in ((60, 1.0), (600, 30.0)):
        for name, config, mean in (("dit", {}, 200.0), ("unet", UNET, 250.0)):
            fids = [mean, mean + spread, mean - spread]
            own = config | {"data": {"per_class": size}}
            fake_group(tmp_path / f"{name}{size}", name, fids, config=own)
    text = said(tmp_path)[1]
    found = re.findall(r"To find a gap of 5 % .* takes (\d+) runs", text.replace(" At ", "\nAt "))
    assert len(found) == 2
    assert int(found[0]) != int(found[1])
