"""Copies are found, fresh samples are not suspected, and the command reports both."""

import json
from types import SimpleNamespace

import pytest
import torch
from helpers.refusals import refused
from PIL import Image

from diffusion_lab.analysis.memorization import compared, fid_gap
from diffusion_lab.data.images import subset
from diffusion_lab.metrics.neighbours import Neighbours, equal_sides
from diffusion_lab.runs import checkpoints
from diffusion_lab.runs.current import CurrentWeights


def draw(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 16, generator=torch.Generator().manual_seed(seed))


TRAINING, TEST = draw(3000, 0), draw(1000, 1)


def neighbours(generated, test, training) -> Neighbours:
    """Neighbours of images of one class, from views of generated and test ones."""
    sides = equal_sides(*(torch.zeros(len(x), dtype=int) for x in (training, test[0])))
    return Neighbours.of(generated, test, training, sides)


def evidence(generated: torch.Tensor, training: torch.Tensor = TRAINING) -> dict[str, float]:
    return neighbours([generated], [TEST], training).results()


def test_fresh_samples_are_not_suspected():
    found = evidence(draw(1000, 2))
    assert found["nearer_to_training"] == pytest.approx(0.5, abs=0.05)
    assert found["distance_ratio"] == pytest.approx(1, abs=0.02)
    assert 0 <= found["copy_ratio"] <= 2.5
    assert found["near_duplicates"] == 0


def test_copies_are_found_with_little_noise_on_them():
    small = TRAINING[:500]
    found = evidence(small + 0.01 * draw(500, 3), small)
    assert found["nearer_to_training"] > 0.99
    assert found["distance_ratio"] < 0.1
    assert found["copies"] == 1
    assert found["copy_ratio"] == pytest.approx(100, rel=0.1)
    assert found["near_duplicates"] > 0.99
    exact = evidence(TRAINING[:1].repeat(10, 1))  # has numbers, too
    assert exact["copies"] == exact["near_duplicates"] == 1


def test_a_share_of_copies_is_that_share():
    mixed = torch.cat([TRAINING[:100] + 0.01 * draw(100, 4), draw(300, 5)])
    found = evidence(mixed)
    assert found["copies"] == pytest.approx(0.25, abs=0.02)
    assert found["near_duplicates"] == pytest.approx(0.25, abs=0.02)


def test_blurred_samples_look_like_copies_by_distance_but_not_beside_test_images():
    found = evidence(0.5 * draw(1000, 6))
    assert found["copy_ratio"] > 10
    assert found["nearer_to_training"] == pytest.approx(0.5, abs=0.05)
    assert found["distance_ratio"] == pytest.approx(1, abs=0.02)


def test_mirrored_copies_are_copies_where_training_images_are_mirrored():
    mirror = -torch.eye(16)  # does to features what flipping does to pixels
    views = [TRAINING[:200] @ mirror, TRAINING[:200]]
    test = [TEST, TEST @ mirror]
    assert neighbours(views[:1], test[:1], TRAINING).results()["copies"] < 0.1
    found = neighbours(views, test, TRAINING)
    assert found.results()["copies"] == found.results()["near_duplicates"] == 1
    assert torch.equal(found.index[:, 0], torch.arange(200))


@pytest.mark.parametrize("count", [10, 50, 300])
def test_the_copy_ratio_is_one_by_chance_also_for_few_test_images(count):
    ratios = [
        neighbours([draw(400, 100 + s)], [draw(count, 200 + s)], draw(400, 300 + s)).results()
        for s in range(40)
    ]
    mean = sum(ratio["copy_ratio"] for ratio in ratios) / len(ratios)
    assert mean == pytest.approx(1, abs=0.6)


def test_chance_spreads_more_where_samples_are_alike():
    varied = evidence(draw(500, 11))["nearer_to_training_std"]
    alike = evidence(0.01 * draw(500, 12))["nearer_to_training_std"]
    assert varied < 0.05
    assert alike > 0.2


def test_the_fid_gap_is_above_zero_for_copies_and_near_it_for_fresh_samples():
    copied = fid_gap(TRAINING[:300], TEST[:300], TRAINING[:300])
    assert copied["to_training"] == pytest.approx(0, abs=1e-6)
    assert copied["gap"] > 0.5
    fresh = fid_gap(draw(300, 9), TEST[:300], TRAINING[300:600])
    assert abs(fresh["gap"]) < 0.3 * copied["gap"]
    assert fresh["reference_images"] == 300


def test_both_sides_have_equally_many_images_of_each_class():
    training, test = torch.arange(60) % 3, torch.arange(100) % 4 + 1
    ours, theirs = equal_sides(training, test)
    assert training[ours].bincount().tolist() == test[theirs].bincount().tolist() == [0, 20, 20]
    assert len(ours.unique()) == len(theirs.unique()) == 40
    assert [len(side) for side in equal_sides(training, training + 3)] == [0, 0]


