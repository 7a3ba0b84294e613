"""Each run of a sweep has a folder; finished runs are skipped, unfinished ones resume."""

import errno
import hashlib
import os
import shlex
import shutil
import signal
from pathlib import Path

import pytest
import torch
from helpers.compositions import composed
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import TINY, checkpoint_of, same, summary_of
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.cli.sweeps import first_job, jobs_of, say_best, sweep_overrides
from diffusion_lab.diffusion.denoiser import Denoiser
from diffusion_lab.runs.folder import save_config, write_summary
from diffusion_lab.runs.progress import locked
from diffusion_lab.runs.resuming import differences
from diffusion_lab.runs.summary import Summary
from diffusion_lab.training import study
from diffusion_lab.training.callbacks.stopping import Interruption
from diffusion_lab.training.task import build_task

QUICK = [a for a in TINY if a != "backbone.patch=4"]
QUICK += ["callbacks.evaluation=null", "callbacks.sample_grid=null", "logger=none"]
SWEEP = ["train", "-m", "study_name=mine", *QUICK, "seed=0,1"]
WHOLE = [*SWEEP, "backbone.patch=4"]


@pytest.mark.parametrize(
    "metric", ["val/loss", "test/loss", "val_by_level/t0.05", "test_by_level/t0.95"]
)
def test_losses_are_compared_by_no_search_that_changes_them(metric):
    used = {"instead": metric}
    with refused(metric, "instead"):
        study.check_losses(used, ["objective"])
    study.check_losses(used, ["optimizer.lr"])
    study.check_losses({"instead": metric.partition("/")[0] + "/psnr"}, ["objective"])


def test_a_metric_is_measured_only_if_a_finished_run_has_it():
    task = build_task(composed("train", *TINY, "name=x"))
    for metric in ("val/loss", "test/loss", "val_by_level/t0.05", "test_by_level/t0.95", "fid"):
        assert task.measures(metric), metric
    for metric in ("train/loss", "train/lr", "train_by_level/t0.05", "val_lossy/x", "val_by_level"):
        assert not task.measures(metric), metric


@pytest.fixture
def trained(trained_once) -> Path:
    """The outputs of the whole sweep."""
    return trained_once(*WHOLE) / "outputs"


@pytest.fixture
def finished(lab, tmp_path, trained) -> None:
    """Copies the finished sweep to the folder in which commands are run."""
    shutil.copytree(trained, tmp_path / "outputs", symlinks=True)


def run_of(study, **settings):
    """The folder, below outputs, of the run of a study that has these settings."""
    found = []
    for path in Path().glob(f"outputs/{study}/*/config.yaml"):
        cfg = OmegaConf.load(path)
        if all(OmegaConf.select(cfg, key) == value for key, value in settings.items()):
            found.append(path.parent)
    (folder,) = found
    return folder


def finished_runs() -> int:
    """The number of finished runs of the study."""
    return sum(summary_of(path.parent)["finished"] for path in Path().glob("*/mine/*/summary.json"))


def finished_at(folder):
    """The time at which the run's last checkpoint was written."""
    return (folder / "checkpoints/last.ckpt").stat().st_mtime_ns


def test_a_name_needs_no_quotes_and_tells_runs_apart():
    values = {"seed": "1", "backbone/block": "adaln", "optimizer.betas": "[0.9, 0.99]"}
    name = study.name_of(values)
    assert name == "backbone.block-adaln_optimizer.betas-.0.9.0.99_seed-1"
    assert study.name_of({"data.fraction": "0.01"}) == "data.fraction-0.01"


def test_a_long_name_keeps_what_lies_highest_and_tells_runs_apart():
    values = {f"callbacks.evaluation.{'key' * i}": "1" for i in range(1, 9)}
    values |= {"seed": "0", "backbone": "unet", "data.fraction": "0.1"}
    name = study.name_of(values)
    assert name.startswith("backbone-unet_seed-0_data.fraction-0.1_callbacks.evaluation.key-1_")
    assert len(name) <= 128
    other = study.name_of(values | {"callbacks.evaluation." + 8 * "key": "2"})
    assert name[:-8] == other[:-8]
    assert name != other
    umlauts = 300 * "\N{LATIN SMALL LETTER A WITH DIAERESIS}"
    assert len(study.name_of({"data.source.path": umlauts})) == 8


