"""A study over sizes of the data: a verdict at each, a line over all, and where lines cross."""

import csv
import json
import re

import pytest
from helpers.fake_runs import NAME, fake_group, fake_run, said

from diffusion_lab.analysis.comparison import compare
from diffusion_lab.analysis.comparison.comparing import collect
from diffusion_lab.analysis.comparison.data_sizes import DataLine, crossings, data_lines
from diffusion_lab.analysis.comparison.verdict import verdicts
from diffusion_lab.metrics.feature_distances import KID
from diffusion_lab.metrics.quantities import QUANTITIES

FID = QUANTITIES[0]
BACKBONES = {"UNet": 1, "DiT": 4, "Mamba2": 4}
FRACTIONS = {0.001: 60, 0.01: 600, 0.1: 6000, 1.0: 60_000}
# mean FID by backbone, at each fraction; the U-Net is best on the least data, DiT on the most
FIDS = {
    "UNet": (300, 200, 150, 130),
    "DiT": (400, 260, 152, 100),
    "Mamba2": (450, 280, 180, 140),
}
NOISE = {"UNet": (0, 3, -2), "DiT": (1, 2, -3), "Mamba2": (-1, 4, -2)}


def study(root, fids=FIDS):
    """Writes runs of backbone x data.fraction x 3 seeds; DiT has null for all of the data."""
    for name, means in fids.items():
        for (fraction, images), mean in zip(FRACTIONS.items(), means, strict=True):
            fake_group(
                root,
                f"{name}_{fraction}",
                [mean + each for each in NOISE[name]],
                config={
                    "backbone": {"_target_": f"diffusion_lab.backbone.{name}"},
                    "data": {"fraction": None if fraction == 1 and name == "DiT" else fraction},
                },
                summary={"training_images": images},
                metrics={f"kid/{NAME}": mean / 1000},
            )


@pytest.fixture
def runs(tmp_path):
    study(tmp_path / "runs")
    return tmp_path / "runs"


def found(runs, metric=FID):
    """The verdict by a metric."""
    return verdicts(collect([runs]).groups, [metric])[metric.name]


def page_of(runs, output):
    compare([str(runs)], str(output))
    return (output / "index.html").read_text()


def test_each_size_of_the_data_has_its_own_answer(runs):
    answer, text = said(runs)
    assert answer == (
        "By FID it depends on the size of the data: UNet is best at 60 and 600 training images, "
        "DiT is best at 60,000 training images, none is shown to be best at 6,000 training images"
    )
    # 3 pairs at each of 4 sizes
    assert found(runs).tests == 12
    assert "At 60,000 training images: DiT is better than UNet: FID lower by 30" in text
    assert "At 6,000 training images: UNet and DiT do not differ significantly in FID" in text


def test_a_composition_that_is_best_at_every_size_is_best(tmp_path):
    study(tmp_path, FIDS | {"UNet": (90, 80, 70, 60)})
    assert said(tmp_path)[0] == "UNet is best by FID at each of 4 sizes of the data"


def test_a_composition_that_is_best_at_some_sizes_alone_is_no_matter_of_size(tmp_path):
    study(tmp_path, FIDS | {"DiT": (400, 260, 152, 129)})
    assert said(tmp_path)[0] == (
        "By FID UNet is best at 60 and 600 training images, none is shown to be best at 6,000 and "
        "60,000 training images"
    )


def test_no_difference_at_any_size(tmp_path):
    for fraction in (0.1, 1.0):
        for width in (1, 2):
            fake_group(
                tmp_path,
                f"{width}_{fraction}",
                [100.0 + 10 * width, 120.0, 90.0 + width],
                config={"backbone": {"width": width}, "data": {"fraction": fraction}},
                summary={"training_images": 60_000 * fraction},
            )
    assert said(tmp_path)[0] == (
        "No difference is shown at this budget: none of 2 pairs on the same data differs "
        "significantly in FID"
    )


