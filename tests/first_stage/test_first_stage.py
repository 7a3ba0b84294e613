"""Latents of a frozen first stage: scaled, cached on disk, and part of a run that diffuses them."""

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
import torch
import yaml
from helpers.pairs import first_fast
from helpers.ranks import on_ranks
from helpers.refusals import assert_names, refused
from helpers.tiny_data import tiny_data
from helpers.tiny_runs import (
    ALONE,
    PLAIN,
    TINY,
    checkpoint_of,
    summary_of,
    tiny_classifier,
    tiny_first_stage,
)
from omegaconf import OmegaConf
from safetensors import safe_open
from torch.optim.swa_utils import AveragedModel

from diffusion_lab import runs
from diffusion_lab.common import hashing
from diffusion_lab.common.images import NotFinite
from diffusion_lab.data import EncodedImages, MomentBatch, loader
from diffusion_lab.data.loader import TensorLoader
from diffusion_lab.families.autoencoder.run import Prior
from diffusion_lab.families.autoencoder.task import latent_moments
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.first_stage import TrainedKL, TrainedVQ, base
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.training.module import Optimization
from diffusion_lab.training.summary import first_stage_seconds

LATENT = [*TINY, "backbone.patch=2", "first_stage=kl", "first_stage.run=first"]
TRAIN = ["train", *LATENT, "logger=none", "run_dir=run"]
EACH_KIND = pytest.mark.parametrize(("kind", "name"), [(TrainedKL, "kl"), (TrainedVQ, "vq")])
CPU = torch.device("cpu")


@pytest.fixture
def data():
    data = tiny_data(flip=True)
    data.setup("fit")
    return data


def open_stage(folder, kind=TrainedKL, cache=True):
    return kind((1, 8, 8), str(folder), None, cache, str(folder / "latents"))


@EACH_KIND
def test_latents_go_there_and_back(tmp_path, data, kind, name):
    stage = open_stage(tiny_first_stage(tmp_path / "first", name), kind)
    assert stage.latent_shape == (4, 4, 4)
    images = data.train_images()
    x0 = stage.encode(images)
    assert (x0.dtype, x0.shape) == (torch.float32, (64, 4, 4, 4))
    mean = stage.network.mean(stage.moments(images))
    torch.testing.assert_close(x0, (mean - 0.1) / 0.5)
    torch.testing.assert_close(stage.restored(x0), mean)
    back = stage.decode(x0)
    assert (back.dtype, back.shape) == (torch.uint8, images.shape)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(stage.encode(images), x0)
        assert (stage.decode(x0).int() - back.int()).abs().max() <= 4


def test_measured_statistics_scale_latents_to_one(tmp_path, data):
    network = open_stage(tiny_first_stage(tmp_path / "first")).network
    mean, std = latent_moments(network, data, CPU)
    stage = open_stage(tiny_first_stage(tmp_path / "first", latent_mean=mean, latent_std=std))
    torch.manual_seed(0)
    moments = stage.moments(data.train_images())
    drawn = torch.cat([stage.draw(moments) for _ in range(20)])
    torch.testing.assert_close(drawn.mean((0, 2, 3)), torch.zeros(4), atol=0.02, rtol=0)
    torch.testing.assert_close(drawn.std((0, 2, 3)), torch.ones(4), atol=0.02, rtol=0)


@EACH_KIND
def test_images_that_are_not_finite_are_refused_and_not_made_black(tmp_path, kind, name):
    stage = open_stage(tiny_first_stage(tmp_path / "first", name), kind)
    codes, prior = torch.zeros(3, 4, 4, dtype=torch.int64), Prior(stage.network, CPU)
    ways = [
        lambda: stage.decode(torch.zeros(3, 4, 4, 4)),
        lambda: stage.from_codes(codes) if kind is TrainedVQ else prior(range(3)),
    ]
    for way in ways:
        assert way().dtype == torch.uint8
    with torch.no_grad():
        next(stage.network.decoder.parameters()).fill_(torch.nan)
    for way in ways:
        with refused("3 of 3", by=NotFinite):
            way()


@EACH_KIND
def test_cached_latents_are_fresh_ones_bit_for_bit(tmp_path, data, kind, name):
    stage = open_stage(tiny_first_stage(tmp_path / "first", name), kind)
    encoded = stage.prepare(data, CPU)
    pixels = TensorLoader(data.train_images(), data.train_labels(), 64, 0, flip=True)
    kept = TensorLoader(
        encoded.moments, data.train_labels(), 64, 0, flip=True, mirrored=encoded.mirrored
    )
    (images, labels), (moments, same) = pixels.batch_at(5), kept.batch_at(5)
    assert torch.equal(labels, same)
    assert pixels.order(0)[1].unique().tolist() == [0, 1]
    drawn = []
    for batch in (stage.moments(images), moments):
        torch.manual_seed(3)
        drawn.append(stage.draw(batch))
    assert torch.equal(*drawn)
    torch.manual_seed(4)
    again = stage.draw(moments)
    assert torch.equal(again, drawn[0]) == (kind is TrainedVQ)  # a KL posterior is sampled anew


