"""The commands sample and evaluate, and the answers of the command line to mistakes."""

import errno
import json
import os
import pkgutil
import signal
import subprocess
import sys
import tempfile

import numpy as np
import pytest
from helpers.compositions import assembled
from helpers.pairs import first_fast
from helpers.paths import ROOT
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY, summary_of
from PIL import Image

from diffusion_lab.analysis.sample import also_asked, way
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.cli import main
from diffusion_lab.cli.commands import COMMANDS, prepare
from diffusion_lab.common.labels import Classes
from diffusion_lab.metrics import PreparedMetrics
from diffusion_lab.report import page as comparing
from diffusion_lab.runs.opened import OpenRun

FAST = ["sampler.steps=3", "device=cpu"]


def test_ctrl_c_does_not_disturb_the_end_of_the_program(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["diffusion-lab"])
    before = signal.getsignal(signal.SIGINT)
    try:
        main()
        os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)


def test_sample_writes_a_grid_files_and_an_array(lab, refusal, run_folder):
    arrays = lab.drawn("run=run", "num_samples=6", "labels=[2,0]", *FAST)
    assert arrays["images"].shape == (6, 8, 8, 1)
    assert arrays["images"].dtype == np.uint8
    assert arrays["labels"].tolist() == [2, 0, 2, 0, 2, 0]
    first = arrays["images"][:, :, :, 0]
    named = ["save=png", "output=mine.png", "labels=[2,0]"]
    result = lab.result("sample", "run=run", "num_samples=6", *named, *FAST)
    folder = result["images"]
    assert (result["grid"], folder) == ("mine.png", "mine")
    for index in range(6):
        with Image.open(f"{folder}/{index:06d}.png") as picture:
            assert np.array_equal(np.asarray(picture), first[index])
    fewer = refusal("sample", "run=run", "num_samples=4", *named)
    assert_names(fewer, "mine", "000004.png", "output=")


@pytest.mark.long
def test_sample_waits_for_no_library_of_training(run_folder, tmp_path):
    program = (
        "import sys; from diffusion_lab.cli.program import main; "
        "sys.argv = ['diffusion-lab', 'sample', 'run=run', 'num_samples=1']; main(); "
        "sys.exit(len({'lightning', 'torchmetrics', 'torchvision'} & sys.modules.keys()))"
    )
    place = {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=os.environ | place)
    assert done.returncode == 0


@pytest.mark.parametrize("line", ["sample run=run", "evaluate run=run", "compare run output=out"])
def test_a_place_that_cannot_be_written_to_is_told_before_the_work(
    refusal, run_folder, monkeypatch, line
):
    def refuse(*_, **__):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    for work in (OpenRun, "draw_all"), (OpenRun, "metrics"), (comparing, "collect"):
        monkeypatch.setattr(*work, None)
    place = "output=out" if "output" in line else "run=run"
    assert_names(refusal(*line.split()), f"{place} cannot be", os.strerror(errno.EROFS), "or ")


def test_a_sample_depends_on_its_seed_alone(lab, run_folder):
    def draw(*more):
        return lab.drawn("run=run", *FAST, *more)["images"].astype(int)

    eight = draw("num_samples=8", "batch_size=8")
    # the noise is bit-identical, but the rounding of matrix products depends on the batch size
    assert abs(draw("num_samples=3", "batch_size=1") - eight[:3]).max() <= 1
    assert abs(draw("num_samples=8", "seed=1") - eight).max() > 5


def test_evaluate_gives_the_metrics_of_the_run(lab, run_folder):
    trained = summary_of(run_folder)
    results = lab.result(
        "evaluate", "run=run", f"precision={trained['precision']}", "batch_size=16", "device=cpu"
    )
    name = "fid/efficientnet_lite0-96/train64-16"
    assert results[name] == pytest.approx(trained["metrics"][name], rel=1e-6)


def test_samples_are_compared_with_validation_images_under_another_name(lab, run_folder):
    options = ["metrics.reference=validation", "batch_size=16", "device=cpu", "json=true"]
    results = lab.result("evaluate", "run=run", *options)
    extractor = "efficientnet_lite0-96"
    assert {f"fid/{extractor}/val20-16", f"fid_real/{extractor}/val20-16"} <= set(results)
    assert not [name for name in results if f"{extractor}/train" in name]


