"""Averages of the weights: several in a run, and those made of snapshots after it."""

import errno
import json
import shutil

import numpy as np
import pytest
import safetensors.torch
import torch
from helpers.faults import infinite, spoil_loss
from helpers.pairs import first_fast
from helpers.refusals import assert_names
from helpers.tiny_runs import FAST, QUICK, TINY_AUTOENCODER, checkpoint_of, same, summary_of

from diffusion_lab.analysis.average import reconstruct
from diffusion_lab.diffusion.power_average import gamma_of
from diffusion_lab.first_stage.autoencoder import saving
from diffusion_lab.runs.weights import read, snapshot_paths, snapshots_of
from diffusion_lab.training.callbacks import PosthocEMA, weight_averaging
from diffusion_lab.training.callbacks.weight_averaging import WeightAverage
from diffusion_lab.training.module import TrainedModule

RUN = [*QUICK, "optimizer.lr=0.1", "lr_schedule.warmup_images=0", "trainer.max_steps=6"]
RUN += ["callbacks.checkpoint.every_n_steps=2", "callbacks.weight_averaging.ramp=null"]
RUN.append("run_dir=run")
HALF_LIFE = "callbacks.weight_averaging.half_life_images="
TWO = [*RUN, f"{HALF_LIFE}20", "callbacks.weight_averaging.also=[80]"]


@pytest.mark.parametrize("weight", [0.01, 0.7])
def test_an_average_moves_as_far_as_it_is_told_unless_the_step_is_bad(weight):
    module = torch.nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
    begin = {name: torch.randn(p.shape) for name, p in module.named_parameters()}
    average = WeightAverage(module, begin)
    average.update(weight, torch.tensor(1.0))
    assert same(average.to_save(), begin)
    average.update(weight, torch.tensor(0.0))
    for name, p in module.named_parameters():
        torch.testing.assert_close(average.to_save()[name], begin[name].lerp(p, weight))


def denoiser(state):
    return {k.removeprefix("denoiser."): v for k, v in state.items() if k.startswith("denoiser.")}


@pytest.mark.slow
def test_two_averages_are_those_of_two_runs(trained_once):
    both = checkpoint_of(trained_once("train", *TWO) / "run")
    short, long = (
        checkpoint_of(trained_once("train", *RUN, f"{HALF_LIFE}{images}") / "run")
        for images in (20, 80)
    )
    assert same(both["current_model_state"], long["current_model_state"])
    assert both["averages"].keys() == {"20", "80"}
    assert same(both["averages"]["20"], short["averages"]["20"])
    assert same(both["averages"]["80"], long["averages"]["80"])
    assert not same(both["averages"]["20"], both["averages"]["80"])
    for one in (both, short):  # the average that is evaluated
        assert same(one["state_dict"], one["state_dict"] | one["averages"]["20"])
    assert same(long["state_dict"], long["state_dict"] | long["averages"]["80"])


def test_the_average_that_is_evaluated_is_stored_once(trained_once):
    checkpoint = checkpoint_of(trained_once("train", *TWO) / "run")
    for name, value in checkpoint["averages"]["20"].items():
        assert value.data_ptr() == checkpoint["state_dict"][name].data_ptr()
        assert value.data_ptr() != checkpoint["averages"]["80"][name].data_ptr()


@pytest.mark.long
def test_all_averages_go_on_when_a_run_is_resumed(lab, tmp_path, trained_once, killed_at_step):
    whole = checkpoint_of(trained_once("train", *TWO) / "run")
    killed_at_step(6, "train", *TWO)
    assert checkpoint_of(tmp_path / "run")["global_step"] == 4
    lab.done("train", "resume=run")
    again = checkpoint_of(tmp_path / "run")
    for half_life in ("20", "80"):
        assert same(again["averages"][half_life], whole["averages"][half_life])
    assert same(again["state_dict"], whole["state_dict"])


