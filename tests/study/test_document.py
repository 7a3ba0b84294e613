"""The file of a study is read with its base and overrides; a mistake is named with file and key."""

import pytest
import yaml

from diffusion_lab.assembly.sentences import text_of
from diffusion_lab.cli.study import document
from diffusion_lab.cli.study.command import check, read
from diffusion_lab.cli.study.jobs import Jobs
from diffusion_lab.common.messages import UserError

PLAIN = {
    "question": "Which is better?",
    "protocol": {"metric": "fid", "test": "welch", "seeds": [0, 1], "stop": "two seeds"},
    "common": {"data": "fashion_mnist", "sampler.steps": 2},
    "arms": {"U-Net": {"backbone": "unet_small"}, "DiT": {"backbone": "dit"}},
    "axes": {"data": {"few": {"data.fraction": 0.1}, "all": {"data.fraction": 1.0}}},
    "budget": {"match": "macs", "reference": "unet_small", "images": 1000},
    "stages": {
        "page": {"compare": {}, "needs": ["train"]},
        "tune": {"train": {"optimizer.lr": [1e-3, 2e-3]}, "choose": "fid", "share": 0.5},
        "train": {"train": {}, "over": ["arms", "data", "seeds"], "needs": {"tuning": "tune"}},
        "copies": {
            "memorization": {},
            "needs": {"run": "train", "control": {"stage": "train", "other": "seeds"}},
        },
    },
}


@pytest.fixture
def load(tmp_path):
    """Loads PLAIN with changed keys, and with overrides."""
    (tmp_path / "study").mkdir()

    def loaded(overrides=(), **changes):
        plain = {k: v for k, v in (PLAIN | changes).items() if v is not None}
        text = yaml.safe_dump(plain, sort_keys=False)
        (tmp_path / "study/mine.yaml").write_text(text)
        return document.load("mine", dict(overrides), str(tmp_path))

    return loaded


def stages(**changes):
    return {"stages": PLAIN["stages"] | changes}


AGAIN = {"memorization": {"num_samples": 8}, "needs": {"run": "train"}}
FREE = {"train": {}}
PAGE = {"compare": {}, "needs": ["train"]}
SIGNS = {"evaluate": {}, "needs": {"run": "train"}, "over": ["arms", "data", "seeds"]}
SIGNS |= {"over": dict.fromkeys(SIGNS["over"], "all") | {"guidance.scale": [-1, 1]}}
ONE_ARM = {"train": {}, "over": {"arms": ["DiT"], "seeds": "all"}}
OF_ANOTHER = {"run": {"stage": "train", "other": "arms"}}
DRAWN = {"choose": "fid", "trials": 3}
OTHER = {"stage": "train", "other": "seed"}


