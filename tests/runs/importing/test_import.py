"""The command `import`: its folder opens like a run, and wrong requests are refused."""

import numpy as np
import pytest
import torch
from helpers.commands import run_alone
from helpers.reference_networks import Reference
from helpers.refusals import assert_names, refused
from helpers.tiny_runs import ALONE, TINY
from helpers.tiny_vae import save_vae
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusion_lab import runs
from diffusion_lab.assembly.instantiate import instantiate
from diffusion_lab.backbone.embedding import grid_positions
from diffusion_lab.diffusion.estimate import Given
from diffusion_lab.diffusion.schedule import Rectified
from diffusion_lab.runs.importing.command import read
from diffusion_lab.runs.importing.kind import ADMFiles, DiTFiles
from diffusion_lab.runs.importing.kind.base import LABELS

SOURCE = "_target_:helpers.coloured_data.Coloured"
DATA = ["data=images", f"data.source={{{SOURCE}}}"]


@pytest.fixture(scope="module")
def adm(tmp_path_factory):
    """The folder of an imported U-Net of ADM, which no test may change; its file is beside it."""
    folder = tmp_path_factory.mktemp("adm")
    save_file(Reference.stored("adm").state, folder / "adm.safetensors")
    settings = ["kind=adm", "kind.head_channels=16", "sampler.steps=2"]
    run_alone(folder, "import", "adm.safetensors", *settings, "output=net")
    return folder / "net"


@pytest.fixture
def edm(lab, tmp_path):
    """The file of a network of EDM in 5 classes, in the folder of `lab`."""
    save_file(Reference.stored("edm_ddpmpp").state, tmp_path / "edm.safetensors")
    return "edm.safetensors"


