"""Data sets of the package datasets, made by the tests without asking the hub."""

import pytest
import torch
from helpers.data_modules import data_of
from helpers.refusals import refused
from helpers.tiny_runs import QUICK, summary_of
from PIL import Image

from diffusion_lab.data import DataError
from diffusion_lab.data.source import HuggingFace

hub = pytest.importorskip("datasets", reason="pip install 'diffusion-lab[huggingface]'")


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))


def picture(value: int) -> Image.Image:
    return Image.new("L", (4, 4), value)


def split(count: int, labels, kind, start: int = 0):
    """Makes rows of a picture of its number, its name and a label."""
    columns = {
        "image": [picture(start + i) for i in range(count)],
        "label": [labels[i % len(labels)] for i in range(count)],
        "name": [f"picture {i}" for i in range(count)],
    }
    names = {"image": hub.Image(), "label": kind, "name": hub.Value("string")}
    return hub.Dataset.from_dict(columns, hub.Features(names))


def data_in(folder, rows, **settings):
    """The data of rows, or of splits by name, that are saved to a folder."""
    rows.save_to_disk(folder)
    return data_of(HuggingFace, str(folder), **settings)


CLASSES = ("a", "b", "c")


@pytest.fixture
def saved(tmp_path) -> str:
    kind = hub.ClassLabel(names=list(CLASSES))
    splits = {"train": split(9, [2, 0, 1], kind), "test": split(3, [1], kind, start=50)}
    hub.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    return str(tmp_path / "saved")


def values(images: torch.Tensor) -> list[int]:
    return images[:, 0, 0, 0].tolist()


def all_values(data) -> list[int]:
    return sorted(values(data.train_images()) + values(data.test_images()))


def test_splits_are_rows_in_order_with_their_class_labels(saved):
    data = data_of(HuggingFace, saved, test_split="test")
    assert (data.image_shape, data.class_names) == ((1, 4, 4), CLASSES)
    assert values(data.train_images()) == list(range(9))
    assert data.train_labels().tolist() == [2, 0, 1] * 3
    assert sorted(values(data.test_images())) == [50, 51, 52]
    assert data.test_labels().tolist() == [1] * 3


def test_images_of_another_column_are_stored_apart(tmp_path):
    columns = {"image": [picture(i) for i in range(9)], "label": [0, 1, 2] * 3}
    columns["depth"] = [picture(100 + i) for i in range(9)]
    kinds = {"image": hub.Image(), "depth": hub.Image(), "label": hub.Value("int64")}
    hub.Dataset.from_dict(columns, hub.Features(kinds)).save_to_disk(tmp_path / "saved")
    for column, start in (("image", 0), ("depth", 100)):
        given = {"image_column": column, "store": True, "store_dir": str(tmp_path / "stored")}
        data = data_of(HuggingFace, str(tmp_path / "saved"), test_share=0.5, **given)
        assert all_values(data) == list(range(start, start + 9))


def test_a_share_is_for_tests_where_there_is_no_test_split(saved):
    data = data_of(HuggingFace, saved, test_share=0.5)
    assert all_values(data) == list(range(9))
    labels = [(2, 0, 1)[i % 3] for i in values(data.test_images())]
    assert labels == data.test_labels().tolist()


def test_parquet_texts_and_numbers(tmp_path):
    path = str(tmp_path / "texts.parquet")
    split(6, ["dog", "cat"], hub.Value("string")).to_parquet(path)
    data = data_of(HuggingFace, path, test_split="train")
    assert data.class_names == ("cat", "dog")
    assert data.train_labels().tolist() == [1, 0] * 3
    assert values(data.train_images()) == list(range(6))
    named = data_of(HuggingFace, path, test_split="train", classes=["dog", "cat", "eel"])
    assert named.train_labels().tolist() == [0, 1] * 3
    with refused("has cat", "classes are dog", by=DataError):
        data_of(HuggingFace, path, test_split="train", classes=["dog"]).prepare_data()

    kind = hub.ClassLabel(names=["cat", "dog"])
    for place, classes in enumerate((["dog", "cat"], ["cats", "dogs"])):  # in order, or renamed
        rows = split(6, [1, 0], kind)
        data = data_in(tmp_path / f"kinds{place}", rows, test_split="train", classes=classes)
        called = [data.class_names[label] for label in data.train_labels()]
        assert called == [["dog", "cat"], ["dogs", "cats"]][place] * 3

    numbers = split(6, [1, 0], hub.Value("int64"))
    data = data_in(tmp_path / "numbers", numbers, test_split="train", channels=3)
    assert (data.class_names, data.native_shape) == (("0", "1"), (3, 4, 4))


