"""The README is true: its commands compose, its tree is the real one."""

import os
import re
import subprocess

import pytest
from helpers.pages import WRITTEN, check_composes, commands_of
from helpers.paths import ROOT

README = (ROOT / "README.md").read_text()
IN_PAGES = {line for page in WRITTEN for line in commands_of(page)}
LINES = [
    line
    for line in commands_of(ROOT / "README.md")
    if "--config-dir" not in line  # tested by test_own_parts.py
    and line not in IN_PAGES  # tested by test_docs.py
]


@pytest.fixture(autouse=True)
def launchers_everywhere(monkeypatch):
    """Pretends that all launchers exist, so that no command is refused for a missing one."""
    monkeypatch.setattr("shutil.which", lambda name: name)


def test_every_command_composes():
    for line in LINES:
        check_composes(line)


def test_the_makefile_is_an_index():
    text = (ROOT / "Makefile").read_text()
    assert not re.findall(r"^define\b|\$\((?:call|eval|shell)\b", text, re.MULTILINE)
    assert not re.findall(r"^[^#\t\n]*:(?![:=])[^=\n#]*=", text, re.MULTILINE)  # of one target


def commands_of_make(*arguments: str) -> list[str]:
    """The commands of diffusion-lab that make would run."""
    make = ["make", "-n", "-B", "-o", "setup", *arguments]
    some = {"NAME": "this-machine", "ARGS": "", "MAKEFLAGS": ""}  # as shells, or make, may have it
    environment = {**os.environ, **some}
    done = subprocess.run(
        make, cwd=ROOT, capture_output=True, text=True, check=True, env=environment
    )
    return re.findall(r"diffusion-lab [a-z-]+.*", done.stdout.replace("\\\n", " "))


def test_make_runs_a_study_and_lists_them_without_a_name():
    (line,) = commands_of_make("study", "NAME=backbones", "ARGS=seeds=0,1")
    assert line.split() == ["diffusion-lab", "study", "backbones", "jobs=2", "seeds=0,1"]
    check_composes(line)
    assert commands_of_make("study")[0].split() == ["diffusion-lab", "study"]


def test_a_launcher_gets_all_trainings_of_a_target():
    for target in ("train", "train-unet", "train-dit", "train-latent", "study"):
        named = ["NAME=backbones"] if target == "study" else []
        commands = commands_of_make(target, "LAUNCHER=slurm", *named)
        assert commands
        assert all("hydra/launcher=slurm" in command for command in commands), target


def test_the_tree_is_the_real_one():
    block = re.search(r"```\n(pyproject.+?)```", README, re.DOTALL)[1]
    entries = re.findall(r"^  (\S+)", block, re.MULTILINE)
    package = ROOT / "diffusion_lab"
    real = {
        path.name + ("/" if path.is_dir() else "")
        for path in package.iterdir()
        if not path.name.startswith("__") and path.name not in ("conf", "py.typed")
    }
    assert set(entries) == real


PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").rglob("README.md"))]


def test_links_lead_somewhere():
    for page in PAGES:
        room = ROOT if page.parent == ROOT else ROOT / "experiments"  # what the site has of it
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            target = (page.parent / link).resolve()
            assert target.exists(), f"{page}: {link}"
            assert target.is_relative_to(room), f"{page}: {link}"
