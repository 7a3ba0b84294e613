"""Files that the command `sample` writes."""


def test_every_way_to_draw_has_a_file_of_its_own(lab, run_folder):
    ways = [
        [],
        ["sampler=ddim"],
        ["sampler=ddim", "guidance.clip=1"],
        ["guidance.clip=1", "sampler=ddim"],  # the same
        ["sampler=ddim", "guidance.clip=2"],
        ["sampler=ddim", "sampler/time_grid=karras"],
        ["sampler=ddim", "guidance=dynamic_thresholding"],
    ]
    before = set(run_folder.rglob("*.png"))
    for way in ways:
        code, _, err = lab("sample", "run=run", "num_samples=1", "device=cpu", *way)
        assert code == 0, err
    assert len(set(run_folder.rglob("*.png")) - before) == len(ways) - 1
