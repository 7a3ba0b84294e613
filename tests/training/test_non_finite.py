"""Steps that are not finite leave no trace, are counted, and end a run or roll it back."""

import errno
import math
import os
from functools import partial
from time import sleep
from types import SimpleNamespace

import lightning
import pytest
import torch
from helpers.faults import infinite, nan, spoil_loss, steep
from helpers.pairs import each_once
from helpers.refusals import assert_names
from helpers.tiny_runs import (
    QUICK,
    TINY_AUTOENCODER,
    checkpoint_of,
    curve,
    same,
    steps_of,
    summary_of,
)
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins import MixedPrecision

from diffusion_lab.assembly.parameter_groups import OptimizerFactory
from diffusion_lab.compute.device import PeakMemory
from diffusion_lab.families.autoencoder.task import AutoencoderModule
from diffusion_lab.families.diffusion.module import DiffusionModule
from diffusion_lab.runs import checkpoints
from diffusion_lab.training.bad_steps import BadSteps
from diffusion_lab.training.callbacks import EMA, NonFinite
from diffusion_lab.training.callbacks.checkpoint import AtomicCheckpointIO, Resumption
from diffusion_lab.training.logger import Clock, JSONLines
from diffusion_lab.training.module import Optimization, RunContext, TrainedModule

LEARNING = ["objective/time_sampler=second_moment", "objective.time_sampler.bins=2"]
SETTINGS = {
    "plain": [],
    "accumulated": ["micro_batch_size=4"],
    "unclipped": ["trainer.gradient_clip_val=null"],
    "bf16": ["trainer.precision=bf16-mixed"],
    "unfused": ["optimizer.fused=false"],
    "muon": ["optimizer=muon", "optimizer.weight_decay=0.1"],
}
KINDS = {kind.__name__: kind for kind in (infinite, nan, steep)}


@pytest.mark.parametrize(("extra", "kind"), each_once(SETTINGS, KINDS))
def test_a_skipped_step_leaves_no_trace(lab, tmp_path, monkeypatch, kind, extra):
    arguments = [*QUICK, *LEARNING, *extra, "callbacks.checkpoint.every_n_steps=1"]
    spoil_loss(monkeypatch, {3}, kind)
    lab.done("train", *arguments, "run_dir=run", "trainer.max_steps=3")
    after, before = checkpoint_of(tmp_path / "run"), checkpoint_of(tmp_path / "run", "previous")
    assert (before["global_step"], after["global_step"]) == (2, 3)
    for part in ("state_dict", "current_model_state"):
        assert after[part].keys() == before[part].keys()
        assert same(after[part], before[part]), part
    for key, state in before["optimizer_states"][0]["state"].items():
        assert same(state, after["optimizer_states"][0]["state"][key])
    summary = summary_of(tmp_path / "run")
    assert (summary["steps"], summary["skipped_steps"]) == (3, 1)
    assert steps_of(tmp_path / "run") == [1, 2]
    assert curve(tmp_path / "run", "train/skipped_steps") == [1]


def test_an_autoencoder_and_its_codebook_are_left_alone(lab, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, {2}, nan, AutoencoderModule)
    arguments = ["autoencoder=vq", "autoencoder.codes=8", "reconstruction/discriminator=patch"]
    arguments += ["callbacks.evaluation=null", "callbacks.checkpoint.every_n_steps=1"]
    arguments += ["run_dir=run", "trainer.max_steps=2"]
    lab.done("train-autoencoder", *TINY_AUTOENCODER, *arguments)
    after, before = checkpoint_of(tmp_path / "run"), checkpoint_of(tmp_path / "run", "previous")
    assert any("quantiser" in name for name in after["state_dict"])
    assert same(after["state_dict"], before["state_dict"])


def spoil_a_layer(monkeypatch, first_step, backwards=False):
    """Makes the MLP of a block return infinite values or gradients from a step on."""

    def on_train_start(self):
        (layer,) = (m for name, m in self.named_modules() if name.endswith("blocks.0.mlp"))

        def forward(module, inputs, output):
            if self.trainer.global_step + 1 < first_step or not self.training:
                return output
            if backwards:
                return output + (output - output.detach()).sqrt()
            return output * torch.inf

        layer.register_forward_hook(forward)

    monkeypatch.setattr(DiffusionModule, "on_train_start", on_train_start, raising=False)


