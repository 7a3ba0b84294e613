"""Runs that are each drawn in their own way, or in several, and images of another program.

Students have teachers that cost something.
"""

import csv
import json

import pytest
from helpers.fake_runs import (
    CALLBACKS,
    GUIDANCE,
    NAME,
    SAMPLER,
    STUDY_PROTOCOL,
    UNET,
    fake_group,
    fake_images,
    fake_run,
    said,
)
from helpers.fake_runs import PROTOCOL as MEASURED
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.analysis.publishing import publish
from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare, samples
from diffusion_lab.runs.current import identify
from diffusion_lab.runs.results import save_evaluation
from diffusion_lab.runs.summary import load_summary

PROTOCOL = {
    "question": "How many calls?",
    "metric": "fid",
    "test": "paired",
    "seeds": [0, 1],
    "stop": "two seeds",
}
FEW = {"sampler": {"_target_": "diffusion_lab.diffusion.sampler.FewStep", "steps": 2}}
CODES = {
    "family": "autoregressive",
    "sampler": {"_target_": "diffusion_lab.families.autoregressive.CodeSampler", "top_k": 5},
    "guidance": {"_target_": "diffusion_lab.families.autoregressive.LogitGuidance", "scale": 2},
    "backbone": {"_target_": "diffusion_lab.families.autoregressive.CodeTransformer"},
}
ONE, TWO = [100.0, 104.0, 99.0], [150.0, 152.0, 157.0]
ACCURACY = "accuracy/classifier-3f01b756/1k"


def two_seeds(folder, name: str, fid: float, config: dict) -> None:
    for seed in (0, 1):
        fake_run(folder / f"{name}{seed}", fid * (1 + seed / 20), seed, config)


def page(folder) -> str:
    compare([str(folder)], str(folder / "out"))
    return (folder / "out/index.html").read_text()


@pytest.mark.parametrize("sampling", [None, "equal"])
def test_other_samplers_are_refused_unless_the_protocol_asks_for_them(tmp_path, sampling):
    protocol = PROTOCOL | ({} if sampling is None else {"sampling": sampling})
    two_seeds(tmp_path, "dit", 20.0, {"protocol": protocol})
    two_seeds(tmp_path, "unet", 10.0, UNET | FEW | {"protocol": protocol})
    with refused("sampler"):
        compare([str(tmp_path)], str(tmp_path / "out"))


def test_a_protocol_lets_each_composition_be_drawn_in_its_own_way(tmp_path):
    protocol = PROTOCOL | {"sampling": "own"}
    two_seeds(tmp_path, "dit", 20.0, {"protocol": protocol})
    two_seeds(tmp_path, "unet", 10.0, UNET | FEW | {"protocol": protocol})
    text = page(tmp_path)
    assert said(tmp_path)[0].startswith("UNet")
    assert "UNet is drawn by FewStep with 2 steps" in text
    assert "DiT is drawn by DPMSolver with 10 steps" in text


def test_an_evaluation_in_another_way_does_not_count_as_a_runs_own(tmp_path):
    """Only the figure of the configured sampler is taken, although a better one was measured."""
    protocol = PROTOCOL | {"sampling": "own"}
    two_seeds(tmp_path, "dit", 20.0, {"protocol": protocol})
    two_seeds(tmp_path, "unet", 30.0, UNET | FEW | {"protocol": protocol})
    for seed in (0, 1):
        folder = tmp_path / f"unet{seed}"
        other = {"sampler": SAMPLER | {"steps": 50}, "guidance": GUIDANCE, "seed": 0}
        measured = {f"fid/{NAME}": 1.0}
        way = with_fingerprint(MEASURED)
        save_evaluation(folder, measured, way, OmegaConf.create(other), identify(folder))
    assert said(tmp_path)[0].startswith("DiT")


def test_families_have_no_sampler_in_common(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {})
    two_seeds(tmp_path, "codes", 10.0, CODES)
    assert {arm.name for arm in collect([tmp_path]).arms} == {"DiT", "CodeTransformer"}
    assert "CodeTransformer is drawn by CodeSampler" in page(tmp_path)