@pytest.mark.slow
def test_a_resumed_run_may_evaluate_another_of_its_averages(lab, tmp_path, trained_once):
    lab.done("train", *TWO, "trainer.max_steps=4")
    other = [f"{HALF_LIFE}80", "callbacks.weight_averaging.also=[20,40]"]
    lab.done("train", "resume=run", "trainer.max_steps=6", *other)
    whole = checkpoint_of(trained_once("train", *TWO) / "run")
    again = checkpoint_of(tmp_path / "run")
    for half_life in ("20", "80"):
        assert same(again["averages"][half_life], whole["averages"][half_life])
    assert same(again["state_dict"], whole["state_dict"] | whole["averages"]["80"])
    assert again["averages"].keys() == {"20", "40", "80"}


@pytest.mark.slow
def test_commands_use_the_average_that_is_asked_for(lab, refusal, tmp_path, trained_once):
    run = trained_once("train", *TWO) / "run"
    checkpoint = checkpoint_of(run)
    states = checkpoint["averages"] | {"trained": checkpoint["current_model_state"]}
    images = {}
    for name, state in states.items():
        lab.done("export", f"run={run}", f"output={name}", f"average={name}")
        exported = safetensors.torch.load_file(tmp_path / name / "model.safetensors")
        assert same(exported, denoiser(state))
        draw = [f"run={run}", "num_samples=2", f"output={tmp_path}/{name}"]
        images[name] = lab.drawn(*draw, f"average={name}")["images"]
    default = lab.drawn(*draw)["images"]
    assert np.array_equal(default, images["20"])
    assert not np.array_equal(default, images["80"])
    assert not np.array_equal(default, images["trained"])
    sentence = refusal("sample", f"run={run}", "average=40")
    assert_names(sentence, "average=40", "trained", "20", "80")


@pytest.mark.slow
def test_an_average_is_another_way_to_sample(lab, refusal, run_folder):
    lab.done("evaluate", "run=run", "average=trained", "device=cpu")
    (record,) = (run_folder / "evaluations").glob("*.json")
    assert json.loads(record.read_text())["sampling"]["average"] == "trained"
    # metrics of one average are not compared with those of another
    sentence = refusal("evaluate", "run=run", "against=run", "average=500000", "device=cpu")
    assert_names(sentence, "average=trained", "average=500000")


SNAPSHOTS = [*QUICK, *FAST, "run_dir=run"]
SHORT = [*SNAPSHOTS, "trainer.max_steps=8", "callbacks.posthoc_ema.snapshots=4"]
LONG = [*SNAPSHOTS, "trainer.max_steps=64", "callbacks.posthoc_ema.snapshots=32"]


@pytest.fixture
def seen(monkeypatch) -> dict[int, dict[str, torch.Tensor]]:
    """The weights of a run's denoiser after each step, as they are trained."""
    found, original = {}, PosthocEMA.on_train_batch_end

    def look(self, trainer, pl_module, *rest):
        original(self, trainer, pl_module, *rest)
        if step := trainer.global_step:  # else of a micro-batch within the first step
            parameters = pl_module.denoiser.named_parameters()
            found[step] = {name: value.detach().clone() for name, value in parameters}

    monkeypatch.setattr(PosthocEMA, "on_train_batch_end", look)
    return found


def files_of(folder):
    found = (folder / "run/snapshots").iterdir()
    return {path.name: path.read_bytes() for path in found}


def assert_averages_of(snapshot, weights):
    """Asserts that a snapshot holds the averages of weights by step, from the first to the last."""
    last = max(weights)
    for length in (0.05, 0.1):
        edges = torch.arange(last + 1, dtype=torch.float64) / last
        shares = (edges ** (gamma_of(length) + 1)).diff().tolist()
        for name in weights[1]:
            wanted = sum(weights[step + 1][name].double() * shares[step] for step in range(last))
            found = snapshot[f"{length}/{name}"].double()
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def distance(found, wanted):
    """The relative distance of two states."""
    (first, second) = (torch.cat([s[k].flatten() for k in wanted]) for s in (found, wanted))
    return ((first - second).norm() / second.norm()).item()


