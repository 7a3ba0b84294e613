"""A callback from outside the package, and the package's own under other names."""

import json

from helpers.tiny_runs import TINY

CODE = """
from diffusion_lab.training.callbacks import Periodic


class LargestWeight(Periodic):
    at_end = True

    def __init__(self, every_n_steps=None):
        self.every_n_steps = every_n_steps

    def run(self, trainer):
        module = trainer.lightning_module
        largest = max(float(each.abs().max()) for each in module.denoiser.parameters())
        module.context.summary["largest_weight"] = largest
        for logger in trainer.loggers:
            logger.log_metrics({"largest_weight": largest}, step=trainer.global_step)
"""
YAML = "_target_: my_callbacks.LargestWeight\nevery_n_steps: 2\n"


def test_a_callback_of_ones_own_is_one_file_and_one_yaml(lab, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "my_callbacks.py").write_text(CODE)
    (tmp_path / "my_conf/callbacks").mkdir(parents=True)
    (tmp_path / "my_conf/callbacks/largest_weight.yaml").write_text(YAML)
    chosen = ["--config-dir", "my_conf", "+callbacks@callbacks.largest_weight=largest_weight"]
    quick = [*TINY, "logger=none", "callbacks.evaluation=null", "trainer.max_steps=4"]
    code, _, err = lab("train", *chosen, *quick, "run_dir=run")
    assert code == 0, err
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "largest_weight" in row] == [2, 4]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["largest_weight"] == rows[-1]["largest_weight"]


def test_an_evaluation_by_another_name_is_found(lab, tmp_path):
    renamed = ["~callbacks.evaluation", "~callbacks.sample_grid"]
    renamed += ["+callbacks@callbacks.fid=evaluation", "+callbacks@callbacks.pictures=sample_grid"]
    code, _, err = lab("train", *TINY, *renamed, "logger=none", "run_dir=run")
    assert code == 0, err
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert any(name.startswith("fid/") for name in summary["metrics"])
    assert summary["protocol"]
    assert "Samples: run/samples/step_" in err


def test_what_is_no_callback_is_refused_by_its_key(lab):
    code, _, err = lab("train", *TINY, "+callbacks.odd._target_=torch.nn.Identity")
    assert code == 2
    assert "callbacks.odd" in err
