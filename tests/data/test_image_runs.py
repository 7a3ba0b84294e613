"""Runs on the user's own images from the command line, even after the images are gone."""

import hashlib
import lzma
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from helpers.pairs import first_fast
from helpers.paths import ROOT
from helpers.picture_files import archive, folder, numbered, png
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY, same, summary_of
from PIL import features

from diffusion_lab import runs
from diffusion_lab.common import hashing
from diffusion_lab.data.source import ImageZip, known_sets
from diffusion_lab.data.source.decoding import decode_into

PAGE = (ROOT / "docs/pages/own-data.md").read_text()
# files that lie beside the repository, where there are any
SHARED = Path(os.environ.get("DIFFUSION_LAB_SHARED", ROOT.parent / "shared")) / "data"
NETWORK = [a for a in TINY if not a.startswith("data.")]
UNMEASURED = ["callbacks.evaluation=null", "logger=none", "run_dir=run"]
QUICK = [*NETWORK, *UNMEASURED]
FAST = ["+debug=fast", "trainer=cpu", *UNMEASURED]


def photos(root: Path) -> str:
    contents = {f"{name}/{i:02}.png": 8 * i for name in ("cat", "dog", "eel") for i in range(24)}
    return folder(root / "photos", contents)


@pytest.mark.slow
def test_a_run_is_opened_where_its_images_are_gone(lab, refusal, tmp_path):
    photos(tmp_path)
    lab.done("train", "data=image_folder", "data.source.path=photos", *NETWORK, "run_dir=run")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]["source"]
    assert saved["image_size"] == [4, 4]
    assert (saved["channels"], saved["resize"]) == (1, "refuse")
    assert saved["classes"] == ["cat", "dog", "eel"]
    assert list((tmp_path / "data/reference").glob("train*")), "features are kept under data"
    trained = summary_of(tmp_path / "run")

    (tmp_path / "2024").mkdir()  # a number to Hydra
    shutil.move(tmp_path / "photos", tmp_path / "2024")
    drawn = lab.drawn("run=run", "num_samples=4")
    assert drawn["images"].shape == (4, 4, 4, 1)
    assert drawn["labels"].tolist() == [0, 1, 2, 0]

    evaluate = ["evaluate", "run=run", "batch_size=16", "device=cpu"]
    assert_names(refusal(*evaluate, "json=true"), "photos", "data_root")
    found = lab.result(*evaluate, "data_root=2024", f"precision={trained['precision']}")
    for name, value in found.items():
        assert value == pytest.approx(trained["metrics"][name], rel=1e-6)

    resume = ["train", "resume=run", "trainer.max_steps=6"]
    assert "data.source.classes=[x]" in refusal(*resume, "data.source.classes=[x]")
    lab.done(*resume, "data.source.path=2024/photos")
    assert summary_of(tmp_path / "run")["steps"] == 6
    folder(tmp_path / "2024/photos", {"fox/0.png": 0})
    assert "folder fox" in refusal(*resume, "trainer.max_steps=9", "data.source.path=2024/photos")


@pytest.mark.slow
def test_images_in_a_file_train_and_resume_bit_for_bit_as_in_memory(lab, tmp_path):
    photos(tmp_path)
    where = ["data=image_folder", "data.source.path=photos", "data.flip=true", "data.pad=8"]
    lab.done("train", *where, *QUICK, "run_dir=memory", "trainer.max_steps=6")
    lab.done("train", *where, *QUICK, "run_dir=file", "data.source.store=true")
    lab.done("train", "resume=file", "trainer.max_steps=6")
    assert len(list((tmp_path / "data/decoded").glob("photos-1x4x4-*.bin"))) == 2
    ours, theirs = (
        runs.load(tmp_path / name)[1].denoiser.state_dict() for name in ("memory", "file")
    )
    assert same(ours, theirs)


@pytest.mark.long
def test_images_without_classes_are_trained_without_labels(lab, refusal, tmp_path):
    folder(tmp_path / "flat", {f"{i}.png": png((i, 0, 0)) for i in range(40)})
    flat = ["data=image_folder", "data.source.path=flat", "data.pad=8"]
    assert "conditioning: " in refusal("train", *flat, *QUICK)
    lab.done("train", *flat, "conditioning=none", "data.fraction=0.5", *QUICK)
    assert lab.drawn("run=run", "num_samples=2")["images"].shape == (2, 4, 4, 3)


