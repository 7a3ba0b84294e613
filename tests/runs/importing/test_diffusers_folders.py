"""Folders of diffusers are opened with their own network, and their scheduler as a schedule."""

import json
import os
import runpy
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from helpers.compositions import composed
from helpers.reduced import Reduced
from helpers.refusals import assert_names, refused
from helpers.tiny_vae import save_vae

from diffusion_lab import runs
from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import prediction
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.runs.importing.command import read
from diffusion_lab.runs.importing.kind import DiffusersFolders
from diffusion_lab.runs.importing.kind.diffusers import scheduler_overrides

diffusers = pytest.importorskip("diffusers")
UNET = {
    "sample_size": 16,
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "norm_num_groups": 8,
    # as in google/ddpm-cifar10-32
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "downsample_padding": 0,
    "norm_eps": 1e-6,
}
DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 5,
}


def randomised(network):
    """A network of diffusers in which no weight is 0."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in network.named_parameters():
        centre = float(parameter.ndim == 1 and name.endswith("norm.weight"))
        torch.nn.init.normal_(parameter, centre, 0.05, generator=generator)
    return network.eval()


def unet(**settings):
    return randomised(diffusers.UNet2DModel(**UNET, **settings))


def dit_pipeline(folder):
    """Writes a pipeline of a DiT to pipeline/; its network and its autoencoder."""
    network = randomised(diffusers.DiTTransformer2DModel(**DIT))
    for block in network.transformer_blocks:  # each block has an embedding of its own
        torch.nn.init.normal_(block.norm1.emb.timestep_embedder.linear_1.weight, std=0.05)
    vae = diffusers.AutoencoderKL.from_pretrained(save_vae(folder / "vae"))
    diffusers.DiTPipeline(network, vae, diffusers.DDIMScheduler()).save_pretrained("pipeline")
    return network, vae


def imported(lab, path, *overrides):
    lab.done("import", str(path), "kind=diffusers", *overrides, "output=net")
    return runs.load("net")[1]


@torch.no_grad()
def answers(model, labels):
    """The outputs of an imported model at the first, a middle and the last level, and its input."""
    x, index = torch.randn(3, *model.denoiser.image_shape), torch.tensor([0, 500, 999])
    estimate = model.denoiser(x, model.schedule((index.double() + 1) / 1000), Given(labels))
    if estimate.log_variance_weight is None:
        return x, index, estimate.output
    return x, index, torch.cat([estimate.output, 2 * estimate.log_variance_weight - 1], 1)


@pytest.mark.parametrize("classes", [None, 5])
def test_a_unet_answers_like_itself(lab, tmp_path, classes):
    network = unet(num_class_embeds=classes)
    scheduler = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="sample")
    diffusers.DDPMPipeline(network, scheduler).save_pretrained("pipeline")
    model = imported(lab, "pipeline")
    labels = None if classes is None else torch.tensor([0, 2, 4])
    x, index, output = answers(model, labels)
    with torch.no_grad():
        expected = network(x, index, class_labels=labels).sample
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert isinstance(model.denoiser.prediction, prediction.X0)
    scheduled = model.schedule((index.double() + 1) / 1000).alpha ** 2
    torch.testing.assert_close(scheduled.float(), scheduler.alphas_cumprod[index])
    assert model.denoiser.conditioning.conditional == (classes is not None)
    answers(model, None)  # the null label has a row


@pytest.mark.long
def test_a_dit_of_a_pipeline_comes_with_its_autoencoder(lab, tmp_path):
    network, _ = dit_pipeline(tmp_path)
    model = imported(lab, "pipeline")
    shutil.rmtree("pipeline")
    assert runs.load("net")[0].image_shape == (3, 64, 64)
    assert runs.load_config("net").sampler.time_grid._target_.endswith("Linspace")
    for labels, taken in (([0, 2, 4], [0, 2, 4]), (None, [5, 5, 5])):
        given = None if labels is None else torch.tensor(labels)
        x, index, output = answers(model, given)
        with torch.no_grad():
            expected = network(x, index, class_labels=torch.tensor(taken)).sample
        torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    model.denoiser.train()
    level, given = model.schedule(torch.tensor(0.5)), Given(torch.arange(3))
    outputs = [model.denoiser(x, level, given).output for _ in range(8)]
    assert all(torch.equal(each, outputs[0]) for each in outputs), "labels are dropped elsewhere"
    lab.done("sample", "run=net", "num_samples=2", "sampler.steps=2")


@pytest.mark.long
def test_a_pipeline_whose_autoencoder_would_be_left_out_is_refused(refusal, tmp_path):
    diffusers.LDMPipeline(
        diffusers.VQModel(norm_num_groups=8, block_out_channels=(8,)),
        unet(),
        diffusers.DDIMScheduler(),
    ).save_pretrained("pipeline")
    sentence = refusal("import", "pipeline", "kind=diffusers", "output=net")
    assert_names(sentence, "pipeline", "vqvae")
    dit_pipeline(tmp_path)
    shutil.rmtree("pipeline/vae")  # of a download that broke off
    assert "pipeline/vae" in refusal("import", "pipeline", "kind=diffusers", "output=net")
    assert not (tmp_path / "net").exists()


@pytest.mark.long
def test_a_network_alone_is_taken_as_ddpm(lab, tmp_path):
    unet().save_pretrained("network")
    model = imported(lab, "network", "sampler=ddim")
    assert isinstance(model.denoiser.prediction, prediction.Eps)
    assert model.schedule.discrete_steps == 1000


def exported(lab, tmp_path, part):
    """Exports the import in net/ to back/; its network and its scheduler's config.json."""
    lab.done("export", "run=net", "format=diffusers", "output=back")
    network = diffusers.AutoModel.from_pretrained("back", subfolder=part)
    return network, json.loads((tmp_path / "back/scheduler/scheduler_config.json").read_text())