def test_the_cache_is_read_again_and_knows_what_it_is_of(tmp_path, data, monkeypatch):
    stage = open_stage(tiny_first_stage(tmp_path / "first"))
    first = stage.prepare(data, CPU)
    assert len(list((tmp_path / "first/latents").glob("moments-*.bin"))) == 2
    assert not torch.equal(first.moments, first.mirrored)
    monkeypatch.setattr(TrainedKL, "encoder", None)
    assert torch.equal(stage.prepare(data, CPU).moments, first.moments)
    monkeypatch.undo()
    stage.sha256 = "another"
    stage.prepare(data, CPU)
    assert len(list((tmp_path / "first/latents").glob("moments-*.bin"))) == 4


def test_few_large_images_are_encoded_at_once(tmp_path, data, monkeypatch):
    shapes = ((1, 8, 8), (3, 64, 64), (3, 256, 256), (3, 160, 160), (3, 4096, 4096))
    assert [base.at_once(shape) for shape in shapes] == [256, 256, 16, 32, 1]
    stage, seen = open_stage(tiny_first_stage(tmp_path / "first")), []
    whole, stage.sha256 = stage.prepare(data, CPU).moments.clone(), "another"
    measured = latent_moments(stage.network, data, CPU)
    monkeypatch.setattr(base, "PIXELS", 20 * 8 * 8)
    stage.network.encoder.register_forward_hook(lambda _, given, out: seen.append(len(given[0])))
    torch.testing.assert_close(stage.prepare(data, CPU).moments, whole)
    torch.testing.assert_close(latent_moments(stage.network, data, CPU), measured)
    assert {*seen} == {16}


def encode_on_rank(rank: int, folder: Path, data) -> dict:
    """Encodes a rank's share of the images, and counts those that were hashed and encoded.

    A batch takes long enough that no rank has done its own share before another begins.
    """
    stage, seen, hashed = open_stage(folder / "first"), [], []
    stage.cache_dir = folder / "shared"
    encoder, of_tensors = stage.encoder, hashing.of_tensors
    stage.encoder = lambda images: (seen.append(len(images)), time.sleep(0.05), encoder(images))[2]
    hashing.of_tensors = lambda tensors: (hashed.append(1), of_tensors(tensors))[1]
    encoded = stage.prepare(data, CPU)
    found = {"moments": encoded.moments.clone(), "mirrored": encoded.mirrored.clone()}
    return found | {"seen": sum(seen), "hashed": len(hashed)}


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_share_the_work_of_encoding(tmp_path, data, monkeypatch, world):
    tiny_first_stage(tmp_path / "first")
    stage = open_stage(tmp_path / "first")
    monkeypatch.setattr(base, "BATCH", 8)
    whole, count = stage.prepare(data, CPU), len(data.train_labels())
    ranks = on_ranks(world, tmp_path, encode_on_rank, tmp_path, data)
    assert sum(rank["seen"] for rank in ranks) == 2 * count
    assert max(rank["seen"] for rank in ranks) <= 2 * (count / world + 16)
    assert [rank["hashed"] for rank in ranks] == [1] + [0] * (world - 1)
    for rank in ranks:
        assert torch.equal(rank["moments"], whole.moments)
        assert torch.equal(rank["mirrored"], whole.mirrored)
    assert len(list((tmp_path / "shared").glob("*.bin"))) == 2


def test_latents_that_cannot_be_written_are_kept_in_memory(tmp_path, data, capfd):
    stage = open_stage(tiny_first_stage(tmp_path / "first"))
    written = stage.prepare(data, CPU)
    stage.cache_dir = tmp_path / "first/config.yaml"
    stage.cache_dir.touch()
    kept = stage.prepare(data, CPU)
    assert torch.equal(kept.moments, written.moments)
    assert torch.equal(kept.mirrored, written.mirrored)
    assert "config.yaml" in capfd.readouterr().err


