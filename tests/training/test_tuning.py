"""A study is tuned before its runs: which runs, which values win, and what its runs then have."""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from threading import Barrier, BrokenBarrierError, Thread

import pytest
from helpers.commands import run_alone
from helpers.refusals import assert_names
from helpers.tiny_runs import TINY
from omegaconf import OmegaConf

from diffusion_lab.cli.tuning_stage import TuningStage
from diffusion_lab.common import files
from diffusion_lab.common.files import read_json
from diffusion_lab.runs import sweep_record
from diffusion_lab.training.tuning import Tuning

QUICK = [a for a in TINY if a != "backbone.depth=1"]
QUICK += ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
OPTIONS = ["tuning.of=[backbone.depth]", "tuning.metric=val/loss", "tuning.images=null"]
TUNED = ["train", "-m", "study_name=mine", *QUICK, "tuning=learning_rate", *OPTIONS]
GRID = "tuning.values={optimizer.lr:[1e-3,2e-3]}"
STUDY = [*TUNED, GRID, "tuning.grow=1", "backbone.depth=1,2", "seed=0,1"]
FOUND = Path("outputs/mine/tuning/tuning.json")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The outputs of the whole study, trained once; no test writes into them."""
    run_alone(folder := tmp_path_factory.mktemp("tuned"), *STUDY)
    return folder / "outputs"


@pytest.fixture
def tuned(lab, tmp_path, trained) -> None:
    """Copies the tuned study to the folder in which commands are run."""
    shutil.copytree(trained, tmp_path / "outputs")


def config_of(study: str, depth: int, seed: int):
    """The saved configuration of the study's run."""
    saved = [OmegaConf.load(path) for path in Path(f"outputs/{study}").glob("*/config.yaml")]
    (cfg,) = [each for each in saved if (each.backbone.depth, each.seed) == (depth, seed)]
    return cfg


def tuning(**settings: object) -> Tuning:
    facts = {
        "of": ["backbone"],
        "values": {"optimizer.lr": [1e-3, 2e-3, 4e-3]},
        "grow": 2,
        "metric": "fid",
        "seeds": [100],
        "images": 1000,
        "num_samples": 10,
        "overrides": [],
        "study": None,
        "running": False,
        "chosen": None,
        "tried": None,
    }
    return Tuning(**facts | settings)


def tried(**by_rate: float | None) -> list[dict]:
    """The results at learning rates, as in tried(r1=200.0) for 1e-3."""
    return [
        {"values": {"optimizer.lr": int(name[1:]) / 1000}, "results": {"100": value}}
        for name, value in by_rate.items()
    ]


def test_the_lowest_mean_wins_and_a_failed_run_never_does():
    best = tuning().best(tried(r1=3.0, r2=1.0, r4=2.0))
    assert best["values"] == {"optimizer.lr": 2e-3}
    two = [
        {"values": {"optimizer.lr": 1e-3}, "results": {"100": 1.0, "101": None}},
        {"values": {"optimizer.lr": 2e-3}, "results": {"100": 4.0, "101": 6.0}},
        {"values": {"optimizer.lr": 4e-3}, "results": {"100": 0.0, "101": 9.0}},
    ]
    assert tuning().best(two)["values"] == {"optimizer.lr": 4e-3}
    assert tuning().best(tried(r1=None)) is None


def test_a_grid_grows_beyond_an_end_that_wins_and_only_so_often():
    low, high = tried(r1=1.0, r2=2.0, r4=3.0), tried(r1=3.0, r2=2.0, r4=1.0)
    assert tuning().beyond(low, 0) == [{"optimizer.lr": 5e-4}]
    assert tuning().beyond(high, 1) == [{"optimizer.lr": 8e-3}]
    assert tuning().beyond(high, 2) == []
    assert tuning().beyond(tried(r1=2.0, r2=1.0, r4=2.0), 0) == []
    assert tuning().beyond(tried(r1=None, r2=None), 0) == []
    assert not tuning().inside(high)
    assert tuning().inside(tried(r1=2.0, r2=1.0, r4=2.0))


