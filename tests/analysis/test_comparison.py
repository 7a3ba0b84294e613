"""Comparisons of run folders: what is found, grouped, refused, tested, tabulated and written."""

import csv
import errno
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_runs import NAME, UNET, fake_group, fake_run, said
from helpers.refusals import refused
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf
from PIL import Image

from diffusion_lab.analysis.comparison import compare, output
from diffusion_lab.analysis.comparison.candidates import run_folders
from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.curves import front
from diffusion_lab.analysis.comparison.names import names_of, varying, without_data
from diffusion_lab.analysis.comparison.pictures import cells_of, data_uri, side_by_side
from diffusion_lab.analysis.comparison.table import NONE
from diffusion_lab.cli.arguments import gather_paths
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import literal, with_spread
from diffusion_lab.common.messages import UserError
from diffusion_lab.metrics.metric import with_fingerprint
from diffusion_lab.runs.results import EVALUATIONS, evaluations_of
from diffusion_lab.runs.weights import CHECKPOINT, CurrentWeights, sha256_of


def compared(tmp_path, *paths):
    """The result and table.md of a comparison of all runs, or of `paths`."""
    output = tmp_path / "comparison"
    result = compare([str(path) for path in paths or [tmp_path / "runs"]], str(output))
    return result, (output / "table.md").read_text()


@pytest.fixture
def runs(tmp_path):
    folder = tmp_path / "runs"
    folder.mkdir()
    return folder


class TestFinding:
    def test_run_folders_are_found_once_and_not_inside_one_another(self, runs):
        first = fake_run(runs / "a/b", 1.0)
        fake_run(first / "wandb/run-1/files", 1.0)
        second = fake_run(runs / "c", 1.0)
        (runs / "c2").symlink_to(second)
        (runs / "up").symlink_to(runs)
        (runs / "conf").mkdir()
        (runs / "conf/config.yaml").write_text("a: 1")
        assert run_folders([runs, first]) == [first, second]

    def test_paths_without_a_run_are_named(self, runs):
        with refused(runs):
            run_folders([runs])
        with refused("nowhere"):
            run_folders(["nowhere"])

    def test_unfinished_damaged_and_repeated_runs_are_said_and_left_out(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0])
        fake_run(runs / "again", 101.0, summary={"ended_at": "2026-01-02T00:00:00+00:00"})
        fake_run(runs / "cut", 90.0, 2, summary={"finished": False, "steps": 40})
        fake_run(runs / "torn", 90.0, 3).joinpath("config.yaml").write_text("{")
        fake_run(runs / "vae", 90.0, 5, config={"autoencoder": {"_target_": "x.KL"}})
        fake_run(runs / "half", 90.0, 7).joinpath("summary.json").write_text('{"finished": tr')
        fake_run(runs / "hopeless", 90.0, 6, summary={"pruned": True, "steps": 30})
        result, text = compared(tmp_path)
        said = " ".join(result["left_out"])
        for words in (
            f"cut is left out: it is unfinished at step 40; resume it with `diffusion-lab train "
            f"resume={runs / 'cut'}`",
            "torn/config.yaml is damaged",
            "half is left out: its summary.json is damaged and cannot be read",
            "vae is left out: it is an autoencoder",
            "hopeless is left out: a search ended it early, at step 30",
            f"dit_0 is left out: {runs / 'again'}, which finished later, has the same composition",
        ):
            assert words in said
            assert literal(words) in text
        assert len(result["left_out"]) == 6
        (members,) = result["compositions"].values()
        assert members == [str(runs / "again"), str(runs / "dit_1")]


def test_a_comparison_that_a_full_disk_cut_short_is_repeated(runs, tmp_path, monkeypatch):
    def fail(path, content):
        if path.name == "pairs.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, content)

    fake_group(runs, "dit", [100.0, 110.0])
    with monkeypatch.context() as patch:
        patch.setattr(output, "write_atomically", fail)
        with pytest.raises(OSError, match=r"pairs\.csv"):
            compared(tmp_path)
    compared(tmp_path)