def test_a_run_that_was_named_by_all_its_keys_is_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    keys = ["study_name=x", "backbone=dit", "experiment=quickstart", "seed=0"]
    short = "outputs/x/backbone-dit_seed-0"
    whole = "outputs/x/backbone-dit_experiment-quickstart_seed-0"
    assert place(*keys) == short
    Path(whole).mkdir(parents=True)
    assert place(*keys) == whole


def place(*overrides, swept=()):
    """The folder of a run with these overrides, of which a sweep varies `swept`."""
    GlobalHydra.instance().clear()
    task = [*overrides, *swept]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("train", overrides=task, return_hydra_config=True)
    OmegaConf.set_readonly(cfg.hydra, False)
    cfg.hydra.mode = RunMode.MULTIRUN if swept else RunMode.RUN
    cfg.hydra.overrides.task = task
    fixed = [override.split("=")[0].lstrip("+~") for override in overrides]
    cfg.hydra.job.config.override_dirname.exclude_keys = fixed
    folder = study.folder_of(cfg, cfg.hydra)
    return folder and str(folder)


@pytest.mark.long
def test_the_place_of_a_run_is_the_same_for_one_value_as_for_several():
    one = place("study_name=x", "backbone=dit", "seed=0")
    assert one == "outputs/x/backbone-dit_seed-0"
    assert place("study_name=x", "backbone=dit", swept=["seed=0"]) == one
    assert place("study_name=x", swept=["backbone=dit", "seed=0"]) == one
    common = ["budget=images", "budget.images=64", "trainer=cpu", "compile=false", "logger=none"]
    assert place("study_name=x", *common, "backbone=dit", swept=["seed=0"]) == one
    swept = place("study_name=x", "backbone=dit", "seed=0", swept=["compile=true"])
    assert swept == "outputs/x/backbone-dit_compile-True_seed-0"
    removed = place("study_name=x", "~augmentation", "+trainer.x=1")
    assert removed == "outputs/x/augmentation-null_trainer.x-1"
    same = ["metrics.num_samples=250", "experiment=quickstart"]
    assert place("study_name=x", *same, "backbone=dit", swept=["seed=0"]) == one
    alone = place("study_name=x", *same, swept=["seed=0"])
    assert alone == "outputs/x/experiment-quickstart_seed-0"
    several = place("study_name=x", "seed=0", swept=["metrics.num_samples=250"])
    assert several == "outputs/x/metrics.num_samples-250_seed-0"
    paths = ["data=image_folder", "data.source.path=photos"]
    assert place("study_name=x", *paths) == "outputs/x/data-image_folder_data.source.path-photos"
    assert place("study_name=x", "compile=false", "data.source.root=elsewhere") is None
    assert place("backbone=dit", swept=["seed=0"]) is None
    assert place("study_name=x", "run_dir=y", swept=["seed=0"]) == "y"
    with refused("study_name", "name of a folder"):
        place("study_name=../x", "seed=0")


CHOSEN = "run_dir='outputs/a/${hydra:runtime.choices.backbone}-${seed}'"


@pytest.mark.parametrize(
    ("given", "folders"),
    [
        (["seed=0,1"], ["mine/backbone-dit_seed-0", "mine/backbone-dit_seed-1"]),
        (["seed=0,1", CHOSEN], ["a/dit-0", "a/dit-1"]),
        (["run_dir=outputs/a,outputs/b"], ["a", "b"]),
        (["resume=outputs/a,outputs/b"], ["a", "b"]),
    ],
)
def test_the_folders_of_a_sweep_are_known_before_its_runs(given, folders):
    overrides, flags = ["study_name=mine", "backbone=dit", *given], ["-m"]
    GlobalHydra.instance().clear()
    cfg = first_job("train", flags, [*overrides, *sweep_overrides(Path("x"), overrides)])
    jobs = jobs_of("train", flags, overrides, cfg)
    assert [job.folder for job in jobs] == [Path("outputs", folder) for folder in folders]


@pytest.mark.long
def test_a_repeated_sweep_skips_what_is_finished_and_adds_what_is_new(lab, tmp_path, finished):
    assert len(list(tmp_path.glob("outputs/mine/*/config.yaml"))) == 2
    folders = [run_of("mine", seed=seed) for seed in (0, 1)]
    before = [finished_at(folder) for folder in folders]
    err = lab.done(*SWEEP[:-1], "backbone.patch=4", "seed=0,1,2")
    assert_names(err, *folders)
    assert finished_runs() == 3
    assert [finished_at(folder) for folder in folders] == before