def test_a_folder_has_weights_configuration_and_where_they_are_from(adm):
    assert {path.name for path in adm.iterdir()} == {"config.yaml", "model.safetensors"}
    with safe_open(adm / "model.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["imported"], facts["file"]) == ("adm", "adm.safetensors")
    assert len(facts["sha256"]) == 64
    saved = runs.load_config(adm)
    assert not {"kind", "paths", "output", "json"} & {*saved}
    assert saved.backbone.multipliers == [1, 3]
    assert saved.sampler.variance == "learned"
    assert saved.sampler.steps == 2
    assert saved.logger is None


@pytest.mark.long
def test_samples_of_the_class_are_drawn_with_its_own_sampler(lab, adm):
    drawn = {}
    for label in (0, 3):
        arguments = ["num_samples=2", f"labels={label}", f"output={label}"]
        drawn[label] = lab.drawn(f"run={adm}", *arguments)["images"]
    assert drawn[0].shape == (2, 16, 16, 3)
    assert not np.array_equal(drawn[0], drawn[3])


@pytest.mark.slow
def test_it_is_profiled_and_exported_like_a_run(lab, tmp_path, adm):
    counts = lab.result("profile", f"run={adm}", "speed=false")
    tensors = load_file(adm / "model.safetensors")
    assert counts["params"] == sum(tensor.numel() for tensor in tensors.values())
    assert counts["image_shape"] == [3, 16, 16]
    exported = lab.result("export", f"run={adm}", "output=mine")
    assert exported["imported"] == "adm"
    same = load_file(tmp_path / "mine/model.safetensors")
    assert all(torch.equal(same[name], tensor) for name, tensor in tensors.items())


@pytest.mark.long
def test_without_data_a_model_is_not_measured_and_with_data_it_is(lab, refusal, adm, edm):
    assert_names(refusal("evaluate", f"run={adm}"), "data.source", "data=...")
    lab.done("import", edm, "kind=edm", *DATA, "output=net")
    arguments = ["metrics.num_samples=8", "metrics.reference_size=16", "sampler.steps=2"]
    found = lab.result("evaluate", "run=net", *arguments, "batch_size=8")
    assert any(name.startswith("fid/") for name in found)


@pytest.mark.slow
def test_a_run_starts_from_its_weights(lab, tmp_path, adm):
    sizes = ["channels=32", "multipliers=[1,3]", "blocks=2", "attention=[1]"]
    sizes.append("stage.head_channels=16")
    shared = ["backbone=unet", "backbone/stage=adm", "backbone/norm=adm", "backbone/resample=block"]
    lab.done(
        "train",
        *[each for each in TINY if not each.startswith(("backbone", "data.source"))],
        *[*ALONE, *DATA, *shared, *(f"backbone.{size}" for size in sizes)],
        *["schedule=ddpm_linear", "objective=improved_ddpm", "trainer.max_steps=1"],
        *[f"init_from={adm}", "run_dir=run", "optimizer.lr=1e-30"],
    )
    trained, imported = (runs.load(folder)[1].denoiser for folder in (tmp_path / "run", adm))
    x, given = torch.randn(2, 3, 16, 16), Given(torch.tensor([0, 4]))
    level = runs.load(adm)[1].schedule(torch.tensor([0.2, 0.9]))
    with torch.no_grad():
        outputs = [each(x, level, given).output for each in (trained, imported)]
    torch.testing.assert_close(*outputs)


@pytest.fixture(scope="module")
def dit(tmp_path_factory):
    """The folder of an imported DiT, which no test may change."""
    folder = tmp_path_factory.mktemp("dit")
    save_file(Reference.stored("dit").state, folder / "dit.safetensors")
    settings = ["kind=dit", "kind.heads=2", f"first_stage.path={save_vae(folder / 'vae')}"]
    run_alone(folder, "import", "dit.safetensors", *settings, "output=net")
    return folder / "net"


@pytest.mark.long
def test_latents_of_the_class_are_drawn_and_decoded(lab, dit):
    drawn = {}
    for label in (0, 3):
        guided = [f"labels={label}", "guidance=classifier_free", "sampler.steps=2"]
        arguments = [*guided, "num_samples=2", f"output={label}"]
        drawn[label] = lab.drawn(f"run={dit}", *arguments)["images"]
    assert drawn[0].shape == (2, 64, 64, 3)
    assert not np.array_equal(drawn[0], drawn[3])


def test_what_is_overridden_replaces_the_recipe(lab, tmp_path, edm):
    chosen = ["sampler=euler", "sampler.steps=7", "schedule=ve", "guidance.clip=1"]
    lab.done("import", edm, "kind=edm", *chosen, "output=net")
    saved = runs.load_config(tmp_path / "net")
    assert saved.sampler._target_.endswith("Euler")
    assert saved.sampler.steps == 7
    assert saved.schedule.sigma_max == 100
    assert saved.guidance.clip == 1
    assert saved.objective.label_dropout == 0


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["kind=diffusers"], ["edm.safetensors"]),
        (["kind=edm", "data=cifar10"], ["(3, 32, 32)"]),
        (["kind=edm", "data=images", f"data.source={{{SOURCE},classes:6}}"], ["6"]),
        (["kind=edm", "backbone.blocks=2"], ["missing"]),
        (["kind=edm", "backbone.multipliers=[1,4]"], ["backbone"]),
        (["kind=edm", "second.pt"], ["FILE"]),
        (["kind=edm", "kind.heads=2"], ["kind.heads"]),
        (["kind=x"], ["kind=x", "dit"]),
        ([], ["kind"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_wrong_request_is_refused_and_leaves_nothing(refusal, tmp_path, edm, arguments, named):
    assert_names(refusal("import", edm, *arguments, "output=net"), *named)
    assert {path.name for path in tmp_path.iterdir()} <= {edm, "data"}


@pytest.mark.parametrize("kind", [ADMFiles, DiTFiles])
def test_weights_of_another_kind_are_refused(tmp_path, edm, kind):
    with refused(edm):
        read(kind(), tmp_path / edm)


def test_nothing_is_written_over(refusal, tmp_path, edm):
    (tmp_path / "net").mkdir()
    assert_names(refusal("import", edm, "kind=edm", "output=net"), "output=net")
    assert_names(refusal("import", "missing.pt", "kind=edm", "output=new"), "missing.pt")


@pytest.mark.long
def test_weights_of_another_shape_or_name_are_refused(refusal, tmp_path, lab):
    state = Reference.stored("edm_ddpmpp").state
    name = "model.dec.8x8_in1.conv1.weight"
    wrong = {
        "lacking": {key: value for key, value in state.items() if key != name},
        "more": state | {"model.dec.8x8_in2.conv1.weight": torch.zeros(1)},
        "reshaped": state | {name: torch.zeros(3, 3)},
        "preconditioned": state | {"model.map_layer0.weight": torch.zeros(7)},
    }
    for which, tensors in wrong.items():
        save_file(tensors, tmp_path / f"{which}.safetensors")
        refusal("import", f"{which}.safetensors", "kind=edm", "output=net")
    assert not (tmp_path / "net").exists()


def imported(lab, tmp_path, kind: str, *settings: str):
    """The configuration of a stored network of this kind, imported to net/."""
    save_file(Reference.stored(kind).state, f"{kind}.safetensors")
    lab.done("import", f"{kind}.safetensors", f"kind={kind}", *settings, "output=net")
    return runs.load_config(tmp_path / "net")


def transformer(width: int, **others: torch.Tensor) -> dict[str, torch.Tensor]:
    """The first and last weights of a DiT of this width for latents of 4 x 4, in five classes."""
    return {
        "x_embedder.proj.weight": torch.zeros(width, 4, 2, 2),
        "pos_embed": grid_positions(2, 2, width, sines_first=True)[None],
        "y_embedder.embedding_table.weight": torch.ones(6, width),
        "final_layer.linear.weight": torch.zeros(32, width),
        "final_layer.linear.bias": torch.zeros(32),
        **others,
    }


def test_sit_walks_to_the_end_of_the_path_in_even_steps(lab, tmp_path):
    vae = save_vae(tmp_path / "vae")
    cfg = imported(lab, tmp_path, "sit", "kind.heads=2", f"first_stage.path={vae}")
    levels = instantiate(cfg, "sampler").levels(Rectified())
    torch.testing.assert_close(levels.t, torch.linspace(1, 0, 126, dtype=torch.float64))


@pytest.mark.long
def test_estimates_of_adm_are_clamped_as_in_its_code(lab, tmp_path):
    settings = ["kind.head_channels=16", "denoiser.clip=null"]
    assert imported(lab, tmp_path, "adm", *settings).denoiser.clip is None
    (tmp_path / "net").rename(tmp_path / "free")
    assert imported(lab, tmp_path, "adm", settings[0]).denoiser.clip == 1


@pytest.mark.parametrize(("width", "heads"), [(1152, 16), (384, 6), (1024, 16), (32, 1)])
def test_heads_have_64_channels_but_in_the_size_xl(tmp_path, width, heads):
    save_file(transformer(width), path := tmp_path / "dit.safetensors")
    assert f"backbone.heads={heads}" in DiTFiles().read(path).overrides


def test_all_labels_are_classes_of_a_network_that_dropped_none(tmp_path):
    save_file(transformer(32), path := tmp_path / "dit.safetensors")
    dropped, kept = DiTFiles().read(path), DiTFiles(null_label=False).read(path)
    assert (dropped.num_classes, kept.num_classes) == (5, 6)
    assert kept.tensors[LABELS].shape == (7, 32)
    assert not kept.tensors[LABELS][-1].any()
    assert "objective.label_dropout=0.0" in {*kept.overrides} - {*dropped.overrides}


def test_a_layer_of_a_large_number_is_refused_at_once(tmp_path):
    name = "blocks.2000000000.attn.qkv.weight"
    save_file(transformer(32, **{name: torch.zeros(96, 32)}), path := tmp_path / "dit.safetensors")
    with refused(name):
        DiTFiles().read(path)