class TestGrouping:
    def test_a_name_has_the_fewest_settings_that_tell_apart_classes_first(self):
        settings = [
            {"backbone._target_": "lab.DiT", "backbone.block._target_": "lab.A", "backbone.w": 1},
            {"backbone._target_": "lab.DiT", "backbone.block._target_": "lab.B", "backbone.w": 2},
            {"backbone._target_": "lab.UNet", "optimizer.lr": 0.1},
        ]
        keys = varying(settings)
        assert keys[:2] == ["backbone._target_", "backbone.block._target_"]
        assert set(keys[2:]) == {"backbone.w", "optimizer.lr"}
        assert names_of(settings, keys) == ["DiT · A", "DiT · B", "UNet"]

    def test_values_that_tell_apart_are_named_by_their_key(self):
        settings = [{"optimizer.lr": lr, "x.lr": 3} for lr in (0.1, 0.2)] + [
            {"optimizer.lr": 0.1, "x.lr": 4}
        ]
        names = names_of(settings, varying(settings))
        assert names == [
            "optimizer.lr=0.1 · x.lr=3",
            "optimizer.lr=0.2 · x.lr=3",
            "optimizer.lr=0.1 · x.lr=4",
        ]
        assert names_of([{}], []) == ["all runs"]

    def test_a_setting_that_follows_from_the_class_is_not_named(self):
        def of(kind, **more):
            return {"backbone._target_": f"a.{kind}"} | {
                f"backbone.{k}": v for k, v in more.items()
            }

        settings = [of("UNet"), of("Mamba2", overlap=False)]
        settings += [of("DiT", overlap=False), of("DiT", overlap=True)]
        names = names_of(settings, varying(settings))
        assert names == ["UNet", "Mamba2", "DiT", "DiT · overlap"]
        rates = [each | {"optimizer.lr": lr} for each in settings[:2] for lr in (1, 2)]
        assert names_of(rates, varying(rates))[0] == "UNet · lr=1"

    def test_a_checksum_is_shortened(self):
        settings = [{"init_sha256": None}, {"init_sha256": "0123456789abcdef" * 4}]
        names = names_of(settings, varying(settings))
        assert names == ["init_sha256=null", "init_sha256=0123456789ab"]

    def test_what_is_switched_off_is_named_only_where_a_name_would_be_empty(self):
        settings = [{"backbone.overlap": False}, {"backbone.overlap": True}]
        names = names_of(settings, varying(settings))
        assert names == ["backbone.overlap=false", "backbone.overlap=true"]

    def test_a_part_is_then_named_as_one_writes_it_unless_two_classes_have_one_name(self):
        key = "coupling._target_"
        settings = [{key: None}, {key: "lab.Transport"}]
        assert names_of(settings, [key]) == ["coupling=none", "coupling=Transport"]
        settings += [{key: "mine.Transport"}]
        assert names_of(settings, [key]) == [
            f"{key}={each.get(key) or 'null'}" for each in settings
        ]

    def test_each_has_a_name_without_its_part_of_the_data_where_more_differs(self):
        clipped = {"data.fraction": 0.1, "trainer.gradient_clip_val": 1.0}
        settings = [{"data.fraction": 0.1}, {"data.fraction": 1.0}, clipped]
        names = names_of(settings, varying(settings))
        assert names == [
            "data.fraction=0.1 · trainer.gradient_clip_val=null",
            "data.fraction=1.0 · trainer.gradient_clip_val=null",
            "data.fraction=0.1 · trainer.gradient_clip_val=1.0",
        ]
        assert without_data(names[0]) == "trainer.gradient_clip_val=null"

    def test_all_of_the_data_is_null(self):
        settings = [{"data.fraction": 0.1}, {}]
        assert names_of(settings, varying(settings)) == ["fraction=0.1", "fraction=null"]

    def test_equal_numbers_are_one_setting(self, runs):
        for seed, (fraction, betas) in enumerate(((None, 1.0), (1, 1), (1.0, 1.0))):
            config = {"data": {"fraction": fraction}, "optimizer": {"betas": [0, betas]}}
            fake_run(runs / str(seed), 100.0 + seed, seed, config=config)
        assert len(collect([runs]).groups) == 1

    def test_a_key_that_is_newer_than_a_run_has_its_default_there(self, runs):
        """Newer code adds keys, and a null, or a class that is not here, has none."""
        fake_run(runs / "older", 100.0, config={"optimizer": {"lr": 0.1}})
        newer = {"backbone": {"registers": 0, "overlap": False}, "optimizer": {"lr": 0.2}}
        fake_run(runs / "newer", 90.0, config=newer)
        assert {group.name for group in collect([runs]).groups} == {"lr=0.1", "lr=0.2"}
        fake_run(runs / "null", 90.0, config={"backbone": {"registers": None}})
        own = {"backbone": {"_target_": "nowhere.Network"}}
        fake_run(runs / "own", 90.0, config=own | {"optimizer": {"lr": 0.1}})
        groups = {Path(group.runs[0].folder).name: group for group in collect([runs]).groups}
        registers = {name: g.settings["backbone.registers"] for name, g in groups.items()}
        assert registers == {"older": 0, "newer": 0, "null": None, "own": None}

    def test_the_steps_of_a_run_that_the_clock_ends_are_no_setting_of_it(self, runs):
        """Runs with different budgets stay apart: neither counts as a repetition of the other."""
        counted = {"trainer": {"max_steps": 100, "max_time": None}}
        timed = {"trainer": {"max_steps": 10**9, "max_time": "00:00:01:30"}}
        timed["budget"] = {"seconds": 90}
        for name, backbone in (("dit", {}), ("unet", UNET)):
            fake_run(runs / f"{name}_images", 1.0, config=backbone | counted)
            fake_run(runs / f"{name}_seconds", 1.0, config=backbone | timed)
        collected = collect([runs])
        assert collected.left_out == []
        names = {group.name for group in collected.groups}
        assert names == {"DiT", "UNet", "DiT · max_steps=100", "UNet · max_steps=100"}

    def test_seeds_places_and_sampling_make_no_composition(self, runs, tmp_path):
        fake_run(runs / "a", 100.0, 0)
        fake_run(
            runs / "b",
            110.0,
            1,
            config={"data": {"source": {"root": "elsewhere"}}, "compile": True},
        )
        fake_run(runs / "c", 120.0, 2, config={"sampler": {"order": None}})
        result, _ = compared(tmp_path)
        assert [len(members) for members in result["compositions"].values()] == [3]


