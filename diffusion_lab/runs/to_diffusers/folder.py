"""The folder for diffusers: network, scheduler, autoencoder, a loop that samples, a model card."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.assembly.model import Drawable
from diffusion_lab.common.files import write_atomically
from diffusion_lab.common.formats import amount, literal, literal_table, plain
from diffusion_lab.first_stage import FirstStage, HubVAE, Pixels
from diffusion_lab.metrics.quantity import REAL
from diffusion_lab.runs.current import EXPORTED, CurrentWeights
from diffusion_lab.runs.files import LOOP, LOOP_BEGINS
from diffusion_lab.runs.results import Record, evaluations_of
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.runs.to_diffusers.network import network_of
from diffusion_lab.runs.to_diffusers.scheduler import scheduler_of, without_counterpart

FOLDERS = {"UNet2DModel": "unet", "DiTTransformer2DModel": "transformer"}
CALLS = {  # what the loop of each scheduler calls
    "DDIMScheduler": {
        "times": "steps",
        "start": "(1 - scheduler.alphas_cumprod[-1]).sqrt() * noise  # its noisiest level",
        "step": "output, t, x, use_clipped_model_output=True",
        "limit": " `steps` must divide 1000.",
        "clipped": "",  # by the scheduler itself
    },
    "FlowMatchEulerDiscreteScheduler": {
        "times": "sigmas=[1 - i / steps for i in range(steps)]",
        "start": "noise",
        "step": "output, t, x",
        "limit": "",
        "clipped": """\
        sigma = t / 1000  # the image is x - sigma * output
        output = (x - (x - sigma * output).clamp(-$clip, $clip)) / sigma
