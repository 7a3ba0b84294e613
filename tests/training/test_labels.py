"""Runs on labels that are numbers or captions: heard by each network, guided by, and saved."""

import csv
import math
import shutil

import numpy as np
import pytest
import torch
from helpers.compositions import assembled
from helpers.picture_files import archive, folder, numbered
from helpers.tiny_runs import TINY

from diffusion_lab import runs
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.backbone.conditioning import CaptionLabel
from diffusion_lab.common.labels import LONGEST, Captions, Numbers, is_caption
from diffusion_lab.data.source.known_sets import FashionMNIST
from diffusion_lab.diffusion.estimate import Given

NETWORK = [*(a for a in TINY if not a.startswith("data.")), "callbacks.evaluation=null"]
QUICK = ["train", *NETWORK, "logger=none", "conditioning=numeric_label", "run_dir=run"]
SHADES = [
    "train",
    *(a for a in TINY if not a.startswith(("backbone", "data.source"))),
    "data.source._target_=helpers.tiny_data.TinyShades",
    *("logger=none", "conditioning=numeric_label", "run_dir=run"),
]
UNWATCHED = [f"callbacks.{each}=null" for each in ("evaluation", "sample_grid", "denoising")]
GREYS = numbered(120, "{:03}.png")


def write_csv(path, *rows) -> None:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def sampled(lab, *arguments) -> np.ndarray:
    return lab.drawn("num_samples=4", *arguments)["labels"]


@pytest.mark.slow
def test_a_run_on_a_csv_is_sampled_and_resumed_from_its_folder(lab, refusal, tmp_path):
    folder(tmp_path / "photos", GREYS)
    greys = ((name, value / 10) for name, value in GREYS.items())
    write_csv(tmp_path / "photos/labels.csv", ("file", "grey"), *greys)
    data = ["data=image_folder", "data.source.path=photos", "data.source.label_file=labels.csv"]
    lab.done(*QUICK, *data, "guidance=classifier_free")
    saved = runs.load_config(tmp_path / "run").data.source
    assert (saved.label_size, saved.classes) == (1, [])
    shutil.move(tmp_path / "photos", tmp_path / "gone")
    assert sampled(lab, "run=run", "labels=0.3").tolist() == [pytest.approx([0.3])] * 4
    given = sampled(lab, "run=run", "labels=[1,2.5,7]")
    assert given.flatten().tolist() == [1, 2.5, 7, 1]
    drawn = sampled(lab, "run=run")
    assert len(set(drawn.flatten().tolist())) == 4
    assert all(round(10 * v) in GREYS.values() for v in drawn.flatten())
    for wrong in ("[[1,2]]", "[]", "x", ".nan", "1e39", "-1e39", f"1{'0' * 400}"):
        assert f"labels={wrong}"[:7] in refusal("sample", "run=run", f"labels={wrong}")
    kept = runs.load(tmp_path / "run")[1].denoiser.conditioning.labels
    assert kept.std > 1
    shutil.move(tmp_path / "gone", tmp_path / "photos")
    lab.done("train", "resume=run", "trainer.max_steps=6")
    again = runs.load(tmp_path / "run")[1].denoiser.conditioning.labels
    assert torch.equal(again.examples, kept.examples)


@pytest.mark.slow
def test_vectors_of_a_dataset_json(lab, refusal, tmp_path):
    pairs = [[name, [value / 10, -value]] for name, value in GREYS.items()]
    archive(tmp_path / "a.zip", GREYS, pairs)
    lab.done(*QUICK, "data=image_zip", "data.source.path=a.zip")
    assert sampled(lab, "run=run", "labels=[1,-10]").tolist() == [[1, -10]] * 4
    two = sampled(lab, "run=run", "labels=[[1,-10],[2,-20]]")
    assert two.tolist() == [[1, -10], [2, -20]] * 2
    assert "labels=1" in refusal("sample", "run=run", "labels=1")
    drawn = sampled(lab, "run=run")
    assert drawn[:, 1].tolist() == pytest.approx((-10 * drawn[:, 0]).tolist())


WAYS = {
    "dit": ["backbone=dit", "backbone.width=32", "backbone.depth=1", "backbone.heads=2"],
    "dit in context": ["backbone/block=in_context"],
    "dit cross": ["backbone/block=cross_attention"],
    "mlp": ["backbone=mlp", "backbone.width=32"],
    "unet": ["backbone=unet", "backbone.channels=32", "backbone.blocks=1"],
    "mamba": ["backbone=mamba", "backbone.width=32", "backbone.depth=1", "backbone.patch=2"],
}


def numbers() -> Numbers:
    labels = Numbers(1)
    labels.learn(torch.linspace(0, 25, 50)[:, None])
    return labels


