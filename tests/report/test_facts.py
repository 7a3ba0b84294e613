"""Facts on how runs were made, and what was not equal: budgets, networks, machines, tuning."""

import json
import re
from pathlib import Path

import pytest
from helpers.fake_runs import NAME, STUDY_PROTOCOL, UNET, fake_group, fake_run

from diffusion_lab.report.comparison import Report
from diffusion_lab.report.facts import notes, reservations, tunings
from diffusion_lab.report.frame import collect
from diffusion_lab.report.records import facts_in
from diffusion_lab.report.words import Fact

FIDS = [100.0, 101.0]
MACS = 2_000_000  # of a fake run, which sees 6,400 images
BY_CLOCK = {"trainer": {"max_steps": 10**6, "max_time": "00:00:10:00"}}
PROTOCOL = {"protocol": STUDY_PROTOCOL}


def seconds(limit: int) -> dict:
    return {"budget": {"seconds": limit}}


def facts_on(root) -> dict[str, list[dict]]:
    """The facts on a comparison by their kinds; each can be said."""
    found = collect([root])
    facts: dict[str, list[dict]] = {}
    for fact in (*notes(found), *reservations(found)):
        assert len(str(fact).split()) <= 45
        facts.setdefault(fact.kind, []).append(fact.values)
    return facts


def two(root, ours=None, theirs=None, config=None, other=None) -> dict[str, list[dict]]:
    """The facts on a DiT and a U-Net whose summaries and configurations differ so."""
    fake_group(root, "dit", FIDS, config=config, summary=ours)
    fake_group(root, "unet", FIDS, config=UNET | (other or {}), summary=theirs)
    return facts_on(root)


@pytest.mark.parametrize(
    ("ours", "theirs", "limits"),
    [
        (seconds(300), seconds(600), [300, 600]),
        (seconds(400), {}, [400, None]),
        (seconds(400), BY_CLOCK, [400, 600]),
        (seconds(400), seconds(400) | BY_CLOCK, [400, 600]),  # it was resumed with another limit
    ],
)
def test_unequal_time_limits_are_named(tmp_path, ours, theirs, limits):
    facts = two(tmp_path, {}, {"images_seen": 32_000}, ours, theirs)
    assert facts["time_limits"] == [{"seconds": limits, "images": (6400, 32_000)}]
    assert "budgets_unequal" not in facts


def test_a_limit_that_was_not_reached_is_none(tmp_path):
    """Both runs ended with their last step, although one had a time limit."""
    config = {"trainer": BY_CLOCK["trainer"] | {"max_steps": 100}}
    facts = two(tmp_path, config=config, other=config)
    assert facts["images"] == [{"images": (6400, 6400)}]


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        ({}, {"images_seen": 32_000}, "budgets_unequal"),
        ({}, {"images_seen": 4800, "forward_passes": 4}, "flops_equal"),
        ({}, {"images_seen": 4800, "forward_passes": 4, "macs": None}, "budgets_unequal"),
        ({}, {"images_seen": 4800, "forward_passes": None}, "budgets_unequal"),
        ({}, {"macs": 3_000_000}, "operations_unequal"),
        ({}, {"forward_passes": 4}, "operations_unequal"),
        ({}, {"macs": 2_090_000}, None),
        ({"parameters": 10**6}, {"parameters": 5 * 10**6}, "parameters_unequal"),
        ({}, {"device": "gpu"}, "other_machines"),
        ({}, {"precision": "bf16-mixed"}, "other_machines"),
        ({"threads": 1}, {"threads": 2}, "other_machines"),
        ({"ranks": 1}, {"ranks": 4}, "other_machines"),
        ({}, {"teacher_images": 120_000, "teacher_calls": 4_000_000}, "taught"),
    ],
)
def test_what_is_unequal_is_said(tmp_path, ours, theirs, kind):
    usual = {"images", "no_protocol", "not_tuned"}
    assert two(tmp_path, ours, theirs).keys() - usual == ({kind} if kind else set())


