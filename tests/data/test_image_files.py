"""Folders and zips of images: what is inferred, the order, the test images, and refusals."""

import json
import os
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.data_modules import data_of
from helpers.picture_files import archive, folder, numbered, png
from helpers.refusals import assert_names, refused

from diffusion_lab.common.images import pad_to
from diffusion_lab.data import DataError, ImageDataModule
from diffusion_lab.data.source import HuggingFace, ImageFolder, ImageZip
from diffusion_lab.data.source.listing import hash_share

TWO = {"cat/0.png": 0, "cat/1.png": 1, "dog/2.png": 2, "dog/3.png": 3}
LABELS = [["b/1.png", 1], ["a/0.png", 0], ["b/3.png", 0], ["a/2.png", 1]]
ZIPPED = {"a/0.png": 0, "a/2.png": 2, "b/1.png": 1, "b/3.png": 3}


def values(images: torch.Tensor) -> list[int]:
    assert images.dtype == torch.uint8
    assert (images == images[:, :1, :1, :1]).all()
    return images[:, 0, 0, 0].tolist()


def of_folder(root, contents, **settings) -> ImageDataModule:
    return data_of(ImageFolder, folder(root, contents), **settings)


def in_both(path, source=ImageFolder, **settings) -> ImageDataModule:
    """The data whose training and test images are those of one path."""
    return data_of(source, str(path), test_path=str(path), **settings)


class TestFolder:
    def test_a_class_is_a_folder(self, tmp_path):
        test = folder(tmp_path / "test", {"dog/8.png": 8, "cat/9.png": 9})
        data = of_folder(tmp_path / "train", TWO, test_path=test)
        assert data.class_names == ("cat", "dog")
        assert (data.image_shape, data.num_classes) == ((1, 4, 4), 2)
        assert values(data.train_images()) == [0, 1, 2, 3]
        assert data.train_labels().tolist() == [0, 0, 1, 1]
        assert data.train_labels().dtype == torch.int64
        tests = dict(zip(values(data.test_images()), data.test_labels().tolist(), strict=True))
        assert tests == {8: 1, 9: 0}

    def test_images_in_no_folder_have_no_classes(self, tmp_path):
        data = of_folder(tmp_path, numbered(40), test_share=0.3)
        assert data.num_classes == 0
        assert set(data.train_labels().tolist() + data.test_labels().tolist()) == {0}
        assert sorted(values(data.train_images()) + values(data.test_images())) == list(range(40))

    def test_one_class_is_a_class(self, tmp_path):
        assert of_folder(tmp_path, numbered(40, "cat/{:02}.png")).class_names == ("cat",)

    def test_names_decide_the_order_whatever_wrote_them(self, tmp_path):
        names = {f"{c}/{i}.png": 9 * i for i in (10, 3, 21, 1) for c in "ba"}
        data = in_both(folder(tmp_path, names), classes=["b", "a"])
        # names are sorted as texts, and labels follow the listed classes
        assert values(data.train_images()) == [9, 90, 189, 27] * 2
        assert data.train_labels().tolist() == [1] * 4 + [0] * 4

    def test_hidden_and_other_files_do_not_count(self, tmp_path):
        others = {
            ".hidden.png": 7,
            "cat/._0.png": b"resource fork",
            "__MACOSX/cat/0.png": 7,
            ".cache/cat/0.png": 7,
            "cat/notes.txt": b"notes",
            "LICENSE": b"free",
        }
        data = in_both(folder(tmp_path, TWO | others))
        assert values(data.train_images()) == [0, 1, 2, 3]

    def test_a_link_to_a_folder_is_a_class(self, tmp_path):
        folder(tmp_path / "elsewhere/animals", {"2.png": 2, "3.png": 3})
        folder(tmp_path / "x", {"cat/0.png": 0, "cat/1.png": 1, ".kept/4.png": 4})
        (tmp_path / "x/dog").symlink_to(tmp_path / "elsewhere/animals")
        (tmp_path / "x/eel").symlink_to(tmp_path / "x/.kept")  # a link to a hidden folder counts
        data = in_both(tmp_path / "x")
        assert data.class_names == ("cat", "dog", "eel")
        assert values(data.train_images()) == [0, 1, 2, 3, 4]

    @pytest.mark.parametrize("target", ["..", ".", "../cat", "../../x/dog"])
    def test_no_folder_is_read_twice(self, tmp_path, capfd, target):
        folder(tmp_path / "x", TWO)
        (tmp_path / "x/cat/again").symlink_to(target)
        (tmp_path / "x/a_link").symlink_to("cat")  # sorts before cat, which keeps its own name
        (tmp_path / "x/z_link").symlink_to(tmp_path / "x/dog")
        data = in_both(tmp_path / "x")
        assert data.class_names == ("cat", "dog")
        assert values(data.train_images()) == [0, 1, 2, 3]
        assert_names(capfd.readouterr().err, "x/cat/again", "x/a_link", "x/z_link")

    def test_links_that_lead_from_one_to_the_other_end(self, tmp_path):
        folder(tmp_path, {"x/a/0.png": 0, "y/1.png": 1})
        (tmp_path / "x/a/over").symlink_to(tmp_path / "y")
        (tmp_path / "y/back").symlink_to(tmp_path / "x")
        assert values(in_both(tmp_path / "x", classes=[]).train_images()) == [0, 1]

    def test_folders_mean_nothing_where_there_are_to_be_no_classes(self, tmp_path):
        deep = {"a/b/0.png": 0, "1.png": 1, "a/2.png": 2}
        data = in_both(folder(tmp_path, deep), classes=[])
        assert data.num_classes == 0
        assert values(data.train_images()) == [1, 2, 0]
        assert data.train_labels().tolist() == [0, 0, 0]


