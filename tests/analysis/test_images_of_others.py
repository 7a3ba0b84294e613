"""Images that another program drew: measured as runs are, and compared beside them."""

import io
import json
import os
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest
from helpers.faults import Killed, die
from helpers.refusals import refused
from helpers.tiny_data import TinyData
from helpers.tiny_runs import tiny_classifier
from PIL import Image

from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.drawn_images import read_drawn
from diffusion_lab.runs import published

DATA = ["data=fashion_mnist", "data.source._target_=helpers.tiny_data.TinyData"]
DATA += ["data.validation_size=20", "metrics.reference_size=64", "metrics.num_samples=16"]
MEASURE = ["evaluate", *DATA, "json=true"]


@pytest.fixture
def run_folder(finished_run, tmp_path) -> Path:
    return Path(shutil.copytree(finished_run, tmp_path / "run"))


@pytest.fixture(scope="module")
def drawn() -> tuple[np.ndarray, np.ndarray]:
    """Twenty images, (n, H, W, C) uint8, that look like those of the tiny data, and labels."""
    images, labels = TinyData().load()[1]
    images = images[:20].permute(0, 2, 3, 1).numpy() // 2 + 30
    return images, labels[:20].numpy()


def as_png(image: np.ndarray) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(image[:, :, 0]).save(stream, "PNG")
    return stream.getvalue()


def write_folder(root: Path, images: np.ndarray, folders: list[str]) -> Path:
    for number, (image, folder) in enumerate(zip(images, folders, strict=True)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        (root / folder / f"{number:03}.png").write_bytes(as_png(image))
    return root


def write_zip(path: Path, images: np.ndarray, labels: list | None) -> Path:
    names = [f"00/{number:03}.png" for number in range(len(images))]
    with zipfile.ZipFile(path, "w") as file:
        for name, image in zip(names, images, strict=True):
            file.writestr(name, as_png(image))
        listed = None if labels is None else list(map(list, zip(names, labels, strict=True)))
        file.writestr("dataset.json", json.dumps({"labels": listed}))
    return path


def spoil_member(path: Path, name: str | None = None) -> None:
    """Compresses a member of a zip, the first one by default, and damages it."""
    with zipfile.ZipFile(path) as file:
        members = {info.filename: file.read(info) for info in file.infolist()}
    name = name or next(iter(members))
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for each, content in members.items():
            file.writestr(each, content)
        start = file.getinfo(name).header_offset + 30 + len(name)
    content = bytearray(path.read_bytes())
    content[start : start + 4] = b"\xff" * 4  # no block of deflate begins so
    path.write_bytes(content)


def lying_array(path: Path) -> None:
    """Writes an .npz whose array says that it is larger than any memory."""
    facts = {"descr": "|u1", "fortran_order": False, "shape": (2**60, 8, 8, 1)}
    with zipfile.ZipFile(path, "w") as file, file.open("arr_0.npy", "w") as member:
        np.lib.format.write_array_header_1_0(member, facts)


def read(place: Path | str):
    """The images and labels in a place, read as `evaluate` reads them."""
    return read_drawn(str(place), TinyData.native_shape, TinyData.class_names)


def results(lab, *arguments: str) -> tuple[dict, str]:
    code, out, err = lab(*arguments)
    assert code == 0, err
    return json.loads(out.splitlines()[-1]), err


@pytest.mark.long
def test_the_samples_of_a_run_have_its_figures(lab, run_folder):
    own, _ = results(lab, "evaluate", "run=run", "json=true", "seed=3")
    file = results(lab, "sample", "run=run", "num_samples=16", "seed=3", "save=npz", "json=true")[
        0
    ]["array"]
    found, _ = results(lab, *MEASURE, f"images={file}", "name=ours")
    assert found.keys() == own.keys()
    for name, value in own.items():
        # the halves of FID's standard deviation are of other images, as images are shuffled
        if not name.startswith(("fid_std", "fid_infinity")):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-7), name