@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize(
    ("conditioning", "kind", "labels"),
    [
        ("numeric_label", numbers(), torch.tensor([[5.0], [20.0], [math.nan]])),
        ("caption", Captions(), Captions().tensor(["a shoe", "a coat", ""])),
    ],
)
def test_every_network_hears_numbers_and_captions(name, conditioning, kind, labels):
    torch.manual_seed(0)
    model = build_model(assembled(*WAYS[name], f"conditioning={conditioning}"), (1, 8, 8), kind)
    for weight in model.denoiser.parameters():  # outputs of new networks are 0
        torch.nn.init.normal_(weight, std=0.1)
    x, level = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1), model.schedule(torch.tensor(0.7))
    one, other, null = model.denoiser(x, level, Given(labels)).x0
    assert not torch.allclose(one, other)
    assert not torch.allclose(one, null)
    torch.testing.assert_close(null, model.denoiser(x[:1], level).x0[0])


@pytest.mark.long
def test_weights_of_another_run_bring_the_scale_that_they_learned_numbers_in(lab, tmp_path):
    network = ["backbone=mlp", "backbone.width=32", "trainer.max_steps=1", *UNWATCHED]
    lab.done(*SHADES, *network)
    # half as many validation images leave other training images, of another mean
    others = ["init_from=run", "data.validation_size=100"]
    lab.done(*SHADES, *network, *others, "run_dir=new")
    lab.done(*SHADES, *network, *others, "run_dir=wide", "backbone.width=48")
    first, second, third = (
        runs.load(tmp_path / name)[1].denoiser.conditioning.labels
        for name in ("run", "new", "wide")
    )
    assert torch.equal(first.mean, second.mean)
    assert torch.equal(first.std, second.std)
    assert not torch.equal(first.examples, second.examples)
    # the layers that hear the numbers are new here, and so is their scale
    assert not torch.equal(first.mean, third.mean)
    assert torch.equal(second.examples, third.examples)


@pytest.mark.slow
def test_samples_follow_the_number_that_is_asked_for(lab, tmp_path):
    settings = [a for a in SHADES if not a.startswith("+debug")]
    network = ["backbone=mlp", "backbone.width=128", "backbone.depth=2", "batch_size=64"]
    steps = ["trainer.max_steps=1500", "optimizer.lr=1e-3"]
    lab.done(*settings, *network, *UNWATCHED, *steps)
    for scale in (1, 1.5):
        guided = "guidance=classifier_free" if scale > 1 else "guidance=none"
        command = ["run=run", "num_samples=150", "labels=[6,12,20]", guided]
        drawn = lab.drawn(*command, f"guidance.scale={scale}")["images"]
        greys = drawn.mean((1, 2, 3)).reshape(-1, 3)
        assert greys.mean(0).tolist() == pytest.approx([60, 120, 200], abs=12)
        assert (greys.std(0) < 25).all()


NAMES = FashionMNIST.class_names
CAPTIONED = [
    "train",
    *NETWORK,
    *("logger=none", "conditioning=caption", "run_dir=run"),
    *("data=image_folder", "data.source.path=photos", "data.source.label_file=captions.csv"),
]


@pytest.fixture
def photos(tmp_path):
    """A folder of grey images, whose captions are names of clothes; the darkest are T-shirts."""
    folder(tmp_path / "photos", GREYS)
    rows = [(name, NAMES[value * 10 // 256]) for name, value in GREYS.items()]
    write_csv(tmp_path / "photos/captions.csv", ("file", "caption"), *rows)
    return tmp_path / "photos"


def captions_of_samples(lab, *arguments) -> list[str]:
    labels = lab.drawn("num_samples=4", *arguments)["labels"]
    return list(map(Captions().caption, torch.from_numpy(labels)))


@pytest.mark.long
def test_a_run_is_sampled_by_sentences_where_its_images_are_gone(lab, refusal, photos, tmp_path):
    pictures = ["callbacks.sample_grid=null", "callbacks.denoising=null"]
    lab.done(*CAPTIONED, *pictures, "guidance=classifier_free")
    assert runs.load_config(tmp_path / "run").data.source.label_size == "text"
    shutil.move(photos, tmp_path / "gone")
    given = captions_of_samples(lab, "run=run", 'labels=["Ankle boot, new","a"]')
    assert given == ["Ankle boot, new", "a"] * 2
    assert captions_of_samples(lab, "run=run", "labels='a white shoe'") == ["a white shoe"] * 4
    assert set(captions_of_samples(lab, "run=run")) <= set(NAMES)
    for wrong in ("[]", "3", f"{'a' * (LONGEST + 1)}", "''"):
        assert "labels=" in refusal("sample", "run=run", f"labels={wrong}")


def test_half_of_an_emoji_is_no_caption():
    assert is_caption("\N{GRINNING FACE}")
    assert not is_caption("\ud83d")


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
    write_csv(tmp_path / "photos/captions.csv", ("file", "caption"), *rows)
    refused = refusal(*CAPTIONED)
    assert "captions.csv" in refused
    assert said in refused


def test_conditions_on_captions_need_captions(refusal, photos):
    assert "conditioning" in refusal(*CAPTIONED[:-1], "data.source.classes=[]")
    assert "caption" in refusal(*CAPTIONED, "conditioning=class_label")
