"""The public names are found in the package itself, and their modules are imported late."""

import subprocess
import sys

import pytest
import yaml
from helpers.refusals import refused

import diffusion_lab


@pytest.mark.parametrize("name", diffusion_lab.__all__)
def test_a_public_name_is_found_and_listed(name):
    assert getattr(diffusion_lab, name) is not None
    assert name in dir(diffusion_lab)


def test_an_unknown_name_is_an_attribute_error():
    with refused("Sampelr", by=AttributeError):
        _ = diffusion_lab.Sampelr


def test_plans_and_tables_of_studies_wait_for_neither_torch_nor_lightning(tmp_path):
    run = tmp_path / "outputs/mine/train/run"
    run.mkdir(parents=True)
    (tmp_path / "outputs/mine/study.json").write_text('{"question": "?", "jobs": []}')
    trainer = {"max_time": "00:00:05:00", "max_steps": 10}
    cfg = {"seed": 0, "batch_size": 2, "trainer": trainer}
    (run / "config.yaml").write_text(yaml.safe_dump(cfg))
    (run / "metrics.jsonl").write_text('{"step": 1, "seconds": 1.0}\n')
    code = (
        "import sys; from diffusion_lab.cli import main\n"
        "for command in ('study', 'study few_steps dry=true', 'status'):\n"
        "    sys.argv = ['diffusion-lab', *command.split()]\n"
        "    main()\n"
        "    assert not {'torch', 'lightning'} & sys.modules.keys(), command"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
