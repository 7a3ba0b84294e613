"""The README's network of one's own: trained from a file and from a configuration, and reloaded."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
CODE = re.search(r"```python\n(# my_networks.py\n.+?)```", README, re.DOTALL)[1]
COMMANDS = re.findall(
    r"^    diffusion-lab (train .*(?:my_networks|backbone=convolutions).*)$", README, re.MULTILINE
)
TINY = ["data.source._target_=helpers.tiny_data.TinyData", "trainer.accelerator=cpu", "+debug=fast"]


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    (tmp_path / "my_networks.py").write_text(CODE)
    configuration = tmp_path / "my_conf" / "backbone" / "convolutions.yaml"
    configuration.parent.mkdir(parents=True)
    configuration.write_text(
        "_target_: my_networks.Convolutions\n_partial_: true\nwidth: 8\ndepth: 2\n"
    )
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'tests'}")
    return tmp_path


def lab(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    # as the console script starts: without the present folder among the modules' places
    start = "import sys; sys.path.remove(''); from diffusion_lab.cli import main; main()"
    command = [sys.executable, "-c", start, *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "command",
    [
        pytest.param(COMMANDS[0], id="lent_keys", marks=pytest.mark.slow),
        pytest.param(COMMANDS[1], id="own_configuration"),
    ],
)
def test_the_readmes_network_trains_and_is_reloaded(folder, command):
    trained = lab(folder, *command.split(), *TINY, "run_dir=run")
    assert trained.returncode == 0, trained.stderr
    drawn = lab(folder, "sample", "run=run", "num_samples=4")
    assert drawn.returncode == 0, drawn.stderr

    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    lost = lab(elsewhere, "sample", "run=../run", "num_samples=4")
    assert lost.returncode == 2
    warning, sentence = lost.stderr.strip().splitlines()
    assert warning.startswith("Warning: ")
    assert "names helpers.tiny_data.TinyData, my_networks.Convolutions, of neither" in warning
    assert "my_networks" in sentence


def test_a_wrong_name_is_one_sentence(folder):
    wrong = lab(folder, "train", "backbone=mlp", "backbone._target_=my_networks.Conv", *TINY)
    assert wrong.returncode == 2
    assert "my_networks.Conv" in wrong.stderr
    assert len(wrong.stderr.strip().splitlines()) == 1
    assert not (folder / "outputs").exists()


@pytest.mark.slow
def test_a_network_that_reads_its_tensors_is_profiled_all_the_same(folder):
    code = CODE.replace(
        "        return ", "        assert x.abs().max().item() < 10\n        return "
    )
    assert code != CODE
    (folder / "my_networks.py").write_text(code)
    arguments = ["--config-dir", "my_conf", "backbone=convolutions", "speed=false", "json=true"]
    done = lab(folder, "profile", *arguments)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["macs"] > 0