class TestSplits:
    def test_a_share_is_for_tests_by_name(self, tmp_path):
        contents = {f"{'cat' if i % 2 else 'dog'}/{i:03}.png": i for i in range(200)}
        data = of_folder(tmp_path, contents, test_share=0.2)
        train, test = values(data.train_images()), values(data.test_images())
        assert sorted(train + test) == list(range(200))
        assert 25 < len(test) < 55
        assert train == sorted(train, key=lambda i: (i % 2 == 0, i))
        assert data.test_labels().tolist() == [int(i % 2 == 0) for i in test]
        # mixed: the first ones are not all cats
        assert len(set(data.test_labels()[:10].tolist())) == 2

    def test_more_images_move_none(self, tmp_path):
        few = set(values(of_folder(tmp_path, numbered(60)).test_images()))
        many = set(values(of_folder(tmp_path, numbered(120)).test_images()))
        assert few == {i for i in many if i < 60}
        larger = set(values(of_folder(tmp_path, numbered(120), test_share=0.3).test_images()))
        assert many < larger

    def test_the_choice_is_the_same_on_every_machine(self):
        assert hash_share("cat/000.png") == pytest.approx(0.28435583633431855, abs=1e-12)

    def test_too_few_images_are_one_sentence(self, tmp_path):
        with refused("0 images", "test_share=0.01", by=DataError):
            of_folder(tmp_path / "x", numbered(5), test_share=0.01).prepare_data()
        test = folder(tmp_path / "test", {"a.png": 1})
        with refused("1 images", by=DataError):
            of_folder(tmp_path / "x", numbered(5), test_path=test).prepare_data()

    def test_a_tenth_of_a_small_folder_is_for_validation(self, tmp_path):
        test = folder(tmp_path / "test", numbered(7))
        data = of_folder(tmp_path / "x", numbered(30), test_path=test, validation_size="auto")
        assert (len(data.train_images()), len(data.validation_rows()[:])) == (27, 3)
        kept = values(data.train_images()) + values(data.validation_rows()[:])
        assert sorted(kept) == list(range(30))


