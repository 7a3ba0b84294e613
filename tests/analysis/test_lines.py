"""Figures of sweeps: means over seeds with their intervals, for each line of a panel."""

import runpy

import pytest
from helpers.paths import ROOT
from matplotlib.figure import Figure
from PIL import Image

from diffusion_lab.report.figures import COLOURS

lines = runpy.run_path(str(ROOT / "experiments/lines.py"))
ROWS = """network,seed,sweep,scale,fid,fid_real,accuracy,accuracy_real
UNet,0,guidance,1,90.0,50.0,0.5,0.9
UNet,1,guidance,1,110.0,50.0,0.7,0.9
UNet,0,guidance,2,80.0,50.0,0.8,0.9
DiT,0,guidance,1,200.0,50.0,0.4,0.9
DiT,0,trained,1,300.0,50.0,0.4,0.9
"""


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
    ("option", "value"),
    [("y", "fidd"), ("y", "scale"), ("x", "steps"), ("where", "network=Mamba")],
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
