"""Augmentation: its effect on images, its labels, and where they are used."""

import math

import pytest
import torch
from helpers.refusals import out_of_range, refused
from helpers.small_networks import small_dit
from helpers.tiny_runs import (
    ALONE,
    TINY,
    checkpoint_of,
    killed_after_two_steps,
    require_equal_training,
)
from torch import nn
from torchvision.transforms import v2

from diffusion_lab.backbone.conditioning import ClassLabel, Unconditional
from diffusion_lab.common.labels import Classes
from diffusion_lab.data.augmentation import NonLeaky, augment, check_augmentation, mirrors
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.objective import Flow, LogitNormal, Objective
from diffusion_lab.diffusion.objective.loss import Denoising
from diffusion_lab.diffusion.schedule import Rectified

EDM = {
    "flip_x": True,
    "flip_y": True,
    "scale": 0.2,
    "rotation": 180,
    "anisotropy": 0.2,
    "translation": 0.125,
}
OFF = {part: type(value)(0) for part, value in EDM.items()}
# columns of a label by transformation
COLUMNS = {
    "flip_x": [0],
    "flip_y": [1],
    "scale": [2],
    "rotation": [3, 4],
    "anisotropy": [5, 6],
    "translation": [7, 8],
}


def only(*parts: str, probability: float = 1.0) -> NonLeaky:
    return NonLeaky(probability, **OFF | {part: EDM[part] for part in parts})


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def noise(count: int, *shape: int) -> torch.Tensor:
    return 2 * torch.rand(count, *shape, generator=seeded(1)) - 1


def label(**values: list[float]) -> torch.Tensor:
    row = torch.zeros(1, 9)
    for part, value in values.items():
        row[0, COLUMNS[part]] = torch.tensor(value)
    return row