def test_a_folder_a_zip_and_an_array_of_the_same_images_are_alike(drawn, tmp_path):
    images, labels = drawn
    names = [TinyData.class_names[label] for label in labels]
    places = [
        write_folder(tmp_path / "named", images, names),
        write_folder(tmp_path / "numbered", images, [str(label) for label in labels]),
        write_zip(tmp_path / "zip.zip", images, labels.tolist()),
        tmp_path / "adm.npz",
        tmp_path / "ours.npz",
    ]
    np.savez(tmp_path / "adm.npz", images, labels)  # arr_0 and arr_1
    np.savez(tmp_path / "ours.npz", images=images, labels=labels)
    for place in places:
        found, classes = read(place)
        # a folder has the images of each class together
        pairs = zip(found.permute(0, 2, 3, 1).numpy(), classes.tolist(), strict=True)
        assert {(image.tobytes(), label) for image, label in pairs} == {
            (image.tobytes(), label) for image, label in zip(images, labels.tolist(), strict=True)
        }, place


def test_without_labels_metrics_of_classes_are_left_out(lab, drawn, tmp_path):
    images, _ = drawn
    np.savez(tmp_path / "array.npz", images)
    # arr_1 has the labels of arr_0, and is none of the images here
    np.savez(tmp_path / "pair.npz", images=images, arr_1=np.zeros(20, int))
    parts = ["000000"] * 10 + ["001000"] * 10
    for place in (
        write_folder(tmp_path / "flat", images, ["."] * 20),
        write_folder(tmp_path / "parts", images, parts),
        write_zip(tmp_path / "null.zip", images, None),
        tmp_path / "array.npz",
        tmp_path / "pair.npz",
    ):
        assert read(place)[1] is None, place
    reader = f"metrics.classifier={tiny_classifier(tmp_path / 'reader.safetensors')}"
    found, err = results(lab, *MEASURE, reader, "metrics.per_class=true", "images=array.npz")
    assert "Accuracy" in err
    assert "FID of class" in err
    kinds = {name.partition("/")[0] for name in found}
    assert {"fid", "kid", "classifier_fid"} <= kinds
    assert not {"accuracy", "fid_class0"} & kinds


@pytest.mark.slow
def test_figures_of_the_same_images_gather_in_one_folder(lab, refusal, drawn, tmp_path):
    images, labels = drawn
    np.savez(tmp_path / "drawn.npz", images, labels)
    write_folder(tmp_path / "scale-1.5", images, ["."] * 20)
    results(lab, *MEASURE, "images=scale-1.5")
    assert (tmp_path / "outputs/scale-1.5/seed0").is_dir()  # a folder has no suffix
    first, err = results(lab, *MEASURE, "images=drawn.npz", "seed=2")
    assert "16 of 20" in err
    folder = tmp_path / "outputs/drawn/seed2"  # named by the file
    other, _ = results(lab, *MEASURE, "images=drawn.npz", "seed=2", "metrics.num_samples=18")
    again, _ = results(lab, "evaluate", f"run={folder}", "json=true", "metrics.num_samples=16")
    assert again == first
    kept = [json.loads(path.read_text()) for path in (folder / "evaluations").iterdir()]
    assert sorted(each["protocol"]["num_samples"] for each in kept) == [16, 18]
    assert {json.dumps(each["metrics"]) for each in kept} == {
        json.dumps(each) for each in (first, other)
    }
    with Image.open(folder / "samples/step_0000000.png") as picture:
        assert picture.size == (2 * (10 * 10 + 2), 2 * (2 * 10 + 2))  # all 20 images

    lab.done("publish", "outputs", "output=published")
    assert "The runs ended" not in (tmp_path / "published/card.md").read_text()

    np.savez(tmp_path / "drawn.npz", images[::-1], labels)
    assert "drawn.npz" in refusal(*MEASURE, "images=drawn.npz", "seed=2")
    assert "drawn.npz" in refusal("evaluate", f"run={folder}")
    results(lab, *MEASURE, "images=drawn.npz", "seed=3")


def test_an_evaluation_that_is_killed_can_be_repeated(lab, refusal, drawn, tmp_path, monkeypatch):
    images, labels = drawn
    np.savez(tmp_path / "drawn.npz", images, labels)
    results(lab, *MEASURE, "images=drawn.npz")
    more = [*MEASURE, "images=drawn.npz", "metrics.num_samples=18"]
    with monkeypatch.context() as patch:
        patch.setattr(published, "mark", lambda *arguments: die())
        with pytest.raises(Killed):
            lab(*more)
    np.savez(tmp_path / "drawn.npz", images[::-1], labels)
    assert "drawn.npz" in refusal(*more)
    np.savez(tmp_path / "drawn.npz", images, labels)
    results(lab, *more)
    folder = tmp_path / "outputs/drawn/seed0"
    assert len(list((folder / "evaluations").iterdir())) == 2
    assert published.is_published(folder)