def test_a_grid_of_whole_numbers_stays_one():
    def found(values: dict[int, float]) -> list[dict]:
        return [{"values": {"batch_size": v}, "results": {"100": r}} for v, r in values.items()]

    sizes = tuning(values={"batch_size": [64, 128]})
    (grown,) = sizes.beyond(found({64: 2.0, 128: 1.0}), 0)
    assert grown == {"batch_size": 256}
    assert type(grown["batch_size"]) is int
    assert sizes.beyond(found({1: 1.0, 2: 2.0}), 0) == []  # half a row is none


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"values": {"optimizer.lr": [1e-3]}}, "values"),
        ({"values": {"optimizer.lr": [2e-3, 1e-3]}}, "values"),
        ({"values": {}}, "values"),
        ({"seeds": []}, "seeds"),
        ({"metric": "kid"}, "metric"),
        ({"of": "backbone"}, "of"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, named):
    with pytest.raises(ValueError, match=named):
        tuning(**settings)


def test_each_network_is_tuned_by_itself_and_its_runs_have_its_best_value(lab, tuned):
    found = json.loads(FOUND.read_text())
    assert sorted(found) == ["backbone.depth=1", "backbone.depth=2"]
    for depth in (1, 2):
        own = found[f"backbone.depth={depth}"]
        rates = [each["values"]["optimizer.lr"] for each in own["tried"]]
        assert rates[:2] == [1e-3, 2e-3]
        assert rates[2:] in ([5e-4], [4e-3])  # two values have no inside
        values = {
            rate: each["results"]["100"] for rate, each in zip(rates, own["tried"], strict=True)
        }
        assert own["chosen"]["optimizer.lr"] == min(values, key=values.get)
        for seed in (0, 1):
            cfg = config_of("mine", depth, seed)
            assert cfg.optimizer.lr == own["chosen"]["optimizer.lr"]
            assert OmegaConf.to_container(cfg.tuning.tried) == own["tried"]
    tuning_runs = list(Path("outputs/mine/tuning").glob("*/summary.json"))
    assert len(tuning_runs) == 6
    seeds = {OmegaConf.load(path.parent / "config.yaml").seed for path in tuning_runs}
    assert seeds == {100}


@pytest.mark.slow
def test_the_record_of_each_stage_has_the_folders_of_its_runs(lab, tuned):
    for study, sweeps in (("outputs/mine/tuning", 2), ("outputs/mine", 1)):
        records = list(sweep_record.of_study(Path(study)))
        assert sweeps <= len(records) <= sweeps + 1  # the grids of two networks may grow apart
        planned = {job.folder for record in records for job in record.jobs}
        assert planned == {path.parent for path in Path(study).glob("*/config.yaml")}


@pytest.mark.slow
def test_a_repeated_study_trains_nothing_again(lab, tuned):
    files = [*Path("outputs/mine").rglob("last.ckpt"), FOUND]
    before = {path: path.stat().st_mtime_ns for path in files if path != FOUND}
    content = FOUND.read_text()
    assert lab(*STUDY)[0] == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert FOUND.read_text() == content
    code, _, err = lab(
        *(a for a in STUDY if a != "-m" and "=0,1" not in a and "=1,2" not in a),
        "backbone.depth=2",
        "seed=7",
    )
    assert code == 0, err
    cfg = config_of("mine", 2, 7)
    assert cfg.optimizer.lr == json.loads(content)["backbone.depth=2"]["chosen"]["optimizer.lr"]


@pytest.mark.slow
def test_a_part_of_the_study_keeps_what_was_found_for_the_rest(lab, tuned):
    before = json.loads(FOUND.read_text())
    part = ["backbone.depth=choice(2)" if a == "backbone.depth=1,2" else a for a in STUDY]
    code, _, err = lab(*part)
    assert code == 0, err
    assert json.loads(FOUND.read_text()) == before


