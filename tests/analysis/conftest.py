"""Comparisons without most of their time: their plots are painted, but not written as SVG."""

import pytest

from diffusion_lab.analysis.comparison import svg

BLANK = f'<svg xmlns="{svg.SVG}" width="1" height="1" viewBox="0 0 1 1" version="1.1"></svg>'


@pytest.fixture
def real_plots() -> None:
    """Lets a test have the plots of comparisons as they are."""


@pytest.fixture(autouse=True)
def blank_plots(request, monkeypatch):
    if "real_plots" not in request.fixturenames:
        monkeypatch.setattr(svg, "_svg", lambda figure: BLANK)