@pytest.mark.long
def test_other_commands_and_settings_of_sampling_refuse_images(lab, refusal, drawn, tmp_path):
    np.savez(tmp_path / "drawn.npz", *drawn)
    results(lab, *MEASURE, "images=drawn.npz")
    assert "outputs/drawn/seed0" in refusal("train", "resume=outputs/drawn/seed0")
    for command, *rest in (
        ("sample",),
        ("likelihood",),
        ("export", "output=new"),
        ("evaluate", "average=trained"),
        ("evaluate", "seed=7"),
        ("evaluate", "sampler=ddim"),
        ("evaluate", "against=outputs/drawn/seed0"),
    ):
        said = refusal(command, "run=outputs/drawn/seed0", *rest)
        assert "outputs/drawn/seed0" in said or rest[0].partition("=")[0] in said, (command, rest)


def test_wrong_images_are_refused_and_nothing_is_written(refusal, drawn, tmp_path):
    images, labels = drawn
    np.savez(tmp_path / "large.npz", np.zeros((20, 9, 8, 1), np.uint8))
    np.savez(tmp_path / "colour.npz", np.zeros((20, 8, 8, 3), np.uint8))
    np.savez(tmp_path / "floats.npz", images / 255)
    np.savez(tmp_path / "other.npz", pictures=images)
    np.savez(tmp_path / "classes.npz", images, labels + 4)
    np.savez(tmp_path / "short.npz", images, labels[:7])
    np.savez(tmp_path / "objects.npz", arr_0=np.array([print], dtype=object), allow_pickle=True)
    np.save(tmp_path / "single.npy", images)
    (tmp_path / "single.npy").rename(tmp_path / "single.npz")
    (tmp_path / "damaged.npz").write_bytes(b"PK nothing")
    (tmp_path / "damaged.zip").write_bytes(b"PK nothing")
    (tmp_path / "nothing.npz").touch()
    np.savez_compressed(tmp_path / "deflated.npz", images)
    spoil_member(tmp_path / "deflated.npz")
    lying_array(tmp_path / "lying.npz")
    write_zip(tmp_path / "labelled.zip", images, labels.tolist())
    spoil_member(tmp_path / "labelled.zip", "dataset.json")
    (tmp_path / "empty").mkdir()
    write_folder(tmp_path / "wide", np.zeros((20, 8, 9, 1), np.uint8), ["."] * 20)
    (write_folder(tmp_path / "bad", images, ["."] * 20) / "001.png").write_bytes(b"no image")
    write_zip(tmp_path / "labels.zip", images, (labels + 4).tolist())
    for name in ("pipe.npz", "pipe.zip"):
        os.mkfifo(tmp_path / name)
    for name in (
        *("large.npz", "colour.npz", "floats.npz", "other.npz", "classes.npz", "short.npz"),
        *("objects.npz", "single.npz", "damaged.npz", "damaged.zip", "empty", "wide", "bad"),
        *("labels.zip", "nowhere", "nowhere.npz", "large.npy"),
        *("nothing.npz", "deflated.npz", "lying.npz", "labelled.zip", "pipe.npz", "pipe.zip"),
    ):
        with refused(f"images={name}", by=DataError):
            read(name)
    assert "images=large.npz" in refusal(*MEASURE, "images=large.npz")
    np.savez(tmp_path / "few.npz", images)
    said = refusal(*MEASURE, "images=few.npz", "metrics.num_samples=21")
    assert "metrics.num_samples=20" in said
    assert "data=" in refusal("evaluate", "images=few.npz")
    assert "run=x" in refusal(*MEASURE, "images=few.npz", "run=x")
    assert "data=" in refusal(*MEASURE, "run=x")
    assert not (tmp_path / "outputs").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").touch()
    assert "mine" in refusal(*MEASURE, "images=few.npz", "run_dir=mine")
