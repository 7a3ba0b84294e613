"""The public names are found in the package itself, and their modules are imported late."""

import subprocess
import sys

import pytest
from helpers.refusals import refused

import diffusion_lab


@pytest.mark.parametrize("name", diffusion_lab.__all__)
def test_a_public_name_is_found_and_listed(name):
    assert getattr(diffusion_lab, name) is not None
    assert name in dir(diffusion_lab)


def test_what_people_extend_is_public():
    wanted = {"NoiseSchedule", "Sampler", "Guidance", "Prediction", "Block", "FirstStage"}
    assert wanted | {"DataSource", "ImageDataModule", "Metric", "runs"} <= set(
        diffusion_lab.__all__
    )


def test_an_unknown_name_is_an_attribute_error():
    with refused("Sampelr", by=AttributeError):
        _ = diffusion_lab.Sampelr


def test_the_package_imports_torch_only_when_something_is_asked_for():
    code = "import sys, diffusion_lab; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
