"""Comparisons of run folders: what is found, grouped, refused and written."""

import csv
import errno
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.fake_runs import NAME, UNET, fake_group, fake_run
from helpers.refusals import refused
from helpers.tiny_runs import TINY
from PIL import Image

from diffusion_lab.cli.commands import gather_paths
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import literal
from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.report import page
from diffusion_lab.report.arms import names_of, varying, without_data
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import cells_of, compare, data_uri, side_by_side
from diffusion_lab.report.records import run_folders
from diffusion_lab.report.scaling import front
from diffusion_lab.runs.current import CHECKPOINT, CurrentWeights, sha256_of
from diffusion_lab.runs.results import EVALUATIONS, evaluations_of

HEUN = "diffusion_lab.diffusion.sampler.Heun"


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

    @pytest.mark.long
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
        for words in ("cut is", "torn/config.yaml", "half is", "vae is", "hopeless is", "dit_0 is"):
            assert words in said
            assert literal(words) in text
        assert len(result["left_out"]) == 6
        (members,) = result["compositions"].values()
        assert members == [str(runs / "again"), str(runs / "dit_1")]


@pytest.mark.long
def test_a_comparison_that_a_full_disk_cut_short_is_repeated(runs, tmp_path, monkeypatch):
    def fail(path, content):
        if path.name == "pairs.csv":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        write_atomically(path, content)

    fake_group(runs, "dit", [100.0, 110.0])
    with monkeypatch.context() as patch:
        patch.setattr(page, "write_atomically", fail)
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

    @pytest.mark.parametrize(
        ("settings", "names"),
        [
            (
                [{"optimizer.lr": lr, "x.lr": x} for lr, x in ((0.1, 3), (0.2, 3), (0.1, 4))],
                [f"optimizer.lr={lr} · x.lr={x}" for lr, x in ((0.1, 3), (0.2, 3), (0.1, 4))],
            ),
            ([{}], ["all runs"]),
            (
                [{"init_sha256": None}, {"init_sha256": "0123456789abcdef" * 4}],
                ["init_sha256=null", "init_sha256=0123456789ab"],
            ),
            (  # what is switched off is named only where a name would be empty
                [{"backbone.overlap": False}, {"backbone.overlap": True}],
                ["backbone.overlap=false", "backbone.overlap=true"],
            ),
            ([{"data.fraction": 0.1}, {}], ["fraction=0.1", "fraction=null"]),
        ],
        ids=["keys", "none", "checksum", "off", "data"],
    )
    def test_values_that_tell_apart_are_named_by_their_key(self, settings, names):
        assert names_of(settings, varying(settings)) == names

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

    def test_equal_numbers_are_one_setting(self, runs):
        for seed, (fraction, betas) in enumerate(((None, 1.0), (1, 1), (1.0, 1.0))):
            config = {"data": {"fraction": fraction}, "optimizer": {"betas": [0, betas]}}
            fake_run(runs / str(seed), 100.0 + seed, seed, config=config)
        assert len(collect([runs]).arms) == 1

    def test_a_key_that_is_newer_than_a_run_has_its_default_there(self, runs):
        """Newer code adds keys, and a null, or a class that is not here, has none."""
        fake_run(runs / "older", 100.0, config={"optimizer": {"lr": 0.1}})
        own = {"registers": 0, "overlap": False, "route": [1, -1]}
        newer = {"backbone": own, "optimizer": {"lr": 0.2}}
        fake_run(runs / "newer", 90.0, config=newer)
        assert {arm.name for arm in collect([runs]).arms} == {"lr=0.1", "lr=0.2"}
        fake_run(runs / "null", 90.0, config={"backbone": {"registers": None}})
        own = {"backbone": {"_target_": "nowhere.Network"}}
        fake_run(runs / "own", 90.0, config=own | {"optimizer": {"lr": 0.1}})
        groups = {Path(arm.runs[0].folder).name: arm for arm in collect([runs]).arms}
        registers = {name: g.settings["backbone.registers"] for name, g in groups.items()}
        assert registers == {"older": 0, "newer": 0, "null": None, "own": None}

    def test_a_protocol_without_its_defaults_is_the_same_as_one_with_them(self, runs):
        asked = {"metric": "fid", "test": "paired", "seeds": [0, 1]}
        for seed, more in enumerate(({}, {"contrasts": "all", "sampling": "equal"})):
            fake_run(runs / str(seed), 100.0, seed, config={"protocol": asked | more})
        assert len(collect([runs]).arms) == 1

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
        names = {arm.name for arm in collected.arms}
        assert names == {"DiT", "UNet", "DiT · max_steps=100", "UNet · max_steps=100"}

    def test_seeds_places_and_sampling_make_no_composition(self, runs):
        elsewhere = {"data": {"source": {"root": "elsewhere"}}, "compile": True}
        for seed, config in enumerate(({}, elsewhere, {"sampler": {"order": None}})):
            fake_run(runs / str(seed), 100.0 + 10 * seed, seed, config)
        assert [len(arm.runs) for arm in collect([runs]).arms] == [3]