@pytest.mark.parametrize(
    ("changes", "key", "named"),
    [
        ({"question": None}, "question", "missing"),
        ({"arm": {}}, "arm", "arms"),
        ({"protocol": {"seed": [0]}}, "protocol.seed", "seeds"),
        ({"protocol": {"contrasts": [["DiT", "Mamba"]]}}, "protocol.contrasts", "Mamba"),
        ({"arms": {"U-Net": {}, "u net": {}}}, "arms.u net", "U-Net"),
        ({"arms": {"U-Net, small": {}}}, "arms.U-Net, small", "comma"),
        (stages(**{"Train": {"train": {}}}), "stages.Train", "'train'"),
        ({"budget": {"match": "macs", "images": 10}}, "budget", "reference"),
        ({"budget": {"images": 10, "seconds": 5}}, "budget", "seconds"),
        ({"budget": {"images": -1}}, "budget.images", "-1"),
        (stages(train={"trian": {}}), "stages.train.trian", "train"),
        (stages(train={"train": {}, "compare": {}}), "stages.train", "one command"),
        (stages(train={"train": {}, "needs": {"tuning": "tuen"}}), "stages.train.needs", "tune"),
        (stages(train={"train": {}, "over": {"arms": ["X"]}}), "stages.train.over.arms", "'X'"),
        (stages(train={"train": {}, "over": ["sizes"]}), "stages.train.over.sizes", "axis"),
        (stages(tune={"train": {}, "choose": "fid"}), "stages.tune.train", "values"),
        (stages(tune={"train": {"lr": [2, 1]}, "choose": "fid"}), "stages.tune.train.lr", "rising"),
        (stages(tune={"train": {"lr": {"log": [1, 2]}}, "choose": "fid"}), "train.lr", "trials"),
        (stages(train={"train": {}, "grow": 1}), "stages.train.grow", "choose"),
        (stages(tune={"train": {"lr": [None, 1]}, "choose": "fid"}), "train.lr", "rising"),
        (stages(tune={"train": {"clip": [False, True]}, "choose": "fid"}), "train.clip", "numbers"),
        (stages(tune=DRAWN | {"train": {"lr": {"log": [0, 1]}}}), "stages.tune.train.lr", "log"),
        (stages(tune={"train": {"lr": [1, 2]}, "choose": "FID"}), "tune.choose", "FID"),
        (stages(tune={"train": {"lr": [1, 2]}, "choose": "test_loss"}), "tune.choose", "test_loss"),
        (stages(tune={"train": {"lr": [1, 2]}, "choose": "fid", "grow": "no"}), "grow", "'no'"),
        (stages(tune=DRAWN | {"train": {"lr": [1, 2]}, "trials": 0.5}), "tune.trials", "0.5"),
        (stages(train={"train": {}, "share": "half"}), "stages.train.share", "half"),
        (stages(page={"compare": {}, "needs": "train", "of": {"arm": ["DiT"]}}), "page.of", "arms"),
        (
            stages(copies=AGAIN | {"needs": {"run": "train", "control": OTHER}}),
            "stages.copies.needs.control.other",
            "seeds",
        ),
        (stages(page={"compare": {}}), "stages.page.needs", "train"),
        (stages(copies={"memorization": {}}), "stages.copies.needs", "run"),
        (stages(tune=PLAIN["stages"]["tune"] | {"needs": ["train"]}), "stages", "circle"),
        ({"protocol": None}, "seeds", "whole numbers"),
        (stages(Train=FREE), "stages.Train", "'train'"),
        (stages(jobs=FREE), "stages.jobs", "itself"),
        ({"name": "//a"}, "name", "folder"),
        ({"name": "."}, "name", "folder"),
        ({"name": ".."}, "name", "folder"),
        ({"name": ""}, "name", "folder"),
        ({"base": ["mine"]}, "base", "no other study"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_file_and_key(load, changes, key, named):
    with pytest.raises(UserError) as error:
        load(**changes)
    text = str(error.value)
    assert "mine.yaml" in text
    assert key in text
    assert named in text


def test_a_file_that_is_no_yaml_and_a_study_that_is_none_are_refused(tmp_path, load):
    load()
    for text in ("arms: [", "arms:\n  DiT: {}\n  DiT: {}", "- DiT"):
        (tmp_path / "study/mine.yaml").write_text(text)
        with pytest.raises(UserError, match=r"mine\.yaml") as error:
            document.load("mine", {}, str(tmp_path))
        assert "\n" not in str(error.value)
        assert text.count("DiT") < 2 or "line 3" in str(error.value)
    with pytest.raises(UserError, match="unet_vs_dit"):
        document.load("unet_vs_dti", {}, None)
    with pytest.raises(UserError, match="config-dir=nowhere"):
        document.load("mine", {}, "nowhere")


def test_drawn_numbers_stand_in_any_order_and_an_own_metric_may_choose(load):
    drawn = {"train": {"batch_size": [64, 32]}, "choose": "mean_gap", "trials": 4}
    choice = load(**stages(tune=PLAIN["stages"]["tune"] | drawn)).stages["tune"].choice
    assert (choice.metric, choice.trials) == ("mean_gap", 4)


FEW = {"train": {}, "over": {"arms": ["U-Net"]}, "needs": {"init_from": "train"}}
TUNED = PLAIN["stages"]["tune"] | {"over": {"arms": ["U-Net", "DiT"]}}


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"tune": TUNED, "more": FEW}, r"stages\.more\.needs\.init_from"),
        ({"again": AGAIN}, r"stages\.again"),
        ({"tune": TUNED | {"train": {"guidance.scale": [-2, 2]}}}, "scale=-2 and guidance.scale=2"),
        ({"free-DiT": PAGE, "free": PAGE | {"over": {"arms": ["DiT"]}}}, "rename the stage free"),
        ({"free": FREE | {"over": {"budget.images": ["many"]}}}, "budget.images must be"),
        ({"free": FREE | {"images": 0.3}}, "budget.images must be"),
        ({"free": FREE | {"share": 1e-6}}, "budget.images must be .* share of 1e-06"),
        ({"extractor": {"train-extractor": {}}}, r"stages\.extractor\.train-extractor: data"),
        ({"again": AGAIN | {"needs": {"run": "tune"}}}, r"stages\.again\.needs\.run"),
        (
            {"train": ONE_ARM, "copies": AGAIN | {"needs": OF_ANOTHER}},
            "copies.*run.*DiT.* has none",
        ),
        ({"again": SIGNS}, "scale=-1 and guidance.scale=1"),
    ],
)
def test_needs_that_match_no_run_and_a_second_report_of_one_are_refused(load, more, named):
    with pytest.raises(UserError, match=named):
        Jobs(load(**stages(**more)), {})