class TestFacts:
    def test_size_and_channels_of_the_images(self, tmp_path):
        coloured = {f"{i}.png": png((i, 2, 3), (6, 5)) for i in range(30)}
        data = of_folder(tmp_path, coloured)
        assert data.image_shape == (3, 5, 6)
        assert data.train_images()[0, 1:].flatten(1).unique(dim=1).flatten().tolist() == [2, 3]

    def test_nothing_is_read_where_all_is_said(self):
        data = data_of(
            ImageFolder, "nowhere", image_size=[5, 6], channels=3, classes=["a", 1], pad=8
        )
        assert (data.native_shape, data.image_shape) == ((3, 5, 6), (3, 8, 8))
        assert data.class_names == ("a", "1")

    def test_facts_build_the_same_data_where_the_images_are_not(self, tmp_path):
        data = in_both(folder(tmp_path / "x", TWO))
        settings = data.source.facts()
        assert settings == {
            "image_size": [4, 4],
            "channels": 1,
            "classes": ["cat", "dog"],
            "label_size": 0,
            "resize": "refuse",
        }
        json.dumps(settings)
        again = data_of(ImageFolder, "nowhere", **settings)
        assert (again.image_shape, again.num_classes) == (data.image_shape, 2)
        scaled = in_both(tmp_path / "x", image_size=8, resize="pad")
        assert scaled.source.facts() == settings | {"image_size": [8, 8], "resize": "pad"}
        flat = of_folder(tmp_path / "flat", numbered(40))
        assert data_of(ImageFolder, "nowhere", **flat.source.facts()).num_classes == 0

    def test_a_package_that_is_missing_is_named(self, monkeypatch):
        monkeypatch.setitem(sys.modules, "datasets", None)
        with refused("pip install 'diffusion-lab[huggingface]'", by=ValueError):
            data_of(HuggingFace, "some/data").prepare_data()
        settings = {"image_size": 4, "channels": 1, "classes": ["a"]}
        assert data_of(HuggingFace, "some/data", **settings).image_shape == (1, 4, 4)

    def test_padding_is_undone_for_metrics(self, tmp_path):
        data = of_folder(tmp_path, numbered(30), pad=8)
        assert data.image_shape == (1, 8, 8)
        assert torch.equal(data.to_native(pad_to(data.train_images(), 8)), data.reference_images())
        with refused("pad=3", "use 4", by=ValueError):
            of_folder(tmp_path, numbered(30), pad=3)