def test_a_teacher_of_unknown_cost_is_said(tmp_path):
    teacher = {"teacher_images": 10, "teacher_calls": None, "teacher_macs": 10}
    unknown = {"images_seen": 4800, "forward_passes": 4} | teacher
    assert two(tmp_path, {}, unknown).keys() >= {"budgets_unequal", "taught"}


def test_equal_operations_are_counted_with_those_of_teachers_and_of_initial_weights(tmp_path):
    def add(name: str, images: int, passes: float, config: dict, **more) -> dict:
        summary = {"images_seen": images, "forward_passes": passes} | more
        fake_group(tmp_path, name, FIDS, config=config, summary=summary)
        return facts_on(tmp_path)

    add("dit", 6400, 3, {})
    # 1,600 and 3,200 images of 3 passes each, and 4,840 calls
    pupil = {"objective": {"_target_": "lab.Pupil", "teacher": {"run": "t"}}, "init_from": "t"}
    teacher = {"teacher_images": 3200, "teacher_calls": 4840, "teacher_macs": MACS}
    facts = add("pupil", 1600, 3, pupil, **teacher)
    assert facts["flops_equal"][0]["share"] == pytest.approx(0.0021, abs=1e-4)
    begun = {"began_from_flops": 2 * 3 * 3200 * MACS}
    facts = add("tuned", 2400, 4, {"backbone": {"width": 48}, "init_from": "y"}, **begun)
    assert "flops_equal" in facts
    facts = add("ect", 2400, 4, {"backbone": {"width": 64}, "init_from": "x"})
    assert "flops_equal" in facts  # although those of some initial weights are not known
    assert len(facts["began"]) == 2


def test_other_networks_behind_a_run_are_named(tmp_path):
    stage = {"first_stage": {"_target_": "diffusion_lab.first_stage.TrainedKL", "run": "x"}}
    fake_group(tmp_path, "latent", FIDS, config=stage, summary={"first_stage_seconds": 600.0})
    begun = UNET | {"init_from": "x"}
    fake_group(tmp_path, "begun", FIDS, config=begun, summary={"began_from_images": 94_400})
    aligned = {"backbone": {"width": 5}, "alignment": {"extractor": {}}}
    fake_group(tmp_path, "aligned", FIDS, config=aligned)
    facts = facts_on(tmp_path)
    assert [each["seconds"] for each in facts["first_stage"]] == [600.0]
    assert [each["images"] for each in facts["began"]] == [94_400]
    assert len(facts["aligned"]) == 1


@pytest.mark.parametrize(("network", "flattered"), [("EfficientNetLite0", True), ("DINOv2", False)])
def test_an_arm_that_was_aligned_to_its_judge_is_named(tmp_path, network, flattered):
    judge = {"extractor": {"_target_": "diffusion_lab.metrics.extractor.EfficientNetLite0"}}
    guide = {"extractor": {"_target_": f"diffusion_lab.metrics.extractor.{network}"}}
    config = {"metrics": judge, "alignment": guide}
    facts = two(tmp_path, config=config, other={"metrics": judge, "alignment": None})
    assert ("flattered" in facts) == flattered


def test_runs_whose_speeds_vary_have_no_cost_in_time(tmp_path):
    fake_group(tmp_path, "dit", FIDS)
    (slow,) = fake_group(tmp_path, "unet", [100.0], config=UNET)
    fake_run(tmp_path / "fast", 101.0, 1, UNET)
    assert "speeds_vary" not in facts_on(tmp_path)
    path = slow / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    slower = [row | {"train/images_per_second": 300.0} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in slower))
    assert facts_on(tmp_path)["speeds_vary"] == [{"arms": ["UNet"]}]


