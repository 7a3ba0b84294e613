"""The reader of configurations: OmegaConf's, but for its speed."""

import pytest
import yaml
from omegaconf import OmegaConf

from diffusion_lab.runs.files import Loader

TEXTS = [
    *("1e3", "1e-3", "1.5e3", "-1.e-4", ".5e+3", "1.0e-05", "1e3x", "e3", "1.2.3e4", "${a.b}"),
    *("08", "012", "0x1e3", "1_000", "12", "1:30", "12:30:45", ".", ".inf", "-.INF", "'1e3'"),
    *("2024-01-01", "2024-01-01T10:00:00", "on", "yes", "~", "null", "[1,2e4,{b:c}]"),
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_value_is_read_as_omegaconf_reads_it(text):
    ours = yaml.load(f"x: {text}", Loader)
    theirs = OmegaConf.to_container(OmegaConf.create(f"x: {text}"))
    assert repr(ours) == repr(theirs)


def test_a_key_may_not_stand_twice():
    with pytest.raises(ValueError, match="twice"):
        yaml.load("a: {b: 1, b: 2}", Loader)
