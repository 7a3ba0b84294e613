"""Pictures: exact conversions, padding that cropping undoes, grids and files."""

import errno

import pytest
import torch
from helpers.refusals import refused
from PIL import Image

from diffusion_lab.common.images import (
    crop_to,
    grid,
    pad_to,
    save_png,
    to_float,
    to_uint8,
)

ALL_VALUES = torch.arange(256, dtype=torch.uint8)


def test_to_float_spans_minus_one_to_one():
    assert to_float(ALL_VALUES).dtype == torch.float32
    assert to_float(ALL_VALUES)[[0, 255]].tolist() == [-1.0, 1.0]
    assert to_float(ALL_VALUES).mean().abs() < 1e-6


def test_all_256_values_survive_the_round_trip():
    assert torch.equal(to_uint8(to_float(ALL_VALUES)), ALL_VALUES)


def test_to_uint8_rounds_to_the_nearest_in_float32_and_clips():
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([9.6, 10.4, 250.51], dtype=dtype) / 127.5 - 1
        assert to_uint8(values).tolist() == [10, 10, 251]
    assert to_uint8(torch.tensor([-3.0, -1.01, 1.01, 40.0])).tolist() == [0, 0, 255, 255]
    values = torch.linspace(-1, 1, 1001).to(torch.bfloat16)
    assert torch.equal(to_uint8(values), to_uint8(values.double().float()))


def test_pad_centres_on_black_and_crop_undoes_it():
    images = torch.randint(1, 256, (2, 3, 28, 26), dtype=torch.uint8)
    padded = pad_to(images, 32)
    assert (padded.shape, padded.dtype) == ((2, 3, 32, 32), torch.uint8)
    assert torch.equal(padded[:, :, 2:30, 3:29], images)
    assert padded.long().sum() == images.long().sum()
    for size in (28, 29, 31, 32):
        assert torch.equal(crop_to(pad_to(images, size), 28, 26), images)
    with refused("28x26", "16x16", by=ValueError):
        pad_to(images, 16)


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_reads_left_to_right_and_top_to_bottom(channels):
    images = torch.arange(5, dtype=torch.uint8).reshape(5, 1, 1, 1).expand(5, channels, 2, 3)
    picture = grid(images, columns=3)
    assert picture.shape == (channels, 2 * 4 + 2, 3 * 5 + 2)
    assert picture.dtype == torch.uint8
    for index in range(5):
        top, left = 2 + index // 3 * 4, 2 + index % 3 * 5
        assert picture[:, top : top + 2, left : left + 3].unique().tolist() == [index]
    assert (picture == 255).sum() == picture.numel() - 5 * channels * 6  # the rest is white


@pytest.mark.parametrize("channels", [1, 3])
def test_png_holds_the_enlarged_picture(tmp_path, channels):
    picture = torch.randint(256, (channels, 4, 5), dtype=torch.uint8)
    path = tmp_path / "samples" / "grid.png"
    save_png(picture, path, scale=3)
    with Image.open(path) as image:
        assert image.size == (15, 12)
        assert image.mode == {1: "L", 3: "RGB"}[channels]
        for row, column in [(0, 0), (3, 4), (2, 1)]:
            for corner in [(0, 0), (2, 2)]:
                pixel = image.getpixel((3 * column + corner[0], 3 * row + corner[1]))
                values = pixel if channels == 3 else (pixel,)
                assert list(values) == picture[:, row, column].tolist()
    assert [p.name for p in path.parent.iterdir()] == ["grid.png"]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "grid.png"
    save_png(torch.zeros(1, 4, 4, dtype=torch.uint8), path)
    before = path.read_bytes()

    def full_disk(image, file, **_):
        file.write(b"half a pict")
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(Image.Image, "save", full_disk)
    with pytest.raises(OSError) as caught:  # noqa: PT011, its number tells
        save_png(torch.ones(1, 4, 4, dtype=torch.uint8), path)
    assert caught.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
