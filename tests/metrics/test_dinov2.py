"""DINOv2 features from a file of random weights, as tests do not download the published ones."""

import pytest
import timm
import torch
from helpers.refusals import refused
from safetensors.torch import save_file

from diffusion_lab.metrics import ExtractorUnavailable
from diffusion_lab.metrics.extractor import DINOv2

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
    x = torch.nn.functional.interpolate(
        images.float(), (224, 224), mode="bicubic", antialias=True
    ).clamp(0, 255)
    mean, std = (
        torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std")
    )
    with torch.no_grad():
        tokens = network.forward_features((x / 255 - mean) / std)
    torch.testing.assert_close(features, tokens[:, 0], rtol=1e-4, atol=1e-4)
    places = extractor.feature_map(images / 127.5 - 1)
    assert places.shape == (2, extractor.map_channels, 16, 16)
    for row, column in ((0, 0), (3, 5), (15, 15)):
        expected = tokens[:, 1 + 16 * row + column]
        torch.testing.assert_close(places[..., row, column], expected, rtol=1e-3, atol=1e-3)


def test_what_is_missing_or_damaged_is_one_sentence(tmp_path):
    (tmp_path / "text").write_text("no weights")
    for model, path in ((MODEL, tmp_path / "none"), (MODEL, tmp_path / "text"), ("vit_x", None)):
        with refused(path or model, by=ExtractorUnavailable):
            DINOv2(model, path and str(path)).load("cpu")
