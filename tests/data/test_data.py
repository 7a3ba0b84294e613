"""The training stream as a pure function of seed and position, the data module, and Lightning."""

import inspect
import itertools
import math
import os
from pathlib import Path

import lightning
import pytest
import torch
from helpers.compositions import composed
from helpers.data_modules import data_of
from helpers.refusals import assert_names, out_of_range, refused
from helpers.tiny_data import TinyShades
from helpers.tiny_runs import TINY
from hydra.utils import instantiate
from omegaconf import OmegaConf
from torch import nn

from diffusion_lab.data import DataError, DataSource, ImageDataModule, Split
from diffusion_lab.data.loader import PassLoader, TensorLoader
from diffusion_lab.data.source import CIFAR10, FashionMNIST
from diffusion_lab.data.source import acquire as sources
from diffusion_lab.data.source.known_sets import FashionMNISTShades, shaded

COUNT = 50


def numbered(count: int, size: int = 4) -> torch.Tensor:
    """Images that encode their index in the top left pixel, and whether they are mirrored."""
    images = torch.zeros(count, 1, size, size, dtype=torch.uint8)
    images[:, 0, 0, 0] = torch.arange(1, count + 1)
    return images


def indices(images: torch.Tensor) -> list[int]:
    return (images.amax(dim=(1, 2, 3)).long() - 1).tolist()


def flips(images: torch.Tensor) -> list[bool]:
    return (images[:, 0, 0, -1] > 0).tolist()


def loader(batch_size: int = 8, **changes) -> TensorLoader:
    settings = {"seed": 3} | changes
    return TensorLoader(numbered(COUNT), torch.arange(COUNT), batch_size, **settings)


def stream(loader: TensorLoader, batches: int) -> list[int]:
    return [i for images, _ in itertools.islice(loader, batches) for i in indices(images)]


def stream_of_flips(loader: TensorLoader, batches: int) -> list[bool]:
    return [f for images, _ in itertools.islice(loader, batches) for f in flips(images)]


def stream_of_ranks(told_by, batches: int, world: int, batch_size: int = 8, **changes) -> list:
    ranks = [iter(loader(batch_size, rank=rank, world=world, **changes)) for rank in range(world)]
    return [each for _ in range(batches) for rank in ranks for each in told_by(next(rank)[0])]


