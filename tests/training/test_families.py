"""Autoregressive models and GANs from the command line: trained, resumed, opened and refused."""

import csv
import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.faults import Killed, at_step, die, spoil_loss
from helpers.ranks import on_two_ranks
from helpers.refusals import assert_names, refused, sentence_of
from helpers.tiny_runs import (
    FAMILIES,
    TINY_AUTOENCODER,
    require_equal_training,
    rows,
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
PLAIN = [*DATA, "trainer.accelerator=cpu", "logger=none", "+debug=fast"]
PLAIN += ["optimizer.lr=0.01", "lr_schedule.warmup_images=0"]
QUIET = ["callbacks.evaluation=null", "callbacks.sample_grid=null"]
MODULES = {"gan": GANModule, "autoregressive": AutoregressiveModule}
SHOWN = {"autoregressive": "bits_per_code", "gan": "discriminator_loss"}


@pytest.fixture(params=FAMILIES)
def family(request, tmp_path):
    if request.param == "autoregressive":
        tiny_first_stage(tmp_path / "stage", "vq")
    return request.param


@pytest.fixture
def trained(family, lab, tmp_path):
    code, _, err = lab("train", *PLAIN, *FAMILIES[family], "run_dir=run")
    assert code == 0, err
    return tmp_path / "run"


def state_of(folder) -> dict[str, torch.Tensor]:
    return torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["current_model_state"]


def require_equal(one: dict, two: dict) -> None:
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.usefixtures("blank_plots")
def test_a_run_is_measured_sampled_exported_and_compared(
    family, trained, lab, tmp_path, finished_run
):
    summary = json.loads((trained / "summary.json").read_text())
    assert summary["finished"]
    assert f"test/{SHOWN[family]}" in summary["metrics"]
    assert any(name.startswith("fid/") for name in summary["metrics"])
    logged = set().union(*rows(trained))
    assert f"val/{SHOWN[family]}" in logged
    if family == "gan":
        assert {"train/generator", "train/real_gradient", DIVERSITY} <= logged
    assert summary["sampling_seconds"] > 0
    code, out, err = lab("evaluate", "run=run", "seed=3", "json=true")
    assert code == 0, err
    again = json.loads(out.splitlines()[-1])
    code, _, err = lab("export", "run=run", "output=shared")
    assert code == 0, err
    code, out, err = lab("evaluate", "run=shared", "seed=3", "json=true")
    assert code == 0, err
    assert json.loads(out.splitlines()[-1]) == again
    code, _, err = lab("sample", "run=shared", "num_samples=4", "labels=1", "output=drawn")
    assert code == 0, err
    assert (tmp_path / "drawn.png").is_file()
    code, out, err = lab("compare", "run", str(finished_run), "json=true")
    assert code == 0, err
    assert len(json.loads(out.splitlines()[-1])["compositions"]) == 2
    code, _, err = lab("publish", "run", str(finished_run), "output=published")
    assert code == 0, err
    with (tmp_path / "published/runs.csv").open() as file:
        published = list(csv.DictReader(file))
    seconds = [float(row["sampling_seconds"]) for row in published]
    shown = published[seconds.index(summary["sampling_seconds"])]
    bits = summary["metrics"].get("test/bits_per_code")
    assert (float(shown["bits_per_code"]) if "bits_per_code" in shown else None) == bits
    code, out, err = lab("compare", "published", "output=compared", "json=true")
    assert code == 0, err
    assert len(json.loads(out.splitlines()[-1])["compositions"]) == 2


def test_the_bits_of_an_untrained_model_are_the_logarithm_of_the_codes(lab, tmp_path):
    tiny_first_stage(tmp_path / "stage", "vq")  # of 8 codes
    still = [*FAMILIES["autoregressive"], *QUIET, "optimizer.lr=1e-30", "run_dir=run"]
    plain = [each for each in PLAIN if not each.startswith("optimizer.lr")]
    code, _, err = lab("train", *plain, *still)
    assert code == 0, err
    metrics = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]
    assert metrics["test/bits_per_code"] == pytest.approx(3, abs=1e-4)


def test_codes_are_drawn_as_the_documentation_says(lab, tmp_path):
    tiny_first_stage(tmp_path / "stage", "vq")
    code, _, err = lab("train", *PLAIN, *FAMILIES["autoregressive"], *QUIET, "run_dir=run")
    assert code == 0, err
    drawing = ["sampler.temperature=0.9", "sampler.top_p=0.95", "guidance.scale=1.5"]
    code, _, err = lab("sample", "run=run", *drawing, "num_samples=4", "output=drawn")
    assert code == 0, err
    assert (tmp_path / "drawn.png").is_file()