""",
    },
}
TEXT = Template('''\
$first

from pathlib import Path

import torch
from diffusers import $imports
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import make_image_grid

FOLDER = Path(__file__).parent
model = $network.from_pretrained(FOLDER, subfolder="$folder")
scheduler = $scheduler.from_pretrained(FOLDER, subfolder="scheduler")
$vae$changes

@torch.no_grad()
def sample(noise, labels=None, steps=50):
    """Turns unit noise (B, $shape) into images in [-1, 1].

    $labels.$limit
    """
    scheduler.set_timesteps($times)
    x = $start
    for t in scheduler.timesteps:
        output = model(x, t.expand(len(x)), class_labels=labels).sample[:, :$channels]
$clipped        x = scheduler.step($step).prev_sample
    return $decoded


if __name__ == "__main__":
    images = sample(torch.randn(20, $shape), $chosen)
    make_image_grid(VaeImageProcessor().postprocess(images), rows=2, cols=10).save("samples.png")
''')


@dataclass(frozen=True)
class Diffusers:
    """A model as parts of diffusers; `vae` is the autoencoder of its latents, if it has any.

    `clip` is the largest magnitude of images, if estimates are clamped to it; `changes` is code
    that the network needs once it is loaded, as its config.json cannot say all.
    """

    network: Any
    scheduler: Any
    vae: Any | None
    num_classes: int
    clip: float | None
    changes: str

    def save(self, folder: Path) -> None:
        """Writes the parts, each to a folder of its own, and the loop."""
        self.network.save_pretrained(folder / FOLDERS[type(self.network).__name__])
        self.scheduler.save_pretrained(folder / "scheduler")
        if self.vae is not None:
            self.vae.save_pretrained(folder / "vae")
        write_atomically(folder / LOOP, loop_of(self))


def convert(model: Drawable, cfg: DictConfig, num_classes: int) -> Diffusers:
    """The parts of a model; raises UserError, which names the option, for what cannot be."""
    vae = autoencoder_of(model.first_stage)
    scheduler = scheduler_of(model, cfg)
    network, changes = network_of(model, cfg)
    if not model.denoiser.conditioning.conditional:
        num_classes = 0
    return Diffusers(network, scheduler, vae, num_classes, model.denoiser.clip, changes)


def autoencoder_of(first_stage: FirstStage) -> Any | None:
    """The autoencoder whose config.json scales latents as this first stage; None for pixels."""
    if isinstance(first_stage, Pixels):
        return None
    if not isinstance(first_stage, HubVAE):
        raise without_counterpart(
            f"the first stage {type(first_stage).__name__}",
            "diffusers has no autoencoder with these layers",
        )
    channels, *sides = first_stage.image_shape
    if channels != 3 or any(side % first_stage.factor for side in sides):
        raise without_counterpart(
            "first_stage=hub_vae",
            f"its autoencoder would decode to other shapes than {first_stage.image_shape}",
        )
    for key, value in {"shift": first_stage.shift, "scale": first_stage.scale}.items():
        if isinstance(value, Tensor):
            raise without_counterpart(
                f"this first_stage.{key}", "diffusers has one for all channels of a latent"
            )
    vae, shift = first_stage.network, first_stage.shift or None
    vae.register_to_config(scaling_factor=1 / first_stage.scale, shift_factor=shift)
    return vae


def loop_of(parts: Diffusers) -> str:
    """The text of sample.py."""
    network, vae, classes = parts.network, parts.vae, parts.num_classes
    names = [type(part).__name__ for part in (network, parts.scheduler, vae) if part is not None]
    size, channels = network.config.sample_size, network.config.in_channels
    height, width = (size, size) if isinstance(size, int) else size
    load, decoded = "", "x"
    if vae is not None:
        load = f'vae = {names[2]}.from_pretrained(FOLDER, subfolder="vae")\n'
        decoded = (
            "vae.decode(x / vae.config.scaling_factor + (vae.config.shift_factor or 0)).sample"
        )
    calls = CALLS[names[1]]
    clipped = "" if parts.clip is None else Template(calls["clipped"]).substitute(clip=parts.clip)
    return TEXT.substitute(
        imports=", ".join(sorted(names)),
        network=names[0],
        folder=FOLDERS[names[0]],
        scheduler=names[1],
        vae=load,
        changes=parts.changes,
        first=LOOP_BEGINS,
        shape=f"{channels}, {height}, {width}",
        labels=f"Labels (B,) are 0 to {classes - 1}" if classes else "There are no labels",
        channels=channels,
        **calls | {"clipped": clipped},
        decoded=decoded,
        chosen=f"torch.arange(20) % {classes}" if classes else "None",
    )


HEAD = """\
---
library_name: diffusers
pipeline_tag: unconditional-image-generation
---

# {name}

