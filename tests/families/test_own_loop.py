"""A model in a training loop of one's own, as the page on scripts has it."""

import re
from functools import partial

import pytest
import torch
from helpers.compositions import TINY_NETWORK
from helpers.paths import ROOT
from helpers.refusals import refused
from PIL import Image

import diffusion_lab as dl
from diffusion_lab.assembly.objects import build_model
from diffusion_lab.common.labels import Classes
from diffusion_lab.common.messages import UserError
from diffusion_lab.families.diffusion.model import DiffusionModel, configured

PAGE = (ROOT / "docs/pages/python.md").read_text()
SHAPE = (1, 8, 8)
UNEMBEDDED = ["backbone=unet_small", "backbone.channels=8", "backbone.stage.head_channels=null"]
UNEMBEDDED += ["backbone.norm.groups=8", "backbone.norm.least=1"]
small = partial(dl.build, *TINY_NETWORK, image_shape=SHAPE)


def batch(count: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, *SHAPE), dtype=torch.uint8, generator=generator)
    return images, torch.arange(count) % 10


@pytest.mark.long
def test_the_scripts_of_the_page_run_and_train():
    batches = [(torch.full((8, 1, 28, 28), 200, dtype=torch.uint8), torch.arange(8))] * 30
    names = {"batches": batches}
    for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        torch.manual_seed(0)
        exec(code, names)
    assert names["samples"].shape == (20, 1, 28, 28)
    assert names["samples"].dtype == torch.uint8
    assert names["loss"] < 1  # of images that are all alike; of a new network it is 1.3
    assert len(names["levels"].t) == 11


def test_the_loss_is_that_of_the_objective_for_bytes_and_for_floats():
    model, (images, labels) = small(num_classes=10), batch()
    x0 = images / 127.5 - 1
    torch.manual_seed(0)
    expected = model.objective(model.denoiser, x0, dl.Given(labels)).minimised.mean()
    for given in (images, x0):
        torch.manual_seed(0)
        assert model.loss(given, labels) == expected
    assert model.loss(images).isfinite()


@pytest.mark.long
def test_samples_are_fixed_by_their_seed_and_labels():
    model = small(num_classes=10)
    draw = partial(model.sample, steps=3, guidance=1.5)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)  # a new network's last layer is 0
    assert torch.equal(draw(4), draw(4, labels=[0, 1, 2, 3]))
    assert torch.equal(draw(2, labels=3), draw(2, labels=torch.tensor([3, 3])))
    assert not torch.equal(draw(2, labels=3), draw(2, labels=4))
    assert not torch.equal(draw(2), draw(2, seed=1))
    assert not torch.equal(draw(2), draw(2, sampler="heun"))
    assert model.denoiser.training


@pytest.mark.long
def test_a_run_that_is_loaded_draws_what_sample_draws(run_folder, lab):
    lab.done("sample", f"run={run_folder}", "num_samples=4", "save=png", "precision=32-true")
    model = dl.load(run_folder / "checkpoints/last.ckpt")
    drawn = model.sample(4)
    files = sorted((run_folder / "samples").glob("*/*.png"))
    assert len(files) == 4
    for image, path in zip(drawn, files, strict=True):
        with Image.open(path) as picture:
            assert bytes(image.permute(1, 2, 0).contiguous().numpy()) == picture.tobytes()
    assert model.loss(torch.zeros(2, *drawn.shape[1:], dtype=torch.uint8)).requires_grad


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["alignment=dispersive"], "alignment"),
        (["objective=consistency_distillation", "objective.teacher.run=x"], "objective.teacher"),
    ],
)
def test_a_run_whose_loss_has_another_part_is_loaded_for_drawing_alone(overrides, key):
    cfg, kind = configured(*TINY_NETWORK, *overrides), Classes.numbered(10)
    model = DiffusionModel(cfg, build_model(cfg, SHAPE, kind), kind)
    assert model.sample(2, steps=2).shape == (2, *SHAPE)
    with refused(key, by=UserError):
        model.loss(*batch())


@pytest.mark.long
def test_wrong_calls_are_refused():
    model, (images, labels) = small(num_classes=10), batch()
    without_classes = small("conditioning=none", "guidance=none", num_classes=10)
    for call, name in {
        lambda: dl.build("backbone=dut", image_shape=SHAPE): "dit",
        lambda: dl.build("backbone.widht=8", image_shape=SHAPE): "width",
        lambda: dl.build("backbone=dit", image_shape=28): "channels, height, width",
        lambda: dl.build("backbone=dit", image_shape=(1, 28, -28)): "channels, height, width",
        lambda: dl.build("family=gan", image_shape=SHAPE, num_classes=10): "family=gan",
        lambda: small("init_from=run"): "init_from",
        lambda: small("guidance=classifier", "guidance.classifier=x"): "guidance.classifier",
        lambda: small("alignment=irepa"): "alignment",
        lambda: dl.build(*UNEMBEDDED, image_shape=SHAPE): "one channel per group",
        lambda: small("objective=reflow", "objective.teacher.run=x"): "objective.teacher",
        lambda: small("first_stage=hub_vae", "first_stage.scale=measured"): "first_stage.scale",
        lambda: model.sample(2, labels=10): "9",
        lambda: model.sample(2, labels=[1]): "1 labels",
        lambda: model.sample(0): "count",
        lambda: model.sample(2, seed=-1): "seed",
        lambda: model.sample(2, seed=None): "seed",
        lambda: dl.command("study", "unet_vs_dit"): "diffusion-lab study",
        lambda: model.sample(2, sampler="hein"): "heun",
        lambda: small().sample(2, guidance=2.0): "conditioning",
        lambda: without_classes.sample(2, labels=3): "labels",
        lambda: dl.load("nowhere"): "nowhere",
    }.items():
        with refused(name, by=UserError):
            call()
    for wrong, name in (
        ((images[..., :4], labels), "8, 8"),
        ((images, labels + 9), "0 to 9"),
        ((images, labels[:-1]), "int64"),
        ((images, labels[:, None]), "int64"),
        ((images, labels.float()), "int64"),
        ((images.float(), labels), r"\[-1, 1\]"),
    ):
        with pytest.raises(ValueError, match=name):
            model.loss(*wrong)
    with pytest.raises(ValueError, match="uint8"):
        small("augmentation=non_leaky").loss(images / 127.5 - 1)