def test_labels_can_be_left_out(saved):
    for settings in ({"label_column": None}, {"classes": []}):
        data = data_of(HuggingFace, saved, test_split="test", **settings)
        assert data.num_classes == 0
        assert data.train_labels().tolist() == [0] * 9


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"split": "trian"}, ["split=trian", "train, test"]),
        ({"test_split": "validation"}, ["test_split=validation"]),
        ({"image_column": "img"}, ["image_column=img", "image, label"]),
        ({"label_column": "fine"}, ["label_column=fine", "null"]),
        ({"image_column": "label"}, ["image_column=label"]),
        ({"classes": ["a"]}, ["has b, c", "classes are a"]),
        ({"classes": ["x"]}, ["label 2", "1 classes"]),
    ],
)
def test_what_is_not_in_the_data_is_one_sentence(saved, settings, named):
    with refused(*named, by=DataError):
        data_of(HuggingFace, saved, **({"test_split": "test"} | settings)).prepare_data()


def test_missing_labels_are_refused(tmp_path):
    data = data_in(tmp_path / "x", split(4, [-1], hub.Value("int64")), test_split="train")
    with refused("0 with -1", by=DataError):
        data.prepare_data()
    data = data_in(tmp_path / "y", split(4, ["0", None], hub.Value("string")), test_split="train")
    with refused("row 1", by=DataError):
        data.prepare_data()


def test_yes_and_no_are_classes(tmp_path):
    data = data_in(tmp_path / "x", split(4, [True, False], hub.Value("bool")), test_split="train")
    assert data.class_names == ("0", "1")
    assert data.train_labels().tolist() == [1, 0] * 2


def test_what_cannot_be_loaded_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.config, "HF_HUB_OFFLINE", True)
    (tmp_path / "empty").mkdir()
    with refused(tmp_path / "empty", by=DataError):
        data_of(HuggingFace, str(tmp_path / "empty")).prepare_data()


def test_a_run_trains_on_it(lab, tmp_path, saved):
    data = ["data=huggingface", f"data.source.path={saved}", "data.source.test_split=test"]
    network = [each for each in QUICK if not each.startswith("data.")]
    lab.done("train", *data, *network, "run_dir=run")
    assert summary_of(tmp_path / "run")["finished"]


@pytest.mark.parametrize("parquet", [True, False])
def test_images_in_a_file_are_those_of_the_present_rows(tmp_path, parquet):
    def read(start: int) -> list[int]:
        rows = split(9, [0, 1], hub.ClassLabel(names=["a", "b"]), start)
        path = tmp_path / ("rows.parquet" if parquet else f"rows{start}")
        rows.to_parquet(path) if parquet else rows.save_to_disk(path)
        where = {"store": True, "store_dir": str(tmp_path / "decoded"), "test_share": 0.5}
        return all_values(data_of(HuggingFace, str(path), **where))

    assert read(0) == read(0) == list(range(9))
    assert read(100) == list(range(100, 109))


def test_a_column_of_numbers_or_lists_is_a_vector(tmp_path):
    number, pair = hub.Value("float64"), hub.List(hub.Value("float32"), length=2)
    for kind, labels, size in ((number, [0.5, 2.0], 1), (pair, [[0.5, 1], [2, 3]], 2)):
        data = data_in(tmp_path / f"rows{size}", split(9, labels, kind), test_share=0.5)
        assert (data.labels.shape, data.class_names) == ((size,), ())
        both = torch.cat([data.train_labels(), data.test_labels()])
        assert both.dtype == torch.float32
        assert torch.equal(both.unique(dim=0), torch.tensor(labels).view(2, size))
    whole = split(9, [3, 4, 7], hub.Value("int64"))
    data = data_in(tmp_path / "whole", whole, test_share=0.5, label_size=1)
    assert set(data.train_labels().flatten().tolist()) <= {3.0, 4.0, 7.0}
    for label_size, named in ((0, ["0.5"]), (2, ["0.5", "2"])):
        with refused(*named, by=DataError):
            data_of(HuggingFace, str(tmp_path / "rows1"), label_size=label_size).prepare_data()