class TestRefusals:
    def test_another_number_of_samples_is_refused_with_the_command_that_mends_it(
        self, runs, tmp_path
    ):
        fake_group(runs, "dit", [100.0, 110.0])
        odd = fake_run(runs / "unet", 90.0, 0, config=UNET, protocol={"num_samples": 500})
        with pytest.raises(UserError) as error:
            compared(tmp_path)
        assert str(error.value) == (
            f"{runs / 'dit_0'} was measured with metrics.num_samples=1000, {odd} with "
            f"metrics.num_samples=500, so their metrics cannot be compared; measure {odd} with "
            f"`diffusion-lab evaluate run={odd} metrics.num_samples=1000`"
        )
        assert not (tmp_path / "comparison").exists()

    def test_another_sampler_is_refused_with_the_command_that_mends_it(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0])
        odd = fake_run(runs / "unet", 90.0, 0, config=UNET | {"sampler": {"steps": 50}})
        with pytest.raises(UserError) as error:
            compared(tmp_path)
        assert str(error.value) == (
            f"{odd} was sampled with sampler.steps=50, {runs / 'dit_0'} with sampler.steps=10, so "
            f"their metrics cannot be compared; measure {odd} with "
            f"`diffusion-lab evaluate run={odd} sampler.steps=10`"
        )

    def test_another_kind_of_sampler_asks_for_one_choice(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0])
        other = {"_target_": "diffusion_lab.diffusion.sampler.Heun"}
        odd = fake_run(runs / "unet", 90.0, config=UNET | {"sampler": other})
        kind = "sampler._target_=diffusion_lab.diffusion.sampler.Heun"
        with refused(kind, f"`diffusion-lab evaluate run={odd} sampler=...`"):
            compared(tmp_path)

    def test_runs_without_metrics_are_named_and_counted(self, runs, tmp_path):
        for seed in range(3):
            fake_run(runs / f"run{seed}", 1.0, seed, summary={"protocol": None})
        with refused("diffusion-lab evaluate run=", "2 other runs"):
            compared(tmp_path)

    def test_a_later_evaluation_is_used_where_it_is_what_all_have(self, runs, tmp_path):
        """Training used unequal protocols, but `evaluate` has measured both runs by one since."""
        for seed, fid in enumerate((100.0, 110.0)):
            name = f"fid/{NAME.replace('1k', '5k')}"
            folder = fake_run(runs / f"run{seed}", 1.0, seed, protocol={"num_samples": 500 + seed})
            (folder / EVALUATIONS).mkdir()
            present = CurrentWeights(folder)
            (own,) = evaluations_of(folder, seed, present)
            protocol = {
                key: own["protocol"][key] for key in own["protocol"] if key != "fingerprint"
            }
            record = own | {
                "protocol": with_fingerprint(protocol | {"num_samples": 5000}),
                "metrics": {name: fid},
                CHECKPOINT: sha256_of(folder),
            }
            (folder / EVALUATIONS / "a.json").write_text(json.dumps(record))
            stale = record | {CHECKPOINT: "of other weights", "metrics": {name: 1.0}}
            (folder / EVALUATIONS / "b.json").write_text(json.dumps(stale))
        _, text = compared(tmp_path)
        assert "5,000 samples" in text
        assert "105.0 ±" in text

    def test_a_folder_of_something_else_is_not_written_to(self, runs, tmp_path):
        fake_run(runs / "a", 1.0)
        (tmp_path / "comparison").mkdir()
        (tmp_path / "comparison/index.html").write_text("<html>mine</html>")
        with refused(tmp_path / "comparison"):
            compared(tmp_path)
        (tmp_path / "file").write_text("")
        with refused(tmp_path / "file"):
            compare([str(runs)], str(tmp_path / "file"))

    def test_a_comparison_is_written_anew_without_plots_of_the_last(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0], metrics={f"kid/{NAME}": 0.1})
        compared(tmp_path)
        plots = tmp_path / "comparison/plots"
        assert (plots / "kid_by_seed.svg").exists()
        (plots / "mine.svg").write_text("")
        for path in runs.glob("*/summary.json"):
            summary = json.loads(path.read_text())
            del summary["metrics"][f"kid/{NAME}"]
            path.write_text(json.dumps(summary))
        compared(tmp_path)
        assert not (plots / "kid_by_seed.svg").exists()
        assert (plots / "mine.svg").exists()
        assert (plots / "fid_by_seed.svg").exists()


