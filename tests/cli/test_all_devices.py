"""Commands on trained runs give on two ranks what they give on one, and fail as one does."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from helpers.commands import prepare_for_commands
from helpers.pairs import first_fast
from helpers.ranks import RANKS, called, on_two_ranks
from helpers.refusals import sentence_of
from helpers.tiny_data import TinyData
from helpers.tiny_runs import TINY
from PIL import Image
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffusion_lab import command
from diffusion_lab.compute import distributed, launch
from diffusion_lab.compute.distributed import rank_and_world
from diffusion_lab.runs.opened import OpenRun

EXACT = ["run=run", "device=cpu", "precision=32-true", "batch_size=4", "json=true"]
COMMANDS = {
    "sample": ["num_samples=7", "save=npz", "output=out/samples"],
    "sample_one": ["num_samples=1", "save=png", "output=out/sample"],  # a rank has none
    "evaluate": ["sampler=ddpm", "sampler.steps=3"],
    "sample-sweep": ["sampler=ddim,heun", "steps=2", "output=out/sweep"],
    "memorization": ["num_samples=13", "output=out/memorization", "control_images=5"],
    "likelihood": ["num_images=5"],
    "encode": ["num_images=5", "columns=3", "output=out/encode.png"],
    "inpaint": ["num_images=3", "variants=2", "output=out/inpaint.png"],
}
LINES = {name: [name.split("_")[0], *EXACT, *own] for name, own in COMMANDS.items()}


def copied(finished_run: Path, folder: Path) -> Path:
    shutil.copytree(finished_run, folder / "run", symlinks=True)
    (folder / "out").mkdir()
    return folder


def on_one_and_two(one: Path, two: Path, lines: dict[str, list[str]]):
    """Runs commands in one process and on two ranks, in a folder each: (folder, ended) of both."""
    with pytest.MonkeyPatch.context() as patch:
        prepare_for_commands(patch, one)
        alone = {name: called(patch, *line) for name, line in lines.items()}
    with pytest.MonkeyPatch.context() as patch:
        prepare_for_commands(patch, two)
        ranks = on_two_ranks(lines, two)
    return (one, alone), (two, ranks)


@pytest.fixture(scope="module")
def both(tmp_path_factory, finished_run):
    """A folder in which one process has run all commands, and one of two ranks: (folder, ended)."""
    one, two = (copied(finished_run, tmp_path_factory.mktemp(name)) for name in ("one", "two"))
    return on_one_and_two(one, two, LINES)


def values(node: object, key: str = "") -> Iterator[tuple[str, object]]:
    """The numbers and texts of a result by the path of their keys."""
    if isinstance(node, dict | list):
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for name, each in items:
            yield from values(each, f"{key}/{name}")
    else:
        yield key, node


def said(err: str, folder: Path) -> str:
    """The words of a command, without its figures and its folder."""
    return re.sub(r"-?\d[\d.e+-]*", "0", err.replace(str(folder), ""))


def assert_alike(both, name: str) -> None:
    """Asserts that a command returns and says on two ranks what it does in one process."""
    (one, alone), (two, (first, second)) = both
    assert (first[name].code, second[name].code) == (0, 0), first[name].err + second[name].err
    expected, found = (
        dict(values(json.loads(ended[name].out.splitlines()[-1]))) for ended in (alone, first)
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        close = isinstance(value, float)
        assert found[key] == (pytest.approx(value, rel=3e-6, abs=1e-6) if close else value), key
    assert said(first[name].err, two) == said(alone[name].err, one)
    assert (second[name].out, second[name].err) == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_two_ranks_return_and_say_what_one_process_does(both, name):
    assert_alike(both, name)


@pytest.mark.slow
def test_two_ranks_measure_images_of_others_and_beside_a_control(tmp_path_factory, trained_once):
    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    train = ["train", *TINY, "run_dir=run", "data.fraction=0.5"]
    images, labels = TinyData().load()[1]
    for folder in folders:
        for seed, name in enumerate(("run", "other")):
            trained = trained_once(*train, f"data.subset_seed={seed}") / "run"
            shutil.copytree(trained, folder / name, symlinks=True)
        np.savez(folder / "drawn.npz", images.permute(0, 2, 3, 1).numpy() // 2, labels.numpy())
    data = ["data=fashion_mnist", *TINY[:2], "metrics.reference_size=64", "metrics.num_samples=31"]
    lines = {
        "evaluate": ["evaluate", *EXACT[1:], *data, "images=drawn.npz"],
        "memorization": ["memorization", *EXACT, "control=other", "num_samples=13"],
    }
    both = on_one_and_two(*folders, lines)
    for name in lines:
        assert_alike(both, name)


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(both):
    (one, _), (two, _) = both
    files, others = (
        {path.relative_to(folder) for path in folder.rglob("*") if path.is_file()}
        for folder in (one, two)
    )
    assert others - files == {Path(f"rank{rank}.json") for rank in range(2)}
    assert not files - others
    expected, found = (np.load(folder / "out/samples.npz") for folder in (one, two))
    assert found["labels"].tolist() == expected["labels"].tolist() == [0, 1, 2, 3, 0, 1, 2]
    assert np.abs(found["images"].astype(int) - expected["images"]).max() <= 1
    pictures = [path for path in files if path.parts[0] == "out" and path.suffix == ".png"]
    assert len(pictures) == 8
    for path in pictures:
        first, second = (np.asarray(Image.open(folder / path), int) for folder in (one, two))
        assert np.abs(first - second).mean() < 0.1, path


@pytest.fixture
def impatient(monkeypatch):
    """Lets ranks that learn of the end of another not wait for a launcher, as there is none."""
    monkeypatch.setattr(distributed, "SECONDS_TO_BE_ENDED_IN", 0.3)


WRONG = {
    "both": ["sample", *EXACT, "num_samples=2", "labels=[9]"],
    "devices": ["sample", *EXACT, "devices=0"],
    "first": ["memorization", *EXACT, "output=run/config.yaml/x"],  # which alone writes
}


@pytest.mark.long
@pytest.mark.parametrize("ranks", first_fast(WRONG))
def test_two_ranks_that_fail_say_what_one_process_does_once(
    lab, refusal, run_folder, tmp_path, impatient, ranks
):
    first, second = (ended["x"] for ended in on_two_ranks({"x": WRONG[ranks]}, tmp_path))
    assert (first.code, second.code) == (2, 2)
    assert sentence_of(first.err + second.err) == refusal(*WRONG[ranks])


@pytest.mark.slow
def test_a_rank_that_fails_alone_ends_the_other(lab, run_folder, tmp_path, impatient, monkeypatch):
    draw_all = OpenRun.draw_all

    def fails_on_the_second(*arguments):
        if rank_and_world()[0] == 1:
            raise ArithmeticError("the fault that a test asked for")
        return draw_all(*arguments)

    monkeypatch.setattr(OpenRun, "draw_all", fails_on_the_second)
    line = ["sample", *EXACT, "num_samples=2", "output=out"]
    first, second = (ended["x"] for ended in on_two_ranks({"x": line}, tmp_path))
    assert (first.code, second.code) == (2, 1)
    assert not [line for line in first.err.splitlines() if line.startswith("diffusion-lab: ")]
    assert "ArithmeticError: the fault that a test asked for" in second.err
    assert not Path("out.png").exists()


@pytest.fixture
def forked(tmp_path, monkeypatch):
    """Forks the processes that a command starts; the list of the command lines that it starts."""
    started = []

    def elastic_launch(config, program):
        def start(*line):
            started.append(list(line))
            assert config.nproc_per_node == RANKS
            ended = [each["x"] for each in on_two_ranks({"x": line[2:]}, tmp_path)]
            for each in ended:
                print(each.out, end="")
                print(each.err, end="", file=sys.stderr)
            failed = {
                rank: ProcessFailure(rank, 0, each.code, "")
                for rank, each in enumerate(ended)
                if each.code
            }
            if failed:
                raise ChildFailedError("x", failed)

        return start

    monkeypatch.setattr(launch, "elastic_launch", elastic_launch)
    return started


@pytest.mark.long
def test_started_processes_return_their_result_from_the_shell_and_from_python(
    lab, run_folder, forked
):
    line = ["likelihood", *EXACT, "num_images=3"]
    expected = json.loads(lab(*line)[1])
    assert forked == []
    code, out, err = lab(*line, "devices=2")
    assert code == 0, err
    assert forked == [["-m", "diffusion_lab", *line, "devices=2"]]
    assert len(out.splitlines()) == 1
    assert json.loads(out) == pytest.approx(expected, rel=1e-6)
    assert err.count("bits per dimension") == 1
    assert command(*line, "devices=2") == pytest.approx(expected, rel=1e-6)


@pytest.mark.slow
def test_started_processes_know_where_the_users_own_configurations_are(lab, run_folder, forked):
    (run_folder.parent / "own/sampler").mkdir(parents=True)
    Path("own/sampler/mine.yaml").write_text("defaults: [ddim]\nsteps: 2\n")
    asked = [*EXACT, "sampler=mine", "devices=2", "num_samples=2", "output=mine"]
    lab.done("sample", "--config-dir", "own", *asked)
    assert f"--config-dir={Path('own').absolute()}" in forked[0]
    assert Path("mine.png").exists()


@pytest.mark.long
def test_processes_that_train_know_where_the_users_own_configurations_are(lab, monkeypatch):
    started = []
    monkeypatch.setattr(launch, "elastic_launch", lambda *_: lambda *line: started.append(line))
    Path("own").mkdir()
    lab.done("train", "--config-dir=own", *TINY, "trainer.devices=2")
    assert started[0][:4] == ("-m", "diffusion_lab", "train", f"--config-dir={Path.cwd()}/own")


@pytest.mark.slow
def test_started_processes_that_fail_are_ended(lab, refusal, run_folder):
    assert refusal(*WRONG["both"], "devices=2") == refusal(*WRONG["both"])
    code, out, err = lab("sample", *EXACT, "num_samples=3", "devices=2")
    assert code == 0, err
    assert json.loads(out)["num_samples"] == 3


@pytest.mark.slow
def test_torchrun_starts_a_command(lab, run_folder):
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    line = [sys.executable, "-m", *torchrun, "diffusion_lab", "evaluate", *EXACT]

    def called_by_torchrun(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*line, *more], check=False, capture_output=True, text=True)

    done = called_by_torchrun()
    assert done.returncode == 0, done.stderr
    alone = json.loads(lab("evaluate", *EXACT)[1])
    assert json.loads(done.stdout) == pytest.approx(alone, rel=3e-6, abs=1e-6)
    done = called_by_torchrun("devices=3")
    assert done.returncode == 1  # torchrun's own
    # torchrun's own trace comes after it
    assert "devices=3" in sentence_of(done.stderr.partition("Traceback")[0])
