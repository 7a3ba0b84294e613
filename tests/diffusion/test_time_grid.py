"""Time grids: their levels, and their ends."""

import math

import pytest
import torch
from helpers.refusals import out_of_range, refused

from diffusion_lab.diffusion.sampler.time_grid import (
    Explicit,
    Karras,
    Leading,
    Linspace,
    Quadratic,
    Trailing,
    UniformGrid,
    UniformLogSNR,
)
from diffusion_lab.diffusion.schedule import (
    Cosine,
    DDPMCosine,
    DDPMLinear,
    DDPMScaledLinear,
    Linear,
    Rectified,
    Shifted,
    Sigmoid,
    SubVP,
    VarianceExploding,
    ZeroTerminalSNR,
)

TABLES = [DDPMLinear(), DDPMScaledLinear(50), DDPMCosine(), ZeroTerminalSNR(DDPMLinear())]
SCHEDULES = [
    Rectified(),
    Cosine(),
    Cosine(0.008),
    Linear(),
    SubVP(),
    Sigmoid(),
    VarianceExploding(),
    Shifted(Rectified()),
    *TABLES,
]
GRIDS = [UniformGrid(), Karras(), UniformLogSNR()]
TABLE_GRIDS = [Leading(), Linspace(), Trailing(), Quadratic()]


def ratio(levels):
    return (levels.sigma / levels.alpha).tolist()


def index(grid, steps, schedule=None):
    levels = grid(schedule or DDPMLinear(), steps)
    return [round(t * 1000 - 1, 9) for t in levels.t[:-1].tolist()]


@pytest.mark.parametrize(
    ("grid", "schedule"),
    [(g, s) for g in GRIDS for s in SCHEDULES] + [(g, s) for g in TABLE_GRIDS for s in TABLES],
)
def test_from_noise_down_to_exactly_clean_data(grid, schedule):
    for steps in (1, 2, 7):
        levels = grid(schedule, steps)
        assert len(levels) == steps + 1
        assert levels.alpha.dtype == torch.float64
        assert (levels.t.diff() <= 0).all()  # sigma_min and 0 may both be at t = 0
        assert (levels.logsnr.diff() > 0).all()
        assert (levels[-1].t, levels[-1].alpha, levels[-1].sigma) == (0, 1, 0)
        assert (levels.sigma[:-1] > 0).all()
        if not isinstance(grid, Leading | Quadratic):
            assert levels[0].t == 1


def test_uniform():
    assert UniformGrid()(Rectified(), 4).t.tolist() == [1, 0.75, 0.5, 0.25, 0]
    assert index(UniformGrid(), 4) == [999, 749, 499, 249]


def test_uniform_ends_at_sigma_min():
    grid = UniformGrid(sigma_min=1 / 9)  # t = 0.1 on the straight path
    for steps in (1, 4, 9):
        assert torch.equal(grid(Rectified(), steps).t, UniformGrid()(Rectified(), steps).t)
    assert grid(Rectified(), 19).t.tolist() == pytest.approx(
        [1 - 0.05 * i for i in range(19)] + [0]
    )
    for schedule in SCHEDULES:
        levels = UniformGrid(sigma_min=0.1)(schedule, 200)
        assert ratio(levels)[-2] == pytest.approx(0.1, rel=1e-9)
        torch.testing.assert_close(levels.t[:-1].diff().diff(), torch.zeros(198).double())
    with out_of_range("sigma_min"):
        UniformGrid(sigma_min=-1.0)


def test_karras_on_edm_is_the_published_formula():
    n = 18
    published = [
        (80 ** (1 / 7) + i / (n - 1) * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(n)
    ]
    assert ratio(Karras()(VarianceExploding(), n)) == pytest.approx([*published, 0], rel=1e-11)


def test_uniform_logsnr_is_geometric():
    levels = UniformLogSNR(0.01, 10)(VarianceExploding(0.01, 10), 4)
    assert ratio(levels) == pytest.approx([10, 1, 0.1, 0.01, 0])


@pytest.mark.parametrize("grid", [Karras(0.01, 50), UniformLogSNR(0.01, 50)])
@pytest.mark.parametrize("schedule", [Rectified(), Cosine(), DDPMLinear()])
def test_beyond_its_range_a_grid_starts_on_all_the_noise_there_is(grid, schedule):
    on_range = ratio(grid(VarianceExploding(0.01, 50), 10))
    levels = grid(schedule, 10)
    # infinite for rectified, e^10 for cosine, 157 for the table
    assert levels[0].logsnr == schedule(torch.ones(())).logsnr
    assert ratio(levels)[1:] == pytest.approx(on_range[1:], rel=1e-9)


def test_a_grid_stops_where_the_schedule_does():
    levels = Karras()(VarianceExploding(0.1, 10), 5)
    assert ratio(levels)[0] == pytest.approx(10)
    assert ratio(levels)[-2] == pytest.approx(0.1)


def test_points_never_coincide():
    # DDIM's own 50 points begin 0, 0, 1, 2, 5: coinciding ones are moved to the next point
    assert index(Quadratic(), 50)[::-1][:6] == [0, 1, 2, 3, 5, 8]
    assert index(Quadratic(), 50)[::-1][10:] == [
        int(x) for x in (torch.linspace(0, math.sqrt(800), 50, dtype=torch.float64) ** 2)[10:]
    ]
    assert index(Quadratic(), 1) == [800]  # linspace gives its other end, which is no noise
    with refused("steps=801", 800, by=ValueError):
        Quadratic()(DDPMLinear(), 801)
    for steps in (29, 30, 100, 800):
        assert min(-torch.tensor(index(Quadratic(), steps)).diff()) >= 1
        assert index(Quadratic(), steps)[0] == 800
    for steps in range(1, 51):
        for grid in (Leading(), Linspace(), Trailing()):
            places = 50 * grid.times(DDPMScaledLinear(50), steps)
            assert len(set(places.round().tolist())) == steps


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_explicit_is_what_is_written(schedule):
    grid = Explicit((0.9, 0.5, 0.013))
    levels = grid(schedule, 3)
    assert levels.t.tolist() == [0.9, 0.5, 0.013, 0]
    assert torch.equal(levels.sigma[:-1], schedule(levels.t[:-1]).sigma)
    with refused("steps=4", 3, by=ValueError):
        grid(schedule, 4)


@pytest.mark.parametrize("grid", TABLE_GRIDS)
def test_table_grids_need_a_table_long_enough(grid):
    with refused("time_grid", by=ValueError):
        grid(Rectified(), 10)
    with refused("steps=1001", by=ValueError):
        grid(DDPMLinear(), 1001)