class TestTensorLoader:
    def test_each_epoch_holds_every_image_once_in_a_new_order(self):
        seen = stream(loader(batch_size=10), 15)
        epochs = [seen[i : i + COUNT] for i in range(0, 150, COUNT)]
        assert all(sorted(epoch) == list(range(COUNT)) for epoch in epochs)
        assert epochs[0] != epochs[1] != epochs[2] != list(range(COUNT))

    def test_labels_go_with_images(self):
        for images, labels in itertools.islice(loader(), 20):
            assert images.dtype == torch.uint8
            assert labels.dtype == torch.int64
            assert indices(images) == labels.tolist()

    @pytest.mark.parametrize("batch_size", [1, 7, 16, 64, 120])
    def test_the_stream_is_the_same_for_any_batch_size(self, batch_size):
        batches = -(-480 // batch_size)
        assert stream(loader(batch_size), batches)[:480] == stream(loader(), 60)

    @pytest.mark.parametrize(("world", "accumulate"), [(1, 4), (2, 2), (4, 1)])
    def test_a_global_batch_is_the_same_on_any_layout(self, world, accumulate):
        expected = stream(loader(batch_size=32), 12)
        assert stream_of_ranks(indices, 12 * accumulate, world) == expected

    def test_a_resumed_stream_goes_on_where_it_stopped(self):
        whole = stream(loader(), 40)
        assert stream(loader(samples_seen=lambda: 13 * 8), 27) == whole[13 * 8 :]
        resumed = stream_of_ranks(indices, 27, world=2, batch_size=4, samples_seen=lambda: 13 * 8)
        assert resumed == whole[13 * 8 :]

    def test_samples_seen_is_asked_late_and_anew(self):
        seen = 0
        endless = loader(samples_seen=lambda: seen)
        iterator = iter(endless)
        seen = 80
        assert indices(next(iterator)[0]) == stream(loader(), 11)[80:]
        seen = 16
        assert stream(endless, 1) == stream(loader(), 3)[16:]

    def test_seeds_give_different_streams(self):
        assert stream(loader(seed=4), 6) != stream(loader(seed=3), 6)
        assert stream(loader(seed=3), 6) == stream(loader(seed=3), 6)

    def test_the_order_of_a_seed_never_changes(self):
        # stored values: another order would silently change every resumed run
        assert stream(loader(), 1) == [11, 44, 30, 18, 1, 26, 24, 13]
        assert flips(next(iter(loader(flip=True)))[0]) == [False] + [True] * 4 + [False, True, True]

    def test_mirroring_depends_on_seed_and_position_alone(self):
        flipped = stream_of_flips(loader(flip=True), 100)
        assert 0.4 < sum(flipped) / len(flipped) < 0.6
        assert stream_of_flips(loader(20, flip=True), 40) == flipped
        assert stream_of_ranks(flips, 100, world=2, batch_size=4, flip=True) == flipped
        assert stream_of_flips(loader(flip=True, samples_seen=lambda: 400), 50) == flipped[400:]
        assert stream_of_flips(loader(flip=True, seed=4), 100) != flipped
        # no image is mirrored in every epoch or in none
        assert flipped[:COUNT] != flipped[COUNT : 2 * COUNT]

    def test_mirroring_is_left_to_right_and_leaves_the_order_alone(self):
        assert stream(loader(flip=True), 20) == stream(loader(), 20)
        images = torch.randint(256, (COUNT, 3, 4, 5), dtype=torch.uint8)
        flipped = TensorLoader(images, torch.arange(COUNT), 25, seed=0, flip=True)
        for batch, labels in itertools.islice(flipped, 2):
            for image, label in zip(batch, labels, strict=True):
                original = images[label]
                assert torch.equal(image, original) or torch.equal(image, original.flip(2))

    def test_the_images_stay_as_they_are(self):
        images = numbered(COUNT)
        mirrored = TensorLoader(images, torch.arange(COUNT), 25, seed=0, flip=True)
        for batch, _ in itertools.islice(mirrored, 4):
            batch.zero_()
        assert torch.equal(images, numbered(COUNT))


class TestPassLoader:
    @pytest.mark.parametrize("count", [7, 8, 50, 64])
    @pytest.mark.parametrize("world", [1, 2, 3, 7])
    @pytest.mark.parametrize("batch_size", [1, 4, 16, 100])
    def test_ranks_share_all_images_in_equally_many_batches(self, count, world, batch_size):
        images, labels = numbered(count), torch.arange(count)
        loaders = [PassLoader(images, labels, batch_size, rank, world) for rank in range(world)]
        batches = [list(loader) for loader in loaders]
        assert len({len(rank) for rank in batches}) == 1
        assert [len(rank) for rank in batches] == [len(loader) for loader in loaders]
        ids = [batch[2] for rank in batches for batch in rank]
        assert all(0 < len(batch) <= batch_size + 1 for batch in ids)
        assert torch.cat(ids).tolist() == list(range(count))
        for rank in batches:
            for images_of, labels_of, ids_of in rank:
                assert indices(images_of) == labels_of.tolist() == ids_of.tolist()

    def test_too_few_images_are_one_sentence(self):
        with refused("2 validation or test images", "3"):
            PassLoader(numbered(2), torch.arange(2), 8, rank=0, world=3)


class Numbered(DataSource):
    """50 training and 20 test images that encode their index."""

    native_shape = (1, 4, 4)
    class_names = ("even", "odd")

    def load(self) -> tuple[Split, Split]:
        images, labels = numbered(COUNT + 20), torch.arange(COUNT + 20)
        return Split(images[:COUNT], labels[:COUNT]), Split(images[COUNT:], labels[COUNT:])


class TestFacts:
    def test_shapes_and_classes_are_known_without_data(self, tmp_path):
        root = str(tmp_path / "nothing")
        fashion = data_of(FashionMNIST, root=root)
        assert (fashion.image_shape, fashion.num_classes) == ((1, 28, 28), 10)
        assert fashion.class_names[0] == "T-shirt/top"
        assert fashion.class_names[9] == "Ankle boot"
        padded = data_of(FashionMNIST, root=root, pad=32)
        assert (padded.image_shape, padded.native_shape) == ((1, 32, 32), (1, 28, 28))
        cifar = data_of(CIFAR10, root=root)
        assert (cifar.image_shape, cifar.num_classes) == ((3, 32, 32), 10)
        assert list(tmp_path.iterdir()) == []

    def test_bad_settings_are_one_sentence(self):
        with refused("pad=16", "use 28", by=ValueError):
            data_of(FashionMNIST, pad=16)
        with refused("per_class=5", "data.fraction", by=ValueError):
            data_of(TinyShades, per_class=5).setup("fit")

    def test_labels_that_are_no_places_in_class_names_are_refused(self):
        data = data_of(Numbered)
        with refused("Numbered", "0 to 49", "2 class_names", by=ValueError):
            data.source.check_labels(data.reference_labels())

    def test_a_source_of_wrong_images_is_refused_before_training(self, refusal, tmp_path):
        sentence = refusal("train", *TINY, "data.source._target_=helpers.tiny_data.TinyFloats")
        assert_names(sentence, "TinyFloats", "float32", "uint8")
        assert not (tmp_path / "run").exists()

    @pytest.mark.parametrize(
        ("argument", "value"),
        [
            *(("flip", value) for value in ("yes", 1, None)),
            *(("on_device", value) for value in ("gpu", 1)),
            *(("validation_size", value) for value in (-1, True, 1e3, "1000")),
            *(("validate_on", value) for value in (0, True, 1e3, "auto", None)),
            *(("pad", value) for value in (0, -32, "32", True, 32.0, math.nan)),
        ],
    )
    def test_settings_of_a_wrong_kind_are_named(self, argument, value):
        with out_of_range(argument):
            data_of(FashionMNIST, root="nowhere", **{argument: value})

    def test_fingerprint_tells_any_change(self):
        def changed(split: int, part: str, by: int) -> tuple[str, str]:
            source = Numbered()
            splits = source.load()
            getattr(splits[split], part).view(-1)[7] += by
            source.load = lambda: splits
            module = ImageDataModule(source)
            return module.fingerprint, module.images_fingerprint

        changes = [(0, "images", 0), (0, "images", 1), (1, "images", 1), (0, "labels", 1)]
        prints = {changed(*change) for change in changes}
        assert len({whole for whole, _ in prints}) == 4
        assert len({images for _, images in prints}) == 3  # images_fingerprint ignores the labels
        assert (data_of(Numbered).fingerprint, data_of(Numbered).images_fingerprint) in prints
        assert data_of(Numbered, pad=8, flip=True).fingerprint == data_of(Numbered).fingerprint

    def test_metrics_see_native_images_that_nothing_has_changed(self):
        module = data_of(Numbered, pad=8, flip=True)
        assert torch.equal(module.train_images(), numbered(COUNT))
        assert torch.equal(module.test_images(), numbered(COUNT + 20)[COUNT:])
        assert module.train_labels().tolist() == list(range(COUNT))
        assert module.test_labels().tolist() == list(range(COUNT, COUNT + 20))


@pytest.mark.parametrize(("name", "cls"), [("fashion_mnist", FashionMNIST), ("cifar10", CIFAR10)])
def test_the_configuration_has_the_defaults_of_the_constructors(name, cls, monkeypatch):
    def defaults(target: type) -> dict[str, object]:
        parameters = inspect.signature(target).parameters
        return {key: each.default for key, each in parameters.items() if key != "source"}

    monkeypatch.delenv("DIFFUSION_LAB_DATA", raising=False)
    config = composed(None, f"+data={name}").data
    values = OmegaConf.to_container(config, resolve=True)
    source = values.pop("source")
    assert source == defaults(cls) | {"_target_": f"diffusion_lab.data.source.{cls.__name__}"}
    assert values.pop("_target_") == "diffusion_lab.data.ImageData"
    assert values == defaults(ImageDataModule) | {"flip": name == "cifar10"}
    monkeypatch.setenv("DIFFUSION_LAB_DATA", "/some/where")
    module = instantiate(config)
    assert type(module.source) is cls
    assert module.source.root == Path("/some/where")


class Recorder(lightning.LightningModule):
    """Records its batches."""

    def __init__(self, batch_size: int = 8):
        super().__init__()
        self.batch_size, self.seed = batch_size, 3
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[list[int]] = []
        self.flipped: list[bool] = []
        self.validated: list[tuple[int, int]] = []  # ids, and what the images encode

    def training_step(self, batch, batch_idx):
        assert batch[0].shape[1:] == (1, 8, 8)
        self.seen.append(indices(batch[0]))
        self.flipped += flips(batch[0][:, :, 2:-2, 2:-2])
        return self.weight

    def validation_step(self, batch, batch_idx):
        assert batch[0].shape[1:] == (1, 8, 8)
        assert batch[1].tolist() == indices(batch[0])
        self.validated += zip(batch[2].tolist(), batch[1].tolist(), strict=True)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Writer(Recorder):
    """Writes to a file what each rank was given."""

    def __init__(self, folder: Path):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save((self.seen, self.validated), self.folder / f"rank{self.global_rank}.pt")


def trainer(steps: int, folder: Path, **changes) -> lightning.Trainer:
    settings = {
        "max_steps": steps,
        "max_epochs": -1,
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "limit_val_batches": 0,
    }
    return lightning.Trainer(**settings | changes)


def datamodule(flip: bool = False, validation_size: int = 0) -> ImageDataModule:
    return data_of(Numbered, pad=8, flip=flip, validation_size=validation_size)


@pytest.mark.filterwarnings("ignore")
class TestLightning:
    @pytest.mark.parametrize("flip", [False, True])
    def test_training_sees_the_stream(self, tmp_path, flip):
        model = Recorder()
        trainer(20, tmp_path).fit(model, datamodule=datamodule(flip=flip))
        assert list(itertools.chain(*model.seen)) == stream(loader(), 20)
        assert model.flipped == stream_of_flips(loader(flip=flip), 20)

    @pytest.mark.parametrize("limit", [1.0, 8])
    @pytest.mark.parametrize(("steps", "before", "after"), [(13, 1, 1), (13, 2, 2), (12, 1, 4)])
    def test_resume_neither_repeats_nor_skips(self, tmp_path, limit, steps, before, after):
        def part(steps: int, accumulate: int, checkpoint: Path | None) -> tuple:
            model = Recorder()
            settings = {"accumulate_grad_batches": accumulate, "limit_train_batches": limit}
            run = trainer(steps, tmp_path, **settings)
            run.fit(model, datamodule=data, ckpt_path=checkpoint)
            run.save_checkpoint(tmp_path / "last.ckpt")
            return itertools.chain(*model.seen)

        data = datamodule(validation_size=11)
        seen = [*part(steps, before, None), *part(20, after, tmp_path / "last.ckpt")]
        assert seen == stream(loader(chosen=data.train_labels()), 20)

    def test_validation_is_on_images_that_no_batch_holds(self, tmp_path):
        model, data = Recorder(), datamodule(validation_size=11)
        settings = {"limit_val_batches": 1.0, "num_sanity_val_steps": 0, "val_check_interval": 10}
        run = trainer(10, tmp_path, check_val_every_n_epoch=None, **settings)
        run.fit(model, datamodule=data)
        validated = data.validation_labels().tolist()
        assert model.validated == list(enumerate(validated))
        trained = list(itertools.chain(*model.seen))
        assert sorted(trained[:39]) == sorted(set(range(COUNT)) - set(validated))
        assert not set(trained) & set(validated)

    def test_a_batch_that_the_micro_batches_cannot_share_is_refused(self, tmp_path):
        run = trainer(4, tmp_path, accumulate_grad_batches=3)
        with refused("global batch of 8", by=ValueError):
            run.fit(Recorder(), datamodule=datamodule())

    def test_more_test_images_than_there_are_is_one_sentence(self):
        with refused("num_images=21", "20 test images", by=ValueError):
            data_of(Numbered).require_test_images(21, "num_images")

    @pytest.mark.slow
    def test_two_ranks_share_each_global_batch(self, tmp_path):
        # forking a process with threads may hang for ever
        settings = {"devices": 2, "strategy": "ddp_spawn", "accumulate_grad_batches": 2}
        validation = {"limit_val_batches": 1.0, "val_check_interval": 16, "num_sanity_val_steps": 0}
        shared = trainer(8, tmp_path, check_val_every_n_epoch=None, **settings, **validation)
        data = datamodule(validation_size=11)
        shared.fit(Writer(tmp_path), datamodule=data)
        (seen0, val0), (seen1, val1) = (torch.load(tmp_path / f"rank{r}.pt") for r in range(2))
        together = [i for micro in zip(seen0, seen1, strict=True) for i in itertools.chain(*micro)]
        assert together == stream(loader(chosen=data.train_labels()), 8)
        assert val0 + val1 == list(enumerate(data.validation_labels().tolist()))


def real_fashion_mnist() -> Path | None:
    """Returns a root whose files are available without a network, or None."""
    for root in (os.environ.get("DIFFUSION_LAB_DATA"), "data", sources.DEBIAN_FOLDER):
        folders = ("FashionMNIST/raw", "", "fashion-mnist") if root else ()
        for folder in folders:
            if list((Path(root) / folder).glob("train-images-idx3-ubyte*")):
                return Path(root)
    return None


@pytest.mark.long
def test_the_real_fashion_mnist(tmp_path):
    root = real_fashion_mnist()
    if root is None:
        pytest.skip("FashionMNIST is not on this machine; `make train` fetches it into data/")
    if root == sources.DEBIAN_FOLDER:  # no folder to write to: unpack from there instead
        root = tmp_path
    try:
        module = data_of(FashionMNIST, root=str(root))
        module.prepare_data()
    except DataError as error:
        pytest.fail(str(error))
    images, labels = module.train_images(), module.train_labels()
    assert images.shape == (60000, 1, 28, 28)
    assert module.test_images().shape == (10000, 1, 28, 28)
    assert labels.bincount().tolist() == [6000] * 10
    assert module.test_labels().bincount().tolist() == [1000] * 10
    assert images.float().mean() / 255 == pytest.approx(0.28604, abs=1e-5)
    assert images.float().std() / 255 == pytest.approx(0.35302, abs=1e-5)
    trousers = images[labels == 1].float().mean(0)[0]
    assert trousers[20, 13:15].mean() < trousers[20, 9:11].mean() / 2  # a gap between two legs


class TestShades:
    def split(self) -> Split:
        generator = torch.Generator().manual_seed(0)
        brightness = torch.arange(60, dtype=torch.uint8)[torch.randperm(60, generator=generator)]
        images = brightness[:, None, None, None].repeat(1, 1, 2, 2)
        return Split(images, torch.arange(60) % 2)

    def test_each_class_is_divided_evenly_from_dark_to_bright(self):
        split = self.split()
        labels = shaded(split, split).labels
        assert torch.equal(labels // 3, split.labels)
        assert torch.bincount(labels).tolist() == [10] * 6
        brightness = split.images.float().mean((1, 2, 3))
        for label in (0, 1):
            dark, middle, bright = (brightness[labels == 3 * label + shade] for shade in range(3))
            assert dark.max() < middle.min() <= middle.max() < bright.min()

    def test_the_limits_are_those_of_the_reference(self):
        dark = Split(torch.zeros(4, 1, 2, 2, dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        assert shaded(dark, self.split()).labels.tolist() == [0, 3, 0, 3]

    def test_a_label_is_named_by_both_attributes(self):
        names = FashionMNISTShades.class_names
        assert len(names) == 30
        assert names[3:6] == ("Trouser, dark", "Trouser, middle", "Trouser, bright")
