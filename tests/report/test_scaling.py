"""Scaling in a comparison: which runs are a family, what is fitted, held out, said and written."""

import csv
import json
import shutil
from itertools import product

import numpy as np
import pytest
from helpers.fake_runs import fake_group

from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare
from diffusion_lab.report.power_laws import PowerLaw
from diffusion_lab.report.scaling import SCALED, distinct, scaling, size_series

FID = SCALED[0]
SIZES, STEPS = (1e6, 4e6, 16e6, 64e6), (1600, 6400, 25_600)
LAWS = {
    "DiT": PowerLaw(30, (5000, 8000), (0.33, 0.4)),
    "UNet": PowerLaw(22, (2500, 9000), (0.25, 0.4)),
}
WIDTH = {"DiT": "width", "UNet": "channels"}


def grid(root, name="DiT", sizes=SIZES, steps=STEPS, seeds=2, change=None, more=None):
    """Writes runs of each size and budget whose FID follows the law of `name`, but for `change`."""
    for width, macs in enumerate(sizes, 1):
        for count in steps:
            value = float(LAWS[name](np.array([[macs], [64.0 * count]]))[0])
            value = change(macs, value) if change else value
            noise = np.exp(0.01 * np.random.default_rng(count + width).standard_normal(seeds))
            # the mean over seeds follows the law exactly
            fids = [float(value * each) for each in noise / noise.mean()]
            backbone = {"_target_": f"diffusion_lab.backbone.{name}", WIDTH[name]: width}
            config = {"backbone": backbone | (more or {}), "trainer": {"max_steps": count}}
            summary = {"macs": macs, "images_seen": 64 * count}
            fake_group(root, f"{name}_{width}_{count}", fids, config=config, summary=summary)
    return root


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """All sizes and budgets with two seeds, which no test may change."""
    return grid(tmp_path_factory.mktemp("whole"))


def part(whole, sizes: int, steps: int) -> list:
    """The runs of the first so many sizes and budgets."""
    each = product(range(1, sizes + 1), STEPS[:steps], (0, 1))
    return [whole / f"DiT_{width}_{count}_{seed}" for width, count, seed in each]


def laws(*paths):
    """The laws of FID, and the rows on its fits by family and form."""
    found = next(each for each in scaling(collect([*paths])) if each.metric.name == "fid")
    rows = found.table.to_dict("records")
    return found, {(row["family"], row["law"]): row for row in rows}


class TestFamilies:
    def test_a_value_that_was_tuned_for_each_size_may_differ(self, tmp_path):
        tuning = {"values": {"optimizer.lr": [1e-3, 2e-3]}, "tried": None}
        for width, lr in enumerate((1e-3, 2e-3), 1):
            for count in STEPS[:2]:
                backbone = {"_target_": "diffusion_lab.backbone.DiT", "width": width}
                config = {"backbone": backbone, "trainer": {"max_steps": count}}
                # Muon's second rate is the first one, by its configuration
                config |= {"optimizer": {"lr": lr, "vector_lr": lr}, "tuning": tuning}
                summary = {"macs": SIZES[width - 1], "images_seen": 64 * count}
                name = f"{width}_{count}"
                fake_group(tmp_path, name, [100.0, 101.0], config=config, summary=summary)
        (family,) = size_series(collect([tmp_path]), FID)
        assert len(family.points) == 4

    def test_sizes_and_budgets_of_a_network_are_a_family(self, tmp_path):
        for name in LAWS:
            grid(tmp_path, name, SIZES[:2], STEPS[:2])
        found = size_series(collect([tmp_path]), FID)
        assert {family.name for family in found} == {"DiT", "UNet"}
        assert sorted(len(family.points) for family in found) == [4, 4]
        (dit,) = (family for family in found if family.name == "DiT")
        assert [*dit.points["size"].unique()] == ["width=1", "width=2"]
        # two passes back, one forth, and two FLOPs for a MAC
        assert (dit.points.flops == 6 * dit.points.macs * dit.points.images).all()

    @pytest.mark.parametrize(("sizes", "steps"), [(3, 1), (1, 3), (4, 1)])
    def test_too_few_sizes_or_budgets_are_none(self, whole, sizes, steps):
        assert scaling(collect(part(whole, sizes, steps))) == []

    def test_another_setting_or_a_switch_of_the_network_parts_a_family(self, tmp_path):
        grid(tmp_path / "a", sizes=SIZES[:2], steps=STEPS[:2])
        grid(tmp_path / "b", sizes=SIZES[:2], steps=STEPS[:2], more={"qk_norm": True})
        found = size_series(collect([tmp_path]), FID)
        assert len({family.name for family in found}) == 2

    def test_runs_of_unknown_cost_are_none(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "runs")
        for path in tmp_path.glob("runs/*/summary.json"):
            path.write_text(json.dumps(json.loads(path.read_text()) | {"forward_passes": None}))
        assert scaling(collect([tmp_path])) == []

    def test_equal_amounts_count_once(self):
        assert distinct([1.0, 1.04, 2.0, 2.0, 4.0]) == 3


BOTH = ("DiT", "E + A N^-a + B D^-b")


