"""Each check of `doctor` finds its fault in a run that has it, and nothing in a good run."""

from types import SimpleNamespace

import pytest
import torch
from helpers.commands import PARTS
from helpers.data_modules import data_of
from helpers.tiny_data import TinyData
from hydra import compose, initialize_config_dir

from diffusion_lab.assembly.sentences import conf_dir
from diffusion_lab.data import Split
from diffusion_lab.data.source import TwoMoons
from diffusion_lab.estimate import checks_of_resources as checks
from diffusion_lab.estimate.budget import ENDLESS
from diffusion_lab.estimate.doctor import diagnose
from diffusion_lab.estimate.run_cost import Duration, activations, duration_of
from diffusion_lab.training.callbacks.periodic import times


def with_blanks(images, labels):
    blank = torch.arange(100)[:, None, None, None].expand(-1, 1, 8, 8)
    return torch.cat([blank, images[100:]]), labels


def with_copies(images, labels):
    return torch.cat([images[:100], images[:100], images[200:]]), labels


FAULTS = {  # of a training split
    "binary": lambda images, labels: (images > 90, labels),
    "constant": lambda images, labels: (torch.full_like(images, 17), labels),
    "dim": lambda images, labels: (images // 4 + 90, labels),
    "blank": with_blanks,
    "from_one": lambda images, labels: (images, labels + 1),
    "missing": lambda images, labels: (images, labels.clamp(max=2)),
    "uneven": lambda images, labels: (images, labels * (torch.arange(3000) < 1000)),
    "copies": with_copies,
}


class Clean(TinyData):
    """Bars by class, 3000 for training and 1500 for tests, sound but for a `fault`."""

    def __init__(self, root: str = "data", fault: str | None = None):
        super().__init__(root)
        self.fault = fault

    def load(self):
        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            labels = torch.arange(count) % 4
            images = torch.randint(0, 76, (count, *self.native_shape), generator=generator)
            images += 180 * (labels[:, None, None, None] == torch.arange(8) // 2)
            return Split(images.to(torch.uint8), labels)

        train, test = split(3000, 0), split(1500, 1)
        if self.fault:
            images, labels = FAULTS[self.fault](*train)
            train = Split(images.to(torch.uint8), labels)
        return train, test


class GreyColour(Clean):
    native_shape = (3, 8, 8)

    def load(self):
        return [
            Split(images[:, :1].repeat(1, 3, 1, 1), labels) for images, labels in super().load()
        ]


class Leaky(Clean):
    def load(self):
        train, test = super().load()
        train.images[:300] = test.images[:300]
        return train, test


class OneClass(Clean):
    class_names = ("only",)

    def load(self):
        return [Split(images, torch.zeros_like(labels)) for images, labels in super().load()]


class NoBytes(Clean):
    def load(self):
        train, test = super().load()
        return Split(train.images.float(), train.labels), test


SOUND = [
    *("data.source._target_=test_doctor.Clean", "batch_size=64", "validate_every_n_steps=100"),
    *("backbone=dit", "backbone.width=32", "backbone.heads=2", "backbone.depth=1"),
    *("backbone.patch=2", "trainer.accelerator=cpu", "trainer.max_steps=1000"),
    *("trainer.precision=32-true", "lr_schedule.warmup_images=2000", "guidance=classifier_free"),
    "metrics.num_samples=1500",
]
QUICK = ["callbacks.evaluation=null", "speed=false"]


def data(name: str) -> str:
    """The override of a class of data, or of clean data with a fault."""
    if name in FAULTS:
        return f"+data.source.fault={name}"
    return f"data.source._target_=test_doctor.{name}"


known = {}


def activations_once(cfg, facts, precision):
    """The activations of a network, which most of these runs have the same of."""
    nodes = (cfg.get(part) for part in PARTS)
    key = f"{[*nodes]} {facts} {precision}"
    if key not in known:
        known[key] = activations(cfg, facts, precision)
    return known[key]


@pytest.fixture
def examine(tmp_path, monkeypatch):
    """examine(*overrides) -> (messages by status and name, facts), checked to write nothing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setattr("diffusion_lab.estimate.run_cost.activations", activations_once)

    def run(*overrides: str) -> tuple[dict[str, dict[str, str]], dict]:
        before = set(tmp_path.rglob("*"))
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("doctor", overrides=[*SOUND, "name=x", *overrides])
        findings, facts = diagnose(cfg)
        assert set(tmp_path.rglob("*")) == before
        said = {status: {} for status in ("ok", "advice", "warning", "error", "skipped")}
        for finding in findings:
            before = said[finding.status].get(finding.name, "")
            said[finding.status][finding.name] = before + finding.message
        return said, facts

    return run


@pytest.mark.long
def test_options_of_speed_and_memory_that_are_on_are_named(examine):
    _, facts = examine(*QUICK, "activation_checkpointing=true")
    assert facts["options"] == "activation_checkpointing"
    shards = "callbacks.checkpoint.sharded=true"
    _, facts = examine(*QUICK, "trainer.devices=2", "trainer.strategy=ddp", "compile=true", shards)
    said = facts["options"].split(", ")
    assert said == ["compile", "DDP", "gradient_as_bucket_view", "callbacks.checkpoint.sharded"]


@pytest.mark.long
def test_a_sound_run_is_measured_and_left_alone(lab, tmp_path):
    result = lab.result("doctor", *SOUND)
    assert list(tmp_path.iterdir()) == []
    checks, facts = result["checks"], result["facts"]
    assert [check for check in checks if check["status"] != "ok"] == []
    assert len(checks) == len({check["name"] for check in checks}) > 20
    assert facts["image_shape"] == [1, 8, 8]
    assert facts["training_images"] == 2700
    assert facts["validation_images"] == 300
    assert facts["images_seen"] == 64_000
    assert facts["epochs"] == pytest.approx(640 / 27)
    for name in ("training_seconds", "drawing_seconds", "features_seconds", "memory_bytes"):
        assert facts[name] > 0


STD_KEYS = ("denoiser.input_std", "objective.prediction.data_std")
STD_KEYS += ("objective.loss.weighting.data_std",)
UNTRAINED = ("sampler.time_grid.sigma_min=0.05", "objective.time_sampler.uniform=0.2")
# overrides, and checks with what they say; faults that do not touch stand together
SPOILT = {
    f"{data('binary')} objective/prediction=eps": [
        ("grey_values", "error", "0, 1", "cast to bytes"),
        ("composition", "error", "objective/prediction=v, flow"),
    ],
    f"{data('constant')} logger.wandb.mode=foo trainer.accelerator=gpu": [
        ("grey_values", "error", "every pixel has the grey value 17"),
        ("settings", "error", "auto, online, offline"),
        ("device", "error", "no GPU"),
    ],
    "trainer.max_steps=x": [("settings", "error", "trainer.max_steps='x'")],
    "validate_every_n_steps=0": [("settings", "error", "validate_every_n_steps=0")],
    f"{data('dim')} schedule=edm objective=edm objective/loss/weighting=edm": [
        ("grey_values", "warning", "between 90 and 15", "stretch them"),
        ("data_std", "warning", *(f"{key}=0.16" for key in STD_KEYS)),
    ],
    (
        f"{data('blank')} sampler.steps=3 guidance.scale=9 optimizer.lr=0.1 "
        "lr_schedule.warmup_images=9_600 callbacks.weight_averaging.ramp=null "
        "validate_every_n_steps=900"
    ): [
        ("blank_images", "warning", "89 of 2700"),
        ("sampling", "warning", "sampler.steps=20", "guidance.scale=2"),
        ("learning_rate", "warning", "diverges", "optimizer.lr=3e-4"),
        ("warm_up", "advice", "15% of the run", "=1600"),
        ("weight_averaging", "warning", "half-life of 500,000", "64,000", "ramp=0.05"),
        ("validation", "advice", "validate_every_n_steps=100"),
        ("evaluation", "advice", "FID and KID are not measured"),
    ],
    (
        f"{data('GreyColour')} sampler=ddpm sampler.steps=1000 guidance=none optimizer.lr=1e-8 "
        "lr_schedule.warmup_images=90_000 backbone.patch=4 callbacks.weight_averaging=null"
    ): [
        ("channels", "advice", "equal", "one channel"),
        ("sampling", "advice", "sampler=dpm_solver"),
        ("labels", "advice", "guidance=classifier_free"),
        ("learning_rate", "warning", "next to nothing"),
        ("warm_up", "warning", "the whole run and more"),
        ("tokens", "warning", "makes 4 patches", "write backbone.patch=2"),
        ("weight_averaging", "advice", "not averaged"),
    ],
    f"{data('from_one')} backbone.patch=3": [
        ("classes", "error", "from 1 to 4", "number the labels from 0"),
        ("composition", "error", "backbone.patch"),
    ],
    f"{data('missing')} batch_size=4000": [
        ("classes", "warning", "fourth has no training images"),
        ("batch", "warning", "2700 training images", "batch_size=2048"),
    ],
    f"{data('uneven')} schedule=ve schedule.sigma_max=2": [
        ("classes", "warning", "a factor of 9.0", "data.per_class=225"),
        ("largest_noise", "warning", "does not cover"),
    ],
    f"{data('copies')} schedule=ve": [
        ("duplicates", "warning", "82 of 2700"),
        ("overlap", "warning", "300 validation images"),
        ("largest_noise", "advice", "=100,", "write schedule.sigma_max=10"),
    ],
    f"{data('Leaky')} trainer.max_steps=20": [
        ("overlap", "warning", "274 of 1500"),
        ("epochs", "advice", "trainer.max_steps=43"),
    ],
    f"{data('Leaky')} data.validation_size=0": [
        ("overlap", "warning", "300 of 1500"),
        ("validation", "advice", "data.validation_size=auto"),
    ],
    f"{data('NoBytes')} batch_size=9 micro_batch_size=2": [
        ("data", "error", "torch.float32", "uint8 (N, 1, 8, 8)"),
        ("batch", "error", "micro_batch_size=1"),
    ],
    "data.validation_size=9000 trainer.precision=bf16-true": [
        ("data", "error", "none of 3000 training images"),
        ("settings", "error", "trainer.precision", "bf16-mixed"),
    ],
    f"{data('OneClass')} schedule=cosine objective=ddpm": [
        ("labels", "advice", "conditioning=none"),
        ("combination", "warning", "guidance.clip=1"),
    ],
    "schedule=ddpm_scaled_linear objective=v_prediction data.per_class=50": [
        ("schedule_end", "warning", "contains 6.8% of the image", "zero_terminal_snr"),
        ("memorization", "warning", "200 images 320 times", "non_leaky"),
    ],
    "sampler.steps=50 sampler.time_grid.sigma_min=0 backbone.patch=1 backbone.width=8": [
        ("combination", "warning", "4% of", *UNTRAINED),
        ("tokens", "warning", "64 patches at width 8", "write backbone.patch=2"),
    ],
    "callbacks.checkpoint.best=fid callbacks.evaluation=null": [
        ("validation", "error", "callbacks.checkpoint.best=fid"),
    ],
    "data.validation_size=0 callbacks.checkpoint.best=val/loss": [
        ("validation", "error", "callbacks.checkpoint.best=val/loss", "data.validation_size"),
    ],
    "protocol={question:why}": [("settings", "error", "protocol", "seeds")],
    "sampler/time_grid=karras data.flip=true augmentation=non_leaky": [
        ("combination", "warning", *UNTRAINED, "data.flip=false"),
    ],
}


@pytest.mark.long
@pytest.mark.parametrize(("overrides", "found"), SPOILT.items())
def test_what_was_spoilt_is_found(examine, overrides, found):
    said, _ = examine(*QUICK, *overrides.split())
    for name, status, *words in found:
        for word in words:
            assert word in said[status][name]
    if not said["error"]:
        assert set(said["skipped"]) == {"time"}  # speed=false
    assert bool(said["error"]) == any(status == "error" for _, status, *_ in found)


@pytest.mark.long
def test_doctor_and_plan_reckon_the_same_memory(lab, examine):
    again = "activation_checkpointing=true"
    planned = lab.result("plan", *SOUND, again, "devices=1", "name=x")["memory"]["total"]
    known.clear()  # each reckons by itself
    assert examine(*QUICK, again)[1]["memory_bytes"] == planned


@pytest.mark.long
def test_muon_of_the_original_scale_has_larger_rates(examine):
    muon = [*QUICK, "optimizer=muon", "optimizer.lr=0.02", "optimizer.vector_lr=1e-3"]
    assert "learning_rate" in examine(*muon)[0]["warning"]
    assert "learning_rate" not in examine(*muon, "optimizer.adjust_lr_fn=original")[0]["warning"]


@pytest.mark.long
def test_a_run_needs_room_for_what_it_keeps(examine, monkeypatch, tmp_path):
    snapshots = "callbacks.posthoc_ema.snapshots"
    said, facts = examine(*QUICK, f"{snapshots}=32")
    assert facts["snapshot_bytes"] == 32 * 2 * 4 * facts["parameters"]
    assert not said["error"]
    assert snapshots in examine(*QUICK, f"{snapshots}=1_000_000_000")[0]["error"]["disk"]
    (tmp_path / "file").write_text("")
    said, _ = examine(*QUICK, "run_dir=file/run")
    assert "file cannot be written to" in said["error"]["disk"]
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=10_000_000))
    # three checkpoints are there at once: the last, the one before it, and one being written
    assert "disk" not in examine(*QUICK)[0]["error"]
    keeping = ["trainer.max_steps=500", "callbacks.checkpoint.keep_every_n_steps=1"]
    assert "are free at" in examine(*QUICK, *keeping)[0]["error"]["disk"]


METRICS = {
    "metrics.reference_size=100 metrics.num_samples=300 metrics.per_class=true": [
        ("sample_counts", "warning", "reference_size=null"),
        ("sample_counts", "advice", "use KID"),
        ("class_counts", "warning", "=400"),
    ],
    "metrics.num_samples=60000": [("sample_counts", "advice", "metrics.num_samples=1500")],
    "metrics=classifier": [("composition", "error", "write metrics.extractor.path=...")],
    "metrics.classifier=nowhere": [("extractor", "error", "metrics.classifier=nowhere")],
}


@pytest.mark.long
@pytest.mark.parametrize(("overrides", "found"), METRICS.items(), ids=METRICS)
def test_what_metrics_are_worth_is_said(examine, overrides, found):
    said, _ = examine("speed=false", *overrides.split())
    for name, status, words in found:
        assert words in said[status][name]


def test_all_rules_that_are_broken_are_listed_once(examine):
    broken = ["objective.label_dropout=0", "denoiser.noise_label=index"]
    said, facts = examine(*QUICK, *broken, "coupling=optimal_transport")
    for remedy in ("objective.label_dropout=0.1", "denoiser.noise_label=time"):
        assert said["error"]["composition"].count(remedy) == 1
    assert "tokens" in said["skipped"]
    assert facts["training_images"] == 2700


@pytest.mark.long
def test_labels_are_dropped_for_a_loss_that_is_guided(examine):
    guided = ["objective=mean_flow", "objective.loss.guidance=2", "guidance=none"]
    assert "labels" not in examine(*QUICK, *guided)[0]["advice"]
    assert "guidance" in examine(*QUICK, "guidance=none")[0]["advice"]["labels"]


@pytest.mark.long
def test_a_loss_with_weights_of_its_own_can_be_examined(examine):
    said, facts = examine(*QUICK, "objective=scm", "schedule=cosine")
    assert not said["error"]
    assert facts["parameters"] > 0


@pytest.mark.parametrize("refused", ["batch_size=abc", "objective/prediction=eps", "seed=-1"])
def test_what_cannot_be_built_hides_no_look_at_the_data(examine, refused):
    said, facts = examine(*QUICK, data("copies"), refused)
    assert len(said["error"]) == 1
    assert "82 of 2700" in said["warning"]["duplicates"]
    assert "tokens" in said["skipped"]
    assert facts["training_images"] == 2700
    assert "parameters" not in facts


@pytest.mark.long
def test_a_run_that_its_time_limit_ends_is_judged_by_what_it_will_see(examine):
    limits = ["trainer.max_time='00:00:00:05'", "trainer.max_steps=10_000_000"]
    said, facts = examine("callbacks.evaluation=null", *limits)
    assert facts["steps"] < 1_000_000
    assert facts["images_seen"] == 64 * facts["steps"]
    assert facts["training_seconds"] == pytest.approx(5, rel=0.2)
    assert "time" in said["ok"]
    said, _ = examine("callbacks.evaluation=null", "trainer.max_steps=100_000_000_000")
    assert "days on this device; trainer.max_steps=" in said["warning"]["time"]


def test_points_that_fall_together_are_no_copies():
    points = data_of(TwoMoons)
    for check in (checks.blank_images, checks.duplicates, checks.overlap):
        assert list(check(points)) == []


@pytest.mark.long
def test_a_run_of_a_time_that_is_not_timed_has_no_steps(examine):
    limits = [f"trainer.max_steps={ENDLESS}", "trainer.max_time=60s"]  # of budget.seconds=60
    said, facts = examine("speed=false", *limits)
    assert "steps" not in facts
    assert not said["error"]
    assert "memorization" not in said["warning"]


def test_what_is_measured_during_training_counts_in_its_time_limit():
    trainer = SimpleNamespace(max_steps=1000, max_time="100s")
    cfg = SimpleNamespace(trainer=trainer, validate_every_n_steps=None)
    cost = SimpleNamespace(step=1.0, call=1.0, calls=1)
    for every, images in ((None, 10), (10, 10), (10, 0)):
        task = SimpleNamespace(
            measured_images=lambda steps, n=images, every=every: n * times(steps, every),
            grid_images=lambda steps: 0,
        )
        lasting = duration_of(cfg, task, cost, 0)
        # 10 s of samples after each 10 s of training
        assert lasting.steps == pytest.approx(50 if every and images else 100, abs=1)


def test_an_evaluation_longer_than_the_training_is_said():
    cfg = SimpleNamespace(trainer=SimpleNamespace(max_steps=100))
    lasting = Duration(100, 60.0, 0.0, 300.0)
    ((status, message),) = checks.time(cfg, SimpleNamespace(metrics=object()), lasting, 20.0)
    assert status == "advice"
    assert "84% of the time" in message


def test_a_batch_that_does_not_fit_is_an_error_and_is_not_tried(examine, monkeypatch):
    monkeypatch.setattr("diffusion_lab.data.source.decoding.free_memory", lambda: 3_000_000)
    monkeypatch.setattr(
        "diffusion_lab.estimate.profile.Bench.train", lambda bench: pytest.fail("tried")
    )
    said, _ = examine("callbacks.evaluation=null")
    assert "write micro_batch_size=" in said["error"]["memory"]


def test_people_read_facts_and_the_worst_first(lab):
    code, out, err = lab("doctor", *SOUND, *QUICK, data("from_one"), "optimizer.lr=1")
    assert code == 1
    assert out == ""
    # a busy machine is said last
    lines = [line for line in err.splitlines() if not line.startswith("Now ")]
    assert lines[0].startswith("Data: Clean, 2,700 training, 300 validation and 1,500 test images")
    assert [line.split()[0] for line in lines if "  " in line][:3] == ["error", "warning", "advice"]
    assert lines[-1] == "1 error, 1 warning, 1 piece of advice"


def test_a_typing_error_is_answered_as_train_does(refusal):
    assert "backbone=dti" in refusal("doctor", "backbone=dti")
    assert "resume" in refusal("doctor", "resume=outputs/x")


@pytest.mark.long
def test_a_sweep_is_looked_at_to_its_end(lab):
    code, _, err = lab("doctor", "-m", *SOUND, *QUICK, "batch_size=7,64", "micro_batch_size=4")
    assert code == 2
    assert err.count("Data: ") == 2
    assert "micro_batch_size=1" in err