class TestVerdict:
    def test_two_seeds_of_one_composition_are_no_difference(self, runs):
        fake_group(runs, "dit", [100.0, 110.0])
        answer, _ = said(runs)
        assert answer.startswith("No difference to test: all runs have the same composition and")
        assert answer.endswith("FID 105 ± 63.5")  # t(1) = 12.706, times the standard error 5

    def test_equal_groups_are_no_difference(self, runs):
        rng = np.random.default_rng(0)
        fake_group(runs, "dit", list(100 + rng.normal(size=4)))
        fake_group(runs, "unet", list(100 + rng.normal(size=4)), config=UNET)
        answer, _ = said(runs)
        assert answer.startswith("No difference is shown at this budget: ")
        assert "do not differ significantly in FID" in answer
        assert "80 % power for" in answer

    def test_the_gap_of_80_percent_power_is_beside_one_that_is_not_shown(self, runs):
        # differences 1, 3: mean 2, standard deviation sqrt(2), standard error 1; a noncentral t of
        # 1 degree of freedom and noncentrality 16.33 is above t(1) = 12.706 in 80 % of draws
        fake_group(runs, "dit", [10.0, 20.0])
        fake_group(runs, "unet", [11.0, 23.0], config=UNET)
        answer, text = said(runs)
        assert "gap 2, of 80 % power for 16.3" in answer
        assert f"p = {1 - 2 * math.atan(2) / math.pi:.2g}" in text

    def test_a_clear_difference_is_named_with_its_size(self, runs):
        # differences 50, 52, 54: mean 52, standard error 2 / sqrt(3), half of the interval 4.97
        fake_group(runs, "dit", [100.0, 110.0, 90.0])
        fake_group(runs, "unet", [150.0, 162.0, 144.0], config=UNET)
        answer, text = said(runs)
        assert answer == "DiT is better than UNet: FID lower by 52 (95 % interval 47 to 57)"
        assert "3 seeds, p = 0.00049" in text

    def test_seeds_are_paired_and_not_pooled(self, runs):
        """Seeds change FID by far more than compositions do, and by about the same in both."""
        fake_group(runs, "dit", [100.0, 300.0, 500.0])
        fake_group(runs, "unet", [105.0, 306.0, 505.0], config=UNET)
        answer, _ = said(runs)
        assert answer.startswith("DiT is better than UNet: FID lower by 5.33")

    def test_only_common_seeds_are_paired(self, runs):
        fake_group(runs, "dit", [100.0, 110.0, 90.0])
        for seed, fid in ((1, 160.0), (2, 141.0), (7, 1.0)):
            fake_run(runs / f"unet_{seed}", fid, seed, config=UNET)
        _, text = said(runs)
        assert "2 seeds, p = " in text

    def test_higher_is_better_for_recall(self, runs):
        for seed in range(3):
            for name, config, recall in (("dit", {}, 0.5), ("unet", UNET, 0.3 + 0.01 * seed)):
                fake_run(
                    runs / f"{name}_{seed}", 100.0, seed, config, metrics={f"recall/{NAME}": recall}
                )
        answer, _ = said(runs, "recall")
        assert answer.startswith("DiT is better than UNet: Recall higher by 0.19 (")

    def test_several_compositions_are_corrected_and_the_best_is_named(self, runs):
        for width, fids in ((1, [100, 101, 99]), (2, [150, 152, 151]), (3, [151, 151, 152])):
            fake_group(runs, f"w{width}", fids, config={"backbone": {"width": width}})
        answer, text = said(runs)
        assert answer == "width=1 is best by FID: better than each of the other 2"
        assert "p = 0.00013, Holm 0.00038" in text
        assert "width=2 and width=3 do not differ significantly" in text

    def test_many_pairs_without_a_difference_are_counted(self, runs):
        for width, fids in enumerate([[1, 4], [2, 0], [3, 7], [6, 3], [500, 501]]):
            fake_group(runs, f"w{width}", fids, config={"backbone": {"width": width + 1}})
        _, text = said(runs)
        assert text.count("seeds, p = ") == 10
        fake_group(runs, "w6", [9, 2], config={"backbone": {"width": 6}})
        _, text = said(runs)
        shown = text.count("seeds, p = ")
        assert f"{15 - shown} pairs do not differ significantly in FID" in text

    def test_one_seed_each_says_nothing_beyond_the_runs(self, runs):
        fake_run(runs / "dit", 100.0)
        fake_run(runs / "unet", 120.0, config=UNET)
        answer, text = said(runs)
        assert answer.startswith("Nothing can be said about FID beyond these runs")
        assert "The gap between DiT and UNet is 20" in text
        assert "Their jackknife deviations over samples are 3 and 3" in text

    def test_unequal_budgets_are_said(self, runs):
        fake_group(runs, "dit", [100.0, 110.0])
        fake_group(runs, "unet", [100.0, 110.0], config=UNET, summary={"images_seen": 32_000})
        _, text = said(runs)
        assert "Budgets are unequal: runs saw 6.4k to 32k images" in text

    def test_equal_time_is_an_equal_budget(self, runs, tmp_path):
        budget = {"budget": {"seconds": 90, "solved": ["trainer.max_time='00:00:01:30'"]}}
        fake_group(runs, "dit", [100.0, 110.0], config=budget)
        fake_group(
            runs, "unet", [100.0, 110.0], config=UNET | budget, summary={"images_seen": 32_000}
        )
        _, text = said(runs)
        assert "Budgets are unequal" not in text
        _, text = compared(tmp_path)
        assert "Every run had a time limit of 90 seconds and saw 6,400 to 32,000 images" in text

    def test_losses_of_other_objectives_are_not_compared(self, runs):
        fake_group(runs, "dit", [100.0, 110.0])
        fake_group(runs, "eps", [100.0, 110.0], config={"objective": {"_target_": "lab.Other"}})
        (sentence,) = collect([runs]).omitted
        assert sentence.startswith("Denoising losses are left out: objective, schedule, data or")
        assert said(runs, "test_loss") is None

    def test_metrics_that_runs_may_have_been_chosen_by_are_said(self, runs, tmp_path):
        for name, config in (("dit", {}), ("unet", UNET)):
            fids = [100.0, 110.0 + len(config)]
            fake_group(runs, name, fids, config=config, protocol={"reference": "validation"})
        compared(tmp_path)
        page = (tmp_path / "comparison/index.html").read_text()
        assert "10,000 validation images" in page
        assert "metrics.reference=train" in page

    def test_runs_of_other_validation_splits_are_other_compositions(self, runs):
        fake_group(runs, "auto", [100.0, 110.0])
        fake_group(runs, "few", [90.0, 95.0], config={"data": {"validation_size": 100}})
        found = collect([runs])
        assert len(found.groups) == 2
        assert found.omitted  # their losses are on other images

    @pytest.mark.usefixtures("real_plots")
    def test_parts_of_the_data_are_compared_at_equal_size_and_cross(self, runs, tmp_path):
        for fraction, images, ours, theirs in ((0.01, 600, 300, 200), (0.1, 6000, 150, 180)):
            for name, config, fid in (("dit", {}, ours), ("unet", UNET, theirs)):
                fake_group(
                    runs,
                    f"{name}{fraction}",
                    [fid, fid + 10.0, fid + 20.0 + len(name)],
                    config=config | {"data": {"fraction": fraction}},
                    summary={"training_images": images},
                )
        result, text = compared(tmp_path)
        assert len(result["compositions"]) == 4
        assert "Holm's correction covers all 4 tests of all metrics" in text
        page = (tmp_path / "comparison/index.html").read_text()
        assert (
            "By the means, DiT overtakes UNet in FID between 600 and 6,000 training images"
        ) in page
        assert (tmp_path / "comparison/plots/fid_over_data.svg").exists()

    def test_values_that_are_not_finite_are_none(self, runs):
        fake_group(runs, "dit", [100.0, 110.0])
        fake_group(runs, "unet", [100.0, float("nan")], config=UNET)
        answer, _ = said(runs)
        assert answer.startswith("Nothing can be said about FID")
        (sentence,) = collect([runs]).omitted
        assert sentence.startswith(f"{runs / 'unet_1'} has no finite FID, Test loss, Val")

    def test_a_loss_that_is_not_compared_is_not_said_to_be_infinite(self, runs):
        fake_group(runs, "dit", [100.0, 110.0], metrics={"test/loss": float("inf")})
        names = [line.split(" has no finite ")[1] for line in collect([runs]).omitted]
        assert [name.split(",")[0] for name in names] == ["Test loss"] * 2
        fake_group(runs, "eps", [1.0, 2.0], config={"objective": {"_target_": "lab.Other"}})
        assert len(collect([runs]).omitted) == 1

    def test_runs_without_any_finite_metric_are_refused(self, runs, tmp_path):
        fake_group(runs, "dit", [float("nan"), float("nan")])
        with refused("finite"):
            compared(tmp_path)
        assert not (tmp_path / "comparison").exists()