@pytest.mark.parametrize(("free", "device"), [(200_000, "meta"), (120_000, "cpu")])
def test_kept_moments_are_all_where_training_is_or_none_are(data, monkeypatch, free, device):
    moments = torch.zeros(64, 8, 2, 2)  # 8 kB, and as much again mirrored
    data.encoded = EncodedImages(moments, torch.ones_like(moments))
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device("meta")),
        lightning_module=SimpleNamespace(batch_size=8, seed=0),
        accumulate_grad_batches=1,
        world_size=1,
        global_rank=0,
        global_step=0,
    )
    # a tenth of this may be used
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free, free))
    original = loader.fits
    monkeypatch.setattr(loader, "fits", lambda kept, _: original(kept, torch.device("cuda")))
    stream = data.train_dataloader()
    assert {stream.images.device.type, stream.mirrored.device.type} == {device}
    assert stream.batch_type is MomentBatch


@pytest.mark.long
def test_a_killed_run_knows_the_seconds_of_its_first_stage(lab, tmp_path, killed_at_step):
    tiny_first_stage(tmp_path / "first")
    (tmp_path / "first/summary.json").write_text('{"training_seconds": 300.0}')
    often = [*ALONE, "callbacks.denoising=null", "callbacks.checkpoint.every_n_steps=2"]
    killed_at_step(3, *TRAIN, *often)
    shutil.rmtree(tmp_path / "first")
    lab.done("train", "resume=run")
    assert summary_of(tmp_path / "run")["first_stage_seconds"] == 300.0


@pytest.mark.long
def test_a_latent_run_from_training_to_another_path(lab, refusal, tmp_path):
    tiny_first_stage(tmp_path / "first")
    (tmp_path / "first/summary.json").write_text('{"training_seconds": 300.0}')
    made = OmegaConf.create({"first_stage": {"run": str(tmp_path / "first/averages/0.05_step30")}})
    assert first_stage_seconds(made, tmp_path / "run") == 300.0  # of an average
    lab.done(*TRAIN, "data.flip=true")
    summary = summary_of(tmp_path / "run")
    assert summary["first_stage_seconds"] == 300.0
    assert summary["metrics"]["rfid/efficientnet_lite0-96/train64-16"] == 12.5
    config = yaml.safe_load((tmp_path / "run/config.yaml").read_text())
    content = (tmp_path / "first" / saving.FIRST_STAGE_FILE).read_bytes()
    assert (tmp_path / "run" / saving.FIRST_STAGE_FILE).read_bytes() == content
    assert len(config["first_stage"]["sha256"]) == 64
    checkpoint = checkpoint_of(tmp_path / "run")
    for part in ("state_dict", "current_model_state"):
        assert not [name for name in checkpoint[part] if not name.startswith("denoiser.")]

    shutil.rmtree(tmp_path / "first")
    shutil.move(tmp_path / "run", tmp_path / "elsewhere/moved")
    moved = "elsewhere/moved"
    for command in (["sample", "num_samples=4"], ["inpaint", "num_images=2", "variants=1"]):
        lab.done(*command, f"run={moved}")
    err = lab.done("evaluate", f"run={moved}")
    assert "12.5" in err
    lab.done("train", f"resume={moved}", "trainer.max_steps=6")
    assert runs.load_summary(tmp_path / moved).first_stage_seconds == 300.0
    lab.done("sample", f"run={moved}", "guidance=autoguidance", f"guidance.weak_run={moved}")
    for command in ("likelihood", "encode"):
        assert "latents" in refusal(command, f"run={moved}")

    path = tmp_path / moved / saving.FIRST_STAGE_FILE
    path.unlink()
    assert f"{moved}/{saving.FIRST_STAGE_FILE}" in refusal("sample", f"run={moved}")
    tiny_first_stage(tmp_path / moved, latent_std=[0.6] * 4)
    sentence = refusal("train", f"resume={moved}", "trainer.max_steps=9")
    assert_names(sentence, moved, config["first_stage"]["sha256"][:12])


@pytest.mark.slow
def test_caching_changes_no_step(lab, tmp_path):
    tiny_first_stage(tmp_path / "first")
    states = []
    for cache in ("true", "false"):
        options = [f"first_stage.cache={cache}", f"run_dir=cache_{cache}", "batch_size=64"]
        plain = ["callbacks.evaluation=null", "trainer.precision=32-true"]
        lab.done(*TRAIN, *options, *plain)
        states.append(runs.load(tmp_path / f"cache_{cache}")[1].denoiser.state_dict())
    for name, value in states[0].items():
        torch.testing.assert_close(value, states[1][name], atol=1e-6, rtol=0)