class TestBadImages:
    def refused_or_skipped(self, tmp_path, capfd, named, kept) -> ImageDataModule:
        """Asserts that bad images are refused, or left out, by name; returns the others."""
        root, test = str(tmp_path / "train"), folder(tmp_path / "test", TWO)
        with refused(*named, "on_bad=skip", by=DataError):
            data_of(ImageFolder, root, test_path=test).setup("fit")
        data = data_of(ImageFolder, root, test_path=test, on_bad="skip")
        assert values(data.train_images()) == kept
        assert_names(capfd.readouterr().err, f"Skipped {named[0]} images", *named[1:])
        return data

    def test_they_are_refused_by_name_or_skipped_with_their_labels(self, tmp_path, capfd):
        bad = {"cat/3.png": b"", "dog/1.png": png(0, (9, 4))}
        folder(tmp_path / "train", TWO | bad | {"dog/4.png": 4})
        named = ["2 of 7", "cat/3.png", "dog/1.png (4x9", "4x4"]
        data = self.refused_or_skipped(tmp_path, capfd, named, [0, 1, 2, 3, 4])
        assert data.train_labels().tolist() == [0, 0, 1, 1, 1]

    def test_a_link_to_no_image_is_one_of_them(self, tmp_path, capfd):
        folder(tmp_path / "train", TWO)
        (tmp_path / "train/cat/8.png").symlink_to("gone.png")
        (tmp_path / "train/dog/9.png").symlink_to("9.png")  # a link to itself
        named = ["2 of 6", "cat/8.png", "gone.png", "dog/9.png"]
        self.refused_or_skipped(tmp_path, capfd, named, [0, 1, 2, 3])

    def test_a_pipe_a_device_and_a_huge_file_are_never_read(self, tmp_path, capfd):
        folder(tmp_path / "train", TWO)
        os.mkfifo(tmp_path / "train/cat/6.png")
        (tmp_path / "train/cat/7.png").symlink_to("/dev/zero")
        (tmp_path / "train/dog/8.png").symlink_to(tmp_path / "test/dog/2.png")  # a regular file
        with (tmp_path / "train/dog/9.png").open("wb") as sparse:
            sparse.truncate(2**32)
        named = [
            "3 of 8",
            "cat/6.png (not a regular",
            "cat/7.png (not a",
            "dog/9.png (4,294,967,296",
        ]
        self.refused_or_skipped(tmp_path, capfd, named, [0, 1, 2, 3, 2])

    @pytest.mark.parametrize("source", [ImageFolder, ImageZip])
    def test_a_path_to_a_pipe_is_never_read(self, tmp_path, source):
        os.mkfifo(tmp_path / "x.zip")
        with refused(tmp_path / "x.zip", by=DataError):
            data_of(source, str(tmp_path / "x.zip")).prepare_data()

    def test_a_link_to_no_folder_is_refused(self, tmp_path):
        root = folder(tmp_path / "train", TWO)
        (tmp_path / "train/eel").symlink_to("/gone/eel")
        with refused("train/eel", "/gone/eel", by=DataError):
            data_of(ImageFolder, root).prepare_data()

    def test_the_first_few_of_many_are_named(self, tmp_path):
        contents = TWO | {f"cat/x{i}.png": b"" for i in range(12)}
        with refused("12 of 16", "x2.png", "7 more", by=DataError):
            in_both(folder(tmp_path, contents)).setup("fit")

    def test_if_all_are_bad_nothing_can_be_skipped(self, tmp_path):
        contents = {f"{i}.png": b"" for i in range(5)}
        test = folder(tmp_path / "test", numbered(5))
        settings = {"test_path": test, "image_size": 4, "channels": 1, "on_bad": "skip"}
        with refused("0 images", tmp_path / "x", by=DataError):
            of_folder(tmp_path / "x", contents, **settings).setup("fit")
        with refused(tmp_path / "x", ".png (", by=DataError):
            _ = of_folder(tmp_path / "x", contents, test_path=test).image_shape

    def test_another_size_is_brought_to_the_one_that_is_asked_for(self, tmp_path):
        contents = {"0.png": png(7, (9, 4)), "1.png": png(8, (2, 2)), "2.png": 9}
        data = in_both(folder(tmp_path, contents), image_size=[5, 3])
        assert data.train_images().shape == (3, 1, 5, 3)
        assert values(data.train_images()) == [7, 8, 9]

    def test_too_many_images_for_the_memory_are_refused_before_they_are_read(
        self, tmp_path, monkeypatch
    ):
        monkeypatch.setattr("diffusion_lab.data.source.decoding.free_memory", lambda: 1000)
        with refused("100 images", "1 x 4 x 4", "image_size=2 ", by=DataError):
            of_folder(tmp_path, numbered(100)).source.load()

    def test_the_memory_is_asked_once(self, tmp_path, monkeypatch):
        data = of_folder(tmp_path, numbered(100))
        data.setup("fit")
        monkeypatch.setattr("diffusion_lab.data.source.decoding.free_memory", lambda: 0)
        data.prepare_data()  # Lightning calls it again when the images fill the memory
        data.setup("validate")