def test_two_studies_that_are_bases_of_each_other_are_refused(tmp_path, load):
    (tmp_path / "study/other.yaml").write_text("base: mine")
    with pytest.raises(UserError, match="base=mine is no other study"):
        load(base="other")


@pytest.mark.parametrize("key", ["stages", "arms", "seeds"])
def test_a_narrowing_to_nothing_is_refused(key):
    with pytest.raises(UserError, match=f"{key}= names none"):
        read(["mine", f"{key}="])


def test_reports_of_one_run_have_folders_of_their_own(load):
    sweep = SIGNS | {"sample-sweep": {}, "over": SIGNS["over"] | {"guidance.scale": [1, 2]}}
    del sweep["evaluate"]
    early = {"memorization": {"step": 20}, "needs": {"run": "train"}}
    jobs = Jobs(load(**stages(steps=sweep, early=early)), {})
    made = [job.made for job in jobs.of("steps")]
    assert len({*made}) == len(made)
    assert {path.name for path in made} == {"steps_guidance.scale-1", "steps_guidance.scale-2"}
    report = jobs.of("early")[0].made
    assert (report.parent.name, report.name) == ("memorization", "step_0000020")
    assert not any(each.startswith("output=") for each in jobs.of("early")[0].arguments)
    assert any(each.startswith("output=") for each in jobs.of("copies")[0].arguments)


def test_stages_come_after_what_they_need_and_jobs_cover_all_axes(load):
    study = load()
    assert list(study.stages) == ["tune", "train", "page", "copies"]
    jobs = Jobs(study, {})
    assert [job.label for job in jobs.of("tune")] == ["U-Net", "DiT"]
    trials = jobs.first_of(jobs.of("tune")[0])
    assert [each.settings["optimizer.lr"] for each in trials] == [1e-3, 2e-3]
    assert {each.settings["budget.images"] for each in trials} == {500}
    assert {each.settings["seed"] for each in trials} == {100}
    assert all("protocol" not in each.settings for each in trials)
    trained = jobs.of("train")
    assert len(trained) == len({job.made for job in trained}) == 2 * 2 * 2
    first = trained[0]
    assert first.label == "U-Net \N{MIDDLE DOT} few"
    assert first.settings["tuning"] == {"file": "outputs/mine/tune/tuning.json", "of": "U-Net"}
    assert first.settings["protocol"]["question"] == PLAIN["question"]
    assert (first.settings["data.fraction"], first.settings["budget.images"]) == (0.1, 1000)
    for job in jobs.of("copies"):
        run, control = job.needs
        assert job.made == run.made / "memorization"  # where the page and the record look for it
        same = {axis: value for axis, value in run.point.items() if axis != "seeds"}
        assert control.point | same == control.point
        assert control.point["seeds"] != run.point["seeds"]
    (page,) = jobs.of("page")
    assert [str(path) for path in page.paths] == ["outputs/mine/train"]


def test_what_is_published_are_the_runs_of_the_page_that_it_needs(load):
    more = {"record": {"publish": {}, "needs": "page"}, "all": {"compare": {}, "needs": "copies"}}
    jobs = Jobs(load(**stages(**more)), {})
    for stage in ("record", "all"):
        (job,) = jobs.of(stage)
        assert [str(path) for path in job.paths] == ["outputs/mine/train"]


def test_overrides_change_a_study_and_lengths_replace_one_another(load):
    changed = {
        "name": "tryout",
        "budget.seconds": 5,
        "protocol.seeds": [3],
        "stages.tune.train.optimizer.lr": [1, 2],
        "stages.tune.images": 7,
        "arms.DiT.backbone.depth": 1,
        "axes.data.few.data.fraction": 0.2,
    }
    jobs = Jobs(load(changed), {"sampler.steps": 9, "metrics.num_samples": 4})
    (one, *_) = jobs.of("train")
    assert str(one.made).startswith("outputs/tryout/train/")
    assert one.settings["budget.seconds"] == 5
    assert "budget.images" not in one.settings
    assert (one.settings["seed"], one.settings["sampler.steps"]) == (3, 9)
    assert one.settings["data.fraction"] == 0.2
    assert jobs.of("train")[-1].settings["backbone.depth"] == 1
    copies = jobs.of("copies")[0]
    assert copies.settings["metrics.num_samples"] == 4
    assert "control" not in copies.settings  # no run has another seed
    trial = jobs.first_of(jobs.of("tune")[0])[0]
    assert trial.settings["optimizer.lr"] == 1
    assert trial.settings["budget.images"] == 4  # half of seven