@pytest.mark.slow
def test_a_folder_of_another_configuration_is_refused_not_reused(lab, tmp_path, finished):
    asked = [*WHOLE, "budget=images", "budget.images=40"]
    folders = [run_of("mine", seed=seed) for seed in (0, 1)]
    before = [finished_at(folder) for folder in folders]
    err = lab.done(*asked, code=1)
    assert_names(err, *folders, "budget._target_=null", "study_name=mine_2")
    assert [finished_at(folder) for folder in folders] == before
    # another place or speed of training does not make another run
    lab.done(*SWEEP, "backbone.patch=4", "micro_batch_size=4", "trainer.strategy=ddp")


@pytest.mark.parametrize("flags", [[], ["--config-dir=own"]])
def test_a_sweep_with_a_job_that_cannot_be_composed_leaves_nothing(lab, tmp_path, flags):
    (tmp_path / "own").mkdir()
    networks = ["backbone=unet_small,dit", "backbone.channels=16", "seed=0"]
    err = lab.done("train", "-m", *flags, "study_name=x", *networks, code=2)
    assert_names(err, "backbone.channels", "backbone=dit")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.long
def test_a_failed_job_does_not_end_the_sweep_and_is_run_alone_by_the_line_that_is_said(
    lab, tmp_path
):
    arguments = [*SWEEP[:-1], "backbone.patch=3,4"]
    err = lab.done(*arguments, code=1)
    assert finished_runs() == 1
    assert_names(err, "backbone.patch=3")
    assert summary_of(run_of("mine", **{"backbone.patch": 4}))["finished"]
    line = err.strip().splitlines()[-1].split()
    assert line[:2] == ["diffusion-lab", "train"]
    (place,) = [each for each in line if each.startswith("run_dir=outputs/mine/")]
    mended = [a.replace("backbone.patch=3", "backbone.patch=2") for a in line[1:]]
    lab.done(*mended)
    assert summary_of(tmp_path / place.removeprefix("run_dir="))["finished"]


@pytest.mark.slow
def test_the_line_of_a_failed_job_names_the_folder_of_configurations(lab, tmp_path):
    (tmp_path / "my own/experiment").mkdir(parents=True)
    mine = "# @package _global_\nname: it's mine\nbackbone:\n  patch: 3\n"
    (tmp_path / "my own/experiment/mine.yaml").write_text(mine)
    flags = ["--config-dir", str(tmp_path / "my own")]
    err = lab.done(*SWEEP[:-1], *flags, "experiment=mine", "logger=none", "seed=0", code=1)
    line = shlex.split(err.strip().splitlines()[-1])
    assert line[:2] == ["diffusion-lab", "train"]
    assert line[2:4] == flags
    lab.done(*line[1:], "backbone.patch=4")


@pytest.mark.slow
def test_an_error_in_training_is_kept_as_well(lab, tmp_path, monkeypatch):
    def fail(self, *arguments, **more):
        raise RuntimeError("the disk is on fire")

    monkeypatch.setattr(Denoiser, "_ask", fail)
    err = lab.done(*SWEEP[:-1], "seed=0", "backbone.patch=4", code=1)
    assert finished_runs() == 0
    assert_names(err, "RuntimeError: the disk is on fire")
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    err = lab.done(*SWEEP[:-1], "seed=0", "backbone.patch=4")
    abandoned = Path("outputs/mine/.abandoned") / run_of("mine", seed=0).name
    assert_names(err, abandoned)
    assert abandoned.is_dir()
    assert finished_runs() == 1


def stop_after(step, monkeypatch):
    """Stops training by SIGTERM after a step."""
    was = Interruption.on_train_batch_end

    def stop(self, trainer, *arguments):
        if trainer.global_step == step:
            os.kill(os.getpid(), signal.SIGTERM)
        was(self, trainer, *arguments)

    monkeypatch.setattr(Interruption, "on_train_batch_end", stop)