# sha256 of all images in order, from the README of those files
DECODED = "30a7853345b798d1861a37a1d4d1f334dc24222ecfe75bf0f88cab3776b46300"
COMMANDS = re.findall(r"^    diffusion-lab (train data=image_.+)$", PAGE, re.MULTILINE)


@pytest.mark.parametrize("line", first_fast(COMMANDS, 2))
def test_the_commands_of_the_page_train(lab, tmp_path, line):
    photos(tmp_path)
    folder(tmp_path / "faces", numbered(40))
    captions = "\n".join(["name,caption", *(f"{name},a boot" for name in numbered(40))])
    folder(tmp_path / "clothes", numbered(40) | {"captions.csv": captions.encode()})
    rows = [f"{name},{value / 4}" for name, value in numbered(40).items()]
    folder(tmp_path / "greys", numbered(40) | {"labels.csv": "\n".join(["name,x", *rows]).encode()})
    labels = [[file, i % 2] for file, i in numbered(10).items()]
    for name in ("train", "test"):
        archive(tmp_path / f"{name}.zip", numbered(10), labels)
    lab.done(*line.split(), *QUICK)


def test_bad_images_are_told_before_anything_is_written(lab, refusal, tmp_path):
    photos(tmp_path)
    (tmp_path / "photos/dog/07.png").write_bytes(b"")
    command = ["train", "data=image_folder", "data.source.path=photos", *QUICK]
    assert "dog/07.png" in refusal(*command)
    assert not (tmp_path / "run").exists()
    assert "dog/07.png" in lab.done(*command, "data.source.on_bad=skip")


@pytest.mark.slow
def test_data_that_are_in_no_files_cannot_have_moved(lab, refusal):
    lab.done("train", "experiment=toy/two_moons", *FAST, "trainer.max_steps=1")
    assert "data_root=elsewhere" in refusal("sample", "run=run", "data_root=elsewhere")


@pytest.mark.slow
def test_the_cifar10_recipe_trains_on_zips(lab, tmp_path, monkeypatch):
    monkeypatch.setenv("DIFFUSION_LAB_DATA", str(tmp_path / "zips"))
    (tmp_path / "zips").mkdir()
    for split, count in (("train", 30), ("test", 20)):
        names = [f"00000/img{i:08}.png" for i in range(count)]
        contents = {name: png((i, 2 * i, 3 * i), (32, 32)) for i, name in enumerate(names)}
        labels = [[name, i % 10] for i, name in enumerate(names)]
        archive(tmp_path / f"zips/cifar10-{split}.zip", contents, labels)
    zips = (tmp_path / "zips").iterdir()
    monkeypatch.setattr(known_sets, "ZIPS", {p.name: hashing.of_file(p) for p in zips})
    small = ["trainer.max_steps=2", "backbone.channels=32", "backbone.blocks=1"]
    lab.done("train", "experiment=cifar10/unet", "data=cifar10_zip", *FAST, *small)
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["data"]
    assert saved["flip"] is True
    assert saved["source"]["classes"][9] == "truck"
    assert saved["source"]["path"] == str(tmp_path / "zips/cifar10-train.zip")


@pytest.mark.slow
@pytest.mark.skipif(
    not (SHARED / "cifar10-test.zip.xz").exists(),
    reason=f"there is no cifar10-test.zip.xz in {SHARED}",
)
def test_the_shared_cifar10_is_decoded_to_its_known_pixels(tmp_path):
    path = tmp_path / "test.zip"
    path.write_bytes(lzma.decompress((SHARED / "cifar10-test.zip.xz").read_bytes()))
    names = yaml.safe_load((ROOT / "conf/data/cifar10_zip.yaml").read_text())["source"]["classes"]
    data = ImageZip(str(path), classes=names)
    assert data.native_shape == (3, 32, 32)
    files = data.find(str(path), data.class_names)
    assert torch.tensor(files.labels).bincount().tolist() == [1000] * 10
    images = np.zeros((10_000, *data.native_shape), np.uint8)
    assert not decode_into(images, files, "refuse")
    if not (features.version("libjpeg_turbo") or "").startswith("3."):
        pytest.skip("another decoder of JPEG may differ by a level or two")
    assert hashlib.sha256(images).hexdigest() == DECODED