@pytest.mark.parametrize("backwards", [False, True])
def test_a_row_of_bad_steps_ends_the_run_and_names_the_layer(
    refusal, tmp_path, monkeypatch, backwards
):
    spoil_a_layer(monkeypatch, 3, backwards)
    arguments = ["trainer.max_steps=50", "callbacks.non_finite.patience=3", "micro_batch_size=4"]
    arguments.append("callbacks.checkpoint.every_n_steps=2")
    sentence = refusal("train", *QUICK, *arguments, "run_dir=run")
    what = "gradient" if backwards else "output"
    assert_names(sentence, "3 consecutive steps", "step 5", what, "denoiser.backbone.blocks.0")
    assert "diffusion-lab train resume=run" in sentence
    kept = torch.load(tmp_path / "run/non_finite/step_0000005_rank0.pt", weights_only=True)
    assert "blocks.0" in kept["found"]
    assert len(kept["batches"]) == 2
    for part in kept["batches"]:
        images, labels = part["batch"]
        assert images.shape == (4, 1, 8, 8)
        assert images.dtype == torch.uint8
        assert len(labels) == len(part["t"]) == len(part["losses"]) == 4
        assert part["losses"].isfinite().all() == backwards
    assert checkpoint_of(tmp_path / "run")["global_step"] == 2, "none within the row"


def test_a_run_without_a_checkpoint_on_a_full_disk_says_why_it_ends(refusal, tmp_path, monkeypatch):
    spoil_a_layer(monkeypatch, 1)
    (tmp_path / "run").mkdir()
    (tmp_path / "run/non_finite").write_text("")  # acts as a disk without room for a folder
    arguments = ["trainer.max_steps=50", "callbacks.non_finite.patience=2", "run_dir=run"]
    sentence = refusal("train", *QUICK, *arguments, "callbacks.non_finite.max_rollbacks=3")
    assert_names(sentence, "max_rollbacks=3", "callbacks.checkpoint.every_n_steps")
    place = ["run/non_finite", os.strerror(errno.EEXIST)]
    assert_names(sentence, "output", "denoiser.backbone.blocks.0", *place)
    assert "resume=" not in sentence  # as there is nothing to resume from, or to roll back to
    assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.long
def test_a_run_is_taken_back_as_often_as_told(refusal, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, {4, 5, 8, 9, 12, 13}, infinite)
    arguments = ["callbacks.checkpoint.every_n_steps=2", "callbacks.non_finite.patience=2"]
    arguments += ["callbacks.non_finite.max_rollbacks=2", "trainer.max_steps=20", "run_dir=run"]
    sentence = refusal("train", *QUICK, *arguments)
    assert_names(sentence, "step 13", "callbacks.non_finite.max_rollbacks=3")
    assert set(steps_of(tmp_path / "run")) == {1, 2, 3, 6, 7, 10, 11}
    state = checkpoint_of(tmp_path / "run")
    assert state["callbacks"]["NonFinite"]["rollbacks"] == 2
    assert state["callbacks"]["NonFinite"]["skipped"] == 4  # saved at step 10
    assert "step 13" in refusal("train", "resume=run", "callbacks.non_finite.max_rollbacks=1")


@pytest.mark.long
def test_the_step_after_a_roll_back_has_its_own_rate(lab, tmp_path, monkeypatch):
    arguments = ["callbacks.checkpoint.every_n_steps=2", "callbacks.non_finite.patience=2"]
    arguments += ["callbacks.non_finite.max_rollbacks=1", "trainer.max_steps=6"]
    arguments.append("lr_schedule=cosine")
    lab.done("train", *QUICK, *arguments, "run_dir=whole")
    spoil_loss(monkeypatch, {4, 5}, infinite)
    lab.done("train", *QUICK, *arguments, "run_dir=run")
    whole, run = (curve(tmp_path / each, "train/lr") for each in ("whole", "run"))
    assert run[-1] == whole[-1] != whole[2]