class TestFolderRefusals:
    @pytest.mark.parametrize(
        ("contents", "named"),
        [
            ({}, "set data.source.path"),
            ({".a.png": 0}, "set data.source.path"),
            ({"a.txt": b"", "b.csv": b"", "c": b""}, ".txt"),
            (TWO | {"z.png": 1}, "(z.png)"),
            (TWO | {"cat/x/0.png": 1}, "(cat/x/0.png)"),
        ],
    )
    def test_what_is_no_such_folder(self, tmp_path, contents, named):
        tmp_path.joinpath("x").mkdir()
        with refused(tmp_path / "x", named, by=DataError):
            of_folder(tmp_path / "x", contents).prepare_data()

    def test_what_is_not_there_or_is_a_file(self, tmp_path):
        with refused(tmp_path / "nowhere", "path of a folder", by=DataError):
            data_of(ImageFolder, str(tmp_path / "nowhere")).prepare_data()
        with refused("a.zip", "image_zip", by=DataError):
            data_of(ImageFolder, archive(tmp_path / "a.zip", TWO)).prepare_data()
        with refused(tmp_path / "x", "image_folder", by=DataError):
            data_of(ImageZip, folder(tmp_path / "x", TWO)).prepare_data()

    @pytest.mark.parametrize(
        ("test", "folders"),
        [
            ({"cat/0.png": 0, "cat/1.png": 1}, "no folder dog"),
            (TWO | {"eel/0.png": 0}, "additional folder eel"),
            (numbered(4), "no folder cat, dog"),
        ],
    )
    def test_other_classes_in_the_test_folder(self, tmp_path, test, folders):
        data = of_folder(tmp_path / "train", TWO, test_path=folder(tmp_path / "test", test))
        with refused(tmp_path / "test", folders, by=DataError):
            data.prepare_data()

    def test_other_classes_than_configured(self, tmp_path):
        with refused("no folder eel", "additional folder dog", by=DataError):
            of_folder(tmp_path, TWO, classes=["cat", "eel"]).prepare_data()