class TestTable:
    def test_every_test_is_written(self, runs, tmp_path):
        # UNet is ahead by recall and behind by FID
        for name, config, fids, recall in (
            ("dit", {}, [100.0, 110.0, 90.0], 0.5),
            ("unet", UNET, [150.0, 162.0, 144.0], 0.6),
        ):
            fake_group(runs, name, fids, config=config, metrics={f"recall/{NAME}": recall})
        compared(tmp_path)
        rows = list(csv.DictReader((tmp_path / "comparison/pairs.csv").open()))
        assert [row["metric"] for row in rows] == ["fid", "recall", "test_loss"]
        fid, recall, _ = rows
        assert (fid["ahead"], fid["behind"], fid["seeds"]) == ("DiT", "UNet", "0 1 2")
        assert (float(fid["gap"]), fid["significant"]) == (52, "True")
        # FID and test loss are corrected together
        assert float(fid["holm"]) == pytest.approx(2 * float(fid["p"]))
        assert fid["tests"] == "2"
        # recall differs by the same in every seed, so it is not tested
        assert (recall["ahead"], recall["significant"]) == ("UNet", "False")
        assert recall["p"] == recall["holm"] == recall["gap_at_80_power"] == ""
        assert float(recall["gap"]) == pytest.approx(-0.1)

    def test_means_intervals_costs_and_real_values(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0, 90.0])
        compared(tmp_path)
        (row,) = csv.DictReader((tmp_path / "comparison/table.csv").open())
        assert (row["composition"], row["seeds"]) == ("all runs", "3")
        assert float(row["fid"]) == 100
        # standard deviation 10, times t(2) / sqrt(3)
        assert float(row["fid_low"]) == pytest.approx(100 - 24.8414, abs=1e-3)
        assert float(row["fid_high"]) == pytest.approx(100 + 24.8414, abs=1e-3)
        assert float(row["fid_real"]) == 96.3
        assert float(row["macs"]) == 2e6
        assert float(row["images_per_second"]) == 375  # median of 350 and 400
        assert float(row["peak_memory"]) == 2**30
        text = (tmp_path / "comparison/table.md").read_text()
        assert "| all runs | 3 | 6.4k | 1M | 2M | 375 | 2 min | 1 GiB | 100.0 ± 24.8 |" in text
        assert f"| real images |{'  |' * 7} 96.3 |  | {NONE} |" in text

    def test_older_runs_have_no_macs_and_no_memory(self, runs, tmp_path):
        fake_run(runs / "a", 100.0, summary={"macs": None, "peak_memory_bytes": None})
        fake_run(runs / "b", 100.0, config=UNET)
        compared(tmp_path)
        row, other = csv.DictReader((tmp_path / "comparison/table.csv").open())
        assert (row["macs"], row["peak_memory"]) == ("", "")
        assert other["macs"] == "2000000"

    def test_a_single_seed_has_no_interval_but_a_std_over_samples(self, runs, tmp_path):
        fake_run(runs / "dit", 100.0)
        fake_run(runs / "unet", 120.0, config=UNET)
        _, text = compared(tmp_path)
        assert "| DiT | 1 | " in text
        assert "| 100 | 3 |" in text
        assert "Student" not in text

    def test_several_seeds_have_a_std_over_samples_beside_their_interval(self, runs, tmp_path):
        for seed, (fid, std) in enumerate(((100.0, 3.0), (110.0, 5.0))):
            fake_run(runs / str(seed), fid, seed, metrics={f"fid_std/{NAME}": std})
        _, text = compared(tmp_path)
        assert "| 105.0 ± 63.5 | 4 |" in text
        (row,) = csv.DictReader((tmp_path / "comparison/table.csv").open())
        assert (float(row["fid_std"]), float(row["fid_low"])) == (4, pytest.approx(105 - 63.531))
        assert "classifier" not in row

    def test_every_run_is_written_with_the_whole_names_of_its_metrics(self, runs, tmp_path):
        accuracy = "accuracy/classifier-3f01b756/1k"
        for seed, fid in enumerate((100.0, 110.0)):
            fake_run(runs / str(seed), fid, seed, metrics={accuracy: 0.7 + seed / 8})
        _, text = compared(tmp_path)
        assert "classifier-3f01b756" in text
        rows = list(csv.DictReader((tmp_path / "comparison/runs.csv").open()))
        assert [row["seed"] for row in rows] == ["0", "1"]
        assert [row["folder"] for row in rows] == [str(runs / "0"), str(runs / "1")]
        assert [float(row[f"fid/{NAME}"]) for row in rows] == [100, 110]
        assert [float(row[f"fid_std/{NAME}"]) for row in rows] == [3, 3]
        assert [float(row[accuracy]) for row in rows] == [0.7, 0.825]
        assert [float(row["training_seconds"]) for row in rows] == [120, 120]
        (row,) = csv.DictReader((tmp_path / "comparison/table.csv").open())
        assert row["classifier"] == "classifier-3f01b756"

    def test_latex_is_escaped(self, runs, tmp_path):
        fake_group(runs, "a", [1.0, 2.0], config={"backbone": {"mlp_ratio": 4}})
        fake_group(runs, "b", [1.0, 2.0], config={"backbone": {"mlp_ratio": 2}})
        compared(tmp_path)
        text = (tmp_path / "comparison/table.tex").read_text()
        assert r"mlp\_ratio=4 & 2 &" in text
        assert r"$\pm$" in text
        for rule in (r"\toprule", r"\midrule", r"\bottomrule"):
            assert rule in text
        widths = {line.count("&") for line in text.splitlines() if line.endswith(r"\\")}
        assert len(widths) == 1

    def test_both_numbers_have_the_digits_of_the_spread(self):
        assert with_spread(468.83, 44.24) == ("468.8", "44.2")
        assert with_spread(0.24691, 0.00421) == ("0.2469", "0.0042")
        assert with_spread(3.0, 0.0) == ("3", "0")