def assert_same(network, other):
    """Asserts that two networks have the same class, settings and weights."""
    assert type(network) is type(other)
    settings, given = (
        {key: value for key, value in each.config.items() if key[0] != "_"}
        for each in (network, other)
    )
    # tuples are read back as lists
    assert json.dumps(settings, sort_keys=True) == json.dumps(given, sort_keys=True)
    weights, own = network.state_dict(), other.state_dict()
    assert weights.keys() == own.keys()
    assert all(torch.equal(weights[name], own[name]) for name in weights)


@pytest.mark.long
@pytest.mark.parametrize("classes", [None, 5])
def test_an_imported_unet_is_exported_as_it_came(lab, tmp_path, classes):
    network = unet(num_class_embeds=classes)
    scheduler = diffusers.DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.0015,
        beta_end=0.0195,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        clip_sample=classes is None,
        clip_sample_range=1.5,
    )
    diffusers.DDIMPipeline(network, scheduler).save_pretrained("pipeline")
    model = imported(lab, "pipeline")
    assert model.denoiser.clip == (1.5 if classes is None else None)
    back, config = exported(lab, tmp_path, "unet")
    assert_same(back, network)
    decides = ("beta_schedule", "beta_start", "beta_end", "prediction_type")
    for key in (*decides, "rescale_betas_zero_snr", "num_train_timesteps", "clip_sample"):
        assert config[key] == scheduler.config[key]
    if classes is None:
        assert config["clip_sample_range"] == 1.5
    assert "imported into" in (tmp_path / "back/README.md").read_text()


def test_latents_scaled_by_channel_are_not_exported(lab, refusal, tmp_path):
    dit_pipeline(tmp_path)
    lab.done("import", "pipeline", "kind=diffusers", "output=net")
    config = tmp_path / "net/config.yaml"
    saved = yaml.safe_load(config.read_text())
    for key in ("shift", "scale"):
        scaled = saved["first_stage"] | {key: [0.1, 0.2, 0.3, 0.4]}
        config.write_text(yaml.safe_dump(saved | {"first_stage": scaled}))
        sentence = refusal("export", "run=net", "format=diffusers", "output=back")
        assert_names(sentence, f"first_stage.{key}", "format=diffusers")
    assert not (tmp_path / "back").exists()