@pytest.mark.parametrize("seeds", [[5, 5], [5, 6]])
def test_that_one_choice_of_the_images_stands_for_all_is_said(tmp_path, seeds):
    for fraction, seed in zip((0.1, 1.0), seeds, strict=True):
        data = {"data": {"fraction": fraction, "subset_seed": seed}}
        fake_group(tmp_path, f"dit_{fraction}", [100.0, 110.0], config=data)
    assert ("one_choice" in facts_on(tmp_path)) == (seeds == [5, 5])


def logged(norms: list[tuple[float, float]]) -> list[dict]:
    """Rows with means and maxima of gradient norms, and one of a validation in between."""
    rows: list[dict] = [
        {"step": 50 * place, "train/grad_norm": mean, "train/grad_norm_max": largest}
        for place, (mean, largest) in enumerate(norms, 1)
    ]
    return [*rows[:1], {"step": 50, "val/loss": 0.3}, *rows[1:]]


@pytest.mark.parametrize(
    ("norms", "spike"),
    [
        ([(2.0, 90.0)] + [(0.5, 1.0)] * 19, 2),  # large only as training begins
        ([(0.5, 1.0)] * 19 + [(0.7, 20.0)], 40),
        ([(0.0, 0.0)] * 20, 0),
        ([], 0),
    ],
)
def test_a_spike_is_measured_by_the_median_after_the_beginning(norms, spike):
    found = facts_in(logged(norms) if norms else [{"step": 1, "train/loss": 0.1}])
    assert found["gradient_spike"] == spike


def log(runs: list[Path], *largest: float) -> None:
    """Gives runs calm gradients of 0.5, and one that is as large as said."""
    for run, most in zip(runs, largest, strict=True):
        rows = logged([(0.5, 0.6)] * 10 + [(0.5, most)])
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + text)


def test_an_arm_whose_gradients_spiked_is_named_with_its_worst_run(tmp_path):
    log(fake_group(tmp_path, "dit", [*FIDS, 99.0]), 21.0, 100.0, 19.0)
    log(fake_group(tmp_path, "unet", FIDS, config=UNET), 3.0, 3.0)
    assert facts_on(tmp_path)["spikes"] == [{"arm": "DiT", "runs": 2, "all": 3, "most": 200}]


@pytest.mark.parametrize(
    ("commit", "kind"), [("a" * 40, "commit"), (f"{'a' * 40}-dirty", "commit"), (None, "no_commit")]
)
def test_the_protocol_and_the_commit_that_held_it_are_named(tmp_path, commit, kind):
    fake_group(tmp_path, "dit", FIDS, config=PROTOCOL, summary={"git_commit": commit})
    facts = facts_on(tmp_path)
    assert kind in facts
    assert facts["protocol"] == [{"metric": "FID", "test": "paired", "seeds": [0, 1, 2]}]
    assert facts["stop"] == [{"rule": STUDY_PROTOCOL["stop"]}]


def test_protocols_that_differ_or_decide_nothing_are_said(tmp_path):
    other = {"protocol": STUDY_PROTOCOL | {"metric": "accuracy"}}
    fake_group(tmp_path / "none", "dit", FIDS, config=other)
    assert facts_on(tmp_path / "none")["not_measured"] == [{"metric": "Accuracy"}]
    assert "protocols_differ" in two(tmp_path / "two", config=PROTOCOL, other=other)


def test_seeds_added_to_a_protocol_count_and_are_said(tmp_path):
    fake_group(tmp_path, "dit", [*FIDS, 102.0], config=PROTOCOL)
    fake_group(tmp_path, "unet", [*FIDS, 102.0], config=UNET | PROTOCOL)
    for seed in (3, 4):
        more = {"protocol": STUDY_PROTOCOL | {"seeds": [3, 4]}}
        ended = {"ended_at": "2030-01-01T00:00:00+00:00"}
        fake_run(tmp_path / f"dit{seed}", 100.0 + seed, seed, more, ended)
    found, facts = collect([tmp_path]), facts_on(tmp_path)
    assert {arm.name: len(arm.runs) for arm in found.arms} == {"DiT": 5, "UNet": 3}
    assert set(found.judged_values("fid").seed) == {0, 1, 2, 3, 4}
    assert facts["planned_later"] == [{"arm": "DiT", "seeds": [3, 4]}]
    assert "other_seeds" not in facts


