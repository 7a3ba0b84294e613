"""Leaves the writing of plots out of comparisons, unless a test asks for the plots."""

import pytest


@pytest.fixture
def real_plots() -> None:
    """Lets a test have the plots of comparisons as they are."""


@pytest.fixture(autouse=True)
def plots_if_asked(request):
    if "real_plots" not in request.fixturenames:
        request.getfixturevalue("blank_plots")