@pytest.mark.long
def test_an_interrupted_sweep_goes_on_and_ends_as_an_unbroken_one(lab, trained, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert lab(*SWEEP, "backbone.patch=4")[0] == 130
    first = run_of("mine", seed=0)
    assert summary_of(first)["finished"] is False
    lab.done(*SWEEP, "backbone.patch=4")
    assert finished_runs() == 2
    parts, whole = (checkpoint_of(each / first.name) for each in (first.parent, trained / "mine"))
    assert same(parts["state_dict"], whole["state_dict"])


SAVED = {
    "seed": 0,
    "budget": None,
    "data": {"fraction": None, "source": {"root": "a"}},
    "callbacks": {
        "weight_averaging": {"_target_": "diffusion_lab.training.callbacks.EMA", "ramp": 0.1}
    },
    "trainer": {"_target_": "lightning.Trainer", "devices": 1, "max_steps": 3},
}


def differing(changes, saved=None):
    """The differences of the run SAVED, changed by `saved`, from a request changed by `changes`."""
    saved = OmegaConf.merge(SAVED, saved or {})
    found = differences(saved, OmegaConf.merge(SAVED, changes))
    return {key: (old, new) for key, old, new in found}


def test_an_empty_node_is_a_value_of_its_own():
    assert flat({"a": {"b": {}, "c": None}, "d": [{}]}) == {"a.b": {}, "a.c": None, "d": [{}]}
    assert flat({}) == {}
    assert differing({"callbacks": {"own": {}}}) == {"callbacks.own": (None, {})}


def test_a_run_is_another_by_any_setting_but_where_it_ran():
    elsewhere = {"data": {"source": {"root": "b"}}, "trainer": {"devices": 2}, "run_dir": "x"}
    assert differing(elsewhere) == {}
    assert differing({"trainer": {"max_steps": 4}}) == {"trainer.max_steps": (3, 4)}
    assert differing({"data": {"fraction": 0.1}}) == {"data.fraction": (None, 0.1)}
    assert differing({}, saved={"data": {"fraction": 0.1}}) == {"data.fraction": (0.1, None)}


def test_how_a_run_is_watched_makes_no_other():
    watched = {"callbacks": {"evaluation": {"every_n_steps": 5, "batch_size": 8, "seed": 0}}}
    often = {"callbacks": {"evaluation": {"every_n_steps": 2, "batch_size": 4, "seed": 0}}}
    grid = {"callbacks": {"sample_grid": {"every_n_steps": 2}}, "validate_every_n_steps": 9}
    assert differing(often, saved=watched) == {}
    assert differing(grid, saved={"callbacks": {"sample_grid": None}}) == {}
    anew = {"callbacks": {"evaluation": {"seed": 1}}}
    seeded = differing(OmegaConf.merge(often, anew), saved=watched)
    assert seeded == {"callbacks.evaluation.seed": (0, 1)}
    classifiers = [{"metrics": {"classifier": path}} for path in ("a/x.safetensors", "b/x", None)]
    assert differing(classifiers[0], saved=classifiers[1]) == {}
    assert differing(classifiers[0], saved=classifiers[2])


def test_an_object_and_null_make_two_runs_whichever_was_saved():
    none = {"callbacks": {"weight_averaging": None}}
    without = OmegaConf.merge(SAVED, none)
    assert "callbacks.weight_averaging.ramp" in differing(none)
    (found, *_) = differences(without, OmegaConf.create(SAVED))
    assert found[0] == "callbacks.weight_averaging._target_"
    assert differing({"augmentation": {"_target_": "x.Y", "p": 0.1}}, {"augmentation": None})
    images = {"_target_": "diffusion_lab.estimate.budget.Budget", "images": 8, "solved": None}
    assert differing({"budget": images})["budget.images"] == (None, 8)
    solved = images | {"solved": ["trainer.max_steps=2"]}
    assert differing({}, saved={"budget": solved})["budget.images"] == (8, None)
    # settings that followed from the budget are not given again
    assert differing({"budget": images}, {"budget": solved, "trainer": {"max_steps": 2}}) == {}


def test_what_a_run_finds_out_is_not_asked_for():
    def of_source(settings):
        return {"data": {"source": settings}}

    asked = {"image_size": None, "channels": None, "classes": None, "resize": "crop"}
    found = {"image_size": [8, 8], "channels": 1, "classes": ["a"], "resize": "refuse"}
    assert differing(of_source(asked), saved=of_source(found)) == {}
    sized = of_source(asked | {"image_size": 8})
    assert differing(sized, saved=of_source(found | {"resize": "crop"})) == {}
    differs = differing(sized, saved=of_source(found))
    assert differs == {"data.source.resize": ("refuse", "crop")}
    measured = {"first_stage": {"path": "vae", "scale": "measured", "sha256": None}}
    kept = {"first_stage": {"path": "run/first_stage", "scale": 0.3, "sha256": "0"}}
    assert differing(measured, saved=kept) == {}
    config = {"first_stage": {"path": "vae", "scale": "config", "sha256": None}}
    assert differing(config, saved=kept) == {"first_stage.scale": (0.3, "config")}


def test_a_first_stage_that_was_trained_again_is_another(tmp_path):
    def asked():
        return {"first_stage": {"run": str(tmp_path), "sha256": None}}

    file = tmp_path / "first_stage.safetensors"
    file.write_bytes(b"one")
    kept = {"first_stage": {"run": "mine", "sha256": hashlib.sha256(b"one").hexdigest()}}
    assert differing(asked(), saved=kept) == {}
    file.write_bytes(b"other")
    assert list(differing(asked(), saved=kept)) == ["first_stage.sha256"]


@pytest.mark.long
def test_compared_models_see_the_same_images_and_noise(lab, monkeypatch):
    """Data order, noise of training and noise of sampling are the same for two backbones."""
    seen = {}

    def watch(self, x, level, given):
        if x.is_meta:  # a count of multiply-accumulates
            return was(self, x, level, given)
        record = seen.setdefault(type(self.backbone).__name__, {True: [], False: []})
        record[self.training].append((x.clone(), level.t.clone(), given.labels))
        return was(self, x, level, given)

    was = Denoiser._ask  # called by the loss and by the samplers
    monkeypatch.setattr(Denoiser, "_ask", watch)
    arguments = [a for a in QUICK if not a.startswith(("backbone", "callbacks.sample_grid"))]
    for backbone in ("backbone=mlp backbone.width=16", "backbone=unet_small backbone.channels=16"):
        lab.done("train", *backbone.split(), *arguments, "seed=5")
    one, other = seen.values()
    assert len(one[True]) == len(other[True]) == 4  # steps
    for mine, theirs in zip(one[True], other[True], strict=True):
        for a, b in zip(mine, theirs, strict=True):
            assert torch.equal(a, b)
    assert not torch.equal(one[True][0][0], one[True][1][0])
    # validation gives whole images at its levels; a drawing gives pure noise first
    validated = list(zip(one[False], other[False], strict=True))
    pure = [(a, b) for a, b in validated if (a[1] == 1).all()]
    assert len(pure) >= 1
    for a, b in pure:
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[2], b[2])


