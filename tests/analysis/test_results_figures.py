"""Figures show the numbers of the records: those of the README, of sweeps, and of one page."""

import csv
import json
import math
import runpy
import shutil
import statistics
import xml.etree.ElementTree

import figures
import pandas as pd
import pytest
from helpers.paths import ROOT
from matplotlib.figure import Figure
from PIL import Image

from diffusion_lab.report.figures import COLOURS

FOLDER = ROOT / "experiments"
FILES = sorted(FOLDER.glob("results_*.svg"))
lines = runpy.run_path(str(ROOT / "experiments/lines.py"))
copies = runpy.run_path(str(ROOT / "experiments/copies.py"))
ROWS = """network,seed,sweep,scale,fid,fid_real,accuracy,accuracy_real
UNet,0,guidance,1,90.0,50.0,0.5,0.9
UNet,1,guidance,1,110.0,50.0,0.7,0.9
UNet,0,guidance,2,80.0,50.0,0.8,0.9
DiT,0,guidance,1,200.0,50.0,0.4,0.9
DiT,0,trained,1,300.0,50.0,0.4,0.9
"""
OBJECTIVES = ROOT / "experiments/objectives"


def excess(name, **where):
    """The mean FID less that of real images of some rows of a CSV file."""
    with (FOLDER / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    assert rows
    fid, real = (
        next(key for key in rows[0] if key.split("/")[0] == of) for of in ("fid", "fid_real")
    )
    return statistics.mean(float(row[fid]) - float(row[real]) for row in rows)


def mean(values):
    return pytest.approx(statistics.mean(values))


def test_the_figures_are_those_of_their_records():
    assert len(FILES) == 4
    assert figures.main(["--check"]) == 0


@pytest.mark.long
def test_a_changed_number_is_found_and_drawn_again(tmp_path, capsys):
    for path in FILES:
        shutil.copy(path, tmp_path)
    path = tmp_path / "results_by_images.svg"
    drawn = path.read_text()
    path.write_text(drawn.replace("121 at 80,000", "120 at 80,000"))
    assert figures.main(["--check"], tmp_path) == 1
    assert path.name in capsys.readouterr().out
    assert figures.main([], tmp_path) == 0
    assert "121 at 80,000" in path.read_text()


def test_lines_have_the_means_of_their_runs():
    found = ("unet_vs_dit", "DiT", 300_032), ("crossing", "U-Net", 1_000_000)
    for folder, composition, images in found:
        own = excess(f"{folder}/published/runs.csv", composition=composition)
        assert own == mean(figures.by_images()[composition][images])
    ten = {"sweep": "samplers", "sampler": "unipc", "steps": "10"}
    assert excess("samplers/samplings.csv", **ten) == mean(figures.by_sampler()["UniPC"][10])
    two = {"run": "MeanFlow", "steps": "2"}
    assert excess("frontier/calls.csv", **two) == mean(figures.by_objective()["MeanFlow"][2])
    assert statistics.mean(figures.by_data("fid")["U-Net"][550]) == pytest.approx(123.6, abs=0.1)


def test_changes_are_of_fid_less_that_of_real_images():
    label, change, low, high, shown = next(figures.changes())
    assert label == "U-Net instead of DiT"
    # 105.3 and 128.6, real images 16.6
    assert change == pytest.approx(100 * ((105.27 - 16.61) / (128.64 - 16.61) - 1), abs=0.1)
    assert low < change < high < 0
    assert shown


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_figure_is_readable_on_any_page(path):
    root = xml.etree.ElementTree.parse(path).getroot()
    paper = next(child for child in root if child.tag.endswith("rect"))
    assert paper.get("fill") == "#ffffff"  # under everything else


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text(ROWS)
    return path


def test_a_line_has_the_means_over_seeds_and_half_their_interval(file):
    axes = Figure().subplots()
    rows = lines["rows_of"](file, "sweep=guidance")
    lines["draw"](axes, rows, "scale", "accuracy", "network", ["DiT", "UNet"])
    dit, unet = axes.containers
    assert (dit.get_label(), unet.get_label()) == ("DiT", "UNet")
    assert (unet[0].get_color(), dit[0].get_color()) == COLOURS[:2]  # as in every figure
    assert list(dit[0].get_ydata()) == [40]  # %
    assert list(unet[0].get_ydata()) == pytest.approx([60, 80])
    low, high = unet[2][0].get_segments()[0][:, 1]
    assert (low, high) == pytest.approx((60 - 127.06, 60 + 127.06), abs=0.01)  # Student's t, 1 df
    assert list(axes.lines[-1].get_ydata()) == [90, 90]  # real images


def test_a_panel_is_drawn_for_each_network_and_column(file, tmp_path, monkeypatch):
    widths = []
    for columns, by in (("fid", "network"), ("fid,accuracy", "network"), ("fid", "seed")):
        picture = tmp_path / "picture.png"
        words = ["lines.py", str(picture), str(file), "--sweep", "guidance", "--x", "scale"]
        monkeypatch.setattr("sys.argv", [*words, "--y", columns, "--by", by, "--linear"])
        lines["main"]()
        with Image.open(picture) as image:
            widths.append(image.width)
    assert widths == [744, 1104, 1104]  # of two networks by seed, too; a single one has more room


@pytest.mark.parametrize(
    ("option", "value"), [("y", "fidd"), ("y", "scale"), ("x", "steps"), ("where", "network=Mamba")]
)
def test_a_column_that_cannot_be_drawn_is_named(file, tmp_path, monkeypatch, capsys, option, value):
    asked = {"sweep": "guidance", "x": "scale", "by": "network"} | {option: value}
    words = [f"--{name}={of}" for name, of in asked.items()]
    monkeypatch.setattr("sys.argv", ["lines.py", str(tmp_path / "a.png"), str(file), *words])
    with pytest.raises(SystemExit) as ended:
        lines["main"]()
    assert ended.value.code == 2
    assert value in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()


def test_copies_begin_at_a_tenth_and_their_law_needs_every_subset(tmp_path, monkeypatch):
    begin = {("DiT", 60): (4, 8), ("DiT", 180): (12, 24), ("DiT", 550): (40, None)}
    begin |= {("U-Net", 60): (4, 4), ("U-Net", 180): (4, 4), ("U-Net", 550): (16, 36)}
    for (network, images), seeds in begin.items():
        for seed, first in enumerate(seeds):
            run = tmp_path / f"published/runs/train/{network}_{images}_{seed}"
            (run / "memorization").mkdir(parents=True)
            words = f"arm: '{network} · {images}'\nseed: {seed}\nbatch_size: 8\n"
            (run / "config.yaml").write_text(words)
            shares = {step: 0.1 if first and step >= first else 0.09 for step in range(4, 44, 4)}
            spaces = {step: {"pixels": {"copies": share}} for step, share in shares.items()}
            report = {"training_images": images, "steps": spaces}
            (run / "memorization/report.json").write_text(json.dumps(report))
    monkeypatch.setattr("sys.argv", ["copies.py", str(tmp_path)])
    copies["main"]()
    begins, laws = (pd.read_csv(tmp_path / name) for name in ("begins.csv", "laws.csv"))
    found = begins.set_index(["network", "images", "seed"]).images_seen.to_dict()
    asked = {(*key, seed): at for key, seeds in begin.items() for seed, at in enumerate(seeds)}
    assert found == {key: 8 * step for key, step in asked.items() if step}
    exponents = laws.set_index(["network", "seed"]).exponent.to_dict()
    assert [exponents["DiT", seed] for seed in (0, 1)] == pytest.approx([1, 1])  # of two sizes
    assert (begins.before == (begins.images_seen - 32).clip(lower=0)).all()
    later = begins[begins.before > 0]
    assert later.between.tolist() == pytest.approx(later.images_seen.tolist())
    first = begins[begins.before == 0]  # a line from none to a tenth
    assert first.between.tolist() == pytest.approx(first.images_seen.tolist())
    x = [math.log(images) for images in (60, 180, 550)]
    slope = statistics.linear_regression(x, [math.log(each) for each in (4, 4, 36)]).slope
    assert exponents["U-Net", 1] == pytest.approx(slope)
    with Image.open(tmp_path / "copies.png") as picture:
        assert picture.width > 700


@pytest.mark.long
def test_the_numbers_of_the_page_on_copies_are_made_of_its_records(tmp_path, monkeypatch):
    folder = ROOT / "experiments/copies"
    shutil.copytree(folder / "published", tmp_path / "published")
    monkeypatch.setattr("sys.argv", ["copies.py", str(tmp_path)])
    copies["main"]()
    for name in ("copies.csv", "begins.csv", "laws.csv"):
        made, kept = (pd.read_csv(each / name) for each in (tmp_path, folder))
        pd.testing.assert_frame_equal(made, kept)


def test_the_table_of_the_page_is_made_of_its_results():
    page = runpy.run_path(str(OBJECTIVES / "rise.py"))
    with (OBJECTIVES / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    table = page["table"](rows).strip()
    assert len(table.splitlines()) == 7
    assert table in (OBJECTIVES / "README.md").read_text()


def test_the_rise_is_the_difference_of_each_seed():
    rows = [
        {"objective": "x", "seed": seed, "steps": steps, "fid": fid}
        for seed, steps, fid in (
            ("0", "10", "5"),
            ("1", "10", "7"),
            ("0", "50", "6"),
            ("1", "50", "4"),
        )
    ]
    few, many, differences = runpy.run_path(str(OBJECTIVES / "rise.py"))["rise"](rows, "x", "fid")
    assert (few, many, differences) == (6, 5, [1, -3])
