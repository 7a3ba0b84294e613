"""Files that the command `sample` writes."""

import json

import numpy as np
from helpers.compositions import composed
from helpers.refusals import assert_names
from PIL import Image

from diffusion_lab.analysis.sample import also_asked, way


def test_every_way_to_draw_has_a_name_of_its_own():
    ways = [
        [],
        ["sampler=ddim"],
        ["sampler=ddim", "guidance.clip=1"],
        ["guidance.clip=1", "sampler=ddim"],  # the same
        ["sampler=ddim", "guidance.clip=2"],
        ["sampler=ddim", "sampler/time_grid=karras"],
        ["sampler=ddim", "guidance=dynamic_thresholding"],
    ]
    names = {way(composed("train", "name=x", *each)) + also_asked(each) for each in ways}
    assert len(names) == len(ways) - 1


def test_a_picture_of_many_samples_has_the_first_of_them(lab, run_folder, monkeypatch):
    monkeypatch.setattr("diffusion_lab.common.images.MOST_IMAGES", 6)
    wanted = ("num_samples=12", "columns=2", "save=npz", "json=true", "device=cpu")
    code, out, err = lab("sample", "run=run", *wanted)
    assert code == 0, err
    assert_names(err, "first 6 of 12")
    written = json.loads(out.splitlines()[-1])
    assert len(np.load(written["array"])["images"]) == 12
    with Image.open(written["grid"]) as picture:
        assert picture.size == (2 * (2 * 10 + 2), 2 * (3 * 10 + 2))
