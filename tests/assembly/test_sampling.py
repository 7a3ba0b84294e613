"""The warning of jumps that a shortcut model was not trained to make."""

import pytest
from helpers.refusals import assert_names

from diffusion_lab.assembly.model import untrained_jumps
from diffusion_lab.diffusion.objective.loss import MeanFlow, Shortcut
from diffusion_lab.diffusion.sampler import FewStep, FlowMap, UniformGrid, UniPC
from diffusion_lab.diffusion.sampler.time_grid import Explicit, Karras
from diffusion_lab.diffusion.schedule import Rectified, VarianceExploding

EVEN, VISIBLE = UniformGrid(0.0), UniformGrid(0.1)


def warning(sampler, schedule=None, loss=None):
    schedule, loss = schedule or Rectified(), loss or Shortcut()
    return untrained_jumps(loss, sampler, schedule)


@pytest.mark.parametrize("finest", [2, 8, 32])
@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding()])
def test_even_grids_of_powers_of_two_take_the_jumps_that_are_trained(finest, schedule):
    trained = {2**k for k in range(finest.bit_length() - 1)}
    for steps in range(1, 2 * finest):
        said = warning(FlowMap(steps, EVEN), schedule, Shortcut(finest=finest))
        assert (said is None) == (steps in trained)
        if said:
            assert_names(said, f"sampler.steps={max(each for each in trained if each <= steps)}")


@pytest.mark.parametrize("schedule", [Rectified(), VarianceExploding()])
@pytest.mark.parametrize("sampler", [FlowMap, FewStep])
@pytest.mark.parametrize("grid", [EVEN, VISIBLE, Karras(0.1, 80.0)])
def test_what_the_warning_says_to_write_silences_it(schedule, sampler, grid):
    for steps in (3, 4, 12, 16, 24, 100, 128):
        if said := warning(sampler(steps, grid), schedule):
            assert_names(said, "sampler/time_grid=uniform", "sampler.time_grid.sigma_min=0")
            written = int(said.partition("sampler.steps=")[2].split()[0])
            assert warning(sampler(written, EVEN), schedule) is None


def test_grids_that_end_at_visible_noise_leave_these_jumps():
    for schedule, longest in ((Rectified(), 8), (VarianceExploding(), 2)):
        assert warning(FlowMap(longest, VISIBLE), schedule) is None
        said = warning(FlowMap(2 * longest, VISIBLE), schedule)
        assert_names(said, "sampler.time_grid.sigma_min=0")
        assert warning(FlowMap(2 * longest, EVEN), schedule) is None
    assert warning(FlowMap(4, Karras(0.1, 80.0)), VarianceExploding())


def test_jumps_to_clean_data_are_trained_from_halves_of_the_path():
    for steps in (1, 2):
        assert warning(FewStep(steps, EVEN)) is None
    for steps in (3, 4):
        assert_names(warning(FewStep(steps, EVEN)), "sampler.steps=2")
    assert warning(FewStep(4, Explicit([1.0, 0.5, 0.25, 0.125]))) is None
    assert warning(FewStep(4, Explicit([1.0, 0.5, 0.25, 0.1])))


def test_other_models_and_solvers_of_short_steps_are_not_warned_of():
    assert warning(FlowMap(3, EVEN), loss=MeanFlow()) is None
    assert warning(UniPC(3, EVEN)) is None