def test_one_composition_at_each_size_is_not_tested(tmp_path):
    study(tmp_path, {"DiT": FIDS["DiT"]})
    answer, text = said(tmp_path)
    assert answer == (
        "Nothing is tested by FID: there is only one composition at each of 4 sizes of the data"
    )
    assert "share" not in text
    assert found(tmp_path).by_size[0] == (
        "At 60 training images: No difference to test: all runs have the same composition and "
        "differ only in their seeds; FID 400 ± 6.57"
    )


def test_a_composition_that_has_a_metric_alone_at_its_size_is_not_compared(tmp_path):
    study(tmp_path)
    for path in tmp_path.glob("*/summary.json"):
        if "0.01_" in str(path.parent) and "DiT" not in str(path.parent):
            summary = json.loads(path.read_text())
            del summary["metrics"][f"kid/{NAME}"]
            path.write_text(json.dumps(summary))
    assert found(tmp_path, KID.quantities[0]).by_size[1] == (
        "At 600 training images: KID was measured for DiT only: nothing to compare"
    )


@pytest.mark.parametrize("seeds", [[5, 5], [5, 6]])
def test_that_one_choice_of_the_images_stands_for_all_is_said(tmp_path, seeds):
    for fraction, seed in zip((0.1, 1.0), seeds, strict=True):
        data = {"data": {"fraction": fraction, "subset_seed": seed}}
        fake_group(tmp_path, f"dit_{fraction}", [100.0, 110.0], config=data)
    words = "All runs use the same choice of training images (data.subset_seed=5)"
    assert (words in said(tmp_path)[1]) == (seeds == [5, 5])


# on all of the data the choice is none, so its runs are one composition in any case
@pytest.mark.parametrize(
    ("chosen", "compositions", "lines"), [((0, 1), 2, 1), ((0, 2), 3, 3), ((0, 0), 2, 1)]
)
def test_runs_that_choose_their_images_by_their_own_seed_are_one_composition(
    tmp_path, chosen, compositions, lines
):
    for fraction in (0.1, 1.0):
        for seed, subset in enumerate(chosen):
            data = {"data": {"fraction": fraction, "subset_seed": subset}}
            fake_run(tmp_path / f"{fraction}_{seed}", 100.0 + seed, seed, config=data)
    groups = collect([tmp_path]).groups
    assert len(groups) == compositions
    # all of the data is the largest part of a choice, if there is one choice
    assert len({group.apart_from_data for group in groups}) == lines


def test_runs_beside_them_that_do_not_choose_so_change_nothing(tmp_path):
    def choices(name: str, config: dict, subsets: dict[int, int]) -> None:
        for seed, subset in subsets.items():
            own = config | {"data": {"fraction": 0.1, "subset_seed": subset}}
            fake_run(tmp_path / f"{name}{seed}", 100.0 + seed, seed, config=own)

    choices("own", {}, {0: 0, 1: 1, 2: 2})
    choices("one", {"backbone": {"_target_": "diffusion_lab.backbone.UNet"}}, {0: 0, 1: 0, 2: 0})
    choices("single", {"backbone": {"_target_": "diffusion_lab.backbone.Mamba2"}}, {0: 0})
    fake_group(tmp_path, "all", [90.0, 91.0], config={"data": {"subset_seed": 0}})
    sizes = sorted(len(group.runs) for group in collect([tmp_path]).groups)
    assert sizes == [1, 2, 3, 3]


def test_one_size_of_the_data_needs_no_word_on_the_choice_of_images(tmp_path):
    for width in (1, 2):
        config = {"data": {"fraction": 0.1}, "backbone": {"width": width}}
        fake_group(tmp_path, f"dit_{width}", [100.0, 110.0], config=config)
    assert "choice of training images" not in said(tmp_path)[1]