A diffusion model {origin} diffusion_lab, as parts of diffusers."""
CARD = "README.md"
PLACES = ("root", "path", "test_path")  # settings of data that only say where files are
PARTS = ("backbone", "schedule", "objective", "first_stage")


def card_of(run: Path, cfg: DictConfig, facts: Mapping[str, str], parts: Diffusers) -> str:
    """The card in Markdown of a run; `facts` say which weights of it these are."""
    return "\n\n".join(part.strip() for part in sections(run, cfg, facts, parts)) + "\n"


def sections(
    run: Path, cfg: DictConfig, facts: Mapping[str, str], parts: Diffusers
) -> Iterator[str]:
    """Yields headings, paragraphs, tables and code."""
    network, scheduler = type(parts.network).__name__, type(parts.scheduler).__name__
    origin = "imported into" if "imported" in facts else "trained with"
    yield HEAD.format(name=literal(cfg.name), origin=origin)
    yield literal_table(["", ""], model_rows(run, cfg, facts, parts))
    yield "## How to load it"
    if parts.changes:
        yield f"""```python
from {LOOP.removesuffix(".py")} import model, scheduler
```"""
        yield (
            f"The network's `config.json` cannot say all: `{LOOP}` sets the rest, and "
            f"`{network}.from_pretrained` without it answers otherwise."
        )
    else:
        yield f"""```python
from diffusers import {network}, {scheduler}

model = {network}.from_pretrained(FOLDER, subfolder="{FOLDERS[network]}")
scheduler = {scheduler}.from_pretrained(FOLDER, subfolder="scheduler")
```"""
    yield f"`{LOOP}` draws samples with them. {same(parts)}"
    yield "## Data"
    yield literal_table(["", ""], data_rows(run, cfg))
    yield "## Figures"
    last, average = load_summary(run).steps or facts.get("step"), facts.get("average", "evaluated")
    if (run / EXPORTED).is_file():  # its records name no average, as it has no others
        average = "evaluated"
    newest = str(last) == str(facts.get("step"))
    found = evaluations_of(run, cfg.seed, CurrentWeights(run)) if newest else []
    found = [each for each in found if each["sampling"].get("average", "evaluated") == average]
    if not found:
        yield "The run keeps no figures of these weights."
    for each in found:
        yield from figures(each)


def same(parts: Diffusers) -> str:
    """The sentence on which samples of diffusion_lab the loop draws."""
    name = type(parts.scheduler).__name__
    flow = name.startswith("FlowMatch")
    sampler = "euler" if flow else "ddim"
    clamped = f"It clamps estimates of the image, as `{name}` does not. "
    return (clamped if flow and parts.clip is not None else "") + (
        f"From the same noise they are those of `diffusion-lab sample run=RUN sampler={sampler} "
        "sampler.steps=50 sampler.time_grid.sigma_min=0 guidance=none precision=32-true`, up "
        "to rounding."
    )


def model_rows(
    run: Path, cfg: DictConfig, facts: Mapping[str, str], parts: Diffusers
) -> Iterator[tuple[str, object]]:
    """Yields what the model is, and how it was trained."""
    count = sum(parameter.numel() for parameter in parts.network.parameters())
    yield "network", f"{type(parts.network).__name__}, {amount(count)} parameters"
    yield "classes", parts.num_classes or "none"
    for part in PARTS:
        yield part, cfg[part]["_target_"].rpartition(".")[2]
    yield "prediction", parts.scheduler.config.get("prediction_type", "velocity")
    summary = load_summary(run)
    known = vars(summary) | {"steps": summary.steps or None, "seed": cfg.get("seed")}
    for key in ("images_seen", "steps", "seed", "training_seconds", "device", "git_commit"):
        if (value := known[key]) is not None:
            yield key, f"{value:,}" if isinstance(value, int) else value
    yield from ((f"weights: {key}", value) for key, value in facts.items())


def data_rows(run: Path, cfg: DictConfig) -> Iterator[tuple[str, object]]:
    """Yields the settings of the data, and how many images were trained on."""
    settings = OmegaConf.to_container(cfg.data, resolve=True)
    for key, value in flat(settings).items():
        if key.rpartition(".")[2] not in PLACES:
            yield key, words(value)
    summary = load_summary(run)
    for key in ("training_images", "validation_images"):
        if (count := getattr(summary, key)) is not None:
            yield key, f"{count:,}"


def figures(record: Record) -> Iterator[str]:
    """Yields the metrics of an evaluation and its protocol, each beside that of real images."""
    metrics = record["metrics"]
    rows = []
    for name, value in metrics.items():
        kind, slash, protocol = name.partition("/")
        if kind.endswith(REAL) or "_by_level" in kind:
            continue
        real = metrics.get(f"{kind}{REAL}{slash}{protocol}")
        rows.append([name, plain(value), "" if real is None else plain(real)])
    yield literal_table(["metric", "samples", "real images"], rows)
    yield "Protocol, and how these samples were drawn:"
    yield literal_table(
        ["", ""],
        ((key, words(each)) for key, each in flat(record["protocol"] | record["sampling"]).items()),
    )


def words(value: object) -> str:
    """A plain value as in a configuration, without quotes around words."""
    return json.dumps(value).strip('"')
