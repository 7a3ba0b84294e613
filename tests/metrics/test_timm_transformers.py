"""DINOv2's and CLIP's features from random weights, as tests download no published ones."""

import pytest
import timm
import torch
from helpers.refusals import refused
from safetensors.torch import save_file
from torch_fidelity.feature_extractor_clip import VisionTransformer

from diffusion_lab.metrics import ExtractorUnavailable
from diffusion_lab.metrics.extractor import CLIP, DINOv2

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


@pytest.mark.slow
def test_embeddings_are_those_of_openais_network_at_336_pixels(tmp_path):
    torch.manual_seed(0)
    theirs = VisionTransformer(336, 32, width=768, layers=12, heads=12, output_dim=512).eval()
    for weight in theirs.parameters():
        torch.nn.init.normal_(weight, std=0.03)
    weights = {f"visual.{name}": value for name, value in theirs.state_dict().items()}
    torch.save(weights, tmp_path / "weights.pth")
    extractor = CLIP("vit_base_patch32_clip_quickgelu_224.openai", str(tmp_path / "weights.pth"))
    extractor.load("cpu")
    images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    x = torch.nn.functional.interpolate(images.float(), (336, 336), mode="bicubic", antialias=True)
    mean, std = (
        torch.tensor(timm.data.constants.__dict__[f"OPENAI_CLIP_{name}"])[:, None, None]
        for name in ("MEAN", "STD")
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