class TestLaws:
    @pytest.mark.long
    def test_exponents_and_a_held_out_size_are_found(self, whole):
        scaled, found = laws(whole)
        row, truth = found[BOTH], LAWS["DiT"]
        assert row["size_exponent"] == pytest.approx(truth.exponents[0], rel=0.01)
        assert row["images_exponent"] == pytest.approx(truth.exponents[1], rel=0.01)
        assert row["compute_exponent"] == pytest.approx(0.33 * 0.4 / 0.73, rel=0.01)
        ends = row["optimal_size_exponent_low"], row["optimal_size_exponent_high"]
        assert ends[0] < row["optimal_size_exponent"] < ends[1]
        assert row["held_out"] == "width=4"
        assert row["held_out_error"] < 0.01
        law = scaled.laws["DiT"]
        assert min(law.flops) >= law.points.flops.min()
        last, before = (
            LAWS["DiT"](np.array([[macs] * 3, [64.0 * count for count in STEPS]]))
            for macs in (SIZES[-1], SIZES[-2])
        )
        assert row["held_out_points"] == 3
        guessed = max(abs(before / last - 1))
        assert row["held_out_unchanged"] == pytest.approx(guessed, rel=1e-6)

    @pytest.mark.long
    def test_one_seed_has_no_interval_and_a_front_at_the_border_is_said(self, tmp_path):
        inner, rows = laws(grid(tmp_path / "inner", seeds=1))
        assert "law_extrapolated" not in {fact.kind for fact in inner.facts}
        assert np.isnan(rows[BOTH]["offset_low"])
        law = inner.laws["DiT"]
        assert law.band(law.flops) == []
        # so few images that more of them are always better than a larger network
        short, rows = laws(grid(tmp_path / "short", steps=(20, 60, 180, 540), seeds=1))
        row = next(iter(rows.values()))
        assert row["at_the_border"] == row["points"] > 4
        kinds = [fact.kind for fact in short.facts]
        assert kinds.count("law_at_border") == kinds.count("law_extrapolated") == 1
        assert max(len(str(fact).split()) for fact in short.facts) <= 30

    @pytest.mark.slow
    def test_a_law_that_does_not_predict_is_said(self, whole, tmp_path):
        def worse(macs, value):
            return 1.15 * value if macs == SIZES[-1] else value

        good, _ = laws(whole)
        bad, _ = laws(grid(tmp_path / "bad", change=worse))
        assert "law_fails" in {fact.kind for fact in bad.facts}
        assert "law_fails" not in {fact.kind for fact in good.facts}

    def test_few_points_have_no_law_but_a_reason(self, whole):
        found, rows = laws(*part(whole, 2, 2))
        (row,) = rows.values()
        assert (found.laws, [fact.kind for fact in found.facts]) == ({}, ["no_law"])
        assert row["reason"]

    def test_equal_values_have_no_law(self, tmp_path):
        found, rows = laws(grid(tmp_path, change=lambda macs, value: 100.0))
        assert (len(rows), found.laws) == (2, {})


class TestOutput:
    @pytest.mark.long
    @pytest.mark.usefixtures("real_plots")
    def test_every_sentence_is_printed_and_written(self, whole, tmp_path, capsys):
        runs = part(whole, 2, 2)
        compare([*map(str, runs)], str(tmp_path / "out"))
        printed, text = capsys.readouterr().err, (tmp_path / "out/table.md").read_text()
        said = [fact for each in scaling(collect(runs)) for fact in each.facts]
        assert len(said) == 2  # there is no law of FID, and none of the validation loss
        for sentence in said:
            assert f"\n  {sentence}.\n" in printed
            assert f"\n* {sentence}.\n" in text

    @pytest.mark.slow
    @pytest.mark.usefixtures("real_plots")
    def test_the_section_is_written_and_removed_with_its_family(self, whole, tmp_path):
        out = tmp_path / "out"
        compare([str(whole)], str(out))
        rows = list(csv.DictReader((out / "scaling.csv").open()))
        assert [(row["metric"], row["law"]) for row in rows] == [
            (metric, law)
            for metric in ("fid", "validation_loss")
            for law in ("E + A C^-b", "E + A N^-a + B D^-b")
        ]
        assert float(rows[1]["compute_exponent"]) == pytest.approx(0.181, abs=0.01)
        page = (out / "index.html").read_text()
        assert 'id="scaling"' in page
        plots = {path.name for path in (out / "plots").glob("*_scaling.svg")}
        assert plots == {"fid_scaling.svg", "validation_loss_scaling.svg"}

        compare([str(whole / "DiT_1_1600_0")], str(out))
        assert not (out / "scaling.csv").exists()
        assert not list((out / "plots").glob("*_scaling.svg"))
        assert 'id="scaling"' not in (out / "index.html").read_text()

    @pytest.mark.long
    def test_a_metric_that_no_run_has_is_not_fitted(self, whole, tmp_path):
        shutil.copytree(whole, tmp_path / "runs")
        for path in tmp_path.glob("runs/*/summary.json"):
            summary = json.loads(path.read_text())
            del summary["metrics"]["val/loss"]
            path.write_text(json.dumps(summary))
        assert [each.metric.name for each in scaling(collect([tmp_path]))] == ["fid"]