@pytest.mark.slow
def test_a_run_is_resumed_with_the_new_logging_and_machine(lab, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        stop_after(2, patch)
        assert lab(*SWEEP)[0] == 130
    folder = run_of("mine", seed=0)
    new = ["data.source.root=elsewhere", "callbacks.checkpoint.every_n_steps=7", "trainer=cpu"]
    new += ["logger=wandb", "logger.wandb.mode=offline"]  # the run was trained without W&B
    lab.done(*SWEEP[:-1], "seed=0", *new)
    assert finished_runs() == 1
    config = OmegaConf.load(folder / "config.yaml")
    assert (config.data.source.root, config.callbacks.checkpoint.every_n_steps) == ("elsewhere", 7)


def test_of_what_is_asked_for_again_a_run_takes_where_and_how_it_is_watched(tmp_path):
    saved = {"data": {"source": {"root": "/a"}}, "trainer": {"devices": 1, "strategy": "auto"}}
    saved |= {"micro_batch_size": None, "callbacks": {"sample_grid": None}}
    saved["logger"] = {"wandb": {"mode": "auto", "tags": ["mine", "budget-images"]}}
    save_config(tmp_path, OmegaConf.create(saved))
    places = ["data.source.root=/b", "trainer.devices=2", "micro_batch_size=4"]
    places.append("logger.wandb.mode=offline")
    others = ["experiment=quickstart", "backbone=dit", "logger=none", "trainer.max_steps=9"]
    others += ["seed=1", "logger.wandb.tags=[a]", "callbacks.sample_grid.every_n_steps=5"]
    assert study.overrides_to_resume(tmp_path, [*others, *places]) == places
    strategy = "trainer.strategy={_target_:diffusion_lab.compute.sharding.DDP}"
    assert study.overrides_to_resume(tmp_path, ["trainer=ddp"]) == [strategy]


@pytest.mark.slow
def test_a_folder_that_may_be_trained_where_there_are_no_locks_stays(lab, finished, monkeypatch):
    folder = run_of("mine", seed=0)
    shutil.rmtree(folder / "checkpoints")
    (folder / "summary.json").unlink()

    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("portalocker.portalocker.LOCKER", flock)
    err = lab.done(*WHOLE, code=1)
    assert_names(err, folder)
    assert folder.is_dir()


@pytest.mark.slow
def test_a_run_that_another_process_trains_is_left_to_it(lab, tmp_path, finished):
    folder = run_of("mine", seed=0)
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 0\n")  # before its first checkpoint
    with locked(folder):
        err = lab.done(*WHOLE, code=1)
    assert_names(err, folder, os.getpid())
    assert finished_runs() == 1
    assert (folder / "config.yaml").read_text() == "seed: 0\n"
    assert not (tmp_path / "outputs/mine/.abandoned").exists()


def test_a_sweep_ends_with_its_best_arms_and_how_to_compare_them(tmp_path, capsys):
    fids = {"a_seed-0": 30.0, "a_seed-1": 20.0, "b_seed-0": 24.0, "c_seed-0": 10.0}
    for name, fid in fids.items():
        metrics = {"fid/x/train1k-1k": fid, "fid/y/train1k-1k": 1.0, "kid/x/1k": 0.1}
        (tmp_path / name).mkdir()
        write_summary(tmp_path / name, Summary(finished=name != "c_seed-0", metrics=metrics))
    say_best(
        [
            {"overrides": [f"backbone={name[0]}", f"seed={name[-1]}", f"run_dir={tmp_path / name}"]}
            for name in fids
        ]
    )
    *best, following = capsys.readouterr().err.splitlines()
    shown = [line.replace(",", "").split() for line in best]
    assert [(line[1], line[-1]) for line in shown] == [
        ("24", str(tmp_path / "b_seed-0")),
        ("25", str(tmp_path / "a_seed-*")),
    ]
    assert "2" in shown[1]  # seeds
    assert following.endswith(f"diffusion-lab compare {tmp_path}")


def test_arms_are_told_apart_though_the_names_of_their_folders_are_cut(tmp_path, capsys):
    cut = "backbone-dit_\N{HORIZONTAL ELLIPSIS}_"
    outcomes = []
    for seed, checksum in enumerate(("4bebd8f4", "0769292c")):
        (folder := tmp_path / f"seed-{seed}_{cut}{checksum}").mkdir()
        write_summary(folder, Summary(finished=True, metrics={"fid/x/train1k-1k": 10.0 + seed}))
        outcomes.append({"overrides": ["backbone=dit", f"seed={seed}", f"run_dir={folder}"]})
    say_best(outcomes)
    (best, _) = capsys.readouterr().err.splitlines()
    assert best.split()[1].strip(",") == "10.5"
    assert best.endswith(f"/seed-*_{cut}*")


def test_a_study_chooses_by_what_its_values_leave_comparable():
    cfg = composed("train", "name=x").copy()
    cfg.metrics.extra = {"sharpness": {"_target_": "torchmetrics.image.inception.InceptionScore"}}
    study.check_choice(cfg, "kid", ["objective.time_sampler.std"])
    study.check_choice(cfg, "val/loss", ["optimizer.lr"])
    study.check_choice(cfg, "val/psnr", ["objective.time_sampler.std"])  # of pictures, not a loss
    with refused("choose: fid", "objective.time_sampler.std"):
        study.check_choice(cfg, "val/loss", ["optimizer.lr", "objective.time_sampler.std"])
    remedies = {"mmd": "mmd=true", "accuracy": "classifier", "seams": "patch", "fid_class": "true"}
    for metric, remedy in remedies.items():
        with refused(f"choose: {metric}", remedy):
            study.check_choice(cfg, metric, ["optimizer.lr"])
    with refused("choose", "sharpness"):  # of which higher is better
        study.check_choice(cfg, "sharpness", ["optimizer.lr"])