def test_a_front_is_what_nothing_cheaper_betters():
    points = [(3, 10), (1, 30), (2, 40), (4, 10), (2, 20)]
    assert front(points, higher_is_better=False) == [1, 4, 0]
    assert front([(1, 0.5), (2, 0.4), (3, 0.6)], higher_is_better=True) == [0, 2]


def test_cells_of_a_grid_are_its_images(runs):
    folder = fake_run(runs / "a", 1.0)
    with Image.open(next(folder.glob("samples/*.png"))) as picture:
        pixels = np.asarray(picture)[::2, ::2]
    cells = cells_of(pixels, 3)
    assert [len(row) for row in cells] == [3] * 4
    assert np.array_equal(cells[1][2], pixels[12:20, 22:30])
    assert cells_of(pixels, 4) is None  # the grid has 3 columns
    assert cells_of(pixels[:-1], 3) is None
    scatter = np.zeros_like(pixels)  # a scatter plot, as of two moons, is no grid
    assert cells_of(scatter, 3) is None
    line = side_by_side([cells[0][0], cells[0][1], cells[1][0]])
    assert line.shape == (8, 8 + 2 + 8 + 4 + 8, 2)
    assert (line[:, 8:10, 1] == 0).all()


def test_large_pictures_are_made_to_fit():
    noise = np.random.default_rng(0).integers(0, 255, (600, 600, 3)).astype(np.uint8)
    assert len(data_uri(noise, 20_000)) <= 20_000
    flat = np.zeros((20, 20), np.uint8)
    assert data_uri(flat, 20_000).startswith("data:image/png")