@pytest.mark.parametrize(
    "key", ["stages.tnue.images", "stages.images", "arms.Mamba.lr", "axes.data.x"]
)
def test_an_override_of_no_key_is_refused(load, key):
    with pytest.raises(UserError, match=key):
        load({key: 1})


def test_what_a_tuning_would_refuse_is_refused_at_once():
    own = {"stages.tune.train.optimizer.lrs": [1, 2]}
    jobs = Jobs(document.load("unet_vs_dit", own, None), {})
    with pytest.raises(UserError, match=r"optimizer\.lrs"):
        check(jobs, jobs.of("tune")[:1], [], None)


@pytest.mark.long
def test_a_network_that_does_not_fit_is_refused_before_another_arm_is_trained():
    own = {"name": "absent", "arms.DiT on patches of 2 x 2.backbone.patch": 5}
    jobs = Jobs(document.load("unet_vs_dit", own, None), {})
    with pytest.raises(UserError, match=r"patches of 2 x 2.*backbone\.patch=5"):
        check(jobs, jobs.of("patches"), [], None)


@pytest.mark.long
def test_a_network_and_a_reference_of_ones_own_options_are_built(tmp_path, load):
    (tmp_path / "backbone").mkdir()
    (tmp_path / "backbone/mine.yaml").write_text("defaults: [dit]\n")
    budget = {"match": "params", "reference": "backbone=mine backbone.width=96", "images": 60}
    jobs = Jobs(load(arms={"A": {"backbone": "mine"}}, budget=budget), {})
    check(jobs, jobs.of("train"), [], str(tmp_path))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"steps": {"sample-sweep": {"stpes": [1, 2]}, "needs": {"run": "train"}}}, "steps.*stpes"),
        ({"copies": {"memorization": {"setp": 2}, "needs": {"run": "train"}}}, "copies.*setp"),
        ({"page": {"compare": {"tpo": 1}, "needs": ["train"]}}, "page.*tpo"),
        ({"record": {"publish": {"tpo": 1}, "needs": ["train"]}}, "record.*tpo"),
        ({"tune": PLAIN["stages"]["tune"] | {"measure": {"weigths": "ema"}}}, "tune.*weigths"),
    ],
)
def test_a_key_that_a_later_command_does_not_have_is_refused_at_once(load, more, named):
    jobs = Jobs(load(**stages(**more)), {})
    with pytest.raises(UserError, match=named):
        check(jobs, jobs.of(next(iter(more))), [], None)


def test_a_key_of_any_value_of_a_later_command_is_checked(load):
    over = {"arms": ["DiT"], "data": ["few"], "seeds": "all", "way": "all"}
    measured = {"evaluate": {}, "over": over, "needs": {"run": "train"}}
    ways = {"way": {"misspelt": {"num_sampels": 4}, "right": {"num_samples": 4}}}
    jobs = Jobs(load(axes=PLAIN["axes"] | ways, **stages(again=measured)), {})
    with pytest.raises(UserError, match=r"again.*num_sampels"):
        check(jobs, jobs.of("again"), [], None)


def test_names_with_dots_and_blanks_are_parts_of_keys(load):
    request = read(
        ["mine", "axes.data.0.1 %.data.fraction=0.5", "stages.my page.compare.top=[1,2]"]
    )
    axes = {"data": {"0.1 %": {"data.fraction": 0.001}, "0": {}}}
    study = load(request.own, axes=axes, **stages(**{"my page": PLAIN["stages"]["page"]}))
    assert Jobs(study, {}).of("train")[0].settings["data.fraction"] == 0.5
    assert study.stages["my page"].settings == {"top": [1, 2]}