def test_seeds_beside_the_protocol_and_metrics_that_runs_may_be_chosen_by_are_named(tmp_path):
    for seed in (0, 1, 5):
        by = {"reference": "validation"}
        fake_run(tmp_path / f"dit{seed}", 100.0 + seed, seed, PROTOCOL, protocol=by)
    facts = facts_on(tmp_path)
    assert facts["other_seeds"] == [{"arm": "all runs", "missing": [2], "beside": [5]}]
    assert "5 beside, which tables count" in str(Fact("other_seeds", **facts["other_seeds"][0]))
    assert "by_validation" in facts


def tuned(best: float, results: dict[float, float | None], **facts: object) -> dict:
    """The tuning in the configuration of a run, with the results of learning rates."""
    tried = [
        {"values": {"optimizer.lr": rate}, "results": {"100": result}}
        for rate, result in results.items()
    ]
    node = {
        "file": "outputs/mine/tune/tuning.json",
        "values": {"optimizer.lr": list(results)},
        "metric": "fid",
        "images": 20_000,
        "seeds": [100],
        "chosen": {"optimizer.lr": best},
        "tried": tried,
    }
    return {"tuning": node | facts, "optimizer": {"lr": best}}


def test_tuning_is_said(tmp_path):
    inside = tuned(2e-3, {1e-3: 120.0, 2e-3: 110.0, 4e-3: 130.0, 8e-3: None})
    at_the_end = tuned(4e-3, {1e-3: 120.0, 2e-3: 115.0, 4e-3: 110.0})
    facts = two(tmp_path, config=inside, other=at_the_end)
    (said,) = facts["tuned"]
    assert (said["keys"], said["counts"], said["images"]) == (["optimizer.lr"], (3, 4), 20_000)
    # a rate above the DiT's best one diverged
    assert facts["at_an_end"] == [{"key": "optimizer.lr", "arm": "UNet", "value": 4e-3}]
    assert {arm.name for arm in collect([tmp_path]).arms} == {"DiT", "UNet"}  # without the rate


@pytest.mark.parametrize(
    ("ours", "theirs", "kind"),
    [
        (tuned(2e-3, {1e-3: 120.0, 2e-3: 110.0}), {}, "some_tuned"),
        (
            tuned(2e-3, {1e-3: 120.0, 2e-3: 110.0}),
            tuned(2e-3, {1e-3: 121.0, 2e-3: 110.0}, images=40_000),
            "tuned_unequally",
        ),
        ({}, {}, "not_tuned"),
    ],
)
def test_networks_that_were_tuned_unequally_or_not_at_all_are_named(tmp_path, ours, theirs, kind):
    assert kind in two(tmp_path, config=ours, other=theirs)


def test_a_curve_is_named_by_what_was_tuned_by_itself(tmp_path):
    """Networks were tuned on all of the data, and are compared on parts of it, too."""
    for number, (name, own) in enumerate((("dit", {}), ("unet", UNET))):
        config = own | tuned(1e-3, {1e-3: 110.0 + number, 2e-3: 120.0}, of=["backbone"])
        for fraction in (0.001, 1.0):
            part = config | {"data": {"fraction": fraction}}
            fake_group(tmp_path, f"{name}{fraction}", FIDS, config=part)
    arms = collect([tmp_path]).arms
    assert len(arms) == 4
    assert {arm.name for arm, _ in tunings(arms)} == {"DiT", "UNet"}
    clipped = {"trainer": {"gradient_clip_val": 1.0}}
    for number, clip in enumerate(({}, clipped)):
        own = tuned(2e-3, {1e-3: 110.0 + number, 2e-3: 100.0})
        fake_group(tmp_path / "clip", f"w{number}", FIDS, config=own | clip)
    arms = collect([tmp_path / "clip"]).arms
    assert [arm.name for arm, _ in tunings(arms)] == [arm.name for arm in arms]