@pytest.mark.slow
def test_a_tuning_run_that_fails_for_another_reason_ends_the_command(lab, tuned):
    before = FOUND.read_text()
    # the folders hold runs of another name, so the tuning runs are refused
    code, _, err = lab(*STUDY, "name=other")
    assert code == 2
    assert_names(err.splitlines()[-1], "tuning runs", "name=other")
    assert FOUND.read_text() == before
    assert len(list(Path("outputs/mine").glob("*/config.yaml"))) == 4


def test_a_run_without_a_finite_metric_has_no_result(tmp_path):
    stage = TuningStage(tuning(metric="fid"), "mine", [], [])
    for metrics in ({"val/loss": 1.0}, {"fid/x": float("nan")}):
        files.write_json(tmp_path / "summary.json", {"finished": True, "metrics": metrics})
        assert stage.result(tmp_path) is None


@pytest.mark.slow
def test_a_value_at_which_training_diverges_loses(lab, monkeypatch):
    def result(stage, folder):
        return None if "lr-0.002" in folder.name else 1.0

    monkeypatch.setattr(TuningStage, "result", result)
    assert lab(*TUNED, GRID, "tuning.grow=0", "backbone.depth=1,2", "seed=0")[0] == 0
    found = json.loads(FOUND.read_text()).values()
    assert [each["chosen"] for each in found] == [{"optimizer.lr": 1e-3}] * 2


@pytest.mark.slow
def test_a_run_that_is_there_goes_on_with_its_values_if_the_file_is_gone(lab, tuned):
    shutil.rmtree("outputs/mine/tuning")
    single = [a for a in STUDY if a != "-m" and not a.startswith(("backbone.depth", "seed="))]
    code, _, err = lab(*single, "backbone.depth=1", "seed=0")
    assert code == 0, err
    assert "already finished" in err


@pytest.mark.slow
def test_a_network_may_be_given_by_several_words(lab):
    # Hydra quotes such a value in one place and escapes it in another
    network = "backbone=mlp backbone.width=64"
    given = [each for each in QUICK if not each.startswith("backbone")]
    given += [
        "backbone=mlp",
        "tuning=learning_rate",
        "tuning.metric=val/loss",
        "tuning.images=null",
    ]
    given += ["tuning.of=[budget.reference]", "tuning.grow=0", GRID, "budget=macs", "seed=0"]
    code, _, err = lab(
        "train", "-m", "study_name=mine", *given, f'budget.reference=choice("{network}")'
    )
    assert code == 0, err
    assert list(json.loads(FOUND.read_text())) == [f"budget.reference={network}"]
    (run,) = Path("outputs/mine").glob("*/config.yaml")
    saved = OmegaConf.load(run)
    assert saved.optimizer.lr == saved.tuning.chosen["optimizer.lr"]


def test_a_single_network_may_have_keys_of_its_own(lab):
    given = [each for each in QUICK if each != "backbone=dit"] + ["backbone=choice(dit)"]
    assert any(each.startswith("backbone.width") for each in given)  # no key of the default one
    given += ["tuning=learning_rate", "tuning.metric=val/loss", "tuning.images=null"]
    given += ["tuning.grow=0", "seed=0"]
    code, _, err = lab("train", "-m", "study_name=mine", *given, GRID)
    assert code == 0, err
    (found,) = json.loads(FOUND.read_text()).items()
    assert found[0] == "backbone=dit"
    assert [each["values"]["optimizer.lr"] for each in found[1]["tried"]] == [1e-3, 2e-3]
    assert len(list(Path("outputs/mine").glob("*/config.yaml"))) == 1


@pytest.mark.slow
def test_another_study_can_use_the_values(lab, tuned):
    other = ["study_name=other" if a == "study_name=mine" else a for a in STUDY]
    assert lab(*other, "tuning.study=mine")[0] == 0
    assert not Path("outputs/other/tuning").exists()
    chosen = json.loads(FOUND.read_text())["backbone.depth=1"]["chosen"]["optimizer.lr"]
    assert config_of("other", 1, 0).optimizer.lr == chosen