def test_the_codes_of_an_fsq_stage_are_learned_and_drawn(lab, tmp_path):
    stage = [*TINY_AUTOENCODER, "autoencoder=fsq", "autoencoder.levels=[3,3]", "run_dir=stage"]
    code, _, err = lab("train-autoencoder", *stage)
    assert code == 0, err
    code, _, err = lab("train", *PLAIN, *FAMILIES["autoregressive"], "run_dir=run")
    assert code == 0, err
    bits = json.loads((tmp_path / "run/summary.json").read_text())["metrics"]["test/bits_per_code"]
    assert 0 < bits < 1.5 * math.log2(9)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_that_are_not_finite_end_a_run_with_a_sentence(lab, tmp_path, monkeypatch, family):
    tiny_first_stage(tmp_path / "stage", "vq")
    spoil_loss(monkeypatch, {2, 3}, lambda loss: loss * math.nan, MODULES[family])
    watch = ["callbacks.non_finite.patience=2"]
    code, _, err = lab("train", *PLAIN, *FAMILIES[family], *QUIET, *watch, "run_dir=run")
    assert code == 2
    assert_names(sentence_of(err), "step 3", "non_finite")
    assert any((tmp_path / "run/non_finite").glob("*.pt"))


def test_a_run_whose_samples_are_alike_ends_with_a_sentence(lab, tmp_path, monkeypatch):
    original = ConvGenerator.forward

    def deaf(self, noise, labels):
        return original(self, torch.zeros_like(noise), labels)

    monkeypatch.setattr(ConvGenerator, "forward", deaf)
    watch = ["callbacks.collapse.patience=2"]
    code, _, err = lab("train", *PLAIN, *FAMILIES["gan"], *QUIET, *watch, "run_dir=run")
    assert code == 2
    assert_names(sentence_of(err), "step 2", "objective.gamma")
    assert "resume" not in err
    assert has_diverged(tmp_path / "run")
    assert "objective.gamma" in (tmp_path / "run/error.txt").read_text()


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(family, lab, tmp_path, monkeypatch):
    common = [*PLAIN, *FAMILIES[family], *QUIET, "callbacks.checkpoint.every_n_steps=1"]
    code, _, err = lab("train", *common, "run_dir=whole")
    assert code == 0, err
    with monkeypatch.context() as patch:
        at_step(patch, 3, die, MODULES[family])
        with pytest.raises(Killed):
            lab("train", *common, "run_dir=parts")
    code, _, err = lab("train", "resume=parts")
    assert code == 0, err
    require_equal_training(tmp_path / "whole", tmp_path / "parts")