def test_paths_are_told_from_overrides(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a=b").mkdir()
    given = ["runs", "--cfg", "job", "output=x", "a=b", "it's"]
    assert gather_paths(given) == ["--cfg", "job", "output=x", r"paths=['runs','a=b','it\'s']"]
    assert gather_paths(["--help"]) == ["--help"]


def test_the_command_compares_trained_runs(lab, run_folder, tmp_path):
    for arguments in (["run_dir=other", "seed=1"], ["run_dir=wide", "backbone.width=48"]):
        code, _, err = lab("train", *TINY, *arguments, "logger=none")
        assert code == 0, err
    code, out, err = lab("compare", "run", "other", "wide", "json=true")
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert set(result["compositions"]) == {"width=32", "width=48"}
    rows = list(csv.DictReader((tmp_path / "comparison/table.csv").open()))
    assert {row["backbone.width"] for row in rows} == {"32", "48"}
    assert all(float(row["macs"]) > 0 and float(row["peak_memory"]) > 1e6 for row in rows)
    page = (tmp_path / "comparison/index.html").read_text()
    assert page.count("data:image/png") == 4  # a strip and a grid of each run


def test_the_macs_of_a_summary_are_those_of_profile(lab, run_folder):
    summary = json.loads((run_folder / "summary.json").read_text())
    code, out, err = lab("profile", "run=run", "device=meta", "json=true")
    assert code == 0, err
    assert summary["macs"] == json.loads(out.splitlines()[-1])["macs"] > 0
    assert OmegaConf.load(run_folder / "config.yaml").backbone.width == 32