@pytest.mark.parametrize(
    ("more", "named"),
    [
        (["optimizer.lr=1e-3"], ["optimizer.lr"]),
        (["batch_size=4,8"], ["batch_size", "tuning.of", "tuning.overrides"]),
        (["tuning.of=[backbone]"], ["tuning.of", "backbone"]),
        (["tuning.seeds=[1]"], ["tuning.seeds", "1"]),
        (["seed=100"], ["tuning.seeds", "100"]),
        (["tuning.images=64"], ["tuning.images", "budget=images"]),
        (["tuning.values={optimizer.lr:[2e-3,1e-3]}"], ["tuning.values"]),
    ],
)
def test_a_study_that_leaves_its_tuning_open_is_refused_before_any_run(refusal, more, named):
    assert_names(refusal(*STUDY, *more), *named)
    assert not list(Path("outputs").rglob("config.yaml"))


def test_the_validation_loss_chooses_no_key_that_changes_its_meaning(refusal):
    other = "tuning.values={objective.label_dropout:[0.1,0.2]}"
    options = [a for a in STUDY if a not in (GRID, "tuning=learning_rate")]
    assert_names(refusal(*options, "tuning=values", other), "val/loss", "tuning.metric=fid")


def test_tuning_without_a_study_is_refused(refusal):
    assert_names(refusal("train", *QUICK, "tuning=learning_rate", "backbone=dit"), "study_name")


def test_a_run_of_a_study_that_was_not_tuned_is_refused(refusal):
    single = [a for a in STUDY if a != "-m" and not a.startswith(("backbone.depth", "seed="))]
    assert_names(refusal(*single, "backbone.depth=1", "seed=0"), "backbone.depth=1", "train -m")
    assert_names(refusal(*single, "seed=0"), "backbone.depth")


@pytest.mark.slow
def test_a_tuned_study_is_left_stage_by_stage(lab, tuned, tmp_path, fake_slurm):
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher")
    left = [*STUDY, "hydra/launcher=slurm", "hydra.launcher.wait=false"]
    Path("outputs").rename("trained")
    code, _, err = lab(*left)
    assert code == 0, err
    assert fake_slurm.submissions == 1
    assert not Path("outputs/mine/sweeps").exists()
    (record,) = sweep_record.of_study(Path("outputs/mine/tuning"))
    assert len(record.jobs) == 4
    shutil.rmtree("outputs")
    shutil.copytree("trained/mine/tuning", "outputs/mine/tuning")
    FOUND.unlink()
    code, _, err = lab(*left)
    assert code == 0, err
    assert FOUND.read_text() == Path("trained", *FOUND.parts[1:]).read_text()
    assert fake_slurm.submissions == 2
    (record,) = sweep_record.of_study(Path("outputs/mine"))
    assert [job.slurm for job in record.jobs] == [f"17_{number}" for number in range(4)]


def test_networks_that_need_the_same_value_try_it_together():
    def stage(*keys: str) -> TuningStage:
        networks = [dict.fromkeys(keys, name) for name in ("a", "b", "c")]
        return TuningStage(tuning(of=list(keys)), "mine", [], networks)

    low, high = tried(r1=1.0, r2=2.0), tried(r1=2.0, r2=1.0)
    four, half = {"optimizer.lr": 4e-3}, {"optimizer.lr": 5e-4}
    assert stage("backbone").beyond([high, low, high], 0) == [(four, [0, 2]), (half, [1])]
    apart = stage("backbone", "optimizer").beyond([high, low, high], 0)
    assert apart == [(four, [0]), (half, [1]), (four, [2])]


def test_commands_that_end_together_keep_what_each_has_found(tmp_path, monkeypatch):
    file, both = tmp_path / "tuning.json", Barrier(2)

    def read_slowly(path):
        found = read_json(path)
        with suppress(BrokenBarrierError):
            both.wait(timeout=0.5)  # without a lock both read before one of them writes
        return found

    monkeypatch.setattr(files, "read_json", read_slowly)
    adding = [Thread(target=files.add_to_json, args=(file, {name: 1})) for name in ("a", "b")]
    for each in adding:
        each.start()
    for each in adding:
        each.join()
    assert read_json(file) == {"a": 1, "b": 1}
