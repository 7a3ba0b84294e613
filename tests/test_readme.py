"""The README is true and short: its commands compose, its tree is the real one."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from helpers.pages import WRITTEN, check_composes, commands_of
from helpers.paths import ROOT
from hydra.core.global_hydra import GlobalHydra

from diffusion_lab.cli.sweep_plan import composed, jobs_of, sweep_overrides
from diffusion_lab.cli.tuning_stage import planned

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


@pytest.mark.parametrize("line", LINES)
def test_every_command_composes(line):
    check_composes(line)


def printed_by_make(*arguments: str) -> str:
    """The commands that make would run, each in one line, but a script that is tested by itself."""
    make = ["make", "-n", "-o", "setup", *arguments]
    printed = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return re.sub(r"experiments/families/vae\.sh.+", "", printed.replace("\\\n", " "))


# commands of each study, and of its _cifar10
SIZED = {"unet-vs-dit": (6, 4), "low-data": (2, 2), "samplers": (3, 3), "guidance": (2, 2)}
ONE_SIZE = {
    "write-up": 5,
    "cifar10-small": 2,
    "additions": 14,
    "scaling": 2,
    "conditioning": 4,
    "latent": 4,
    "families": 6,  # and those of vae.sh
    "few-steps": 11,
}


@pytest.mark.parametrize(
    ("study", "commands", "size"),
    [
        (study, count, size)
        for study, counts in SIZED.items()
        for count, size in zip(counts, ("", "_cifar10"), strict=True)
    ]
    + [(*each, "") for each in ONE_SIZE.items()],
)
def test_every_command_of_a_study_composes(study, commands, size):
    printed = printed_by_make(f"study-{study}", f"SIZE={size}", "IMAGES=640", "TIME=5")
    script = re.compile(r"experiments/sweep\.sh \S+/diffusion-lab {} (\S+)")
    printed = script.sub(r"diffusion-lab sample-sweep run=RUN output=RUN/sweeps/\1", printed)
    lines = re.findall(r"diffusion-lab [a-z][^\n'|]+", printed.replace("/{}", "/kl"))
    lines = [line for line in lines if "train-extractor" not in line]
    assert len(lines) == commands
    for line in lines:
        check_composes(line)


@pytest.mark.parametrize(
    "study",
    [
        pytest.param(each, marks=[pytest.mark.slow] if each == "few-steps" else [])
        for each in ("unet-vs-dit", "low-data", *ONE_SIZE)
    ],
)
def test_the_tuning_of_a_study_is_complete_and_no_two_of_its_runs_have_one_folder(study):
    folders = []
    for overrides in sweeps_of(printed_by_make(f"study-{study}")):
        planned("train", ["-m"], overrides)
        folders += folders_of(overrides)
    assert len(folders) > 3
    assert len(set(folders)) == len(folders)


def sweeps_of(printed: str) -> Iterator[list[str]]:
    """The overrides of each sweep that trains."""
    for line in re.findall(r"diffusion-lab train -m ([^\n|]+)", printed):
        GlobalHydra.instance().clear()
        yield [each for each in shlex.split(line) if not each.startswith("hydra")]


def folders_of(overrides: list[str]) -> list[Path]:
    """The folders of a sweep's runs."""
    every = [*overrides, *sweep_overrides(Path("x"), overrides)]
    cfg = composed("train", ["-m"], every)
    return [job.folder for job in jobs_of("train", ["-m"], overrides, cfg)]


def test_other_seeds_of_a_study_leave_the_models_that_its_tuning_starts_from():
    printed = printed_by_make("study-few-steps", "ARGS=seed=0,1")
    stages = [each for each in sweeps_of(printed) if "study_name=few_steps_stages" in each]
    starts = [path.name for overrides in stages for path in folders_of(overrides)]
    assert {"flow-unet_small-100", "edm-unet_small-100", "flow-dit-1", "edm-dit-0"} <= {*starts}
    assert len(starts) == 2 * (2 * 2 + 1)


@pytest.mark.parametrize(
    "target", ["train-latent", "study-optimizers", *(f"study-{each}" for each in SIZED | ONE_SIZE)]
)
def test_a_launcher_gets_all_work_of_a_target_but_the_comparison(target):
    printed = printed_by_make("-B", target, "LAUNCHER=slurm")
    commands = re.findall(r"diffusion-lab [a-z-]+ [^\n]+", printed)
    assert commands
    for command in commands:
        assert "hydra/launcher=slurm" in command or " compare " in command, command


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("sweep.sh", "{} steps steps=1"),
        ("low_data/copies.sh", "10 {}"),
        ("families/vae.sh", "mine 2 a=1 a=2 10 FILE"),
    ],
)
def test_the_scripts_of_studies_pass_the_launcher_on(script, arguments, monkeypatch, tmp_path):
    run = tmp_path / "fraction-1.0_seed-3"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 3\n")
    for name, printing in (("diffusion-lab", '"$@"'), ("python", "4e-3")):
        (tmp_path / name).write_text(f"#!/bin/sh\necho {printing}\n")
        (tmp_path / name).chmod(0o755)
    for launcher in ("slurm", ""):
        monkeypatch.setenv("LAUNCHER", launcher)
        lab = tmp_path / "diffusion-lab"
        called = [ROOT / "experiments" / script, lab, *arguments.format(run).split()]
        done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=True)
        lines = done.stdout
        assert lines
        for line in lines.splitlines():
            assert ("hydra/launcher=slurm" in line) == bool(launcher)


@pytest.mark.parametrize(("code", "chosen"), [(2, "0.004"), (1, None)])
def test_a_vae_whose_prior_is_refused_is_not_the_best(code, chosen, tmp_path):
    rates = {"mine_vae_tuning/lr-" + rate: rate for rate in ("1e-3", "2e-3", "4e-3")}
    for number, (name, rate) in enumerate({**rates, "mine/vae_seed-0": 0}.items()):
        run = tmp_path / "outputs" / name
        run.mkdir(parents=True)
        (run / "config.yaml").write_text(f"optimizer:\n  lr: {float(rate)}\n")
        (run / "fid").write_text(f'{{"metrics": {{"fid/x": {300 - number}}}}}')
    lab = tmp_path / "diffusion-lab"
    lab.write_text(
        f"""#!/bin/sh
case "$*" in
*lr-2e-3*) exit {code};;
evaluate*) run=${{2#run=}}; mkdir "$run/evaluations"; cp "$run/fid" "$run/evaluations/x.json";;
*) echo "$@";;
esac
"""
    )
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for script in (lab, python):
        script.chmod(0o755)
    (tmp_path / "experiments").symlink_to(ROOT / "experiments")
    called = [ROOT / "experiments/families/vae.sh", lab, "mine", "2", "a=1", "b=2", "10", "FILE"]
    done = subprocess.run(called, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode == 0) == bool(chosen)
    assert ("b=2" in done.stdout) == bool(chosen)
    assert f"optimizer.lr={chosen}" in done.stdout or not chosen


def test_every_make_target_named_exists():
    targets = re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    named = re.findall(r"(?:^    |`)make ([a-z0-9-]+)", README, re.MULTILINE)
    assert named
    assert set(named) <= set(targets)


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


def test_it_is_short():
    assert len(README.splitlines()) <= 250


PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "experiments").rglob("README.md")),
]


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.parent.name)
def test_links_lead_somewhere(page):
    room = ROOT if page.parent == ROOT else ROOT / "experiments"  # what the site has of it
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        target = (page.parent / link).resolve()
        assert target.exists(), f"{page}: {link}"
        assert target.is_relative_to(room), f"{page}: {link}"
