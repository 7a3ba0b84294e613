"""The protocol of a study: a wrong one is refused before anything is trained."""

from pathlib import Path

import pytest
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

WHOLE = "{question:'Which?',metric:fid,test:paired,seeds:[0,1],stop:'after two seeds'}"
QUICK = ["train", *TINY, "callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]


@pytest.mark.parametrize(
    ("protocol", "named"),
    [
        (WHOLE.replace("metric:fid,", ""), "protocol"),
        (WHOLE.replace("fid", "fidd"), "protocol.metric"),
        (WHOLE.replace("fid", "fld"), "metrics.fld=true"),
        (WHOLE.replace("paired", "anova"), "protocol.test"),
        (WHOLE.replace("[0,1]", "[0]"), "protocol.seeds"),
        ("fid", "protocol"),
        (WHOLE.replace("fid", "accuracy"), "metrics.classifier"),
        (WHOLE, "callbacks.evaluation"),
    ],
)
def test_a_wrong_protocol_is_refused_before_training(refusal, protocol, named):
    assert_names(refusal(*QUICK, f"protocol={protocol}"), named)
    assert not list(Path("outputs").rglob("config.yaml"))


def test_a_run_keeps_its_protocol(lab):
    by_loss = WHOLE.replace("fid", "test_loss")
    code, _, err = lab(*QUICK, "run_dir=outputs/one", f"protocol={by_loss}")
    assert code == 0, err
    saved = OmegaConf.load("outputs/one/config.yaml")
    assert saved.protocol.metric == "test_loss"
    assert saved.protocol.seeds == [0, 1]