@pytest.mark.long
def test_fresh_images_of_all_classes_are_no_nearer_to_a_few_balanced_training_images():
    """Held-out images whose classes vary by chance would make nearer_to_training 0.52."""
    classes, seeds = 10, 150
    modes = 3 * torch.randn(classes, 16, generator=torch.Generator().manual_seed(0))
    nearer, gaps = [], []
    for seed in range(seeds):
        labels = torch.randint(classes, (3, 300), generator=torch.Generator().manual_seed(seed))
        labels[2] = torch.arange(300) % classes  # generated images are balanced
        training, test, generated = modes[labels] + draw(900, seed).reshape(3, 300, 16)
        few = subset(labels[0], None, 6, seed)
        sides = equal_sides(labels[0][few], labels[1])
        training = training[few]
        found = Neighbours.of([generated], [test], training, sides).results()
        nearer.append(found["nearer_to_training"])
        gaps.append(fid_gap(generated, test[sides[1]], training[sides[0]])["gap"])
    for values, expected in ((nearer, 0.5), (gaps, 0.0)):
        values = torch.tensor(values, dtype=torch.float64)
        error = values.std() / seeds**0.5
        assert (values.mean() - expected).abs() < 2.5 * error


def test_test_images_that_are_training_images_say_nothing_of_chance():
    images = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1)
    data = SimpleNamespace(
        train_images=lambda: images[:8],
        test_images=lambda: images[[3, 9, 11, 0]],
        train_labels=lambda: torch.zeros(8, dtype=int),
        test_labels=lambda: torch.zeros(4, dtype=int),
        classes_of=lambda labels: labels,
    )
    places, sides = compared(data, mirrored=False)
    assert places.tolist() == [1, 2]
    assert len(sides[0]) == len(sides[1]) == 2
    data.test_images = lambda: images[[3, 9, 0, 0]]
    with refused("2 training and 2 test images"):
        compared(data, mirrored=False)
    half = torch.arange(16, dtype=torch.uint8).view(4, 1, 1, 4)
    data.train_images, data.test_images = lambda: half[:2], lambda: half[[2, 3, 0, 1]].flip(-1)
    data.train_labels = lambda: torch.zeros(2, dtype=int)
    assert [len(compared(data, each)[0]) for each in (False, True)] == [4, 2]


@pytest.mark.long
def test_the_command_writes_a_report_and_pictures(lab, run_folder):
    logged = json.loads((run_folder / "summary.json").read_text())["metrics"]
    arguments = ["num_samples=12", "pairs=5", "batch_size=8", "precision=32-true", "json=true"]
    result = lab.result("memorization", "run=run", *arguments)
    assert result == json.loads((run_folder / "memorization/report.json").read_text())
    assert result["training_images"] == 64
    protocol = result["protocol"]
    assert (protocol["extractor"], protocol["num_samples"]) == ("efficientnet_lite0-96", 12)
    assert len(protocol["test"]) == len(protocol["extractor_fingerprint"]) == 64
    assert len(protocol["fingerprint"]) == 12
    assert protocol["mirrored"] is False
    assert CurrentWeights(run_folder).match({"weights_file": result["weights_file"]})
    assert CurrentWeights(run_folder).match({"checkpoint": result["checkpoint"]})
    assert set(result["neighbours"]) == {"efficientnet_lite0-96", "pixels"}
    assert len(result["loss_by_level"]) == 10
    for name, losses in result["loss_by_level"].items():
        assert losses["training"] > 0
        assert losses["test"] == pytest.approx(logged[f"test_by_level/{name}"], rel=0.02)
    for name in ("pairs.png", "losses.png"):
        with Image.open(run_folder / "memorization" / name) as picture:
            assert picture.width > 300


@pytest.mark.long
def test_copies_of_all_checkpoints_are_counted(lab, tmp_path, run_folder):
    last = run_folder / "checkpoints/last.ckpt"
    tree, tensors = checkpoints.take_apart(checkpoints.read(last))
    other = {key: each + 0.1 if each.is_floating_point() else each for key, each in tensors.items()}
    checkpoints.save(checkpoints.put_together(tree, other), checkpoints.file_of(run_folder, 1))
    few = ["num_samples=4", "positive_at=null", "precision=32-true", "json=true"]
    result = lab.result("memorization", "run=run", *few, "step=all")
    assert result == json.loads((run_folder / "memorization/report.json").read_text())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone/copies.png").touch()
    first, newest = result["steps"].values()
    assert [*result["steps"]] == ["1", str(checkpoints.step_of(run_folder))]
    for step, found in (("step=1", first), ("step=null", newest)):
        alone = lab.result("memorization", "run=run", *few, step, "output=alone")
        assert alone["neighbours"] == found
    assert first != newest == result["neighbours"]
    assert not (tmp_path / "alone/copies.png").exists()  # of another measurement
    report = (run_folder / "memorization/report.json").read_text()
    lab.result("memorization", "run=run", *few, "step=1")
    assert (run_folder / "memorization/report.json").read_text() == report
    with Image.open(run_folder / "memorization/copies.png") as picture:
        assert picture.width > 1000