@pytest.mark.long
def test_a_roll_back_waits_for_the_checkpoint_that_is_being_written(lab, tmp_path, monkeypatch):
    def slow(checkpoint, path):
        sleep(1)  # longer than the steps until the roll back
        save(checkpoint, path)

    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", slow)
    spoil_loss(monkeypatch, {4, 5}, infinite)
    arguments = ["callbacks.checkpoint.every_n_steps=2", "callbacks.non_finite.patience=2"]
    arguments += ["callbacks.checkpoint.background=true", "validate_every_n_steps=100"]
    arguments += ["callbacks.non_finite.max_rollbacks=1", "trainer.max_steps=5", "run_dir=run"]
    lab.done("train", *QUICK, *arguments)
    state = checkpoint_of(tmp_path / "run")
    assert state["callbacks"]["NonFinite"]["rollbacks"] == 1


def test_an_average_that_a_resumed_run_adds_outlives_a_roll_back(lab, tmp_path, monkeypatch):
    saving = ["callbacks.checkpoint.every_n_steps=2", "validate_every_n_steps=100"]
    lab.done("train", *QUICK, *saving, "trainer.max_steps=2", "run_dir=run")
    spoil_loss(monkeypatch, {4, 5}, infinite)
    more = ["callbacks.non_finite.patience=2", "callbacks.non_finite.max_rollbacks=1"]
    more += ["callbacks.weight_averaging.also=[100]", "trainer.max_steps=5"]
    lab.done("train", "resume=run", *more)
    state = checkpoint_of(tmp_path / "run")
    assert state["averages"].keys() == {"100", "500000"}
    # it begins with the weights that the run is taken back to
    assert same(state["averages"]["100"], state["current_model_state"])


def test_a_roll_back_restores_weights_averages_and_optimiser(lab, tmp_path, monkeypatch):
    # steps 1-2 are saved; step 3 changes the weights; 4 and 5 are bad, and 3 is undone
    spoil_loss(monkeypatch, {4, 5}, infinite)
    arguments = ["callbacks.checkpoint.every_n_steps=2", "callbacks.non_finite.patience=2"]
    arguments += ["callbacks.non_finite.max_rollbacks=1", "trainer.max_steps=5", "run_dir=run"]
    arguments.append("validate_every_n_steps=100")
    lab.done("train", *QUICK, *arguments)
    after, before = checkpoint_of(tmp_path / "run"), checkpoint_of(tmp_path / "run", "previous")
    assert (before["global_step"], after["global_step"]) == (2, 5)
    for part in ("state_dict", "current_model_state"):
        assert same(after[part], before[part])
    counts = {float(s["step"]) for s in after["optimizer_states"][0]["state"].values()}
    assert counts == {2.0}


@pytest.mark.slow
def test_all_ranks_skip_the_step_that_is_bad_on_one(lab, tmp_path):
    bad = ["+callbacks.bad._target_=helpers.failing.BadRank", "+callbacks.bad.folder=ranks"]
    arguments = [*QUICK, *LEARNING, *bad, "+callbacks.bad.steps=[3]", "trainer.devices=2"]
    lab.done("train", *arguments, "run_dir=run", "callbacks.checkpoint.every_n_steps=1")
    assert summary_of(tmp_path / "run")["skipped_steps"] == 1
    first, second = (torch.load(tmp_path / f"ranks/rank{rank}.pt") for rank in range(2))
    assert same(first, second)
    assert all(value.isfinite().all() for value in first.values())
    states = checkpoint_of(tmp_path / "run")["optimizer_states"][0]["state"]
    assert {float(state["step"]) for state in states.values()} == {3.0}  # of four


@pytest.mark.slow
def test_a_row_of_bad_steps_ends_all_ranks_with_one_sentence(lab, tmp_path):
    bad = ["+callbacks.bad._target_=helpers.failing.BadRank", "+callbacks.bad.folder=ranks"]
    bad += ["+callbacks.bad.steps=[3,4]", "callbacks.non_finite.patience=2"]
    arguments = [*QUICK, *bad, "trainer.devices=2", "trainer.max_steps=50", "run_dir=run"]
    err = lab.done("train", *arguments, "callbacks.checkpoint.every_n_steps=1", code=2)
    assert "Traceback" not in err
    assert err.count("step 4") == 1
    kept = {path.name for path in (tmp_path / "run/non_finite").iterdir()}
    assert kept == {f"step_0000004_rank{rank}.pt" for rank in range(2)}


