"""diffusion_lab: compare diffusion models on equal terms.

The names below are those that users extend or call; each is imported on first use, so that
`import diffusion_lab` itself costs nothing.
"""

from importlib import import_module

__version__ = "0.2.0"

HOMES = {  # public name -> its module
    "Ancestral": "diffusion_lab.diffusion.sampler",
    "AnnealedLangevin": "diffusion_lab.diffusion.sampler",
    "Backbone": "diffusion_lab.backbone",
    "Block": "diffusion_lab.backbone.block",
    "Condition": "diffusion_lab.backbone.conditioning",
    "Cosine": "diffusion_lab.diffusion.schedule",
    "DataSource": "diffusion_lab.data.source",
    "Denoiser": "diffusion_lab.diffusion.denoiser",
    "DiT": "diffusion_lab.backbone",
    "DPMSolver": "diffusion_lab.diffusion.sampler",
    "EDM2UNet": "diffusion_lab.backbone",
    "Euler": "diffusion_lab.diffusion.sampler",
    "FirstStage": "diffusion_lab.first_stage",
    "Given": "diffusion_lab.diffusion.estimate",
    "Guidance": "diffusion_lab.diffusion.guidance",
    "Heun": "diffusion_lab.diffusion.sampler",
    "ImageDataModule": "diffusion_lab.data.datamodule",
    "Mamba": "diffusion_lab.backbone",
    "Metric": "diffusion_lab.metrics",
    "MLP": "diffusion_lab.backbone",
    "NoiseLevel": "diffusion_lab.diffusion.noise",
    "NoiseSchedule": "diffusion_lab.diffusion.schedule",
    "Objective": "diffusion_lab.diffusion.objective",
    "Pipeline": "diffusion_lab.assembly.pipeline",
    "Prediction": "diffusion_lab.diffusion.objective",
    "Rectified": "diffusion_lab.diffusion.schedule",
    "Sampler": "diffusion_lab.diffusion.sampler",
    "TimeGrid": "diffusion_lab.diffusion.sampler.time_grid",
    "TimeSampler": "diffusion_lab.diffusion.objective",
    "UNet": "diffusion_lab.backbone",
    "VarianceExploding": "diffusion_lab.diffusion.schedule",
    "UniPC": "diffusion_lab.diffusion.sampler",
    "add_noise": "diffusion_lab.diffusion.noise",
    "build": "diffusion_lab.families.diffusion.model",
    "command": "diffusion_lab.cli",
    "image_grid": "diffusion_lab.common.images",
    "jump": "diffusion_lab.diffusion.noise",
    "load": "diffusion_lab.families.diffusion.model",
    "results": "diffusion_lab.report.frame",
}
__all__ = ["__version__", "runs", *HOMES]


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(HOMES[name]), name)
    if name == "runs":
        return import_module("diffusion_lab.runs")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