@pytest.mark.slow
def test_other_data_are_said_and_other_stages_refused(lab, refusal, tmp_path):
    tiny_first_stage(tmp_path / "first", data="of other images")
    assert_names(lab.done(*TRAIN), "Advice: first")
    metrics = summary_of(tmp_path / "run")["metrics"]
    assert not [name for name in metrics if name.startswith("rfid")]
    tiny_first_stage(tmp_path / "vq", "vq")
    tiny_first_stage(tmp_path / "flat", latent_std=[0.0] * 4)
    wrong = [
        ("first_stage.run=vq", "vq"),
        ("first_stage.run=flat", "flat"),
        ("data.pad=12", "(1, 12, 12)"),
        ("augmentation=non_leaky", "first_stage.cache=false"),
        ("denoiser.clip=1", "denoiser.clip=null"),
        ("guidance=dynamic_thresholding", "guidance.percentile=null"),
        ("guidance.clip=1", "guidance.clip=null"),
    ]
    for argument, named in wrong:
        assert named in refusal(*TRAIN, "run_dir=other", argument)
        assert not (tmp_path / "other").exists()


def test_averaged_weights_share_the_frozen_stage(tmp_path):
    stage = open_stage(tiny_first_stage(tmp_path / "first"))
    module = DiffusionModule(
        torch.nn.Linear(2, 2), torch.nn.Identity(), stage, Optimization(None, None, batch_size=1)
    )
    assert not [name for name in module.state_dict() if "first_stage" in name]
    copied = AveragedModel(module)  # as code that averages weights may do
    assert copied.module.first_stage is stage


@pytest.mark.long
@pytest.mark.parametrize("kind", first_fast(["vae", "vq"]))
def test_the_prior_of_a_vae_is_drawn_from_and_measured(lab, refusal, tmp_path, kind):
    reconstruction = "likelihood" if kind == "vae" else "plain"
    chosen = [f"autoencoder={kind}", f"reconstruction={reconstruction}"]
    lab.done("train-autoencoder", *PLAIN, *chosen, "autoencoder.channels=8", "run_dir=run")
    if kind == "vq":
        assert_names(refusal("sample", "run=run"), "first_stage=vq", "first_stage.run=run")
        return
    result = lab.result("sample", "run=run", "num_samples=4", "save=npz")
    assert result["grid"] == "run/samples/prior_seed0_n4.png"
    # its metrics are of reconstructions only
    assert "diffusion-lab evaluate run=run" in refusal("evaluate", "run=run", "against=run")
    name = "efficientnet_lite0-96/train64-16"
    assert {f"fid/{name}", f"rfid/{name}"} <= set(lab.result("evaluate", "run=run"))
    (record,) = (tmp_path / "run/evaluations").glob("*.json")
    assert json.loads(record.read_text())["sampling_seconds"] > 0
    reader = f"metrics.classifier={tiny_classifier(tmp_path / 'reader.safetensors')}"
    code, out, err = lab("evaluate", "run=run", reader, "json=true")
    assert code == 0, err
    assert "Left out" in out + err
    kinds = {name.split("/")[0] for name in json.loads(out.splitlines()[-1])}
    assert {"fid", "classifier_fid"} <= kinds
    assert "accuracy" not in kinds
    lab.done("publish", "run", "output=published")
    lab.done("compare", "published", "output=compared")
    lab.done("evaluate", "run=run", "against=run")
    assert "sampler" in refusal("sample", "run=run", "sampler=heun")
    assert "autoencoder" in refusal("encode", "run=run")

    path = tmp_path / "run" / saving.FIRST_STAGE_FILE
    autoencoder, facts, _ = saving.load_autoencoder(path)
    for change, distance in (
        ({"latent_mean": [0.1, -0.8, 0.1, 0.1]}, "0.8"),
        ({"latent_std": [1.0, 1.0, 0.25, 1.0]}, "a factor of 4"),
    ):
        saving.save_autoencoder(autoencoder, replace(facts, **change), path)
        sentence = refusal("sample", "run=run", "num_samples=4")
        assert_names(sentence, distance, "autoencoder=vae")


@pytest.mark.parametrize(
    "facts",
    [
        {"image_shape": [1, 8]},
        {"image_shape": "abc"},
        {"kind": ["kl"]},
        {"settings": [1]},
        {"latent_mean": "abcd"},
        {"latent_std": [1.0]},
        {"metrics": [1]},
    ],
    ids=str,
)
def test_a_file_with_other_facts_is_named(tmp_path, facts):
    tiny_first_stage(tmp_path)
    path = tmp_path / saving.FIRST_STAGE_FILE
    with safe_open(path, "pt") as file:
        known = json.loads(file.metadata()["facts"])
    weights = safetensors.torch.load_file(path)
    for text in (json.dumps(known | facts), "no JSON"):
        safetensors.torch.save_file(weights, path, {"facts": text})
        with refused(path, "train-autoencoder", by=ValueError):
            saving.load_autoencoder(path)