class TestZip:
    def module(self, tmp_path, labels=..., contents=ZIPPED, **settings) -> ImageDataModule:
        test = archive(tmp_path / "test.zip", contents, labels)
        settings = {"test_path": test} | settings
        return data_of(ImageZip, archive(tmp_path / "train.zip", contents, labels), **settings)

    def test_dataset_json_gives_labels_and_order(self, tmp_path):
        data = self.module(tmp_path, LABELS)
        assert values(data.train_images()) == [1, 0, 3, 2]
        assert data.train_labels().tolist() == [1, 0, 0, 1]
        tests = dict(zip(values(data.test_images()), data.test_labels().tolist(), strict=True))
        assert tests == {1: 1, 0: 0, 3: 0, 2: 1}
        assert data.class_names == ("0", "1")
        assert self.module(tmp_path, LABELS, classes=["x", "y", "z"]).class_names[2] == "z"

    def test_without_labels_in_it_there_are_none(self, tmp_path):
        data = self.module(tmp_path, None)
        assert data.num_classes == 0
        assert values(data.train_images()) == [0, 2, 1, 3]
        assert self.module(tmp_path, LABELS, classes=[]).train_labels().tolist() == [0] * 4
        bare = archive(tmp_path / "bare.zip", ZIPPED | {"dataset.json": b"{}"})
        assert in_both(bare, ImageZip).num_classes == 0

    def test_without_it_a_class_is_a_folder(self, tmp_path):
        data = self.module(tmp_path)
        assert data.class_names == ("a", "b")
        assert data.train_labels().tolist() == [0, 0, 1, 1]
        assert self.module(tmp_path, contents=numbered(4)).num_classes == 0

    def test_hidden_members_do_not_count(self, tmp_path):
        hidden = {"__MACOSX/a/._0.png": b"fork", ".DS_Store": b""}
        data = self.module(tmp_path, contents=hidden | ZIPPED)
        assert values(data.train_images()) == [0, 2, 1, 3]

    @pytest.mark.filterwarnings("ignore:Duplicate name")
    def test_a_member_that_is_there_twice_counts_once_as_the_later_one(self, tmp_path):
        path = archive(tmp_path / "x.zip", TWO)
        with zipfile.ZipFile(path, "a") as file:
            file.writestr("cat/1.png", png(7))
        assert values(in_both(path, ImageZip).train_images()) == [0, 7, 2, 3]

    def test_threads_read_one_zip(self, tmp_path, monkeypatch):
        monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
        contents = numbered(250, "{:03}.png")
        data = self.module(tmp_path, contents=contents, test_path=None)
        train = values(data.train_images())
        assert train == sorted(train)
        assert sorted(train + values(data.test_images())) == list(range(250))

    def test_a_damaged_member_is_a_bad_image(self, tmp_path):
        path = Path(archive(tmp_path / "x.zip", {"a.png": 1, "b.png": 2, "c.png": 3}))
        content = bytearray(path.read_bytes())
        content[content.index(b"IDAT") + 6] ^= 255
        path.write_bytes(content)
        with refused("1 of 3", "a.png", "CRC-32", by=DataError):
            in_both(path, ImageZip).setup("fit")

    def test_a_member_that_is_huge_is_never_unpacked(self, tmp_path, monkeypatch):
        path = archive(tmp_path / "x.zip", {"a.png": 1, "b.png": 2, "c.png": bytes(1000)})
        monkeypatch.setattr("diffusion_lab.data.source.decoding.LARGEST", 999)
        with refused("1 of 3", "c.png (1,000 bytes", "999", by=DataError):
            in_both(path, ImageZip).setup("fit")
        monkeypatch.setattr("diffusion_lab.data.source.image_folder.LARGEST_LABELS", 9)
        with refused("dataset.json", "bytes", by=DataError):
            self.module(tmp_path, LABELS).prepare_data()

    @pytest.mark.parametrize(
        ("labels", "named"),
        [
            ([*LABELS, ["a/9.png", 0]], "missing images, a/9.png"),
            (LABELS[1:], "no label for b/1.png"),
            ([*LABELS[1:], ["b/1.png", -1]], "b/1.png with -1"),
            ([*LABELS[1:], ["b/1.png", True]], "b/1.png with True"),
            ([*LABELS[1:], ["b/1.png", [0, 1]]], "a/0.png with 0; a label must be 2"),
            ([*LABELS[1:], ["b/1.png", 3]], "no image of 2"),
            ([*LABELS, ["b/1.png", 1]], "b/1.png more than once"),
            ([["a/0.png"]], '["a/0.png"]'),
            ({"a/0.png": 1}, '{"labels"'),
            ([], '{"labels"'),
        ],
    )
    def test_wrong_labels_are_one_sentence(self, tmp_path, labels, named):
        with refused("dataset.json", named, by=DataError):
            self.module(tmp_path, labels).prepare_data()

    def test_labels_without_a_class_are_refused(self, tmp_path):
        with refused("label 1", "1 classes", by=DataError):
            self.module(tmp_path, LABELS, classes=["x"]).prepare_data()
        data = self.module(tmp_path, LABELS)
        data.source.test_path = archive(tmp_path / "none.zip", ZIPPED, None)
        with refused("none.zip", "0, 1", by=DataError):
            data.prepare_data()

    @pytest.mark.parametrize("text", [b"{", b"[1]", b"3", b"\xed\xa0\x80"])
    def test_a_dataset_json_that_is_none(self, tmp_path, text):
        path = archive(tmp_path / "x.zip", {"a.png": 1, "dataset.json": text})
        with refused("dataset.json", "x.zip", by=DataError):
            data_of(ImageZip, path).prepare_data()

    def test_what_is_no_zip_or_has_no_images(self, tmp_path):
        path = Path(archive(tmp_path / "x.zip", TWO))
        path.write_bytes(path.read_bytes()[:-50])
        with refused("x.zip", by=DataError):
            data_of(ImageZip, str(path)).prepare_data()
        for contents, named in (({}, "set data.source.path"), ({"a.txt": b""}, ".txt")):
            for labels in (..., None):
                path = archive(tmp_path / "y.zip", contents, labels)
                with refused("y.zip", named, by=DataError):
                    data_of(ImageZip, path).prepare_data()

    @pytest.mark.parametrize(
        "name", ["/etc/a.png", "../a.png", "a/../../b.png", "a\\..\\b.png", "a\\b.png"]
    )
    def test_a_member_outside_of_the_zip_is_refused(self, tmp_path, name):
        path = archive(tmp_path / "x.zip", ZIPPED | {name: 1})
        with refused("x.zip", name, by=DataError):
            data_of(ImageZip, path).prepare_data()


