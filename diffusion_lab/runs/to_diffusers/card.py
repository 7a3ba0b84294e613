"""The model card of an export to diffusers: what it is, how to load it, and its figures."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from diffusion_lab.build.config_keys import flat
from diffusion_lab.common.formats import amount, literal, literal_table, plain
from diffusion_lab.metrics.quantity import REAL
from diffusion_lab.runs.current import CurrentWeights
from diffusion_lab.runs.results import evaluations_of
from diffusion_lab.runs.samplings import Record
from diffusion_lab.runs.summary import load_summary
from diffusion_lab.runs.to_diffusers.folder import FOLDERS, LOOP, Diffusers

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
    """The card in Markdown of the run with the configuration `cfg`.

    `facts` say which weights of the run these are.
    """
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
    yield f"""```python
from diffusers import {network}, {scheduler}

model = {network}.from_pretrained(FOLDER, subfolder="{FOLDERS[network]}")
scheduler = {scheduler}.from_pretrained(FOLDER, subfolder="scheduler")
```"""
    yield f"`{LOOP}` draws samples with them. {same(parts)}"
    yield "## Data"
    yield literal_table(["", ""], data_rows(run, cfg))
    yield "## Figures"
    found = evaluations_of(run, cfg.seed, CurrentWeights(run)) if is_newest(run, facts) else []
    found = [each for each in found if of_these(each, facts)]
    if not found:
        yield "The run keeps no figures of these weights."
    for each in found:
        yield from figures(each)


def same(parts: Diffusers) -> str:
    """The sentence on which samples of diffusion_lab the loop draws."""
    name = type(parts.scheduler).__name__
    sampler = "euler" if name.startswith("FlowMatch") else "ddim"
    return (
        f"From the same noise they are those of `diffusion-lab sample run=RUN sampler={sampler} "
        "sampler.steps=50 sampler.time_grid.sigma_min=0 guidance=none`, up to rounding."
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
    known = summary.to_json() | {"steps": summary.steps or None, "seed": cfg.get("seed")}
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


def is_newest(run: Path, facts: Mapping[str, str]) -> bool:
    """Whether weights are of the run's last step, to which its figures belong."""
    return str(load_summary(run).steps or facts.get("step")) == str(facts.get("step"))


def of_these(record: Record, facts: Mapping[str, str]) -> bool:
    """Whether an evaluation is of the average that was exported."""
    average = record["sampling"].get("average", "evaluated")
    return average == facts.get("average", "evaluated")


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
