"""Published folders: what is in them, that they give the same comparison, and what is refused."""

import csv
import json
import shutil
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from helpers.fake_runs import NAME, STUDY_PROTOCOL, UNET, fake_group, fake_run
from helpers.refusals import assert_names, refused
from helpers.tiny_data import TinyData, tiny_data
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from diffusion_lab.analysis.publishing import LARGEST, publish, thin
from diffusion_lab.common import hashing
from diffusion_lab.common.files import read_rows
from diffusion_lab.metrics.extractor import Classifier
from diffusion_lab.metrics.extractor.classifier import SmallClassifier, save_classifier
from diffusion_lab.report.page import compare
from diffusion_lab.runs.current import CHECKPOINT, identify
from diffusion_lab.runs.folder import load_config, save_config
from diffusion_lab.runs.results import require_evaluations, save_evaluation
from diffusion_lab.runs.summary import load_summary

FACTS = {
    "threads": 2,
    "ranks": 1,
    "precision": "32-true",
    "python": "3.12.1",
    "git_commit": "c0ffee-dirty",
    "ended_at": "2026-01-02T03:04:05+00:00",
    "versions": {"torch": "2", "lightning": "2.6", "diffusion-lab": "0.2"},
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of two compositions and two seeds in outputs/mine, compared by later evaluations."""
    monkeypatch.chdir(tmp_path)
    folder = Path("outputs/mine")
    for name, config, fids in (("dit", {}, [100.0, 110.0]), ("unet", UNET, [150.0, 163.0])):
        for seed, fid in enumerate(fids):
            own = [f"backbone={name}", f"seed={seed}"]
            facts = FACTS | {"overrides": ["study_name=mine", *own]}
            run = fake_run(folder / f"{name}_{seed}", fid, seed, config, summary=facts)
            evaluate(run, fid / 2)
            memorised(run, fid)
    return folder


def evaluate(run: Path, fid: float) -> Path:
    """Measures a run again, with more samples."""
    protocol = load_summary(run).protocol | {"num_samples": 5000}
    metrics, cfg = {f"fid/{NAME}": fid, f"fid_std/{NAME}": 1.5}, load_config(run)
    cfg.seed = 0  # of the samples
    return save_evaluation(run, metrics, protocol, cfg, identify(run))


def memorised(run: Path, fid: float) -> None:
    """Writes a report on copies of the weights that a run has now."""
    (run / "memorization").mkdir()
    ratios = {name: {"copy_ratio": fid / 100} for name in ("efficientnet", "pixels")}
    sampling = load_summary(run).sampling
    report = {"neighbours": ratios, "sampling": sampling, "protocol": {"num_samples": 10}}
    (run / "memorization/report.json").write_text(json.dumps(report | identify(run)))


def rows_of(folder: Path, name: str, *without: str) -> list[dict]:
    rows = list(csv.DictReader((folder / name).open()))
    return [{key: value for key, value in row.items() if key not in without} for row in rows]


@pytest.fixture
def same_comparison(real_plots):
    """Asserts that both folders give the same tables, tests and plots."""

    def check(original: Path, published: Path) -> None:
        for path, output in ((original, "before"), (published, "after")):
            compare([str(path)], output)
        before, after = Path("before"), Path("after")
        for name in ("table.csv", "pairs.csv"):
            assert rows_of(before, name) == rows_of(after, name)
        assert rows_of(before, "runs.csv", "folder") == rows_of(after, "runs.csv", "folder")
        plots = sorted(path.name for path in before.glob("plots/*"))
        assert plots
        assert plots == sorted(path.name for path in after.glob("plots/*"))
        for name in plots:
            assert (before / "plots" / name).read_text() == (after / "plots" / name).read_text()

    return check


def card_of(folder: str | Path = "published") -> dict:
    return json.loads((Path(folder) / "card.json").read_text())


@pytest.mark.long
def test_the_published_folder_gives_the_same_comparison_without_the_original(
    study, same_comparison, tmp_path
):
    publish([str(study)], "published")
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree("published", elsewhere)
    shutil.copytree(study, "copy")
    same_comparison(study, elsewhere)
    (row, *_) = rows_of(Path("after"), "runs.csv")
    assert float(row[f"fid/{NAME}"]) == 50  # of the later evaluation, though its weights are gone
    assert "copy_ratio" in row
    found = require_evaluations(elsewhere / "runs/unet_0")  # to be compared against
    assert [record["metrics"][f"fid/{NAME}"] for record in found] == [150, 75]
    assert (Path("after") / "index.html").is_file()


def test_the_folder_has_the_records_of_these_weights_and_nothing_large(study):
    sweep = study / "dit_0/sweeps/steps"
    sweep.mkdir(parents=True)
    old = "steps,fid\n10,120.0\n"  # of a program that did not note the weights
    (sweep / "results.csv").write_text(old)
    mixed = study / "dit_0/sweeps/mixed"
    mixed.mkdir()
    own = identify(study / "dit_0")[CHECKPOINT]
    rows = [f"null,1,{own}", "null,2,other", "50,3,other"]
    (mixed / "results.csv").write_text("\n".join(["step,fid,checkpoint", *rows, ""]))
    stale = study / "dit_0/sweeps/stale"
    stale.mkdir()
    (stale / "results.csv").write_text("fid,checkpoint\n4,other\n")
    (evaluation,) = (study / "dit_0/evaluations").iterdir()
    other = json.loads(evaluation.read_text()) | {CHECKPOINT: "other", "weights_file": None}
    (evaluation.parent / "stale.json").write_text(json.dumps(other))
    publish([str(study)], "published")
    run = Path("published/runs/dit_0")
    files = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    assert files == {
        *("config.yaml", "metrics.jsonl", "summary.json", "published.json"),
        *(f"evaluations/{evaluation.name}", "memorization/report.json"),
        *("sweeps/steps/results.csv", "sweeps/mixed/results.csv"),
    }
    assert (run / "sweeps/steps/results.csv").read_text() == old
    assert [row["fid"] for row in rows_of(run, "sweeps/mixed/results.csv")] == ["1", "3"]
    rows = rows_of(Path("published"), "runs.csv")
    assert [row["folder"] for row in rows] == [
        f"runs/{n}_{s}" for n in ("dit", "unet") for s in (0, 1)
    ]
    assert {float(row[f"fid_std/{NAME}"]) for row in rows} == {1.5}
    assert {row["images_seen"] for row in rows} == {"6400"}
    assert {float(row["training_seconds"]) for row in rows} == {120}
    # without the checksum of weights later evaluations do not count
    for path in Path("published").rglob("published.json"):
        path.unlink()
    found = compare(["published/runs"], "after")
    assert len(found["left_out"]) == 4
    assert float(rows_of(Path("after"), "runs.csv")[0][f"fid/{NAME}"]) == 100


def test_the_card_says_what_a_reader_asks(study):
    publish([str(study)], "published")
    card = card_of()
    assert card["common"] == ["study_name=mine"]
    assert card["commands"]["runs/unet_1"] == ["backbone=unet", "seed=1"]
    (machine,) = card["machines"]
    assert machine["git_commit"] == "c0ffee-dirty"
    assert (machine["threads"], machine["precision"], machine["runs"]) == (2, "32-true", 4)
    assert card["hours"]["total"]["core_hours"] == pytest.approx(4 * 120 * 2 / 3600, abs=1e-4)
    assert card["hours"]["total"]["wall_clock_hours"] == pytest.approx(600 / 3600, abs=1e-4)
    assert card["hours"]["tuning"]["runs"] == 0
    assert card["dates"][-1] == FACTS["ended_at"]
    assert card["protocol"]["num_samples"] == 5000
    assert card["sampling"]["sampler"]["steps"] == 10
    assert card["seeds"] == [0, 1]
    assert card["tuning"] == {}
    text = Path("published/card.md").read_text()
    assert_names(text, "c0ffee", "3.12.1", "lightning", "0123", "| UNet", "study_name=mine")


def test_the_card_names_what_runs_began_from_and_what_was_fixed_before_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = Path("outputs/stages/kl")
    stage.mkdir(parents=True)
    facts = FACTS | {"training_seconds": 300.0, "wall_seconds": 360.0, "images_seen": 640}
    (stage / "summary.json").write_text(json.dumps(facts))
    fixed = {"question": "Which is better?", "metric": "fid", "seeds": [0, 1]}
    config = {"protocol": fixed, "first_stage": {"run": str(stage)}, "init_from": "outputs/gone"}
    for seed in (0, 1):
        fake_run(Path(f"outputs/mine/{seed}"), 100.0 + seed, seed, config, FACTS)
    # a resumed run has its own copy of the first stage
    resumed = config | {"first_stage": {"run": "outputs/mine/2"}}
    fake_run(Path("outputs/mine/2"), 102.0, 2, resumed, FACTS)
    publish(["outputs/mine"], "published")
    card = card_of()
    assert card["study_protocols"] == [fixed]
    assert list(card["sources"]) == [str(stage)]
    assert card["sources"][str(stage)]["images_seen"] == 640
    hours = card["hours"]
    assert hours["before"]["wall_clock_hours"] == pytest.approx(0.1)
    assert hours["total"]["runs"] == 4
    text = Path("published/card.md").read_text()
    assert "Which is better?" in text
    assert str(stage) in text


ANYONE_S = "`a`<img src=x>\\<b>[c](http://d)|![e](f)\n# g\n```\n<h>"


def test_words_of_others_are_no_markdown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = dict.fromkeys(("device", "git_commit", "python", "precision"), ANYONE_S)
    changed |= {"versions": {ANYONE_S: ANYONE_S}, "overrides": [ANYONE_S]}
    fixed = STUDY_PROTOCOL | {"question": ANYONE_S}
    for name in ("dit", "unet"):
        backbone = {"_target_": f"mine.{name}", "width": ANYONE_S + name}
        config = {"protocol": fixed, "name": ANYONE_S, "backbone": backbone}
        for seed in (0, 1):
            alone = changed | {"overrides": [ANYONE_S, f"{ANYONE_S}{seed}"]}
            fake_run(Path(f"outputs/mine/{name}_{seed}"), 9.0 + seed, seed, config, FACTS | alone)
    publish(["outputs/mine"], "published")
    compare(["outputs/mine"], "compared")
    for path in (Path("published/card.md"), Path("compared/table.md")):
        text = path.read_text()
        assert "img src" in text
        tokens = MarkdownIt().enable("table").parse(text)
        inner = [each for token in tokens for each in token.children or ()]
        kinds = {each.type for each in [*tokens, *inner]}
        assert not kinds & {"html_block", "html_inline", "link_open", "image"}
        assert "a" not in [each.content for each in inner if each.type == "code_inline"]
        headings = [b.content for a, b in pairwise(tokens) if a.type == "heading_open"]
        assert "g" not in headings


def test_the_card_names_the_networks_that_jump_though_summaries_lack_facts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_group(Path("few"), "dit", [100.0, 110.0])
    fake_group(Path("few"), "jumps", [90.0, 95.0], config=UNET, summary={"jumps": True})
    publish(["few"], "published")
    card = card_of()
    assert card["jumps"] == ["UNet"]
    assert "told where a step goes: UNet." in Path("published/card.md").read_text()
    names = ("dit_0", "dit_1", "jumps_0", "jumps_1")
    assert card["commands"] == {f"runs/{name}": None for name in names}
    assert [(each["git_commit"], each["runs"]) for each in card["machines"]] == [(None, 4)]
    assert card["hours"]["runs"]["core_hours"] is None
    assert card["hours"]["runs"]["wall_clock_hours"] is not None


def test_unfinished_and_repeated_runs_are_left_out_and_named(study):
    fake_run(study / "cut", 90.0, 2, summary={"finished": False, "steps": 40})
    again = {"ended_at": "2025-01-01T00:00:00+00:00"}
    evaluate(fake_run(study / "again", 101.0, 0, summary=again), 70.0)
    found = publish([str(study)], "published")
    assert found["runs"] == 4
    assert_names(" ".join(found["left_out"]), study / "cut", study / "again")
    said = card_of()["left_out"]
    assert_names(" ".join(said), "cut is left out", "again is left out: dit_0")
    names = {path.name for path in Path("published/runs").iterdir()}
    assert names == {"dit_0", "dit_1", "unet_0", "unet_1"}


def test_folders_without_finished_runs_are_refused_and_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fake_run(Path("mine/cut"), 90.0, summary={"finished": False, "steps": 40})
    (tmp_path / "empty").mkdir()
    with refused("mine/cut"):
        publish(["mine"], "published")
    with refused("empty"):
        publish(["empty"], "published")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "empty"}


@pytest.mark.long
def test_publishing_again_replaces_what_it_wrote_and_nothing_else(study):
    publish([str(study)], "published")
    shutil.rmtree(study / "unet_1")
    publish([str(study)], "published")
    assert not Path("published/runs/unet_1").exists()
    compare(["published"], "after")
    (Path("published") / "notes.txt").write_text("mine")
    with refused("published", "notes.txt"):
        publish([str(study)], "published")
    assert Path("published/notes.txt").read_text() == "mine"
    assert [path.name for path in Path().glob(".published*")] == []


def test_folders_of_others_are_not_written_to(study):
    Path("other").mkdir()
    Path("other/file").write_text("mine")
    for output in ("other", "other/file"):
        with refused(output):
            publish([str(study)], output)
    for output in (study / "published", study, study.parent):
        with refused(output):
            publish([str(study)], str(output))
    publish([str(study)], "published")
    with refused("published"):
        publish(["published"], "twice")
    assert not (study / "published").exists()


def test_a_failure_leaves_the_old_folder_as_it_was(study, monkeypatch):
    publish([str(study)], "published")
    before = card_of()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusion_lab.analysis.publishing.text_of", full)
    with refused("published"):
        publish([str(study)], "published")
    assert card_of() == before
    assert {path.name for path in Path().iterdir()} == {"outputs", "published"}


def test_runs_of_several_studies_are_in_folders_of_their_own(study):
    wide = {"backbone": {"width": 64}}
    for seed in (0, 1):
        evaluate(fake_run(Path(f"outputs/other/dit_{seed}"), 90.0 + seed, seed, wide), 44.0 + seed)
    publish([str(study), "outputs/other"], "published")
    assert Path("published/runs/mine/dit_0/summary.json").is_file()
    assert Path("published/runs/other/dit_0/summary.json").is_file()
    (study.parent / "deeper").mkdir()
    shutil.copytree("outputs/other", "outputs/deeper/mine")
    with refused("dit_0"):
        publish([str(study), "outputs/deeper/mine"], "published")


@pytest.mark.long
def test_a_published_copy_inside_a_study_is_not_compared_with_its_runs(study):
    (study / "train").mkdir()
    for run in [*study.glob("dit_*"), *study.glob("unet_*")]:
        run.rename(study / "train" / run.name)
    publish([str(study / "train")], str(study / "record"))
    found = compare([str(study)], "page")
    assert [len(folders) for folders in found["compositions"].values()] == [2, 2]
    assert found["left_out"] == []
    shutil.rmtree(study / "train")
    found = compare([str(study)], "page")
    assert [len(folders) for folders in found["compositions"].values()] == [2, 2]


def test_one_study_may_be_given_by_several_paths(study):
    Path("link").symlink_to(study)
    whole = [f"runs/{name}_{seed}" for name in ("dit", "unet") for seed in (0, 1)]
    for paths in (["link/dit_0", str(study)], [str(study), str(study.resolve()), "link"]):
        publish(paths, "published")
        assert [row["folder"] for row in rows_of(Path("published"), "runs.csv")] == whole
    publish([str(study / "dit_0"), str(study / "unet_0")], "published")
    assert {path.name for path in Path("published/runs").iterdir()} == {"dit_0", "unet_0"}


class TestTuning:
    @pytest.fixture
    def tuned(self, study):
        """The study with tuning runs, measured against validation images, one of which failed."""
        tuned_by("outputs/tune", study)
        fake_run(Path("outputs/tune/lr-4"), 80.0, 100, summary={"finished": False})
        return study

    @pytest.mark.long
    def test_tuning_is_published_and_counted_but_not_compared(self, tuned):
        found = publish([str(tuned)], "published")
        assert_names(" ".join(found["left_out"]), "outputs/tune/lr-4")
        folder, card = Path("published/tuning"), card_of()
        assert {path.name for path in folder.iterdir()} == {"lr-1", "lr-2", "tuning.json"}
        assert (folder / "lr-1/metrics.jsonl").is_file()
        assert (folder / "tuning.json").read_bytes() == Path(
            "outputs/tune/tuning.json"
        ).read_bytes()
        hours = card["hours"]
        assert [hours[kind]["runs"] for kind in ("runs", "tuning", "total")] == [4, 2, 6]
        assert card["chosen"]["tuning/tuning.json"] == {"DiT": {"optimizer.lr": 2}}
        compared = compare(["published"], "after")["compositions"]
        assert [len(runs) for runs in compared.values()] == [2, 2]
        compare(["published/tuning"], "tuning_runs")  # is compared by itself if it is asked for

    def test_tuning_is_found_where_the_study_was_moved_to(self, tuned, monkeypatch):
        Path("moved").mkdir()
        shutil.move("outputs", "moved/mine")
        monkeypatch.chdir("moved/mine/mine")
        publish(["."], "../../../published")
        assert card_of("../../../published")["hours"]["tuning"]["runs"] == 2

    @pytest.mark.long
    def test_several_tunings_are_kept_apart(self, tuned):
        fake_group(Path("outputs/other"), "wide", [9.0, 8.0], config={"backbone": {"width": 64}})
        for run in Path("outputs/other").iterdir():
            evaluate(run, 5.0)
        tuned_by("outputs/tune-wide", Path("outputs/other"))
        publish([str(tuned), "outputs/other"], "published")
        assert Path("published/tuning/tune/tuning.json").is_file()
        assert Path("published/tuning/tune-wide/lr-2/summary.json").is_file()
        compare(["published"], "after")


def tuned_by(tuning: str, runs: Path) -> None:
    """Writes two tuning runs, measured against validation images, which all `runs` name."""
    asked = {"of": ["backbone"], "values": {"optimizer.lr": [1, 2]}, "metric": "fid"}
    for rate in (1, 2):
        own = {"protocol": {"reference": "validation"}, "summary": FACTS}
        fake_run(Path(tuning) / f"lr-{rate}", 80.0, 100, **own)
    found = {"DiT": {"chosen": {"optimizer.lr": 2}, "tried": []}}
    (Path(tuning) / "tuning.json").write_text(json.dumps(found))
    for run in runs.iterdir():
        cfg, own = load_config(run), asked | {"file": f"{tuning}/tuning.json"}
        OmegaConf.update(cfg, "tuning", own, force_add=True)
        save_config(run, cfg)


class TestClassifier:
    @pytest.fixture
    def original(self, study):
        """The classifier that a study's runs were measured with."""
        torch.manual_seed(0)
        network = SmallClassifier((1, 8, 8), 4).eval()
        facts = {"shape": [1, 8, 8], "classes": list(TinyData.class_names)}
        save_classifier(network, Path("classifier.safetensors"), facts)
        name = f"classifier-{hashing.of_file(Path('classifier.safetensors'))[:8]}"
        for seed in (0, 1):
            config = {"metrics": {"classifier": "classifier.safetensors"}}
            accuracy = {f"accuracy/{name}/1k": 0.5 + seed / 8}
            fake_run(Path(f"judged/{seed}"), 100.0 + seed, seed, config, metrics=accuracy)
        return name

    def test_it_is_published_in_half_precision(self, original):
        publish(["judged"], "published")
        (facts,) = card_of()["classifiers"]
        assert facts["name"] == original
        assert facts["sha256_of_original"].startswith(original.removeprefix("classifier-"))
        path = Path("published") / facts["file"]
        assert path.stat().st_size < 0.6 * Path("classifier.safetensors").stat().st_size
        images, read = tiny_data().test_images(), []
        for file in (Path("classifier.safetensors"), path):
            classifier = Classifier(str(file))
            classifier.load("cpu")
            classifier.check(tiny_data())
            read.append(classifier(images))
        assert read[1].dtype == torch.float32
        torch.testing.assert_close(read[1], read[0], atol=1e-2, rtol=1e-2)
        text = (Path("published") / "card.md").read_text()
        assert_names(text, facts["file"], facts["sha256_of_original"])

    @pytest.mark.long
    def test_one_that_is_gone_or_replaced_is_named(self, original):
        for change in (lambda path: path.write_bytes(b"other"), Path.unlink):
            change(Path("classifier.safetensors"))
            found = publish(["judged"], "published")
            assert found["missing_classifiers"] == [original]
            assert card_of()["classifiers"][0]["file"] is None


class TestThinning:
    @pytest.mark.slow
    def test_rows_of_losses_are_thinned_evenly_and_the_comparison_stays(
        self, study, same_comparison
    ):
        path = study / "dit_0/metrics.jsonl"
        measured = read_rows(path)
        rows = [
            {
                "step": step,
                "train/loss": 1 / step,
                "train/grad_norm": 0.5,
                "train/grad_norm_max": 400.0 if step == 1239 else 1.0,  # of a row that is left out
                "train/images_per_second": 300.0 + (step * 7) % 101,
                "images": 64 * step,
                "seconds": step / 2,
            }
            for step in range(1, 4001)
        ]
        rows += [
            row | {"step": 2000 * i, "images": 128000 * i} for i, row in enumerate(measured, 1)
        ]
        rows.sort(key=lambda row: row["step"])
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        publish([str(study)], "published")
        kept_file = Path("published/runs/dit_0/metrics.jsonl")
        kept = read_rows(kept_file)
        assert path.stat().st_size > LARGEST > kept_file.stat().st_size > LARGEST / 2
        assert [row for row in kept if f"fid/{NAME}" in row] == [
            row for row in rows if f"fid/{NAME}" in row
        ]
        steps = [row["step"] for row in kept if "train/loss" in row and row["step"] % 2000]
        gaps = [b - a for a, b in pairwise(steps)]
        assert max(gaps) <= min(gaps) + 2
        card = card_of()["thinned"]
        assert card["runs/dit_0"]["rows"] == len(rows)
        assert card["runs/dit_0"]["kept"] == len(kept)
        assert "runs/dit_1" not in card
        assert 1239 not in steps
        assert card["runs/dit_0"]["gradient_spike"] == 800
        same_comparison(study, Path("published"))
        # restored elsewhere, with a run that was trained there, and published again
        shutil.copytree("published/runs", "elsewhere/mine")
        (Path("elsewhere/mine/dit_0") / ".lock").touch()
        shutil.rmtree("elsewhere/mine/unet_1")
        shutil.copytree(study / "unet_1", "elsewhere/mine/unet_1")
        publish(["elsewhere/mine"], "again")
        assert card_of("again")["thinned"] == card
        assert not Path("again/runs/dit_0/.lock").exists()
        same_comparison(study, Path("again"))

    def test_a_file_with_many_measurements_keeps_all_of_them(self, tmp_path):
        path = tmp_path / "metrics.jsonl"
        rows = [{"step": i, "images": i, "val/loss": i / 7} for i in range(8000)]
        rows += [{"step": i, "images": 10**6 + i, "train/loss": i / 7} for i in range(8000)]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        assert thin(path)["rows"] == 16_000
        kept = read_rows(path)
        assert kept[:8000] == rows[:8000]
        assert 100 < len(kept) - 8000 < 4000