@pytest.mark.parametrize(
    ("wrong", "named"),  # mistakes that other packages report
    [
        ("trainer.precision=fp16", "bf16-mixed"),
        ("trainer.max_time=5m", "trainer"),
        ("trainer.strategy=foo", "ddp"),
        ("metrics=inception", "efficientnet_lite0"),
    ],
)
def test_what_other_packages_refuse_is_one_sentence(refusal, tmp_path, monkeypatch, wrong, named):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    assert named in refusal("train", *TINY, wrong)
    assert not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_a_truncated_data_file_is_named_and_kept(refusal, tmp_path):
    path = tmp_path / "data/FashionMNIST/raw/train-images-idx3-ubyte"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"\0\0\10\3 truncated")
    assert path.name in refusal("train", "trainer=cpu", "+debug=fast")
    assert path.exists()
    assert not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_evaluations_are_kept_and_compared_if_they_are_alike(lab, refusal, run_folder, monkeypatch):
    summary = summary_of(run_folder)
    assert summary["training_images"] == 64
    lab.done("train", *TINY, "run_dir=2024", "seed=1")
    metrics = lab.result("evaluate", "run=run", "against=2024")
    (path,) = (run_folder / "evaluations").glob("*.json")
    kept = json.loads(path.read_text())
    assert kept["metrics"] == metrics
    assert kept["protocol"] == summary["protocol"]
    for arguments in (["run=2024"], ["run=run", "against=2024"]):
        err = lab.done("evaluate", *arguments, "metrics.per_class=true")
    table = [line for line in err.splitlines() if "│" in line]
    assert sum(" fid/" in line for line in table) == 1
    assert sum("fid_class" in line for line in table) == 4

    def prepare(*_):
        raise AssertionError("features are computed before the comparison is known to be possible")

    monkeypatch.setattr(PreparedMetrics, "of", prepare)
    sentence = refusal("evaluate", "run=2024", "against=run", "metrics.num_samples=7")
    assert_names(sentence, "2024", "7", "run", "16")
    sentence = refusal("evaluate", "run=run", "against=2024", "sampler.steps=4")
    assert_names(sentence, "2024", "sampler.steps=3", "run", "sampler.steps=4")
    assert "`diffusion-lab evaluate run=2024 sampler.steps=4`" in sentence


def test_what_cannot_be_compared_with_is_refused_before_anything_is_opened(refusal, run_folder):
    assert "nowhere" in refusal("evaluate", "run=unopened", "against=[run,nowhere]")
    (run_folder / "summary.json").unlink()
    assert "`diffusion-lab evaluate" in refusal("evaluate", "run=unopened", "against=run")
    (run_folder / "checkpoints/last.ckpt").unlink()
    assert "checkpoints/last.ckpt" in refusal("evaluate", "run=unopened", "against=run")


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments", [["train", "--help"], ["--help"], ["train", "--cfg", "job"], ["trian"]]
)
@pytest.mark.parametrize("unbuffered", first_fast(["", "1"]))
def test_output_that_nobody_reads_ends_quietly(arguments, unbuffered):
    closed, pipe = os.pipe()
    os.close(closed)
    with os.fdopen(pipe, "w") as unread:
        ended = subprocess.run(
            [sys.executable, "-m", "diffusion_lab", *arguments],
            stdout=unread,
            stderr=subprocess.PIPE,
            env=os.environ | {"PYTHONUNBUFFERED": unbuffered},
            text=True,
        )
    wrong = arguments == ["trian"]
    assert ended.returncode == (2 if wrong else 0)
    assert len(ended.stderr.splitlines()) == wrong


def test_another_broken_pipe_is_not_taken_for_standard_output(lab, monkeypatch):
    def broken(*_):
        raise BrokenPipeError

    monkeypatch.setattr("diffusion_lab.cli.program.execute", broken)
    with pytest.raises(BrokenPipeError):
        lab("train")


def test_every_command_has_a_function_and_a_configuration():
    for name, command in COMMANDS.items():
        assert callable(pkgutil.resolve_name(f"diffusion_lab.{command.function}"))
        assert (conf_dir() / f"{name.replace('-', '_')}.yaml").is_file()


@pytest.mark.parametrize("path", ["runs", "runs/one", "runs/one/checkpoints/last.ckpt"])
@pytest.mark.parametrize("key", ["", "run="])
def test_a_run_is_its_folder_its_checkpoint_or_alone_in_a_folder(tmp_path, monkeypatch, path, key):
    monkeypatch.chdir(tmp_path)
    for file in ("config.yaml", "checkpoints/last.ckpt"):
        (tmp_path / "runs/one" / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "runs/one" / file).touch()
    assert prepare(COMMANDS["sample"], [f"{key}{path}", "seed=1"]) == ["run=runs/one", "seed=1"]


def test_classes_are_asked_for_by_number_or_name():
    labels = Classes(("T-shirt", "Boot"))
    assert labels.parse([1, "boot", "T-SHIRT"]).tolist() == [1, 1, 0]
    with pytest.raises(ValueError, match="T-shirt"):
        labels.parse(["Sock"])


def test_every_way_to_draw_has_a_name_of_its_own():
    ways = [
        [],
        ["sampler=dpm_solver"],  # as the run's own, which may have other settings
        ["sampler=dpm_solver_3m"],
        ["sampler=ddim"],
        ["sampler=ddim", "guidance.clip=1"],
        ["guidance.clip=1", "sampler=ddim"],  # the same
        ["sampler=ddim", "guidance.clip=2"],
        ["sampler=ddim", "sampler/time_grid=karras"],
        ["sampler=ddim", "guidance=dynamic_thresholding"],
    ]
    names = {way(assembled(*each)) + also_asked(each) for each in ways}
    assert len(names) == len(ways) - 1


def test_a_picture_of_many_samples_has_the_first_of_them(lab, run_folder, monkeypatch):
    monkeypatch.setattr("diffusion_lab.common.images.MOST_IMAGES", 6)
    wanted = ("num_samples=12", "columns=2", "save=npz", "json=true", "device=cpu")
    code, out, err = lab("sample", "run=run", *wanted)
    assert code == 0, err
    assert_names(err, "first 6 of 12")
    written = json.loads(out.splitlines()[-1])
    assert len(np.load(written["array"])["images"]) == 12
    with Image.open(written["grid"]) as picture:
        assert picture.size == (2 * (2 * 10 + 2), 2 * (3 * 10 + 2))
