"""The figures of the README show the numbers of the records, and nothing else."""

import csv
import shutil
import statistics
import xml.etree.ElementTree

import figures
import pytest
from helpers.paths import ROOT

FOLDER = ROOT / "experiments"
FILES = sorted(FOLDER.glob("results_*.svg"))


def excess(name, **where):
    """The mean FID less that of real images of some rows of a CSV file."""
    with (FOLDER / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if where.items() <= row.items()]
    assert rows
    return statistics.mean(float(row["fid"]) - float(row["fid_real"]) for row in rows)


def mean(values):
    return pytest.approx(statistics.mean(values))


def test_the_figures_are_those_of_their_records():
    assert len(FILES) == 4
    assert figures.main(["--check"]) == 0


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
    later = {"sweep": "guidance", "guidance.scale": "1", "network": "DiT"}
    assert excess("guidance/samplings.csv", **later) == mean(figures.by_images()["DiT"][300_032])
    ten = {"sweep": "samplers", "sampler": "unipc", "steps": "10"}
    assert excess("samplers/samplings.csv", **ten) == mean(figures.by_sampler()["UniPC"][10])
    two = {"run": "mean_flow", "steps": "2"}
    assert excess("few_steps/calls_unet_small.csv", **two) == mean(
        figures.by_objective()["MeanFlow"][2]
    )
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
