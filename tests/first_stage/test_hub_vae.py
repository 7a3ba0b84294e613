"""Autoencoders of diffusers as first stages, tiny and untrained."""

import json
import logging
import shutil
import sys

import pytest
import torch
import yaml
from helpers.refusals import assert_names, refused
from helpers.tiny_data import tiny_data
from helpers.tiny_runs import TINY
from PIL import Image

import diffusion_lab
from diffusion_lab.first_stage import HubVAE, trained

diffusers = pytest.importorskip("diffusers")


def save(folder, name="AutoencoderKL"):
    torch.manual_seed(0)
    if name == "AutoencoderKL":
        network = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[8, 8],
            norm_num_groups=4,
            scaling_factor=0.25,
            shift_factor=0.5,
        )
    else:
        network = diffusers.AutoencoderTiny(
            encoder_block_out_channels=[8, 8],
            decoder_block_out_channels=[8, 8],
            num_encoder_blocks=[1, 1],
            num_decoder_blocks=[1, 1],
        )
    network.save_pretrained(folder)
    return network.eval()


def open_stage(folder, scale="config", sha256=None, shape=(1, 8, 8), shift=None, cache=True):
    return HubVAE(shape, str(folder), scale, sha256, cache, str(folder / "latents"), shift)


@pytest.mark.parametrize("name", ["AutoencoderKL", "AutoencoderTiny"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_go_there_and_back(tmp_path, name, channels):
    network = save(tmp_path, name)
    stage = open_stage(tmp_path, shape=(channels, 9, 8))
    assert stage.factor == 2
    assert stage.latent_shape == (4, 5, 4)
    images = torch.randint(0, 256, (2, channels, 9, 8), dtype=torch.uint8)
    x0 = stage.encode(images)
    assert x0.shape == (2, 4, 5, 4)
    assert stage.decode(x0).shape == images.shape
    moments = stage.moments(images)
    assert stage.draw(moments).shape == x0.shape
    padded = torch.cat([images, images[:, :, -1:]], 2).expand(-1, 3, -1, -1)
    with torch.no_grad():
        encoded = network.encode(padded / 127.5 - 1)
    if name == "AutoencoderKL":
        torch.testing.assert_close(x0, (encoded.latent_dist.mean - 0.5) * 0.25)
        drawn = torch.stack([stage.draw(moments) for _ in range(300)])
        expected = encoded.latent_dist.std * 0.25
        torch.testing.assert_close(drawn.std(0), expected, rtol=0.3, atol=1e-3)
    else:
        torch.testing.assert_close(x0, encoded.latents)
        assert torch.equal(stage.draw(moments), x0)


def test_opening_one_warns_of_nothing(tmp_path, caplog, monkeypatch):
    save(tmp_path)
    monkeypatch.setattr(logging.getLogger("diffusers"), "propagate", True)
    open_stage(tmp_path)
    assert caplog.records == []


def test_each_channel_may_have_a_scale_and_a_shift_of_its_own(tmp_path):
    network = save(tmp_path)
    scale, shift = [0.5, 1.0, 2, 0.25], [1.0, -1, 0, 3.5]
    stage = open_stage(tmp_path, scale, shift=shift)
    images = torch.randint(0, 256, (2, 1, 8, 8), dtype=torch.uint8)
    with torch.no_grad():
        raw = network.encode(images.expand(-1, 3, -1, -1) / 127.5 - 1).latent_dist.mean
    x0 = stage.encode(images)
    factors, shifts = (torch.tensor(each)[:, None, None] for each in (scale, shift))
    torch.testing.assert_close(x0, (raw - shifts) * factors)
    torch.testing.assert_close(stage.restored(x0), raw)
    assert stage.facts()["scale"] == scale
    plain = open_stage(tmp_path).encode(images)
    torch.testing.assert_close(open_stage(tmp_path, shift=[0.5] * 4).encode(images), plain)
    for wrong, named in (
        ({"scale": [1.0]}, ["scale=[1.0]", "4"]),
        ({"shift": [1.0, 2.0]}, ["shift=[1.0, 2.0]", "4"]),
        ({"scale": [1.0, 1.0, 0.0, 1.0]}, ["scale"]),
        ({"scale": "unit"}, ["scale", "unit"]),
    ):
        with refused(*named, by=ValueError):
            open_stage(tmp_path, **wrong)


def test_a_measured_scale_gives_unit_deviation_to_what_is_drawn(tmp_path, monkeypatch):
    network = save(tmp_path)
    # a wide posterior, and images whose first ones do not represent the rest
    network.quant_conv.bias.data[4:] = 0.5
    network.save_pretrained(tmp_path)
    monkeypatch.setattr(trained, "MEASURED", 32)
    found = []
    for cache in (True, False):
        data = tiny_data()
        data.setup("fit")
        images = data.train_images()
        images[:32] //= 4
        stage = open_stage(tmp_path, "measured", cache=cache)
        stage.prepare(data, torch.device("cpu"))
        torch.manual_seed(0)
        drawn = torch.cat([stage.draw(stage.moments(images)) for _ in range(20)])
        assert drawn.std() == pytest.approx(1.0, rel=0.03)
        found.append(stage.facts()["scale"])
        again = open_stage(tmp_path, **stage.facts())
        assert torch.allclose(again.encode(images), stage.encode(images))
    assert found[0] == pytest.approx(found[1], rel=1e-6)


def test_a_measured_scale_is_of_latents_without_the_means_of_channels(tmp_path):
    network = save(tmp_path)
    network.quant_conv.bias.data[:4] = torch.tensor([10.0, -10.0, 5.0, -5.0])
    network.save_pretrained(tmp_path)
    data = tiny_data()
    data.setup("fit")
    for shift in ([10.0, -10.0, 5.0, -5.0], [0.0] * 4):
        stage = open_stage(tmp_path, "measured", shift=shift)
        stage.prepare(data, torch.device("cpu"))
        drawn = stage.draw(stage.moments(data.train_images()))
        assert drawn.square().mean().sqrt().item() == pytest.approx(1.0, rel=0.2)


@pytest.mark.slow
def test_a_run_keeps_a_copy(lab, refusal, tmp_path):
    save(tmp_path / "vae")
    stage = ["first_stage=hub_vae", "first_stage.path=vae", "first_stage.scale=measured"]
    quick = ["callbacks.evaluation=null", "logger=none", "run_dir=run"]
    lab.done("train", *TINY, "backbone.patch=2", *stage, *quick)
    kept = yaml.safe_load((tmp_path / "run/config.yaml").read_text())["first_stage"]
    assert (kept["path"], len(kept["sha256"])) == ("vae", 64)
    assert isinstance(kept["scale"], float)
    # a run reopens from its own copy, even if it is moved and the original deleted
    shutil.rmtree(tmp_path / "vae")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for command in (
        ["sample", "run=moved", "num_samples=4"],
        ["train", "resume=moved", "trainer.max_steps=6"],
        ["sample", "run=moved", "guidance=autoguidance", "guidance.weak_run=moved"],
        ["export", "run=moved", "output=mine"],
        ["sample", "run=mine", "num_samples=4"],
    ):
        lab.done(*command)
    # another run in the same latents may be guided by it, and reopens with its guidance
    guided = [
        *TINY,
        "backbone.patch=2",
        "first_stage=hub_vae",
        "first_stage.path=moved/first_stage",
    ]
    guided += [*quick[:2], "guidance=autoguidance", "guidance.weak_run=moved", "run_dir=guided"]
    assert "first_stage.scale" in refusal("train", *guided, "first_stage.scale=measured")
    lab.done("train", *guided, f"first_stage.scale={kept['scale']}")
    lab.done("sample", "run=guided", "num_samples=2", "save=png", "precision=32-true")
    (picture,) = (tmp_path / "guided/samples").glob("*/*0.png")
    image = diffusion_lab.load("guided").sample(2)[0].permute(1, 2, 0).contiguous().numpy()
    with Image.open(picture) as saved:
        assert saved.tobytes() == bytes(image)

    copy, named = tmp_path / "moved/first_stage", ["moved/first_stage", kept["sha256"][:12]]
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"scaling_factor": 5.0}))
    assert_names(refusal("sample", "run=moved"), *named)
    (copy / "config.json").write_text(json.dumps(settings))
    network = diffusers.AutoencoderKL.from_pretrained(copy)
    torch.nn.init.ones_(network.quant_conv.weight)
    network.save_pretrained(copy)
    assert_names(refusal("sample", "run=moved"), *named)
    shutil.rmtree(copy)
    assert "moved/first_stage" in refusal("sample", "run=moved")


def test_what_cannot_be_had_is_said_in_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with refused(tmp_path / "nobody" / "nothing", "hub", by=ValueError):
        open_stage(tmp_path / "nobody" / "nothing")
    (tmp_path / "config.json").write_text("{}")
    with refused(tmp_path, "damaged", by=ValueError):
        open_stage(tmp_path)
    save(tmp_path)
    for content in ("[1]", '{"_class_name": ["a"]}', '"a"'):
        (tmp_path / "config.json").write_text(content)
        with refused(f"path={tmp_path}", by=ValueError):
            open_stage(tmp_path)
    grey = diffusers.AutoencoderTiny(in_channels=1, out_channels=1)
    grey.save_pretrained(tmp_path / "grey")
    with refused(tmp_path / "grey", "channels", by=ValueError):
        open_stage(tmp_path / "grey")
    with refused("1 or 3 channels", by=ValueError):
        open_stage(tmp_path, shape=(2, 8, 8))
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with refused("pip install 'diffusion-lab[diffusers]'", by=ValueError):
        open_stage(tmp_path)