def moments(image: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Centroid (2,) and covariance (2, 2) of an image (H, W) over black, right and up, in pixels.

    Both are measured from the image's centre.
    """
    weight = (image.double() + 1) / (image.double() + 1).sum()
    height, width = image.shape
    y = ((height - 1) / 2 - torch.arange(height).double())[:, None].expand(height, width)
    x = (torch.arange(width).double() - (width - 1) / 2).expand(height, width)
    places = torch.stack([x, y]).flatten(1)
    mean = places @ weight.flatten()
    centred = places - mean[:, None]
    return mean, centred * weight.flatten() @ centred.T


# places of the pixels of 161 x 153, right of the centre and up
X, Y = torch.arange(153) - 76, (80 - torch.arange(161))[:, None]


def blob(x: torch.Tensor = X, y: torch.Tensor = Y) -> torch.Tensor:
    """A slanted Gaussian off the centre, white on black, at these places: (1, 1, H, W)."""
    x, y = x - 4, y + 2
    return 2 * torch.exp(-(x**2 / 30 + y**2 / 14 + x * y / 40))[None, None] - 1


def test_nothing_is_done_where_everything_is_off():
    images = noise(20, 3, 5, 7)
    augmented, labels = NonLeaky(0.0, **OFF)(images)
    assert torch.equal(augmented, images)
    assert torch.equal(labels, torch.zeros(20, 9))
    assert torch.equal(NonLeaky(1.0, **OFF)(images)[0], images)
    pixels = torch.randint(256, (20, 3, 5, 7), dtype=torch.uint8)
    assert torch.equal(augment(NonLeaky(0.0, **OFF), pixels)[0], pixels)
    assert augment(None, pixels) == (pixels, None)


@pytest.mark.parametrize("shape", [(3, 8, 8), (1, 5, 9)])
@pytest.mark.parametrize(("part", "axis", "column"), [("flip_x", -1, 0), ("flip_y", -2, 1)])
def test_flips_are_exact(part, axis, column, shape):
    images = noise(40, *shape)
    before = images.clone()
    augmented, labels = only(part)(images)
    flipped = labels[:, column].bool()
    assert 0 < flipped.sum() < 40
    assert torch.equal(augmented[flipped], images.flip(axis)[flipped])
    assert torch.equal(augmented[~flipped], images[~flipped])
    assert torch.equal(images, before)


def test_half_are_mirrored_even_at_probability_0():
    _, labels = only("flip_x", "flip_y", probability=0.0)(noise(2000, 1, 2, 2))
    assert labels[:, 0].mean().item() == pytest.approx(0.5, abs=0.04)
    assert not labels[:, 1:].any()


def test_quarter_turns_go_counter_clockwise():
    images = noise(1, 3, 9, 9)
    for turns in (1, 2, 3):
        angle = turns * math.pi / 2
        done = only("rotation").apply(
            images, label(rotation=[math.cos(angle) - 1, math.sin(angle)])
        )
        torch.testing.assert_close(done, images.rot90(turns, (2, 3)), atol=1e-5, rtol=0)


def test_a_shift_by_whole_pixels_moves_them_and_mirrors_beyond_the_edge():
    images = noise(1, 2, 16, 8)
    done = only("translation").apply(images, label(translation=[2.0, -0.5]))  # 2 right, 1 up
    expected = torch.cat([images[..., :2].flip(-1), images[..., :-2]], dim=-1)
    expected = torch.cat([expected[..., 1:, :], expected[..., -1:, :]], dim=-2)
    torch.testing.assert_close(done, expected, atol=1e-5, rtol=0)


def forward(labels: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """EDM's map of a point, right and up of the centre: matrix (2, 2) and shift (2,).

    It scales first, then rotates, then stretches, then shifts.
    """
    _, _, size, cos, sin, across, along, right, down = labels[0].double().tolist()
    scale = 2 ** (0.2 * size) * torch.eye(2).double()
    turn = torch.tensor([[cos + 1, -sin], [sin, cos + 1]]).double()
    length = math.hypot(across, along)
    unit = torch.tensor([[across, along], [-along, across]]).double() / (length or 1)
    factors = torch.tensor([2 ** (0.2 * length), 2 ** (-0.2 * length)]).double()
    stretch = unit.T @ factors.diag() @ unit if length else torch.eye(2).double()
    return stretch @ turn @ scale, 0.125 * torch.tensor([right * width, -down * height]).double()


@pytest.mark.parametrize("parts", [*([part] for part in list(EDM)[2:]), list(EDM)[2:]], ids=str)
def test_a_label_tells_how_the_moments_of_an_image_change(parts):
    image, augmentation = blob(), only(*parts)
    mean, covariance = moments(image[0, 0])
    for seed in range(12):
        torch.manual_seed(seed)
        labels = augmentation.draw(1)
        labels[:, [2, 5, 6, 7, 8]] *= 0.3  # keeps the blob inside, and its mirror images outside
        (done,) = augmentation.apply(image, labels)
        matrix, shift = forward(labels, *image.shape[2:])
        after, spread = moments(done[0])
        torch.testing.assert_close(after, matrix @ mean + shift, atol=0.05, rtol=0)
        torch.testing.assert_close(spread, matrix @ covariance @ matrix.T, atol=0.2, rtol=0)


def test_the_order_of_the_parts_is_heard():
    quarter, axis = [-1.0, 1.0], [5.0, 0.0]
    both = only("rotation", "anisotropy")
    image = blob()
    together = both.apply(image, label(rotation=quarter, anisotropy=axis))
    turned_first = both.apply(both.apply(image, label(rotation=quarter)), label(anisotropy=axis))
    turned_last = both.apply(both.apply(image, label(anisotropy=axis)), label(rotation=quarter))
    inside = (..., slice(50, -50), slice(50, -50))  # the part that mirror images do not reach
    torch.testing.assert_close(together[inside], turned_first[inside], atol=0.01, rtol=0)
    assert (together - turned_last)[inside].abs().max() > 0.5


def test_smooth_images_are_resampled_closely_and_nothing_leaves_the_range():
    cos, sin = math.cos(1), math.sin(1)
    turned = only("rotation").apply(blob(), label(rotation=[cos - 1, sin]))
    # each pixel's place before a rotation by one radian, counter-clockwise
    expected = blob(cos * X + sin * Y, -sin * X + cos * Y)
    torch.testing.assert_close(turned, expected, atol=0.03, rtol=0)
    hard = noise(100, 1, 8, 8).sign()
    augmented, _ = only(*EDM)(hard)
    assert augmented.abs().max() <= 1


def test_each_part_has_its_rate_and_its_distribution_and_zeros_elsewhere():
    labels = only(*EDM, probability=0.12).draw(50_000)
    done = {part: (labels[:, columns] != 0).any(1) for part, columns in COLUMNS.items()}
    rates = {part: value.double().mean().item() for part, value in done.items()}
    expected = dict.fromkeys(EDM, 0.12) | {"flip_x": 0.5, "flip_y": 0.06}
    assert rates == pytest.approx(expected, abs=0.006)
    both = (done["scale"] & done["rotation"]).double().mean().item()
    assert both == pytest.approx(0.0144, abs=0.003), "independently"
    assert set(labels[:, 0].tolist()) == set(labels[:, 1].tolist()) == {0.0, 1.0}
    for part in ("scale", "translation"):
        values = labels[done[part]][:, COLUMNS[part]]
        assert values.mean().item() == pytest.approx(0, abs=0.04)
        assert values.std().item() == pytest.approx(1, abs=0.04)
    cos, sin = labels[done["rotation"], 3:5].unbind(1)
    angle = torch.atan2(sin, cos + 1)
    torch.testing.assert_close(torch.hypot(sin, cos + 1), torch.ones_like(cos))
    assert angle.abs().mean().item() == pytest.approx(math.pi / 2, abs=0.05)
    axis = labels[done["anisotropy"], 5:7]
    assert axis.mean(0).abs().max() < 0.04
    assert axis.square().sum(1).mean().item() == pytest.approx(1, abs=0.06)


def test_the_largest_angle_is_kept():
    labels = NonLeaky(1.0, **OFF | {"rotation": 15.0}).draw(5000)
    angle = torch.rad2deg(torch.atan2(labels[:, 4], labels[:, 3] + 1)).abs()
    assert 14.9 < angle.max() <= 15.001


@pytest.mark.parametrize("part", EDM)
def test_a_part_that_is_off_is_told_by_zeros(part):
    parts = EDM | {part: OFF[part]}
    labels = NonLeaky(1.0, **parts).draw(200)
    assert not labels[:, COLUMNS[part]].any()
    others = [column for other in EDM if other != part for column in COLUMNS[other]]
    assert labels[:, others].any(0).all()


def test_images_that_nothing_is_done_to_are_the_same_bits():
    images = noise(300, 3, 6, 6)
    augmented, labels = only(*EDM, probability=0.12)(images)
    as_it_is = ~labels.any(1)
    assert 50 < as_it_is.sum() < 250
    assert torch.equal(augmented[as_it_is], images[as_it_is])
    changed = (augmented != images).flatten(1).any(1)
    assert torch.equal(changed, ~as_it_is)


@pytest.mark.parametrize("shape", [(1, 7, 5), (3, 8, 8), (2, 1, 1)])
def test_a_seed_fixes_it_whatever_the_precision_around(shape):
    images, augmentation = noise(50, *shape), only(*EDM, probability=0.5)
    torch.manual_seed(3)
    expected, labels = augmentation(images)
    assert expected.shape == images.shape
    torch.manual_seed(3)
    with torch.autocast("cpu", torch.bfloat16):
        again = augmentation(images)
    for one, other in zip((expected, labels), again, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert torch.equal(one, other)
    torch.manual_seed(4)
    assert not torch.equal(augmentation(images)[1], labels)


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        *(("probability", value) for value in (1.5, -0.1, math.nan, True, "0.1", None)),
        *(("rotation", value) for value in (181, math.nan, "right")),
        *(("scale", value) for value in (-1, math.nan, math.inf, False)),
        *(("anisotropy", value) for value in (-1, [0.2])),
        ("translation", -1),
        ("flip_x", 1),
        ("flip_y", "no"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(argument, value):
    with out_of_range(argument):
        NonLeaky(**{"probability": 0.1} | EDM | {argument: value})


def denoiser(backbone, conditioning=ClassLabel, **settings) -> Denoiser:
    torch.manual_seed(0)
    return Denoiser(
        backbone, conditioning, Flow(), (1, 8, 8), labels=Classes.numbered(3), **settings
    ).eval()


def test_weights_of_a_network_are_the_same_and_one_more():
    plain, told = (denoiser(small_dit(), augmentation_labels=n) for n in (0, 9))
    assert set(told.state_dict()) - set(plain.state_dict()) == {"augmentation.weight"}
    assert told.augmentation.weight.shape == (16, 9)
    for name, value in plain.state_dict().items():
        assert torch.equal(value, told.state_dict()[name])


class Recorder(nn.Module):
    """Records the conditions that it is given."""

    condition_width = 4

    def __init__(self, in_channels, out_channels, image_size):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))
        self.seen = []

    def forward(self, x, noise, condition):
        self.seen.append(condition)
        return self.scale * x[:, :1]


@pytest.mark.parametrize("conditioning", [ClassLabel, Unconditional])
def test_a_condition_has_as_many_tokens_in_sampling_as_in_training(conditioning):
    model = denoiser(Recorder, conditioning, augmentation_labels=9)
    x, level = noise(4, 1, 8, 8), Rectified()(torch.tensor(0.5))
    told = only(*EDM).draw(4)
    vector = told @ model.augmentation.weight.T
    model(x, level, Given(augmentation=told))
    model(x, level)
    plain = model.conditioning(None, 4)
    for condition, expected in zip(model.backbone.seen, (vector, torch.zeros(4, 4)), strict=True):
        assert condition.labels is plain.labels or torch.equal(condition.labels, plain.labels)
        before = 0 if plain.vector is None else plain.vector
        torch.testing.assert_close(condition.vector, before + expected)
        torch.testing.assert_close(condition.tokens[:, -1], expected)
        assert condition.tokens.shape[1] == (1 if plain.tokens is None else 2)


def test_training_tells_both_passes_and_label_dropout_leaves_it():
    model = denoiser(Recorder, self_conditioning=True, augmentation_labels=9)
    objective = Objective(Rectified(), Flow(), LogitNormal(), Denoising(), label_dropout=1.0)
    told = only(*EDM).draw(4)
    for seed in range(6):
        given = Given(torch.arange(4) % 3, augmentation=told)
        objective(model, noise(4, 1, 8, 8), given, seeded(seed))
    assert len(model.backbone.seen) > 6, "some passes were made for self-conditioning"
    for condition in model.backbone.seen:
        assert condition.labels.tolist() == [3] * 4
        torch.testing.assert_close(condition.tokens[:, -1], told @ model.augmentation.weight.T)


@pytest.mark.long
def test_a_run_augments_training_alone_and_resumes_exactly(lab, tmp_path, monkeypatch):
    original, calls = NonLeaky.__call__, []

    def counted(self, images):
        calls.append(len(images))
        return original(self, images)

    monkeypatch.setattr(NonLeaky, "__call__", counted)
    augmented = ["augmentation=non_leaky", "augmentation.probability=0.5", "data.flip=true"]
    kept = ["callbacks.checkpoint.keep_every_n_steps=2", "trainer.max_steps=3"]
    split = ["micro_batch_size=4", "run_dir=whole"]
    assert "data.flip=true" in lab.done("train", *TINY, *ALONE, *augmented, *kept, *split)
    lab.done("train", f"resume={killed_after_two_steps(tmp_path / 'whole')}")
    assert calls == [4] * 2 * (3 + 1), "two micro-batches a step, and no validation image"
    require_equal_training(tmp_path / "whole", tmp_path / "parts")
    for part in ("state_dict", "current_model_state"):
        assert "denoiser.augmentation.weight" in checkpoint_of(tmp_path / "whole")[part]

    result = lab.result("profile", "run=parts", "device=meta")
    modules = {module["name"]: module for module in result["modules"]}
    assert modules["augmentation"]["params"] == modules["augmentation"]["macs"] == 9 * 32


def test_a_transform_of_torchvision_changes_each_image_by_itself_and_is_not_told():
    images = torch.arange(64, dtype=torch.uint8).reshape(1, 1, 8, 8).repeat(50, 1, 1, 1)
    torch.manual_seed(0)
    flipped, told = augment(v2.RandomHorizontalFlip(), images)
    assert told is None
    mirrored = (flipped == images.flip(3)).all(dim=(1, 2, 3))
    assert ((flipped == images).all(dim=(1, 2, 3)) ^ mirrored).all()
    assert 10 < mirrored.sum() < 40


def test_augmentations_that_mirror_are_known():
    edm = NonLeaky(0.1, flip_x=True, flip_y=False, scale=0, rotation=0, anisotropy=0, translation=0)
    flip, turn = v2.RandomHorizontalFlip(), v2.RandomRotation(10)
    assert all(
        map(mirrors, (edm, flip, v2.Compose([turn, v2.RandomApply([flip])]), nn.Sequential(flip)))
    )
    assert not any(map(mirrors, (None, turn, v2.RandomVerticalFlip(), v2.Compose([turn]))))


def test_a_transform_that_changes_the_kind_of_image_is_refused():
    check_augmentation(v2.RandomRotation(90), (1, 8, 8))
    for transform, words in (
        (v2.Resize(4), ("Resize", "size")),
        (v2.CenterCrop(4), ("CenterCrop", "size")),
        (v2.Normalize([0.5, 0.5], [1, 1]), ("Normalize",)),
    ):
        with refused(*words):
            check_augmentation(transform, (1, 8, 8))