def test_a_folder_and_its_zip_are_the_same_data(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, 40).tolist()
    contents = {f"{'ab'[i % 2]}/{i:02}.png": value for i, value in enumerate(noise)}
    one = of_folder(tmp_path / "x", contents)
    other = data_of(ImageZip, archive(tmp_path / "x.zip", contents))
    assert one.fingerprint == other.fingerprint


NAMES = numbered(40, "{:02}.png")


def written(root, kind, labels=..., table=None):
    """A folder or zip of images with a dataset.json or the text of a CSV beside them."""
    extra = {} if table is None else {"labels.csv": table.encode()}
    root.mkdir(exist_ok=True)
    if kind is ImageZip:
        return archive(root / "a.zip", NAMES | extra, labels)
    if labels is not ...:
        extra["dataset.json"] = json.dumps({"labels": labels}).encode()
    return folder(root / "a", NAMES | extra)


def read(kind, path, **settings):
    data = data_of(kind, path, **{"test_share": 0.3} | settings)
    data.prepare_data()
    data.check_splits()
    greys = torch.cat([data.train_images(), data.test_images()])[:, 0, 0, 0]
    labels = torch.cat([data.train_labels(), data.test_labels()])
    return data, dict(zip(greys.tolist(), labels, strict=True))


def labels_by(function):
    return [[name, function(value)] for name, value in NAMES.items()]


QUARTERS = labels_by(lambda value: value / 4)


def csv_of(function, titles="name,x"):
    return "\n".join([titles, *(f"{name},{label}" for name, label in labels_by(function))])


@pytest.mark.parametrize("kind", [ImageFolder, ImageZip])
class TestBoth:
    def test_numbers_and_lists_are_vectors(self, tmp_path, kind):
        for function, size in ((lambda v: v / 4, 1), (lambda v: [v / 4, -v, 1], 3)):
            path = written(tmp_path / str(size), kind, labels_by(function))
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
        path = written(tmp_path, kind, labels_by(lambda value: value % 3))
        data, labels = read(kind, path)
        assert (data.labels.shape, data.class_names) == ((), ("0", "1", "2"))
        assert all(int(label) == value % 3 for value, label in labels.items())
        data, labels = read(kind, path, label_size=1)
        assert (data.labels.shape, data.class_names) == ((1,), ())
        assert all(label.tolist() == [value % 3] for value, label in labels.items())

    def test_what_a_run_saves_opens_the_same_data(self, tmp_path, kind):
        path = written(tmp_path, kind, QUARTERS)
        first, _ = read(kind, path)
        facts = first.source.facts()
        assert facts["label_size"] == 1
        again = data_of(kind, path, test_share=0.3, **facts)
        assert again.fingerprint == first.fingerprint
        away = data_of(kind, str(tmp_path / "nowhere"), **facts)
        assert (away.labels.shape, away.num_classes) == ((1,), 0)

    def test_fractions_and_validation_take_them_as_one_class(self, tmp_path, kind):
        path = written(tmp_path, kind, QUARTERS)
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
        path = written(tmp_path / "x", kind, QUARTERS)
        pairs = written(tmp_path / "y", kind, labels_by(lambda value: [value, 0.5]))
        with refused("dataset.json", "a number of", by=DataError):
            read(kind, path, test_path=pairs)
        whole = written(tmp_path / "z", kind, labels_by(lambda value: value))
        assert read(kind, path, test_path=whole)[0].test_labels().dtype == torch.float32