@pytest.mark.slow
def test_the_table_is_by_size_and_then_by_fid_and_all_of_the_data_is_a_fraction(runs, tmp_path):
    page = page_of(runs, tmp_path / "out")
    rows = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["composition"] for row in rows] == [
        f"{name} · fraction={fraction}"
        for fraction, names in (
            (0.001, ("UNet", "DiT", "Mamba2")),
            (0.01, ("UNet", "DiT", "Mamba2")),
            (0.1, ("UNet", "DiT", "Mamba2")),
            (1, ("DiT", "UNet", "Mamba2")),
        )
        for name in names
    ]
    assert [float(row["training_images"]) for row in rows[::3]] == [60, 600, 6000, 60_000]
    assert "| UNet · fraction=0.001 | 3 | 60 |" in (tmp_path / "out/table.md").read_text()
    answer = page[page.index('<p class="answer">') :]
    assert answer.index("At 60 training images: UNet is best by FID") < answer.index(
        "At 60,000 training images: DiT is best by FID: better than each of the other 2"
    )
    assert (
        "By the means, DiT overtakes UNet in FID between 6,000 and 60,000 training images" in answer
    )
    pairs = list(csv.DictReader((tmp_path / "out/pairs.csv").open()))
    assert {(row["data"], row["ahead"]) for row in pairs if row["metric"] == "fid"} >= {
        ("60 training images", "UNet"),
        ("60,000 training images", "DiT"),
    }
    assert page.count("Holm&#39;s correction covers all") == 1
    assert (tmp_path / "out/plots/fid_over_data.svg").is_file()
    # the description, for readers who cannot see the plot
    assert "by size of the data, then best first: UNet · fraction=0.001 300.3;" in page


def test_a_composition_has_one_colour_and_a_mark_for_each_size(runs):
    groups = collect([runs]).groups
    assert [group.look % 8 for group in groups if group.name.startswith("DiT")] == [0] * 4
    assert [group.look % 8 for group in groups if group.name.startswith("UNet")] == [1] * 4
    assert len({group.look for group in groups}) == 12
    lines = data_lines(groups, "fid")
    assert [(line.name, line.look % 8) for line in lines] == [
        ("DiT", 0),
        ("UNet", 1),
        ("Mamba2", 2),
    ]
    assert lines[1].points[0][:2] == (60, pytest.approx(300 + 1 / 3))


def line(name, *means, start=0):
    sizes = [60, 600, 6000, 60_000][start:]
    return DataLine(name, 0, tuple((x, y, 0.0) for x, y in zip(sizes, means, strict=False)))


@pytest.mark.parametrize(
    ("ours", "theirs", "said"),
    [
        ((5, 5), (4, 6), ["B between 60 and 600"]),
        ((5, 5, 5), (4, 5, 6), ["B between 60 and 6,000"]),  # equal in between
        ((5, 5, 5), (4, 6, 4), ["B between 60 and 600", "A between 600 and 6,000"]),
        ((5, 5, 5), (5, 6, 7), ["no: A is better at 2 of 3 sizes, and equal at 1"]),
        ((5, 5, 5), (6, 5, 7), ["no: A is better at 2 of 3 sizes, and equal at 1"]),
        ((5, 5), (3, 3), ["no: B is better at 2 of 2 sizes"]),
        ((5, 5), (5, 5), ["equal"]),
    ],
)
def test_crossings_by_the_means(ours, theirs, said):
    found = crossings([line("A", *ours), line("B", *theirs)], FID)
    assert all(sentence.startswith("By the means, ") for sentence in found)
    words = []
    for sentence in found:
        if place := re.search(
            r"(A|B) overtakes (?:A|B) in FID (between .*) training images$", sentence
        ):
            # the line that is passed was better before
            words.append(f"{'B' if place[1] == 'A' else 'A'} {place[2]}")
        elif place := re.search("do not cross in FID(: .*)", sentence):
            words.append(f"no{place[1]}")
        else:
            assert sentence.endswith("A and B are equal in FID at every size")
            words.append("equal")
    assert words == said


def test_lines_with_one_size_in_common_are_not_said_to_cross_or_not():
    assert crossings([line("A", 5, 5), line("B", 4, 6, start=1)], FID) == []
