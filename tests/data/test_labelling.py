"""Labels of a dataset.json or a CSV, in folders and zips: classes, numbers, vectors, refusals."""

import json

import pytest
import torch
from helpers.data_modules import data_of
from helpers.picture_files import archive, folder, numbered
from helpers.refusals import refused

from diffusion_lab.data import DataError
from diffusion_lab.data.source import ImageFolder, ImageZip

NAMES = numbered(40, "{:02}.png")


def written(root, kind, labels=..., table=None, names=NAMES):
    """A folder or zip of images with a dataset.json or the text of a CSV beside them."""
    extra = {} if table is None else {"labels.csv": table.encode()}
    root.mkdir(exist_ok=True)
    if kind is ImageZip:
        return archive(root / "a.zip", names | extra, labels)
    if labels is not ...:
        extra["dataset.json"] = json.dumps({"labels": labels}).encode()
    return folder(root / "a", names | extra)


def read(kind, path, **settings):
    data = data_of(kind, path, **{"test_share": 0.3} | settings)
    data.prepare_data()
    data.check_splits()
    greys = torch.cat([data.train_images(), data.test_images()])[:, 0, 0, 0]
    labels = torch.cat([data.train_labels(), data.test_labels()])
    return data, dict(zip(greys.tolist(), labels, strict=True))


def csv_of(function, titles="name,x", names=NAMES):
    return "\n".join([titles, *(f"{name},{function(value)}" for name, value in names.items())])


@pytest.mark.parametrize("kind", [ImageFolder, ImageZip])
class TestBoth:
    def test_numbers_and_lists_are_vectors(self, tmp_path, kind):
        cases = ((lambda v: v / 4, 1), (lambda v: [v / 4, -v, 1], 3))
        for number, (function, size) in enumerate(cases):
            path = written(
                tmp_path / str(number), kind, [[n, function(v)] for n, v in NAMES.items()]
            )
            data, labels = read(kind, path)
            assert (data.labels.shape, data.num_classes) == ((size,), 0)
            for value, label in labels.items():
                assert label.tolist() == torch.tensor(function(value)).view(-1).tolist()

    def test_a_csv(self, tmp_path, kind):
        path = written(tmp_path, kind, table=csv_of(lambda v: f"{v / 4},{-v}", "name,x,y"))
        data, labels = read(kind, path, label_file="labels.csv")
        assert data.labels.shape == (2,)
        assert {value: label.tolist() for value, label in labels.items()} == {
            value: [value / 4, -value] for value in NAMES.values()
        }
        assert read(kind, path)[0].labels.shape == ()  # without its name it says nothing

    def test_whole_numbers_are_classes_unless_they_are_to_be_numbers(self, tmp_path, kind):
        path = written(tmp_path, kind, [[name, value % 3] for name, value in NAMES.items()])
        data, labels = read(kind, path)
        assert (data.labels.shape, data.class_names) == ((), ("0", "1", "2"))
        assert all(int(label) == value % 3 for value, label in labels.items())
        data, labels = read(kind, path, label_size=1)
        assert (data.labels.shape, data.class_names) == ((1,), ())
        assert all(label.tolist() == [value % 3] for value, label in labels.items())

    def test_what_a_run_saves_opens_the_same_data(self, tmp_path, kind):
        path = written(tmp_path, kind, [[name, value / 4] for name, value in NAMES.items()])
        first, _ = read(kind, path)
        facts = first.source.facts()
        assert facts["label_size"] == 1
        again = data_of(kind, path, test_share=0.3, **facts)
        assert again.fingerprint == first.fingerprint
        away = data_of(kind, str(tmp_path / "nowhere"), **facts)
        assert (away.labels.shape, away.num_classes) == ((1,), 0)

    def test_fractions_and_validation_take_them_as_one_class(self, tmp_path, kind):
        path = written(tmp_path, kind, [[name, value / 4] for name, value in NAMES.items()])
        data, _ = read(kind, path, validation_size=6, fraction=0.5)
        rest = len(data.reference_images()) - 6
        assert (len(data.train_labels()), len(data.validation_labels())) == (round(rest / 2), 6)
        assert data.tested_on().labels.shape == (len(data.test_labels()), 1)

    @pytest.mark.parametrize(
        ("labels", "named"),
        [
            (lambda n, v: [n, [v, 0.5] if v else [v]], "01.png"),
            (lambda n, v: [n, v / 4 if v else "much"], "much"),
            (lambda n, v: [n, v / 4 if v else None], "00.png"),
            (lambda n, v: [n, v / 4 if v else True], "True"),
            (lambda n, v: [n, [v / 4] if v else []], "00.png"),
            (lambda n, v: [n, v / 4 if v else float("nan")], "nan"),
            (lambda n, v: [n, v / 4 if v else 10**309], "00.png"),
            (lambda n, v: [n, 1_700_000_000 + v], "1,699,999,995 more"),
            (lambda n, v: [n if v else "other.png", v / 4], "other.png"),
        ],
    )
    def test_wrong_labels_are_named(self, tmp_path, kind, labels, named):
        path = written(tmp_path, kind, [labels(n, v) for n, v in NAMES.items()])
        with refused("dataset.json", named, by=DataError):
            read(kind, path)

    @pytest.mark.parametrize(
        ("table", "named"),
        [
            ("", "titles"),
            ("name,x", "titles"),
            ("name\n00.png", "titles"),
            ("name,x\n00.png,1\n01.png,much", "much"),
            ("name,x\n00.png,1,2", "00.png,1,2"),
            ("name,x\n00.png,1\n00.png,2", "more than once"),
            ("name,x\n00.png,1", "01.png"),
            (csv_of(lambda v: v) + "\n99.png,1", "99.png"),
            (csv_of(lambda v: v if v else "inf"), "inf"),
            (csv_of(lambda v: v if v else "1e39"), "1e+39"),  # infinite as float32
        ],
    )
    def test_a_wrong_csv_is_named(self, tmp_path, kind, table, named):
        path = written(tmp_path, kind, table=table)
        with refused("labels.csv", named, by=DataError):
            read(kind, path, label_file="labels.csv")

    def test_labels_that_are_not_there_are_missed(self, tmp_path, kind):
        path = written(tmp_path, kind)
        with refused("path=", "other.csv", "label_file", by=DataError):
            read(kind, path, label_file="other.csv")
        with refused("path=", "dataset.json", "label_size=null", by=DataError):
            read(kind, path, label_size=1)

    def test_test_images_have_as_many_numbers(self, tmp_path, kind):
        path = written(tmp_path / "x", kind, [[name, value / 4] for name, value in NAMES.items()])
        test = written(
            tmp_path / "y", kind, [[name, [value, 0.5]] for name, value in NAMES.items()]
        )
        with refused("dataset.json", "a number of", by=DataError):
            read(kind, path, test_path=test)
        whole = written(tmp_path / "z", kind, [[name, value] for name, value in NAMES.items()])
        assert read(kind, path, test_path=whole)[0].test_labels().dtype == torch.float32
