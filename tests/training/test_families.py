"""Autoregressive models and GANs from the command line: trained, resumed, opened and refused."""

import csv
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from helpers.commands import run_alone
from helpers.faults import nan, spoil_loss
from helpers.refusals import assert_names, refused, sentence_of
from helpers.tiny_runs import (
    FAMILIES,
    FAST,
    PLAIN,
    TINY_AUTOENCODER,
    rows,
    same,
    summary_of,
    tiny_first_stage,
)
from safetensors.torch import load_file

from diffusion_lab import runs
from diffusion_lab.common.messages import TrainingStopped
from diffusion_lab.families.autoregressive.task import AutoregressiveModule
from diffusion_lab.families.gan import ConvGenerator
from diffusion_lab.families.gan.task import DIVERSITY, GANModule, diversity
from diffusion_lab.training.callbacks import Collapse
from diffusion_lab.training.tuned import has_diverged

DATA = ["data.source._target_=helpers.tiny_data.TinyData", "data.validation_size=20"]
COMMON = [*PLAIN, *FAST]
QUIET = ["callbacks.evaluation=null", "callbacks.sample_grid=null"]
MODULES = {"gan": GANModule, "autoregressive": AutoregressiveModule}
SHOWN = {"autoregressive": "bits_per_code", "gan": "discriminator_loss"}


