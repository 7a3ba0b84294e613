"""Runs on captions: read from a CSV, heard by each way of conditioning, dropped, and sampled of."""

import csv
import shutil

import pytest
import torch
import yaml
from helpers.picture_files import folder, numbered
from helpers.tiny_runs import TINY

from diffusion_lab.backbone.conditioning import CaptionLabel
from diffusion_lab.common.labels import LONGEST, Captions
from diffusion_lab.data.source.known_sets import FashionMNIST

NAMES = FashionMNIST.class_names
GREYS = numbered(120, "{:03}.png")
QUICK = [
    "train",
    *(a for a in TINY if not a.startswith("data.")),
    *("callbacks.evaluation=null", "logger=none", "conditioning=caption", "run_dir=run"),
    *("data=image_folder", "data.source.path=photos", "data.source.label_file=captions.csv"),
]


@pytest.fixture
def photos(tmp_path):
    """A folder of grey images, whose captions are names of clothes; the darkest are T-shirts."""
    folder(tmp_path / "photos", GREYS)
    rows = [(name, NAMES[value * 10 // 256]) for name, value in GREYS.items()]
    with (tmp_path / "photos/captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *rows])
    return tmp_path / "photos"


def sampled(lab, *arguments) -> list[str]:
    labels = lab.drawn("num_samples=4", *arguments)["labels"]
    return list(map(Captions().caption, torch.from_numpy(labels)))


def test_a_run_is_sampled_by_sentences_where_its_images_are_gone(lab, refusal, photos, tmp_path):
    lab.done(*QUICK, "guidance=classifier_free")
    saved = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    assert saved["data"]["source"]["label_size"] == "text"
    shutil.move(photos, tmp_path / "gone")
    assert sampled(lab, "run=run", 'labels=["Ankle boot, new","a"]') == ["Ankle boot, new", "a"] * 2
    assert sampled(lab, "run=run", "labels='a white shoe'") == ["a white shoe"] * 4
    assert set(sampled(lab, "run=run")) <= set(NAMES)
    for wrong in ("[]", "3", f"{'a' * (LONGEST + 1)}", "''"):
        assert "labels=" in refusal("sample", "run=run", f"labels={wrong}")


def test_a_caption_is_its_bytes_and_the_null_label_has_none():
    kind, texts = Captions(), ["a white shoe", "ein grüner Mantel", ""]
    labels = kind.tensor(texts)
    assert (labels.shape, labels.dtype) == ((3, LONGEST), torch.uint8)
    assert list(map(kind.caption, labels)) == texts
    assert kind.is_null(labels).tolist() == [False, False, True]
    dropped = kind.drop(labels, torch.tensor([True, False, False]))
    assert list(map(kind.caption, dropped)) == ["", *texts[1:]]
    kind.learn(labels[:2])
    assert set(map(kind.caption, kind.in_turn(range(2000)))) == set(texts[:2])
    assert sorted(map(kind.caption, kind.grid(10))) == sorted(texts[:2])


def test_the_order_of_letters_and_of_words_matters():
    torch.manual_seed(0)
    encoder = CaptionLabel(Captions(), 32, depth=1)
    texts = ["a red coat", "a coat red", "a redcoat", "a red cota"]
    vectors = encoder(Captions().tensor(texts), 4).vector
    assert torch.pdist(vectors).min() > 1e-4
    assert encoder(None, 2).tokens.shape == (2, LONGEST // 8, 32)


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([("000.png", "x"), ("001.png", "")], "001.png"),
        ([("000.png", "a" * (LONGEST + 1)), ("001.png", "x")], "000.png"),
        ([("000.png", "x"), ("001.png", "y", "z")], "001.png"),
    ],
)
def test_captions_that_cannot_be_are_named(refusal, tmp_path, rows, said):
    folder(tmp_path / "photos", numbered(2, "{:03}.png"))
    with (tmp_path / "photos/captions.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("file", "caption"), *rows])
    refused = refusal(*QUICK)
    assert "captions.csv" in refused
    assert said in refused


def test_conditions_on_captions_need_captions(refusal, photos):
    assert "conditioning" in refusal(*QUICK[:-1], "data.source.classes=[]")
    assert "caption" in refusal(*QUICK, "conditioning=class_label")
