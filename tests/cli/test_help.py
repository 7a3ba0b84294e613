"""Help is read from the files of conf/, at once: neither Hydra nor torch takes part in it."""

import subprocess
import sys

import pytest
import yaml
from helpers.paths import CONF
from helpers.refusals import assert_names

import diffusion_lab
from diffusion_lab.cli.commands import COMMANDS, prepare


def test_the_program_lists_its_commands_and_its_version(lab):
    code, out, _ = lab("--help")
    assert code == 0
    assert_names(out, *COMMANDS, "study", "options")
    assert lab("--version")[:2] == (0, f"{diffusion_lab.__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_what_it_does_and_lists_its_keys(lab, command):
    code, out, _ = lab(command, "--help")
    assert code == 0
    assert lab("help", command)[1] == out
    content = yaml.safe_load((CONF / f"{command.replace('-', '_')}.yaml").read_text())
    own = {key for key, value in content.items() if not isinstance(value, dict | list)}
    header = content["hydra"]["help"]["header"]
    assert_names(out, header.strip(), *(f"  {key}=" for key in own - {"paths"}))


def test_groups_are_listed_where_they_are_taken_with_what_is_taken(lab):
    trains, draws, shows = (lab(name, "--help")[1] for name in ("train", "sample", "status"))
    assert_names(
        trains, "backbone (unet): ", " fashion_mnist/dit,", "+debug: ", "callbacks.NAME=null"
    )
    assert_names(draws, "sampler (the run's own): ", "sampler/time_grid: ", "run=???")
    assert "\n  backbone" not in draws
    assert "\n  sampler" not in shows


def test_options_are_listed_and_shown_with_their_comments(lab):
    assert_names(lab("options")[1], "  schedule: cosine, ", "  backbone/block: adaln, ")
    assert_names(lab("options", "sampler")[1], "heun", "second order", "sampler/time_grid=")
    shown = lab("options", "backbone=dit_s_2")[1]
    assert_names(shown, "depth: 12", "backbone=dit\n", "positions: sincos")


def test_options_of_ones_own_are_among_them(lab, tmp_path):
    (tmp_path / "my_conf/sampler").mkdir(parents=True)
    (tmp_path / "my_conf/sampler/mine.yaml").write_text("# Mine alone.\nsteps: 3\n")
    for where in (["--config-dir", "my_conf"], ["--config-dir=my_conf"]):
        assert "mine" in lab("sample", "--help", *where)[1]
        assert "Mine alone" in lab("options", "sampler", *where)[1]
        assert "steps: 3" in lab("options", *where, "sampler=mine")[1]


def test_help_waits_for_neither_torch_nor_lightning():
    program = (
        "import sys; from diffusion_lab.cli import main; "
        "sys.argv = ['diffusion-lab', 'train', '--help']; main(); "
        "sys.exit(len({'torch', 'lightning', 'wandb', 'pandas'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_flags_may_stand_between_overrides():
    given = ["experiment=quickstart", "--config-dir", "my_conf", "backbone=dit", "--cfg", "job"]
    flags = ["--config-dir", "my_conf", "--cfg", "job"]
    assert prepare(COMMANDS["train"], given) == ["experiment=quickstart", "backbone=dit", *flags]
    for kept in (["--cfg", "job", "seed=1"], ["seed=1", "--info"], ["seed=1", "-cd", "a=b"]):
        assert prepare(COMMANDS["train"], kept) == kept