def test_losses_of_other_objectives_are_not_compared(tmp_path):
    infinite = {"test/loss": float("inf"), f"fid/{NAME}": float("nan")}
    fake_group(tmp_path, "dit", [100.0, 110.0], metrics=infinite)
    fake_group(tmp_path, "unet", [100.0, 110.0], config=UNET)
    facts = facts_on(tmp_path)
    assert [each["metrics"] for each in facts["not_finite"]] == [["test_loss", "fid"]] * 2
    fake_group(tmp_path, "eps", [1.0, 2.0], config={"objective": {"_target_": "lab.Other"}})
    facts = facts_on(tmp_path)
    assert "losses_differ" in facts
    assert [each["metrics"] for each in facts["not_finite"]] == [["fid"]] * 2


def test_nor_are_their_losses_by_level(tmp_path):
    levels = {"val_by_level/t0.05": 0.3, "test_by_level/t0.05": 0.3}
    fake_group(tmp_path, "dit", [100.0, 110.0], metrics=levels)
    other = {"objective": {"_target_": "lab.Other"}}
    fake_group(tmp_path, "eps", [1.0, 2.0], config=other, metrics=levels)
    kinds = set(collect([tmp_path]).frame.metric)
    assert "fid" in kinds
    assert not [kind for kind in kinds if "loss" in kind or "level" in kind]


def trials(metric: str, results: list[float | None]) -> dict:
    """The tuning of a network by random trials of two settings."""
    ranges = {"optimizer.lr": {"log": [1e-3, 1e-1]}, "batch_size": [32, 64]}
    tried = [
        {"values": {"optimizer.lr": rate, "batch_size": size}, "results": {"100": result}}
        for rate, size, result in zip((2e-3, 4e-3, 8e-3), (32, 64, 32), results, strict=True)
    ]
    facts = {"values": ranges, "metric": metric, "chosen": tried[1]["values"], "tried": tried}
    config = tuned(4e-3, {}, **facts)
    return config | {"batch_size": 64}


@pytest.mark.parametrize(
    ("metric", "results"), [("kid", [0.2, 0.1, None]), ("accuracy", [0.5, 0.9, None])]
)
def test_the_best_of_random_trials_is_drawn_over_their_number(
    tmp_path, real_plots, metric, results
):
    config = trials(metric, results)
    facts = two(tmp_path, config=config, other=config)
    assert "tuned" in facts
    assert facts["at_an_end"] == [{"key": "batch_size", "arm": "DiT", "value": 64}]
    folded = Report(collect([tmp_path])).folded
    assert "Tuning" not in folded
    (drawn,) = folded["Search"]
    lines = re.findall(r'<path d="M ([^"]*)" clip-path', drawn.file)
    y = [float(number) for number in lines[-1].split()[1::3]]
    # a better one has a share of 1/3, 5/9 and 19/27 of choices of one, two and three
    assert (y[1] - y[0]) / (y[2] - y[0]) == pytest.approx(0.6, abs=1e-4)
    assert (y[0] < y[2]) == (metric == "kid")  # from the top down


def test_a_grid_of_which_one_value_is_left_is_no_search(tmp_path):
    grid = tuned(2e-3, {1e-3: None, 2e-3: 110.0, 4e-3: None})
    two(tmp_path, config=grid, other=grid)
    folded = Report(collect([tmp_path])).folded
    assert "Search" not in folded
    (drawn,) = folded["Tuning"]
    assert drawn.name == "tuning_optimizer_lr"
