"""Compositions that are each drawn in their own way, and students whose teachers cost something."""

import json

import pytest
from helpers.fake_runs import CALLBACKS, GUIDANCE, NAME, SAMPLER, UNET, fake_run
from helpers.fake_runs import PROTOCOL as MEASURED
from helpers.refusals import refused
from omegaconf import OmegaConf

from diffusion_lab.metrics.quantity import with_fingerprint
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare, samples
from diffusion_lab.runs.current import identify
from diffusion_lab.runs.results import save_evaluation

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


def two_seeds(folder, name: str, fid: float, config: dict) -> None:
    for seed in (0, 1):
        fake_run(folder / f"{name}{seed}", fid * (1 + seed / 20), seed, config)


def page(folder) -> tuple[str, dict]:
    result = compare([str(folder)], str(folder / "out"))
    return (folder / "out/index.html").read_text(), result


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
    text, result = page(tmp_path)
    assert result["verdict"]["fid"].startswith("UNet")
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
    _, result = page(tmp_path)
    assert result["verdict"]["fid"].startswith("DiT")


def test_families_have_no_sampler_in_common(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {})
    two_seeds(tmp_path, "codes", 10.0, CODES)
    text, result = page(tmp_path)
    assert set(result["compositions"]) == {"DiT", "CodeTransformer"}
    assert "CodeTransformer is drawn by CodeSampler" in text


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
    _, result = page(tmp_path)
    assert set(result["compositions"]) == {"DiT", "KLAutoencoder"}
    (reason,) = result["left_out"]
    assert "other" in reason
    assert result["verdict"]["fid"].startswith("DiT is better")
    drawn = samples(collect([tmp_path]).arms)
    assert [each.arm.name for each in drawn] == ["DiT"]  # a VAE's pictures are reconstructions


def test_a_vae_follows_the_protocol_of_the_others(tmp_path):
    two_seeds(tmp_path, "dit", 20.0, {"protocol": PROTOCOL})
    for seed in (0, 1):
        vae(tmp_path / f"vae{seed}", 40.0 + 3 * seed, seed, MEASURED)
    text, _ = page(tmp_path)
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
    text, _ = page(tmp_path)
    assert "UNet has a teacher that saw 120k images and answered 4M calls" in text
    assert "DiT has a teacher" not in text
