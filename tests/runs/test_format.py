"""A run folder records its format, and a run of another format is refused."""

import pytest
import yaml
from omegaconf import OmegaConf

import diffusion_lab
from diffusion_lab import runs
from diffusion_lab.common.messages import UserError
from diffusion_lab.runs.files import FORMAT, WRITTEN_BY
from diffusion_lab.runs.folder import save_config


def test_a_configuration_is_read_back_without_its_format(tmp_path):
    save_config(tmp_path, OmegaConf.create({"seed": 3}))
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert saved[WRITTEN_BY] == {"format": FORMAT, "version": diffusion_lab.__version__}
    assert runs.load_config(tmp_path) == {"seed": 3}


@pytest.mark.parametrize(
    ("written_by", "version"),
    [({}, "0.1"), ({WRITTEN_BY: {"format": FORMAT + 1, "version": "9.8.7"}}, "9.8.7")],
)
def test_a_folder_of_another_format_is_refused_by_both_versions(tmp_path, written_by, version):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written_by | {"seed": 3}))
    with pytest.raises(UserError) as error:
        runs.load_config(tmp_path)
    assert f"diffusion-lab {version}" in str(error.value)
    assert diffusion_lab.__version__ in str(error.value)
    assert "\n" not in str(error.value)
