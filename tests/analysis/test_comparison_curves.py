"""Curves of metrics measured in training, and which runs and sample grids count as alike."""

import json

import pytest
from helpers.fake_runs import NAME, UNET, draw_grid, fake_group, fake_run

from diffusion_lab.analysis.comparison import compare
from diffusion_lab.analysis.comparison.candidates import read
from diffusion_lab.analysis.comparison.comparing import collect, judge, name_in_rows
from diffusion_lab.analysis.comparison.curves import curve, training_flops
from diffusion_lab.analysis.comparison.pictures import grid_noise, latest_grid, samples
from diffusion_lab.analysis.comparison.verdict import verdicts
from diffusion_lab.metrics.quantities import QUANTITIES

FID = QUANTITIES[0]


def rows_of(folder, rows):
    lines = (json.dumps({"images": 64 * row["step"]} | row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text("".join(lines))


def points(root):
    """The curve of the only composition, (images, minutes, mean), from its runs' metrics.jsonl."""
    found = collect([root])
    (group,) = found.groups
    name = name_in_rows(found, group, FID)
    return [(point.images, point.minutes, point.mean) for point in curve(group, "fid", name)]


def test_a_metric_is_at_the_time_at_which_its_step_was_reached(tmp_path):
    """FID's row is written after an evaluation of 60 seconds, and the loss's row before it."""
    for seed, later in ((0, 0.0), (1, 6.0)):
        folder = fake_run(tmp_path / str(seed), 100.0, seed)
        rows = []
        for step in (50, 75, 100):
            seconds = 2.0 * step + later
            if step != 75:  # step 75 has no other row
                rows += [
                    {"step": step, "train/loss": 0.5, "seconds": seconds},
                    {"step": step, "val/loss": 0.5, "seconds": seconds + 1},
                ]
            rows.append({"step": step, f"fid/{NAME}": 400.0 - step, "seconds": seconds + 60})
        rows_of(folder, rows)
    assert points(tmp_path) == [
        (3200, pytest.approx(103 / 60), 350),
        (4800, pytest.approx(213 / 60), 325),
        (6400, pytest.approx(203 / 60), 300),
    ]


def test_a_curve_ends_where_its_seeds_do_also_after_unequal_numbers_of_images(tmp_path):
    for seed, last in ((0, 100), (1, 110)):
        folder = fake_run(tmp_path / str(seed), 100.0, seed)
        places = [(50, 400.0), (last, 300.0 - last)]
        rows_of(folder, [{"step": s, f"fid/{NAME}": v, "seconds": 120.0} for s, v in places])
    assert points(tmp_path) == [(3200, 2, 400), (6720, 2, 195)]


@pytest.mark.parametrize(("self_conditioning", "passes"), [(False, 3), (True, 3.5)])
def test_self_conditioning_asks_the_network_once_more_in_half_of_the_steps(
    tmp_path, self_conditioning, passes
):
    config = {"denoiser": {"self_conditioning": self_conditioning}}
    fake_group(tmp_path, "dit", [100.0, 110.0], config=config)
    (group,) = collect([tmp_path]).groups
    assert training_flops(group, 10) == 2 * passes * 2_000_000 * 10


def test_the_passes_that_a_run_noted_count(tmp_path):
    summary = {"forward_passes": 4.0}
    fake_group(tmp_path / "few", "dit", [100.0, 110.0], summary=summary)
    (group,) = collect([tmp_path / "few"]).groups
    assert training_flops(group, 10) == 2 * 4 * 2_000_000 * 10
    fake_group(tmp_path / "none", "dit", [100.0, 110.0], summary={"forward_passes": None})
    (group,) = collect([tmp_path / "none"]).groups
    assert training_flops(group, 10) is None


def test_seeds_of_one_first_stage_from_the_hub_are_one_composition(tmp_path):
    """Each run has its own copy of the first stage, at its own path; the sha256 identifies it."""
    for seed, sha256 in ((0, "a"), (1, "a"), (2, "b")):
        stage = {"_target_": "diffusion_lab.first_stage.HubVAE", "path": "hub", "sha256": sha256}
        config = {"first_stage": stage, "activation_checkpointing": seed == 1}
        fake_run(tmp_path / str(seed), 100.0 + seed, seed, config=config)
    groups = collect([tmp_path]).groups
    assert [group.name for group in groups] == ["sha256=a", "sha256=b"]
    assert [len(group.runs) for group in groups] == [2, 1]


def test_the_latest_grid_is_of_the_last_step_and_not_of_the_last_name(tmp_path):
    folder = fake_run(tmp_path / "a", 1.0)
    for step in ("9000000", "10000000", "0000200"):
        draw_grid(folder / f"samples/step_{step}.png", 0)
    (folder / "samples/step_of_mine.png").write_text("")
    assert latest_grid(folder).name == "step_10000000.png"


@pytest.mark.parametrize(
    ("other", "alike"),
    [
        ({}, True),
        ({"sampler": {"steps": 20}}, False),
        ({"callbacks": {"sample_grid": {"seed": 1}}}, False),
        ({"first_stage": {"_target_": "diffusion_lab.first_stage.TrainedKL"}}, False),
    ],
)
def test_grids_show_the_same_noise_if_they_were_drawn_alike(tmp_path, other, alike):
    first = fake_run(tmp_path / "a", 1.0)
    second = fake_run(tmp_path / "b", 1.0, config=UNET | other)
    # the noise is known from the configurations, so no metric needs to be comparable
    runs, _ = read([first, second])

    noises = {grid_noise(run) for run in runs}
    assert (len(noises) == 1) == alike


def test_a_run_without_a_grid_has_no_known_noise(tmp_path):
    fake_group(tmp_path, "a", [1.0], config={"callbacks": {"sample_grid": None}})
    (group,) = collect([tmp_path]).groups
    assert grid_noise(group.runs[0]) is None
    assert samples([group])[0].strip is None


def test_metrics_in_training_are_drawn_to_their_end(lab, tmp_path):
    """Real runs: FID every 2 of 5 steps and at the end, against images, time and operations."""
    from helpers.tiny_runs import TINY

    arguments = [*TINY, "callbacks.evaluation.every_n_steps=2", "trainer.max_steps=5"]
    for seed in (0, 1):
        code, _, err = lab(
            "train", *arguments, f"seed={seed}", f"run_dir=runs/{seed}", "logger=none"
        )
        assert code == 0, err
    collection = collect([tmp_path / "runs"])
    (group,) = collection.groups
    found = curve(group, "fid", name_in_rows(collection, group, FID))
    assert [point.images for point in found] == [16, 32, 40]
    assert found[-1].mean == pytest.approx(group.mean("fid"))
    times = [point.minutes for point in found]
    assert times == sorted(times)
    # the curve ends when training does, before the last evaluation
    assert times[-1] * 60 < max(run.summary["wall_seconds"] for run in group.runs)
    assert [point.flops for point in found] == [
        pytest.approx(6 * group.mean("macs") * images) for images in (16, 32, 40)
    ]
    assert [
        plot.name
        for plot in judge(collection, FID, verdicts(collection.groups, [FID])["fid"]).along
    ] == [
        "fid_against_images",
        "fid_against_minutes",
        "fid_against_flops",
    ]


@pytest.mark.parametrize(("macs", "drawn"), [(2_080_000, False), (4_000_000, True)])
def test_a_front_is_drawn_where_costs_differ(tmp_path, macs, drawn):
    fake_run(tmp_path / "runs/a", 100.0)  # has 2 million MACs
    fake_run(tmp_path / "runs/b", 90.0, config=UNET, summary={"macs": macs})
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert (tmp_path / "out/plots/fid_by_macs.svg").exists() == drawn