@pytest.fixture(scope="module", params=FAMILIES)
def once(request, tmp_path_factory):
    """A family, and the folder in which a run of it was trained once, beside its first stage."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_first_stage(folder / "stage", "vq")
    run_alone(folder, "train", *COMMON, *FAMILIES[request.param], "run_dir=run")
    return request.param, folder


@pytest.fixture
def family(once, tmp_path):
    """A family, of which a run and its first stage are copied to the folder of `lab`."""
    shutil.copytree(once[1], tmp_path, dirs_exist_ok=True)
    return once[0]


@pytest.mark.long
@pytest.mark.usefixtures("blank_plots")
def test_a_run_is_measured_sampled_exported_and_compared(family, lab, tmp_path, finished_run):
    trained = tmp_path / "run"
    summary = summary_of(trained)
    assert summary["finished"]
    assert f"test/{SHOWN[family]}" in summary["metrics"]
    assert any(name.startswith("fid/") for name in summary["metrics"])
    logged = set().union(*rows(trained))
    assert f"val/{SHOWN[family]}" in logged
    if family == "gan":
        assert {"train/generator", "train/real_gradient", DIVERSITY} <= logged
    assert summary["sampling_seconds"] > 0
    again = lab.result("evaluate", "run=run", "seed=3")
    if family == "autoregressive":
        drawing = ["sampler.temperature=0.9", "sampler.top_p=0.95", "guidance.scale=1.5"]
        lab.done("sample", "run=run", *drawing, "num_samples=4")
    lab.done("export", "run=run", "output=shared")
    result = lab.result("evaluate", "run=shared", "seed=3")
    assert result == again
    lab.done("sample", "run=shared", "num_samples=4", "labels=1", "output=drawn")
    assert (tmp_path / "drawn.png").is_file()
    assert len(lab.result("compare", "run", str(finished_run))["compositions"]) == 2
    lab.done("publish", "run", str(finished_run), "output=published")
    with (tmp_path / "published/runs.csv").open() as file:
        published = list(csv.DictReader(file))
    seconds = [float(row["sampling_seconds"]) for row in published]
    shown = published[seconds.index(summary["sampling_seconds"])]
    bits = summary["metrics"].get("test/bits_per_code")
    assert (float(shown["bits_per_code"]) if "bits_per_code" in shown else None) == bits
    assert len(lab.result("compare", "published", "output=compared")["compositions"]) == 2


def test_the_bits_of_an_untrained_unconditional_model_are_the_logarithm_of_the_codes(lab, tmp_path):
    tiny_first_stage(tmp_path / "stage", "vq")  # of 8 codes
    still = [*FAMILIES["autoregressive"], *QUIET, "optimizer.lr=1e-30", "run_dir=run"]
    lab.done("train", *PLAIN, *still, "lr_schedule.warmup_images=0", "conditioning=none")
    metrics = summary_of(tmp_path / "run")["metrics"]
    assert metrics["test/bits_per_code"] == pytest.approx(3, abs=1e-4)


@pytest.mark.long
def test_the_codes_of_an_fsq_stage_are_learned_and_drawn(lab, tmp_path):
    stage = [*TINY_AUTOENCODER, "autoencoder=fsq", "autoencoder.levels=[3,3]", "run_dir=stage"]
    lab.done("train-autoencoder", *stage, *QUIET)
    lab.done("train", *COMMON, *FAMILIES["autoregressive"], "run_dir=run")
    bits = summary_of(tmp_path / "run")["metrics"]["test/bits_per_code"]
    assert 0 < bits < 1.5 * math.log2(9)


@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_losses_that_are_not_finite_end_a_run_with_a_sentence(lab, tmp_path, monkeypatch, family):
    tiny_first_stage(tmp_path / "stage", "vq")
    spoil_loss(monkeypatch, {2, 3}, nan, MODULES[family])
    watch = ["callbacks.non_finite.patience=2"]
    err = lab.done("train", *COMMON, *FAMILIES[family], *QUIET, *watch, "run_dir=run", code=2)
    assert_names(sentence_of(err), "step 3", "non_finite")
    assert any((tmp_path / "run/non_finite").glob("*.pt"))


def test_a_run_whose_samples_are_alike_ends_with_a_sentence(lab, tmp_path, monkeypatch):
    original = ConvGenerator.forward

    def deaf(self, noise, labels):
        return original(self, torch.zeros_like(noise), labels)

    monkeypatch.setattr(ConvGenerator, "forward", deaf)
    watch = ["callbacks.collapse.patience=2"]
    err = lab.done("train", *COMMON, *FAMILIES["gan"], *QUIET, *watch, "run_dir=run", code=2)
    assert_names(sentence_of(err), "step 2", "objective.gamma")
    assert "resume" not in err
    assert has_diverged(tmp_path / "run")
    assert "objective.gamma" in (tmp_path / "run/error.txt").read_text()


@pytest.mark.slow
def test_averages_are_made_after_training(family, lab, tmp_path):
    snapshots = ["callbacks.posthoc_ema.snapshots=2", "callbacks.sample_grid=null"]
    lab.done("train", *COMMON, *FAMILIES[family], *snapshots, "run_dir=new")
    lab.done("average", "run=new", "length=0.2")
    lab.done("sample", "run=new", "average=0.2", "num_samples=4")
    found = []
    for place, average in enumerate(("0.2", "trained")):
        lab.done("export", "run=new", f"average={average}", f"output=shared{place}")
        found.append(load_file(tmp_path / f"shared{place}/model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert not same(*found)


@pytest.mark.long
def test_what_cannot_be_asked_of_a_run_is_refused(family, tmp_path, refusal):
    with refused(f"family={family}"):
        runs.load(tmp_path / "run")
    guidance = "guidance.scale=2" if family == "gan" else "guidance=interval"
    for command, named in (
        (["sample", guidance], "guidance"),
        (["sample", "sampler=heun"], "sampler"),
        (["sample", "sampler.steps=5"], "sampler.steps"),
        (["encode"], "diffusion model"),
        (["profile"], "diffusion"),
        (["likelihood"], "diffusion model"),
        (["memorization"], "diffusion model"),
        (["sample-sweep"], "diffusion model"),
        (["export", "output=new", "format=diffusers"], "format=run"),
    ):
        assert named in refusal(command[0], "run=run", *command[1:]), command


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_commands_of_noise_levels_refuse_another_family(lab, command):
    code, out, err = lab(command, *DATA, "family=gan")
    assert code != 0
    assert "family=diffusion" in out + err
    assert "Traceback" not in out + err


def test_an_unconditional_gan_trains(lab):
    lab.done("train", *COMMON, *FAMILIES["gan"], *QUIET, "conditioning=none", "run_dir=new")


def test_a_collapsed_gan_is_ended_with_a_sentence(tmp_path):
    images, labels = torch.randn(8, 1, 4, 4), torch.tensor([0, 1] * 4)
    assert diversity(images, images, labels).item() == pytest.approx(1)
    assert diversity(images / 2, images, labels).item() == pytest.approx(0.5)
    one_of_each = images[:2].repeat(4, 1, 1, 1)
    assert diversity(one_of_each, images, labels).item() == pytest.approx(0, abs=1e-6)
    numbers = torch.randn(8, 2)  # which do not divide the batch
    assert diversity(one_of_each, images, numbers).item() > 0.1
    assert diversity(images, images, torch.arange(8)).isnan()
    with torch.autocast("cpu", torch.bfloat16):  # whose products would make it a number
        assert diversity(images, images + 0.3, torch.arange(8)).isnan()
    trainer = SimpleNamespace(global_step=0, log_every_n_steps=2, accumulate_grad_batches=1)
    module = SimpleNamespace(bad_steps=SimpleNamespace(skipped=False))
    module.context = SimpleNamespace(folder=tmp_path)
    trainer.lightning_module = module
    watch = Collapse(least=0.1, patience=2)

    def step(value: float) -> None:
        trainer.global_step += 1
        watch.on_train_batch_end(trainer, module, {DIVERSITY: torch.tensor(value)}, None, 0)

    for value in (0.0, 0.05, 0.0, 0.5, 0.0, 0.05):  # it looks at every second
        step(value)
    restored = Collapse(least=0.1, patience=2)
    restored.load_state_dict(watch.state_dict())
    assert restored.row == 1
    step(0.0)
    step(float("nan"))
    step(0.0)
    assert not has_diverged(tmp_path)
    with pytest.raises(TrainingStopped, match=r"objective\.gamma"):
        step(0.0)
    assert has_diverged(tmp_path)  # so that tuning takes another value


def test_a_run_that_went_back_to_a_checkpoint_has_not_diverged(tmp_path):
    (tmp_path / "non_finite").mkdir()
    assert not has_diverged(tmp_path)
    (tmp_path / "error.txt").write_text("the disk is full")
    assert not has_diverged(tmp_path)
    (tmp_path / "error.txt").write_text("the loss is not finite")
    assert has_diverged(tmp_path)