class TestRefusals:
    @pytest.mark.parametrize(
        ("config", "protocol", "theirs", "mended"),
        [
            ({}, {"num_samples": 500}, "metrics.num_samples=500", "metrics.num_samples=1000"),
            ({"sampler": {"steps": 50}}, {}, "sampler.steps=50", "sampler.steps=10"),
            ({"sampler": {"_target_": HEUN}}, {}, f"sampler._target_={HEUN}", "sampler=..."),
        ],
    )
    def test_what_was_measured_otherwise_is_refused_with_the_command_that_mends_it(
        self, runs, tmp_path, config, protocol, theirs, mended
    ):
        usual, _ = fake_group(runs, "dit", [100.0, 110.0])
        odd = fake_run(runs / "unet", 90.0, config=UNET | config, protocol=protocol)
        with refused(usual, theirs, f"`diffusion-lab evaluate run={odd} {mended}`"):
            compared(tmp_path)
        assert not (tmp_path / "comparison").exists()

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
        assert "105 (100 to 110)" in text

    def test_a_folder_of_something_else_is_not_written_to(self, runs, tmp_path):
        fake_run(runs / "a", 1.0)
        (tmp_path / "comparison").mkdir()
        (tmp_path / "comparison/index.html").write_text("<html>mine</html>")
        with refused(tmp_path / "comparison"):
            compared(tmp_path)
        (tmp_path / "file").write_text("")
        with refused(tmp_path / "file"):
            compare([str(runs)], str(tmp_path / "file"))

    @pytest.mark.long
    def test_a_comparison_of_other_runs_is_not_replaced_in_silence(self, runs, tmp_path, capsys):
        first, other = str(fake_run(runs / "a", 1.0)), str(fake_run(runs / "b", 2.0, seed=1))
        output = str(tmp_path / "comparison")
        for paths, said in (([first], False), ([first, other], False), ([other], True)):
            compare(paths, output)
            assert ("output=..." in capsys.readouterr().err) == said

    @pytest.mark.long
    def test_a_comparison_is_written_anew_without_plots_of_the_last(self, runs, tmp_path):
        fake_group(runs, "dit", [100.0, 110.0])
        others = fake_group(runs, "unet", [90.0, 95.0], config=UNET)
        compared(tmp_path)
        plots = tmp_path / "comparison/plots"
        assert (plots / "fid_gaps.svg").exists()
        (plots / "mine.svg").write_text("")
        for folder in others:
            shutil.rmtree(folder)
        compared(tmp_path)
        assert not (plots / "fid_gaps.svg").exists()
        assert (plots / "mine.svg").exists()
        assert (plots / "fid_by_seed.svg").exists()


@pytest.mark.parametrize("family", ["gone.family", "my_package.family"])
def test_runs_of_a_strangers_family_are_read_without_its_code(tmp_path, monkeypatch, family):
    (tmp_path / "my_package").mkdir()
    (tmp_path / "my_package/__init__.py").write_text("raise SystemExit('it was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    fake_group(tmp_path / "runs", "own", [100.0, 101.0], config={"family": family})
    (arm,) = collect([tmp_path / "runs"]).arms
    assert [run.family for run in arm.runs] == [family] * 2


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


@pytest.mark.long
def test_the_command_compares_trained_runs(lab, run_folder, tmp_path):
    lab.done("train", *TINY, "run_dir=wide", "backbone.width=48", "logger=none")
    result = lab.result("compare", "run", "wide")
    assert set(result["compositions"]) == {"width=32", "width=48"}
    rows = list(csv.DictReader((tmp_path / "comparison/table.csv").open()))
    assert {row["backbone.width"] for row in rows} == {"32", "48"}
    assert all(float(row["macs"]) > 0 and float(row["peak_memory"]) > 1e6 for row in rows)
    page = (tmp_path / "comparison/index.html").read_text()
    assert page.count("data:image/png") == 4  # a strip and a grid of each run
