"""Weights in 16 bits are refused, whatever the backbone."""

import pytest
from helpers.paths import CONF
from hydra import compose, initialize_config_dir

from diffusion_lab.common.messages import UserError
from diffusion_lab.training.train import check_settings


@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
@pytest.mark.parametrize("backbone", ["unet", "dit", "mamba"])
def test_weights_in_sixteen_bits_are_refused(backbone, precision):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", [f"backbone={backbone}", f"trainer.precision={precision}"])
    with pytest.raises(UserError, match=f"trainer.precision='{precision}' must be one of"):
        check_settings(cfg)