def test_given_settings_go_to_each_command_that_takes_them(load):
    more = {
        "kl": {"train-autoencoder": {"optimizer.lr": [1, 2]}, "choose": "fid", "measure": {}},
        "classes": {"train-extractor": {"data": "fashion_mnist"}},
    }
    jobs = Jobs(
        load(**stages(**more)), {"logger": "none", "data": "other", "metrics.size": 4, "lr": 1}
    )
    (trial, _), (classes,) = jobs.first_of(jobs.of("kl")[0]), jobs.of("classes")
    measured = jobs.measurement(trial)
    given = [
        each.settings.keys() & {"logger", "data", "metrics.size", "lr"}
        for each in (trial, measured, classes)
    ]
    assert given == [{"logger", "data"}, {"metrics.size"}, {"data"}]
    assert classes.made.stem == "other"


def test_a_study_changes_its_base_key_by_key(tmp_path, load):
    load()
    own = {"base": "mine", "question": "And now?", "common": {"sampler.steps": 5}}
    own |= {"budget": {"seconds": 9}, "arms": {"Mamba": {"backbone": "mamba2"}}}
    own |= {"stages": {"train": {"train": {}}}}
    (tmp_path / "study/other.yaml").write_text(yaml.safe_dump(own))
    study = document.load("other", {}, str(tmp_path))
    assert (study.name, study.question, list(study.arms)) == ("other", "And now?", ["Mamba"])
    assert study.common == {"data": "fashion_mnist", "sampler.steps": 5}
    assert study.budget == {"match": "macs", "reference": "unet_small", "seconds": 9}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "null"),
        (True, "true"),
        (1e-3, "0.001"),
        ("${seed}", "${seed}"),
        ("null", "'null'"),
        ("a b", "'a b'"),
        ("it's", r"'it\'s'"),
        (r"a\b c", r"'a\b c'"),
        ([1, "a b"], "[1,'a b']"),
        ({"a": [1], "b": "x"}, "{a:[1],b:x}"),
    ],
)
def test_values_are_written_as_hydra_reads_them(value, text):
    from diffusion_lab.assembly.sentences import parse

    assert text_of(value) == text
    if value != "${seed}":
        assert parse([f"key={text}"])[0].value() == value


def test_measurements_have_each_sampling_seed_and_the_given_metrics(load):
    protocol = PLAIN["protocol"] | {"sampling_seeds": [5, 6]}
    on_run = {"needs": {"run": "train"}}
    again = {"again": on_run | {"evaluate": {}}, "steps": on_run | {"sample-sweep": {"steps": 2}}}
    study = load(protocol=protocol, **stages(**again))
    jobs = Jobs(study, {"metrics.reference_size": 9})
    assert {job.settings["seed"] for job in jobs.of("again")} == {5, 6}
    assert len(jobs.of("again")) == 2 * len(jobs.of("train")) == 2 * len(jobs.of("steps"))
    assert len({job.title for job in jobs.of("again")}) == len(jobs.of("again"))
    assert "seed=5,6" in jobs.of("steps")[0].arguments
    assert jobs.of("steps")[0].settings["metrics.reference_size"] == 9


def test_the_measurement_of_a_trial_has_the_given_metrics_but_its_own_reference(load):
    measured = {"measure": {"metrics.reference": "validation"}, "num_samples": 7}
    study = load(**stages(tune=PLAIN["stages"]["tune"] | measured))
    given = {"metrics.reference_size": 9, "metrics.reference": "test", "batch_size": 1}
    jobs = Jobs(study, given)
    settings = jobs.measurement(jobs.first_of(jobs.of("tune")[0])[0]).settings
    assert settings["metrics.reference_size"] == 9
    assert settings["metrics.reference"] == "validation"
    assert settings["metrics.num_samples"] == 7
    assert "batch_size" not in settings


@pytest.mark.parametrize(
    ("own", "given", "named"),
    [
        ({}, {"logger": None}, "logger=null"),  # no name of an option
        ({"protocol.seeds": [0]}, {}, r"protocol\.seeds"),
    ],
)
def test_what_is_wrong_is_refused_before_anything_is_trained(load, own, given, named):
    jobs = Jobs(load(own), given)
    with pytest.raises(UserError, match=named):
        check(jobs, jobs.of("train"), [], None)


@pytest.mark.parametrize(
    ("key", "place"),
    [
        ("seed", "protocol.seeds"),
        ("backbone", "arms"),
        ("data.fraction", "axes.data"),
        ("optimizer.lr", "stages.tune.train"),
    ],
)
def test_a_setting_that_would_make_runs_alike_is_refused(load, key, place):
    with pytest.raises(UserError, match=f"{key}=1.*{place}"):
        Jobs(load(), {key: 1})
    Jobs(load(arms={"DiT": {"backbone": "dit"}}), {"backbone": "unet", "data": "cifar10"})