@pytest.mark.long
def test_an_imported_dit_is_exported_with_its_autoencoder(lab, tmp_path):
    network, vae = dit_pipeline(tmp_path)
    model = imported(lab, "pipeline", "first_stage.scale=0.5")
    back, config = exported(lab, tmp_path, "transformer")
    assert_same(back, network)
    assert config["beta_schedule"] == "linear"
    autoencoder = diffusers.AutoencoderKL.from_pretrained(tmp_path / "back", subfolder="vae")
    latents, weights = torch.randn(2, 4, 8, 8), autoencoder.state_dict()
    assert all(torch.equal(each, weights[name]) for name, each in vae.state_dict().items())
    with torch.no_grad():
        decoded = autoencoder.decode(latents / autoencoder.config.scaling_factor).sample
    ours = model.first_stage.decode(latents)  # uint8
    assert ((decoded.clamp(-1, 1) + 1) * 127.5 - ours).abs().max() < 0.51
    loop = runpy.run_path(str(tmp_path / "back/sample.py"))
    images = loop["sample"](torch.randn(2, 4, 8, 8), torch.tensor([0, 4]), steps=2)
    assert images.shape == (2, 3, 64, 64)


def test_flow_matching_becomes_the_straight_path(lab):
    network = unet()
    network.save_pretrained("pipeline/unet")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained("pipeline/scheduler")
    model = imported(lab, "pipeline")
    assert isinstance(model.schedule, Rectified)
    assert isinstance(model.denoiser.prediction, prediction.Flow)
    x, sigma = torch.randn(2, 3, 16, 16), torch.tensor([0.25, 1.0])
    with torch.no_grad():
        output = model.denoiser(x, model.schedule(sigma)).output
        torch.testing.assert_close(output, network(x, 1000 * sigma).sample, rtol=0, atol=1e-5)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A pipeline of a U-Net and a scheduler, which no test may change."""
    folder = tmp_path_factory.mktemp("diffusers")
    unet().save_pretrained(folder / "unet")
    diffusers.DDPMScheduler().save_pretrained(folder / "scheduler")
    return folder


@pytest.fixture
def spoilt(pipeline, tmp_path) -> Path:
    """A copy of the pipeline."""
    return Path(shutil.copytree(pipeline, tmp_path / "pipeline"))


def refuse(path: Path, *named: object) -> None:
    """Asserts that reading a folder is refused in a sentence that has all of `named`."""
    with refused(*named):
        read(DiffusersFolders(), path)


@pytest.mark.parametrize("name", ["scheduler/scheduler_config.json", "unet/config.json"])
def test_a_damaged_file_of_settings_is_named(refusal, spoilt, tmp_path, name):
    for content in ("", "{", "[1]", "{}"):
        (spoilt / name).write_text(content)
        refuse(spoilt, name)
    assert_names(refusal("import", "pipeline", "kind=diffusers", "output=net"), name)
    assert not (tmp_path / "net").exists()


@pytest.mark.parametrize("kind", ["timestep", "identity"])
def test_a_network_whose_labels_are_no_classes_is_refused(tmp_path, kind):
    unet(class_embed_type=kind).save_pretrained(tmp_path)
    refuse(tmp_path, f"class_embed_type={kind}")


def test_weights_that_would_run_code_are_refused(spoilt, tmp_path):
    (spoilt / "unet/diffusion_pytorch_model.safetensors").unlink()
    content = {"conv_in.weight": Reduced(os.mkdir, str(tmp_path / "executed"))}
    torch.save(content, spoilt / "unet/diffusion_pytorch_model.bin")
    refuse(spoilt)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("key", ["act_fn", "attn_norm_num_groups", "beta_start"])
def test_settings_that_name_code_are_refused(spoilt, tmp_path, monkeypatch, key):
    monkeypatch.chdir(tmp_path)
    name = "scheduler/scheduler_config.json" if key == "beta_start" else "unet/config.json"
    given = json.loads((spoilt / name).read_text())
    for value in (
        {"_target_": "os.mkdir", "path": "executed"},
        ["silu", {"_target_": "os.mkdir", "path": "executed"}],
        "${oc.env:HOME}",
        "{_target_:os.mkdir,path:executed}",
    ):
        (spoilt / name).write_text(json.dumps(given | {key: value}))
        refuse(spoilt)
    assert not (tmp_path / "executed").exists()


def test_other_folders_are_refused(spoilt, tmp_path):
    (tmp_path / "empty").mkdir()
    refuse(tmp_path / "empty", "empty")
    config = spoilt / "unet/config.json"
    given = json.loads(config.read_text())
    for wrong in ({"_class_name": "AutoencoderKL"}, {"block_out_channels": [16, 48]}):
        config.write_text(json.dumps(given | wrong))
        refuse(spoilt, "unet")
    (spoilt / "unet/diffusion_pytorch_model.safetensors").unlink()
    refuse(spoilt, "unet")


@pytest.mark.parametrize(
    "settings",
    [
        {"beta_schedule": "sigmoid"},
        {"num_train_timesteps": 4000},
        {"trained_betas": [0.1, 0.2]},
        {"prediction_type": "other"},
    ],
    ids=str,
)
def test_a_scheduler_without_a_counterpart_is_refused(tmp_path, settings):
    known = {"_class_name": "DDPMScheduler", "beta_schedule": "linear"}
    (tmp_path / "scheduler_config.json").write_text(json.dumps(known | settings))
    with refused(tmp_path, "DDPMScheduler", next(iter(settings))):
        scheduler_overrides(tmp_path, in_latents=False)


CLIPPED = {
    "unsaid by a DDPMScheduler": ({"_class_name": "DDPMScheduler"}, False, 1.0),
    "unsaid by a solver": ({"_class_name": "DPMSolverMultistepScheduler"}, False, None),
    "said": ({"_class_name": "DDIMScheduler", "clip_sample_range": 2}, False, 2.0),
    "not at all": ({"_class_name": "DDPMScheduler", "clip_sample": False}, False, None),
    "of latents": ({"_class_name": "DDIMScheduler", "clip_sample": True}, True, None),
}


@pytest.mark.parametrize(("settings", "in_latents", "clip"), CLIPPED.values(), ids=CLIPPED)
def test_a_scheduler_that_clips_images_is_a_denoiser_that_does(
    tmp_path, capfd, settings, in_latents, clip
):
    config = {"beta_schedule": "linear"} | settings
    (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
    found = scheduler_overrides(tmp_path, in_latents)
    assert [each for each in found if "clip" in each] == [f"denoiser.clip={clip}"] * bool(clip)
    assert ("clip_sample" in capfd.readouterr().err) == in_latents


def test_a_shift_of_the_steps_is_named(tmp_path, capfd):
    for shift, is_said in ((3.0, True), (1.0, False)):
        config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift}
        (tmp_path / "scheduler_config.json").write_text(json.dumps(config))
        assert "schedule=rectified" in scheduler_overrides(tmp_path, in_latents=True)
        assert ("shift=3.0" in capfd.readouterr().err) == is_said


SCHEDULERS = {
    "linear": {"beta_schedule": "linear", "beta_start": 0.0002, "beta_end": 0.03},
    "scaled": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "zero": {"beta_schedule": "scaled_linear", "rescale_betas_zero_snr": True},
}


@pytest.mark.parametrize("settings", SCHEDULERS.values(), ids=SCHEDULERS)
def test_a_scheduler_becomes_its_schedule(tmp_path, settings):
    scheduler = diffusers.DDIMScheduler(prediction_type="v_prediction", **settings)
    scheduler.save_pretrained(tmp_path)
    found = scheduler_overrides(tmp_path, in_latents=False)
    assert "objective/prediction=v" in found
    cfg = composed("train", "name=x", *(each for each in found if each.startswith("schedule")))
    levels = instantiate(cfg, "schedule")(torch.arange(1, 1001) / 1000)
    expected = scheduler.alphas_cumprod
    torch.testing.assert_close(levels.alpha.float() ** 2, expected, rtol=1e-4, atol=1e-7)