class Line(TrainedModule):
    """A linear layer of one input; its loss is multiplied by the batch, a number."""

    def __init__(self):
        optimizer = OptimizerFactory(partial(torch.optim.AdamW, lr=0.1))
        super().__init__(Optimization(optimizer, lambda images, progress: 1.0, batch_size=1))
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        return self.layer(torch.ones(1, 1)).float().square().mean() * batch[0]

    def metrics_of_pass(self, split):
        return {}


class Weights(Callback):
    """Records the weight, its average and the loss scale after each step; saves checkpoints."""

    def __init__(self, folder):
        self.folder = folder
        self.found = {}

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        weight = pl_module.layer.weight.item()
        with trainer.callbacks[0].current.swapped():
            average = pl_module.layer.weight.item()
        self.found[trainer.global_step] = [weight, average, trainer.scaler.get_scale()]
        trainer.save_checkpoint(self.folder / f"{trainer.global_step}.ckpt")


def fit_with_scaler(folder, from_step=None, bad_step=3):
    """Trains four steps in half precision, one of them with an infinite loss."""
    torch.manual_seed(0)
    weights, scaler = Weights(folder), torch.amp.GradScaler("cpu", init_scale=1024.0)
    without = ("progress_bar", "model_summary", "checkpointing")
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_steps=4,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler), AtomicCheckpointIO()],
        callbacks=[EMA(half_life_images=2, ramp=None), NonFinite(), weights, Resumption()],
        gradient_clip_val=1.0,
        logger=False,
        **{f"enable_{each}": False for each in without},
    )
    factors = torch.ones(4)
    factors[bad_step - 1] = torch.inf
    factors = factors[from_step or 0 :]
    checkpoint = folder / f"{from_step}.ckpt" if from_step else None
    loader = torch.utils.data.DataLoader(factors[:, None], batch_size=1)
    line, clock = Line(), Clock(batch_size=1)
    rows = JSONLines(folder / "metrics.jsonl", clock)
    line.context = RunContext(folder, clock, PeakMemory(torch.device("cpu")), rows)
    trainer.fit(line, loader, ckpt_path=checkpoint, weights_only=True)
    return weights.found, trainer.callbacks[1].counts.skipped


def test_a_gradient_scaler_skips_the_step_and_is_resumed(tmp_path):
    found, skipped = fit_with_scaler(tmp_path)
    assert skipped == 1
    assert found[3] == [*found[2][:2], 512.0]
    assert found[2][2] == 1024.0
    assert found[4][0] != found[3][0]
    assert found[4][1] != found[3][1]
    again, skipped = fit_with_scaler(tmp_path, from_step=3)
    assert again == {4: found[4]}
    assert skipped == 1


@pytest.mark.parametrize("scaler", [None, torch.amp.GradScaler("cpu")])
def test_players_are_clipped_apart_and_the_norm_is_that_before(scaler):
    module = AutoencoderModule.__new__(AutoencoderModule)
    torch.nn.Module.__init__(module)
    module.bad_steps = BadSteps()
    module.bad_steps.begin(module)
    first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
    first.grad, second.grad = torch.tensor([0.5]), torch.tensor([40.0])
    module.players = lambda: [[first], [second]]
    module._fabric, module._trainer = None, SimpleNamespace(scaler=scaler)
    module._device = torch.device("cpu")
    module.configure_gradient_clipping(torch.optim.SGD([first, second], 1.0), 1.0)
    assert (first.grad.item(), second.grad.item()) == pytest.approx((0.5, 1.0), rel=1e-4)
    assert module.gradient_norm.item() == pytest.approx(math.hypot(0.5, 40.0))


def test_an_average_begins_with_the_first_step_that_is_taken(tmp_path):
    found, _ = fit_with_scaler(tmp_path, bad_step=1)
    assert found[2][1] == found[2][0]
    assert found[3][1] != found[3][0]


def test_a_run_whose_every_step_is_skipped_is_not_finished(lab, refusal, tmp_path, monkeypatch):
    spoil_loss(monkeypatch, range(1, 9), infinite)
    assert_names(refusal("train", *QUICK, "run_dir=run"), "optimizer.lr", "4")
    assert not (tmp_path / "run/summary.json").exists()
    assert_names(refusal("train", "resume=run"), "optimizer.lr")