def test_a_family_has_one_way_even_beside_another(tmp_path):
    two_seeds(tmp_path, "codes", 10.0, CODES)
    two_seeds(tmp_path, "dit", 20.0, {})
    two_seeds(tmp_path, "unet", 15.0, UNET | FEW)
    with refused("sampler"):
        compare([str(tmp_path)], str(tmp_path / "out"))


def vae(folder, fid: float, seed: int, measured: dict) -> None:
    """Writes the finished run of a VAE, whose samples were measured after training."""
    kind = "diffusion_lab.first_stage.autoencoder.KLAutoencoder"
    none = dict.fromkeys(("backbone", "objective", "sampler", "guidance"))
    fake_run(folder, fid, seed, none | {"autoencoder": {"_target_": kind}})
    config = OmegaConf.load(folder / "config.yaml")
    config.callbacks.sample_grid = {"_target_": f"{CALLBACKS}.ReconstructionGrid", "columns": 3}
    OmegaConf.save(config, folder / "config.yaml")
    summary = json.loads((folder / "summary.json").read_text())
    for key in ("protocol", "sampling"):  # training measures reconstructions
        del summary[key]
    summary["metrics"] = {"rfid": 1.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    way = OmegaConf.create({"seed": 0})
    metrics = {f"fid/{NAME}": fid}
    save_evaluation(folder, metrics, with_fingerprint(measured), way, identify(folder))


def test_a_vae_joins_if_its_samples_were_measured_alike(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {})
    for seed in (0, 1):
        vae(tmp_path / f"vae{seed}", 40.0 + 3 * seed, seed, MEASURED)
    vae(tmp_path / "other", 40.0, 2, MEASURED | {"num_samples": 50})
    found = collect([tmp_path])
    assert {arm.name for arm in found.arms} == {"DiT", "KLAutoencoder"}
    (reason,) = found.left_out
    assert "other" in str(reason)
    assert said(tmp_path)[0].startswith("DiT is better")
    drawn = samples(found.arms)
    assert [each.arm.name for each in drawn] == ["DiT"]  # a VAE's pictures are reconstructions


def test_a_vae_follows_the_protocol_of_the_others(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {"protocol": PROTOCOL})
    for seed in (0, 1):
        vae(tmp_path / f"vae{seed}", 40.0 + 3 * seed, seed, MEASURED)
    text = page(tmp_path)
    assert PROTOCOL["question"] in text
    assert "different protocols" not in text


KINDS = ("init_sha256", "objective.teacher.sha256")


@pytest.mark.parametrize(
    ("kinds", "weights", "compositions"),
    [
        *((KINDS, weights, count) for weights, count in (("ab", 2), ("aa", 2), ("abcd", 2))),
        *((kinds, "aabb", 3) for kinds in (KINDS[:1], KINDS[1:], KINDS)),
    ],
)
def test_weights_to_start_from_are_a_composition_unless_each_seed_has_its_own(
    tmp_path, kinds, weights, compositions
):
    two_seeds(tmp_path, "unet", 10.0, UNET)
    for seed, sha in enumerate(weights):
        own = OmegaConf.create({})
        for kind in kinds:
            OmegaConf.update(own, kind, sha * 64)
        fake_run(tmp_path / f"dit{seed}", 20.0 + seed, seed, OmegaConf.to_container(own))
    arms = collect([tmp_path]).arms
    assert len(arms) == compositions
    assert sum(len(arm.runs) for arm in arms) == 2 + len(weights)


def test_what_a_teacher_cost_is_said(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {})
    for seed in (0, 1):
        costs = {"teacher_images": 120_000, "teacher_calls": 4_000_000}
        fake_run(tmp_path / f"unet{seed}", 10.0 + seed, seed, UNET, costs)
    _, text = said(tmp_path)
    assert "UNet has a teacher that saw 120k images and answered 4M calls" in text
    assert "DiT has a teacher" not in text


def sampled(folder, fid: float, seed: int, config: dict, again: dict[int, float]) -> None:
    """Writes a run, and its FID and accuracy for other numbers of steps."""
    fake_run(folder, fid, seed, config, metrics={ACCURACY: 0.6 + seed / 100})
    for steps, other in again.items():
        way = {"sampler": SAMPLER | {"steps": steps}, "guidance": GUIDANCE, "seed": 0}
        metrics = {f"fid/{NAME}": other, f"fid_real/{NAME}": 96.3, ACCURACY: 0.8}
        protocol, weights = load_summary(folder).protocol, identify(folder)
        save_evaluation(folder, metrics, protocol, OmegaConf.create(way), weights)


def compared(root):
    """The text of the table and of the page of the runs in a folder."""
    compare([str(root / "runs")], str(root / "out"))
    return (root / "out/table.md").read_text(), (root / "out/index.html").read_text()


@pytest.fixture
def two_ways(tmp_path):
    """Runs in 10 steps, and in 50, in which the U-Net is ahead."""
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        for seed, fid in enumerate(fids):
            sampled(tmp_path / f"runs/{name}{seed}", fid, seed, config, {50: 300.0 - fid})
    return tmp_path


@pytest.mark.long
def test_each_is_judged_by_itself_and_every_metric_and_run_is_listed(two_ways):
    text, page = compared(two_ways)
    for each in (text, page):
        assert "With sampler.steps=50: UNet is better than DiT: FID 147" in each
    head, _, *rows = text[text.index("With sampler.steps=50:") :].splitlines()[2:]
    assert head == "| composition | seeds | FID | Accuracy |"  # a loss depends on no sampler
    cells = [[cell.split(" (")[0] for cell in row.strip("| ").split(" | ")] for row in rows[:2]]
    assert cells == [["DiT", "3", "199", "80.0 %"], ["UNet", "3", "147", "80.0 %"]]
    assert page.count(">With sampler.steps=50</caption>") == 1
    rows = list(csv.DictReader((two_ways / "out/samplings.csv").open()))
    assert len(rows) == 12
    assert [*rows[0]] == [
        *("composition", "sampling", "seed", "fid", "fid_real", "accuracy", "accuracy_real")
    ]
    assert [*rows[-1].values()] == ["UNet", "sampler.steps=50", "2", "143.0", "96.3", "0.8", ""]


@pytest.mark.long
def test_the_answer_by_what_depends_on_no_sampling_is_given_once(tmp_path):
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        own = config | {"protocol": STUDY_PROTOCOL | {"metric": "test_loss"}}
        for seed, fid in enumerate(fids):
            sampled(tmp_path / f"runs/{name}{seed}", fid, seed, own, {50: 300.0 - fid})
    report = Report(collect([tmp_path / "runs"]))
    assert report.panels[0].metric.name == "test_loss"
    assert not [each for each in report.sentences if each.startswith("With ")]
    assert [table.way for table in report.by_sampling] == ["sampler.steps=50"]


@pytest.mark.long
def test_one_run_alone_is_no_sampling_of_all(two_ways):
    compared(two_ways)
    for path in (two_ways / "runs/dit0/evaluations").iterdir():
        path.unlink()
    assert "steps=50" not in "".join(compared(two_ways))
    assert not (two_ways / "out/samplings.csv").exists()


def test_the_seeds_of_a_protocol_decide_for_each(tmp_path):
    """A fourth seed, which the protocol does not name, is far off, and counts in no test of FID."""
    for name, config, fids in (("dit", {}, ONE), ("unet", UNET, TWO)):
        for seed, fid in enumerate([*fids, 10 * fids[0]]):
            own = config | {"protocol": STUDY_PROTOCOL}
            sampled(tmp_path / f"runs/{name}{seed}", fid, seed, own, {50: fid + 1})
    text, _ = compared(tmp_path)
    for start in ("\n", "With sampler.steps=50: "):
        assert f"{start}DiT is better than UNet: FID 10" in text


def others(root, name, fids, **more):
    return [fake_images(root / f"{name}{i}", fid, i, name=name) for i, fid in enumerate(fids)]


def test_images_are_judged_beside_runs_over_common_seeds(tmp_path):
    fake_group(tmp_path, "unet", [50.0, 51.5, 49.0], config=UNET)
    fake_group(tmp_path, "dit", [80.0, 81.0, 79.5])
    others(tmp_path, "theirs", [30.0, 31.0, 30.5])
    found = collect([tmp_path])
    assert [arm.name for arm in found.arms] == ["theirs", "UNet", "DiT"]
    assert [arm.drawn_elsewhere for arm in found.arms] == [True, False, False]
    result = compare([str(tmp_path)], str(tmp_path / "comparison"))
    assert result["verdict"]["fid"].startswith("theirs is best")
    with (tmp_path / "comparison/table.csv").open() as file:
        rows = {row["composition"]: row for row in csv.DictReader(file)}
    assert float(rows["theirs"]["fid"]) == 30.5
    assert rows["theirs"]["seeds"] == "3"
    # costs and losses are those of runs alone
    assert rows["theirs"]["macs"] == rows["theirs"]["test_loss"] == ""
    assert rows["UNet"]["macs"]
    assert rows["UNet"]["test_loss"]
    page = (tmp_path / "comparison/index.html").read_text()
    assert "theirs" in page
    assert "Every run saw 6,400 images" in page


@pytest.mark.parametrize("name", ["UNet", "theirs", "a.b"])
def test_a_single_composition_beside_images_has_the_name_of_its_network(tmp_path, name):
    fake_group(tmp_path, "unet", [50.0, 51.0], config=UNET)
    others(tmp_path, name, [30.0, 31.0])
    names = {arm.name: len(arm.runs) for arm in collect([tmp_path]).arms}
    assert names.pop("UNet") == 2
    assert list(names.values()) == [2]  # another name than the network's
    assert next(iter(names)).startswith(name)


def test_images_alone_and_two_sets_of_them_compare(tmp_path):
    others(tmp_path, "one", [30.0, 31.0])
    others(tmp_path, "two", [50.0, 52.0])
    assert {arm.name for arm in collect([tmp_path]).arms} == {"one", "two"}
    assert "one is better than two" in said(tmp_path)[0]


def test_images_fit_any_sampling_of_runs_but_runs_must_share_one(tmp_path):
    other = {"sampler": {"steps": 20}, "callbacks": {"evaluation": {"seed": 5}}}
    one, two = fake_run(tmp_path / "a", 50.0), fake_run(tmp_path / "b", 60.0, config=UNET | other)
    theirs = fake_images(tmp_path / "theirs", 30.0)
    for run in (one, two):
        assert len(collect([run, theirs]).arms) == 2
    with refused("steps"):
        collect([one, two, theirs])


def test_images_measured_by_another_protocol_are_refused(tmp_path):
    run = fake_run(tmp_path / "a", 50.0, protocol={"num_samples": 500})
    with refused("metrics.num_samples", 500, 1000):
        collect([run, fake_images(tmp_path / "theirs", 30.0)])


def test_images_are_published_beside_runs(tmp_path):
    fake_group(tmp_path / "study", "unet", [50.0, 51.0], config=UNET)
    others(tmp_path / "study", "theirs", [30.0, 31.0])
    publish([str(tmp_path / "study")], str(tmp_path / "published"))
    card = json.loads((tmp_path / "published/card.json").read_text())
    assert card["compositions"].keys() == {"UNet", "theirs"}
    assert card["hours"]["runs"]["runs"] == 2  # of training
    again = collect([tmp_path / "published"])
    means = again.values("fid").groupby("arm").value.mean()
    assert means.to_dict() == {"UNet": 50.5, "theirs": 30.5}