@pytest.mark.long
def test_snapshots_hold_the_averages_of_all_steps_and_do_not_change_them(lab, tmp_path, seen):
    err = lab.done("train", *SHORT, "micro_batch_size=4")
    assert_names(err, "run/snapshots")
    assert len(seen) == 8
    paths = snapshot_paths(tmp_path / "run")
    assert list(paths) == [2, 4, 6, 8]
    for step, path in paths.items():
        snapshot = safetensors.torch.load_file(path)
        assert_averages_of(snapshot, {k: v for k, v in seen.items() if k <= step})
    with_them = checkpoint_of(tmp_path / "run")
    assert same(with_them["snapshot"], snapshot)
    off = ["callbacks.posthoc_ema.snapshots=0", "run_dir=without"]
    lab.done("train", *SHORT, "micro_batch_size=4", *off)
    assert not (tmp_path / "without/snapshots").exists()
    without = checkpoint_of(tmp_path / "without")
    assert "snapshot" not in without
    for part in ("state_dict", "current_model_state"):
        assert same(without[part], with_them[part])


def test_weights_stand_still_in_a_skipped_step(lab, tmp_path, seen, monkeypatch):
    spoil_loss(monkeypatch, [4], infinite)  # in which a snapshot is due
    lab.done("train", *SHORT)
    assert summary_of(tmp_path / "run")["skipped_steps"] == 1
    states = checkpoint_of(tmp_path / "run")["optimizer_states"][0]["state"]
    assert {float(state["step"]) for state in states.values()} == {7.0}  # of eight
    assert same(seen[4], seen[3])
    paths = snapshot_paths(tmp_path / "run")
    for step in (4, 8):
        snapshot = safetensors.torch.load_file(paths[step])
        assert_averages_of(snapshot, {k: v for k, v in seen.items() if k <= step})


def test_a_rollback_takes_averages_and_snapshots_back(lab, tmp_path, seen, monkeypatch):
    spoil_loss(monkeypatch, [4, 5], infinite)  # step 2 is saved, and 3 to 5 are undone
    saving = ["callbacks.checkpoint.every_n_steps=2", "callbacks.non_finite.patience=2"]
    more = ["callbacks.non_finite.max_rollbacks=1", "validate_every_n_steps=100"]
    lab.done("train", *SHORT, *saving, *more, "callbacks.posthoc_ema.snapshots=8")
    assert list(snapshot_paths(tmp_path / "run")) == [1, 2, 5, 6, 7, 8]
    assert not same(seen[3], seen[2])
    kept = seen | {3: seen[2], 4: seen[2]}
    assert same(kept[5], kept[2])
    assert_averages_of(checkpoint_of(tmp_path / "run")["snapshot"], kept)


@pytest.mark.long
@pytest.mark.parametrize("step", first_fast([5, 6]))
def test_a_resumed_run_has_the_snapshots_of_an_unbroken_one(
    lab, tmp_path, trained_once, killed_at_step, step
):
    often = [*SHORT, "callbacks.checkpoint.every_n_steps=3", "callbacks.posthoc_ema.snapshots=7"]
    whole = trained_once("train", *often)
    killed_at_step(step, "train", *often)
    assert checkpoint_of(tmp_path / "run")["global_step"] == 3
    late = snapshot_paths(tmp_path / "run")[4]
    late.write_bytes(b"of a step that is taken again")
    (tmp_path / "run/snapshots/step_0000099.safetensors").write_bytes(b"")
    (tmp_path / "run/snapshots/.step_0000005.safetensors.0.part").write_bytes(b"half")
    lab.done("train", "resume=run")
    assert files_of(tmp_path) == files_of(whole)
    again, unbroken = (checkpoint_of(folder / "run")["snapshot"] for folder in (tmp_path, whole))
    assert same(again, unbroken)


def test_a_run_that_its_time_ends_has_as_many_snapshots(lab, tmp_path, monkeypatch):
    done = property(lambda self: min(1.0, self.trainer.global_step / 6))
    monkeypatch.setattr(TrainedModule, "progress", done)
    lab.done("train", *SHORT, "trainer.max_steps=7")
    assert list(snapshot_paths(tmp_path / "run")) == [2, 3, 5, 6]
    # an average at the end needs no snapshot there
    result = lab.result("average", "run=run", "length=0.05")
    assert result["step"] == 7