def test_resuming_equals_never_having_stopped(family, lab, tmp_path):
    common = [*PLAIN, *FAMILIES[family], *QUIET, "micro_batch_size=4"]
    for folder, steps in (("whole", 4), ("parts", 2)):
        code, _, err = lab("train", *common, f"run_dir={folder}", f"trainer.max_steps={steps}")
        assert code == 0, err
    code, _, err = lab("train", "resume=parts", "trainer.max_steps=4")
    assert code == 0, err
    require_equal_training(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.slow
def test_averages_are_made_after_training(family, lab, tmp_path):
    snapshots = ["callbacks.posthoc_ema.snapshots=2", "callbacks.sample_grid=null"]
    code, _, err = lab("train", *PLAIN, *FAMILIES[family], *snapshots, "run_dir=run")
    assert code == 0, err
    code, _, err = lab("average", "run=run", "length=0.2")
    assert code == 0, err
    code, _, err = lab("sample", "run=run", "average=0.2", "num_samples=4")
    assert code == 0, err
    found = []
    for place, average in enumerate(("0.2", "trained")):
        code, _, err = lab("export", "run=run", f"average={average}", f"output=shared{place}")
        assert code == 0, err
        found.append(load_file(tmp_path / f"shared{place}/model.safetensors"))
    assert found[0].keys() == found[1].keys()
    assert any(not torch.equal(value, found[1][name]) for name, value in found[0].items())


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_two_ranks_train_the_model_of_one(family, lab, refusal, tmp_path, strategy):
    exact = ["trainer.precision=32-true", "micro_batch_size=4", "data.flip=false"]
    common = [*PLAIN, *FAMILIES[family], *QUIET]
    several = [f"trainer={strategy}", "trainer.accelerator=cpu", "trainer.devices=2", *exact]
    if (family, strategy) == ("gan", "fsdp"):
        assert "trainer=ddp" in refusal("train", *common, *several)
        return
    code, _, err = lab("train", *common, *exact, "run_dir=one")
    assert code == 0, err
    for ended in on_two_ranks({"x": ["train", *common, *several, "run_dir=two"]}, tmp_path):
        assert ended["x"].code == 0, ended["x"].err
    one, two = state_of(tmp_path / "one"), state_of(tmp_path / "two")
    for name, value in one.items():
        torch.testing.assert_close(two[name], value, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize(
    ("family", "wrong", "named"),
    [
        ("gan", "sampler=heun", "sampler"),
        ("gan", "sampler.steps=5", "sampler.steps"),
        ("gan", "objective.discriminator.normalised=true", "objective.discriminator"),
        ("gan", "conditioning=raw_labels", "conditioning=class_label"),
        ("gan", "trainer.precision=16-mixed", "bf16-mixed"),
        ("gan", "budget.reference=unet", "budget.reference"),
        ("gan", "callbacks.checkpoint.best=val/loss", "metrics.reference=validation"),
        ("autoregressive", "callbacks.checkpoint.best=val/loss", "val/bits_per_code"),
        ("gan", "guidance=classifier_free", "guidance"),
        ("gan", "schedule=cosine", "schedule"),
        ("gan", "backbone=unet", "backbone"),
        ("gan", "objective=next_code", "objective"),
        ("gan", "denoiser.clip=1", "denoiser.clip"),
        ("gan", "objective.discriminator.layers=6", "layers"),
        ("gan", "callbacks.evaluation.also_steps=[2]", "also_steps"),
        ("gan", "+callbacks@callbacks.level_losses=level_losses", "level_losses"),
        ("autoregressive", "sampler=heun", "sampler"),
        ("autoregressive", "sampler.steps=5", "sampler.steps"),
        ("autoregressive", "guidance=interval", "guidance"),
        ("autoregressive", "first_stage=pixels", "first_stage=vq"),
        ("autoregressive", "backbone=generator", "backbone"),
        ("autoregressive", "objective=ddpm", "objective"),
        ("autoregressive", "init_from=run", "init_from"),
        ("diffusion", "backbone=generator", "backbone"),
        ("diffusion", "objective=r3gan", "objective"),
        ("diffusion", "sampler=codes", "sampler"),
        ("diffusion", "callbacks@callbacks.collapse=collapse", "callbacks.collapse"),
    ],
)
def test_what_does_not_belong_to_a_family_is_refused(refusal, tmp_path, family, wrong, named):
    if family == "autoregressive":
        tiny_first_stage(tmp_path / "stage", "vq")
    own = [*FAMILIES.get(family, []), wrong]
    if wrong.startswith("backbone="):
        own = [each for each in own if not each.startswith("backbone.")]
    if wrong.startswith("budget."):
        own.append("budget=params")
    if wrong == "first_stage=pixels":
        own = [each for each in own if not each.startswith("first_stage.")]
    assert named in refusal("train", *PLAIN, *own, "run_dir=run")
    assert not (tmp_path / "run").exists()


def test_what_cannot_be_asked_of_a_run_is_refused(family, trained, refusal):
    own = {
        "gan": [(["sample", "guidance.scale=2"], "guidance")],
        "autoregressive": [(["sample", "guidance=interval"], "guidance")],
    }
    for command, named in (
        *own[family],
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


def test_a_run_is_not_loaded_as_a_diffusion_model(family, trained):
    with refused(f"family={family}"):
        runs.load(trained)


@pytest.mark.parametrize("command", ["doctor", "plan"])
def test_commands_of_noise_levels_refuse_another_family(lab, command):
    code, out, err = lab(command, *DATA, "family=gan")
    assert code != 0
    assert "family=diffusion" in out + err
    assert "Traceback" not in out + err


def test_guidance_needs_labels_in_training(refusal, tmp_path):
    tiny_first_stage(tmp_path / "stage", "vq")
    common = [*PLAIN, *FAMILIES["autoregressive"], "guidance.scale=2"]
    assert "guidance.scale" in refusal("train", *common, "conditioning=none")
    assert "label_dropout" in refusal("train", *common, "objective.label_dropout=0")


def test_an_unconditional_model_of_either_family_trains(family, lab):
    code, _, err = lab("train", *PLAIN, *FAMILIES[family], *QUIET, "conditioning=none")
    assert code == 0, err


def test_a_collapsed_gan_is_ended_with_a_sentence(tmp_path):
    images, labels = torch.randn(8, 1, 4, 4), torch.tensor([0, 1] * 4)
    assert diversity(images, images, labels).item() == pytest.approx(1)
    assert diversity(images / 2, images, labels).item() == pytest.approx(0.5)
    one_of_each = images[:2].repeat(4, 1, 1, 1)
    assert diversity(one_of_each, images, labels).item() == pytest.approx(0, abs=1e-6)
    numbers = torch.randn(8, 2)  # which do not divide the batch
    assert diversity(one_of_each, images, numbers).item() > 0.1
    assert diversity(images, images, torch.arange(8)).isnan()
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
