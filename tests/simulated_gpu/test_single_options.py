"""Each option by itself trains and draws on a simulated GPU, which refuses mixed devices."""

from pathlib import Path
from shutil import copytree

import pytest
from helpers.gpu import only_simulated
from helpers.paths import CONF
from helpers.tiny_runs import PLAIN, QUICK, tiny_classifier

pytestmark = only_simulated
DIT = ["backbone.width=32", "backbone.heads=2", "backbone.depth=1", "backbone.patch=4"]
UNET = ["backbone.channels=32"]
NEEDED = {  # what an option needs, or what makes it small
    "objective=ddpm": ["schedule=ddpm_linear"],
    "objective=improved_ddpm": ["schedule=ddpm_linear"],
    "objective=edm": ["schedule=edm"],
    "objective=ect": ["schedule=edm"],
    "objective=v_prediction": ["schedule=cosine"],
    "objective=scm": ["schedule=cosine"],
    "objective=score_matching": ["schedule=ve"],
    "objective=reflow": [
        *("objective.teacher.run=run", "objective.teacher.count=16"),
        *("objective.teacher.steps=2", "objective.teacher.cache_dir=pairs"),
    ],
    "objective=consistency_distillation": ["objective.teacher.run=run", "init_from=run"],
    "sampler=annealed_langevin": ["schedule=ve", "objective=edm", "sampler.steps=3"],
    "sampler=flow_map": ["objective=mean_flow"],
    "sampler=few_step": ["objective=ect", "schedule=edm"],
    "sampler=restart": ["sampler.steps=18"],
    "sampler=runge_kutta": ["sampler.tolerance=0.1"],
    "sampler/time_grid=explicit": ["sampler.time_grid.times=[1,0.5]", "sampler.steps=2"],
    "guidance=autoguidance": ["guidance.weak_run=run"],
    "guidance=classifier": ["guidance.classifier=classifier.safetensors"],
    "guidance=embedded": ["objective=improved_mean_flow", "objective.loss.guidance=8"],
    "guidance=cfg_plus_plus": ["sampler=ddim", "sampler.steps=3"],
    "optimizer=any": ["optimizer._target_=torch.optim.SGD", "optimizer.lr=0.1"],
    **{
        f"sampler/time_grid={name}": ["schedule=ddpm_linear", "objective=ddpm"]
        for name in ("leading", "linspace", "quadratic", "trailing")
    },
    "backbone=unet_adm": ["backbone.channels=64"],
    "backbone=diffusers_dit": DIT,
    "backbone=diffusers_unet": UNET,
    "backbone=mamba": ["backbone.width=32", "backbone.depth=1", "backbone.patch=4"],
    "backbone=mamba2": ["backbone.width=64", "backbone.depth=1", "backbone.patch=4"],
    "backbone=mamba2_modern": ["backbone.width=64", "backbone.depth=1", "backbone.patch=4"],
    "backbone=energy": ["backbone@backbone.network=unet_small"],
    **{f"backbone={name}": DIT for name in ("dit", "dit_modern", "dit_smooth")},
    **{
        f"backbone=unet{name}": UNET
        for name in ("", "_ddpm", "_ddpmpp", "_ncsnpp", "_one_head", "_small")
    },
}
LARGE = ("dit_s_", "dit_b_", "dit_l_", "dit_xl_", "mamba_", "edm2_")  # sizes of another
OTHER = ("diffusers_model",)  # downloads


def options(group: str) -> list[str]:
    """The options of diffusion models in a group."""
    found = (path for path in (CONF / group).glob("*.yaml") if "family=" not in path.read_text())
    names = sorted(path.stem for path in found)
    return [f"{group}={name}" for name in names if not name.startswith(LARGE + OTHER)]


TRAINED = [
    *options("backbone"),
    *options("backbone/block"),
    *options("objective"),
    *options("objective/time_sampler"),
    *options("objective/loss/weighting"),
    *options("optimizer"),
    *(f"{option} objective=v_prediction" for option in options("schedule")),
    *(f"trainer.precision={name}" for name in ("32-true", "bf16-mixed", "16-mixed")),
    "backbone.depth=3 backbone.routed=0.5 backbone.positions=rotary",
    *("micro_batch_size=4", "micro_batch_size=4 trainer.precision=16-mixed"),
    *("activation_checkpointing=true", "denoiser.self_conditioning=true"),
    *("augmentation=non_leaky", "coupling=optimal_transport", "alignment=efficientnet_lite0"),
    *("callbacks.statistics.every_n_steps=1 micro_batch_size=4",),
    *("callbacks.posthoc_ema.snapshots=2", "data.on_device=false", "data.flip=true"),
    *("sampler=annealed_langevin", "sampler=flow_map", "sampler=few_step", "guidance=embedded"),
    *(f"sampler/time_grid={name}" for name in ("leading", "linspace", "quadratic", "trailing")),
]
DRAWN = [
    each
    for group in ("sampler", "sampler/time_grid", "guidance")
    for each in options(group)
    if each not in TRAINED
]


@pytest.fixture
def folder(lab, trained_once, tmp_path) -> Path:
    """The folder of `lab`, with a trained run and a classifier."""
    copytree(trained_once("train", *QUICK, "run_dir=run"), tmp_path, dirs_exist_ok=True)
    tiny_classifier(tmp_path / "classifier.safetensors")
    return tmp_path


@pytest.mark.parametrize("options", TRAINED)
def test_it_trains_and_draws(lab, folder, options):
    chosen = options.split()
    network = [] if options.startswith("backbone=") else ["backbone=dit", *DIT]
    common = ["callbacks.evaluation=null", "trainer.max_steps=2", "run_dir=new"]
    more = [each for option in chosen for each in NEEDED.get(option, [])]
    lab.done("train", *PLAIN, *network, *common, *chosen, *more)


@pytest.mark.parametrize("option", DRAWN)
def test_it_draws(lab, folder, option):
    sample = ["run=run", "num_samples=2", "output=drawn"]
    lab.done("sample", *sample, option, *NEEDED.get(option, ["sampler.steps=3"]))
    assert Path("drawn.png").is_file()