@pytest.mark.slow
def test_an_average_is_that_of_a_run_that_kept_it(lab, tmp_path, trained_once, monkeypatch):
    lengths = (0.02, 0.07, 0.15, 0.25)
    with monkeypatch.context() as patch:
        patch.setattr(weight_averaging, "LENGTHS", lengths)
        lab.done("train", *LONG)
    kept = checkpoint_of(tmp_path / "run")["snapshot"]
    found = snapshots_of(trained_once("train", *LONG) / "run")[1]
    assert len(found) == 32
    for length in lengths:
        wanted = {k.removeprefix(f"{length}/"): v for k, v in kept.items() if f"{length}/" in k}
        assert len(wanted) > 10
        errors = []
        for count in (8, 16, 32):
            chosen = {step: read for step, read in found.items() if step % (64 // count) == 0}
            tensors = reconstruct(chosen, 64, [length])[length][0]
            errors.append(distance(tensors, wanted))
        assert errors[2] < 0.01
        assert errors[0] > errors[1] > errors[2]


@pytest.fixture
def averaged(lab, tmp_path, trained_once):
    """A copy of a run with averages of lengths 0.05 and 0.02, and what `average` said of them."""
    shutil.copytree(trained_once("train", *LONG), tmp_path, dirs_exist_ok=True)
    return lab.result("average", "run=run", "length=[0.05,0.02]")


def weights_of(folder):
    return safetensors.torch.load_file(folder / "model.safetensors")


@pytest.mark.slow
def test_an_average_can_be_chosen_by_commands(lab, refusal, tmp_path, averaged):
    assert averaged["step"] == 64
    assert [made["average"] for made in averaged["averages"]] == ["0.05", "0.02"]
    assert averaged["averages"][0]["profile_error"] < 1e-6
    assert 0.01 < averaged["averages"][1]["profile_error"] < 0.1
    kept = checkpoint_of(tmp_path / "run")["snapshot"]
    made = weights_of(tmp_path / "run/averages/0.05_step64")
    for name in (key.removeprefix("0.05/") for key in kept if key.startswith("0.05/")):
        torch.testing.assert_close(made[name], kept[f"0.05/{name}"], rtol=1e-5, atol=1e-7)
    lab.done("export", "run=run", "average=0.02", "output=mine")
    exported, short = weights_of(tmp_path / "mine"), tmp_path / "run/averages/0.02_step64"
    assert same(exported, weights_of(short))
    images = []
    for arguments in (["run=run", "average=0.02"], ["run=mine"], ["run=run"]):
        draw = ["num_samples=2", f"output={tmp_path}/drawn"]
        images.append(lab.drawn(*arguments, *draw)["images"])
    assert np.array_equal(images[0], images[1])
    assert not np.array_equal(images[0], images[2])
    sentence = refusal("sample", "run=run", "average=0.03")
    assert_names(sentence, "0.03", "0.02", "0.05", "500000", "step=64")
    sentence = refusal("sample", "run=run", "average=0.03_step32")
    assert_names(sentence, "0.02", "length=0.03", "step=32")


@pytest.mark.slow
def test_averages_are_compared_by_a_sweep(lab, averaged):
    chosen = ["average=0.02,0.05", "metrics.num_samples=16", "device=cpu"]
    rows = lab.result("sample-sweep", "run=run", *chosen)["rows"]
    assert {row["average"] for row in rows} == {"0.02", "0.05"}
    assert rows[0]["fid"] != rows[1]["fid"]


@pytest.mark.slow
def test_an_earlier_step_has_its_own_average(lab, refusal, tmp_path, averaged):
    (made,) = lab.result("average", "run=run", "length=0.1", "step=32")["averages"]
    assert made["average"] == "0.1_step32"
    snapshot = read(snapshot_paths(tmp_path / "run")[32], "")
    for name, value in weights_of(tmp_path / made["folder"]).items():
        if f"0.1/{name}" in snapshot:
            torch.testing.assert_close(value, snapshot[f"0.1/{name}"], rtol=1e-5, atol=1e-7)
    result = lab.result("export", "run=run", "average=0.1_step32", "output=mine")
    assert result["step"] == "32"
    assert_names(refusal("average", "run=run", "step=31"), "step=31", "step=30", "step=32")
    other = refusal("sample", "run=run", "average=0.1_step32", "step=64")
    assert_names(other, "average=0.1_step32", "step=64", "average=0.1")


@pytest.mark.slow
def test_a_run_that_trains_longer_needs_its_averages_anew(lab, refusal, averaged):
    lab.done("train", "resume=run", "trainer.max_steps=66")
    assert_names(refusal("sample", "run=run", "average=0.05"), "average=0.05", "0.05_step64")
    lab.done("average", "run=run", "length=0.05")
    lab.done("sample", "run=run", "average=0.05", "num_samples=2")


@pytest.mark.slow
def test_float16_takes_half_the_disk(tmp_path, trained_once):
    half = trained_once("train", *LONG, "callbacks.posthoc_ema.dtype=float16") / "run"
    run = trained_once("train", *LONG) / "run"
    sizes = [sum(len(data) for data in files_of(folder.parent).values()) for folder in (half, run)]
    assert sizes[0] == pytest.approx(sizes[1] / 2, rel=0.1)
    found, wanted = (
        reconstruct(snapshots_of(folder)[1], 64, [0.15])[0.15][0] for folder in (half, run)
    )
    assert 0 < distance(found, wanted) < 1e-3


@pytest.mark.long
def test_a_snapshot_that_cannot_be_written_or_read_is_said_and_left_out(
    lab, refusal, tmp_path, monkeypatch
):
    original = weight_averaging.save_snapshot

    def save(run, step, *rest):
        if step == 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        original(run, step, *rest)

    monkeypatch.setattr(weight_averaging, "save_snapshot", save)
    err = lab.done("train", *SHORT)
    assert_names(err, "snapshot of step 4", "No space left on device")
    paths = snapshot_paths(tmp_path / "run")
    assert list(paths) == [2, 6, 8]
    paths[6].write_bytes(paths[6].read_bytes()[:100])
    assert paths[6].name in refusal("average", "run=run", "length=0.07")
    paths[6].unlink()
    lab.done("average", "run=run", "length=0.07")
    lab.done("export", "run=run", "output=mine")
    assert "mine" in refusal("average", "run=mine")  # which has no snapshots


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["vae", "vq"])
def test_an_autoencoder_has_averages_that_are_first_stages(lab, refusal, tmp_path, kind):
    loss = "likelihood" if kind == "vae" else "plain"
    arguments = [*TINY_AUTOENCODER, f"autoencoder={kind}", f"reconstruction={loss}", "run_dir=run"]
    steps = ["trainer.max_steps=6", "callbacks.posthoc_ema.snapshots=3", "optimizer.lr=0.01"]
    lab.done("train-autoencoder", *arguments, *steps)
    made = lab.result("average", "run=run", "length=[0.05,0.2]")["averages"]
    assert all(any(key.startswith("rfid/") for key in each) for each in made)
    whole, facts, _ = saving.load_autoencoder(tmp_path / "run/first_stage.safetensors")
    average, other, _ = saving.load_autoencoder(
        tmp_path / "run/averages/0.05_step6/first_stage.safetensors"
    )
    kept = checkpoint_of(tmp_path / "run")["snapshot"]
    for name, value in average.named_parameters():
        torch.testing.assert_close(value, kept[f"0.05/{name}"], rtol=1e-5, atol=1e-6)
    for name, value in average.named_buffers():
        assert torch.equal(value, dict(whole.named_buffers())[name])
    assert other.latent_mean != facts.latent_mean
    stage = [f"first_stage={'kl' if kind == 'vae' else kind}", "backbone.patch=1"]
    where = ["first_stage.run=run/averages/0.05_step6", "run_dir=latent", "trainer.max_steps=1"]
    lab.done("train", *QUICK, *stage, *where)
    if kind == "vae":
        lab.done("sample", "run=run", "average=0.2", "num_samples=2")
        assert_names(refusal("sample", "run=run", "average=trained"), "average=trained", "0.05")
