"""Trained runs from which another run learns: they draw its pairs, or are asked as it trains."""

from dataclasses import dataclass

import torch
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from diffusion_lab.assembly import rules
from diffusion_lab.assembly.costs import ImageFacts, counted, sampling_calls
from diffusion_lab.assembly.model import Model
from diffusion_lab.assembly.objects import build_pipeline
from diffusion_lab.assembly.pipeline import Pipeline
from diffusion_lab.assembly.pipeline.diffusion import PAIRS
from diffusion_lab.common.messages import UserError, progress_bar, say
from diffusion_lab.compute.distributed import cached, gather_shards, own_batches
from diffusion_lab.data import EncodedImages, ImageData, PairBatch
from diffusion_lab.diffusion.guidance import Guidance
from diffusion_lab.diffusion.objective import TeacherModel, TeacherPairs
from diffusion_lab.families.diffusion.initial_weights import starts_anew
from diffusion_lab.families.diffusion.run import load, load_weak, require_same_space
from diffusion_lab.runs.current import sha256_of
from diffusion_lab.runs.opened import load_diffusion_config
from diffusion_lab.runs.summary import load_summary

BATCH = 250  # samples that are drawn at once


@dataclass(frozen=True)
class Teacher:
    """An opened teacher, and what is asked of it."""

    settings: TeacherPairs | TeacherModel
    sha256: str
    cfg: DictConfig  # the teacher's, with the sampler and guidance that are used
    pipeline: Pipeline

    @classmethod
    def opened(cls, student: Model, data: ImageData, cfg: DictConfig) -> "Teacher | None":
        """Opens the teacher of a run with the configuration `cfg`; None if it has none.

        Raises UserError if it is missing, is not the one of a resumed run, or does not fit.
        """
        settings = student.objective.teacher
        if settings is None:
            return None
        name = f"objective.teacher.run={settings.run}"
        try:
            theirs, sha256 = load_diffusion_config(settings.run), sha256_of(settings.run)
        except UserError as error:
            raise UserError(f"{name} cannot teach: {error}") from error
        if settings.sha256 is not None and settings.sha256 != sha256:
            raise UserError(
                f"{name} has other weights than this run was trained with: their sha256 begins "
                f"with {sha256[:12]}, not with {settings.sha256[:12]}; restore them"
            )
        parts = (key for key in ("fraction", "per_class") if cfg.data.get(key) is not None)
        rules.check(teacher=settings, part=next(parts, None))
        if theirs.guidance.get("classifier"):
            raise UserError(
                f"{name} is guided by a classifier, which no student can ask; give a run that "
                "samples with another guidance"
            )
        own, model = load(settings.run, theirs)
        require_same_space(name, model, student)
        same_levels = theirs.schedule == cfg.schedule
        rules.check(teacher=settings, its_loss=model.loss, same_levels=same_levels)
        set_as_asked(theirs, settings)
        weak = load_weak(theirs.guidance.get("weak_run"), theirs, model)
        pipeline = build_pipeline(theirs, model, own.labels, weak)
        rules.check(teacher=settings, its_guidance=pipeline.guidance)
        return cls(settings, sha256, theirs, pipeline)

    def prepare(self, device: torch.device) -> EncodedImages | None:
        """Returns the pairs that are trained on, if any, and lets the student ask the model."""
        if self.settings.asked:
            self.answer(self.settings, device)
            return None
        self.pipeline.denoiser.to(device)
        return self.pairs(self.settings)

    def answer(self, asked: TeacherModel, device: torch.device) -> None:
        """Lets a student ask the model on a device."""
        self.pipeline.denoiser.to(device).requires_grad_(False)
        asked.open(self.pipeline.bound)

    def pairs(self, chosen: TeacherPairs) -> EncodedImages:
        """Draws the pairs, or takes them from the cache: sample and noise along the channels."""
        key = {
            "teacher": self.sha256,
            "sampler": OmegaConf.to_container(self.cfg.sampler),
            "guidance": OmegaConf.to_container(self.cfg.guidance),
            "weak": sha256_of(weak) if (weak := self.cfg.guidance.get("weak_run")) else None,
            "pairs": [chosen.count, chosen.seed, PAIRS],
        }
        found = cached(chosen.cache_dir, f"pairs-{chosen.count}", key, lambda: self.drawn(chosen))
        return EncodedImages(found["pairs"], labels=found["labels"], batch_type=PairBatch)

    def drawn(self, chosen: TeacherPairs) -> dict[str, Tensor]:
        """Draws all pairs (N, 2c, h, w), and their labels (N,)."""
        count = chosen.count
        say(f"Drawing {count:,} pairs from {chosen.run} once, to be cached in {chosen.cache_dir}")
        parts = own_batches(count, BATCH)
        pairs = []
        with progress_bar("Drawing pairs", len(parts) * self.pipeline.steps) as advance:
            for ids in parts:
                pairs.append(self.pipeline.pairs(ids, chosen.seed, advance).cpu())
        labels = self.pipeline.labels(range(count))
        unlabelled = torch.zeros(count, dtype=torch.int64)
        drawn = gather_shards(pairs)
        return {"pairs": drawn, "labels": unlabelled if labels is None else labels}

    def costs(self, data: ImageData, images_seen: int) -> dict[str, object]:
        """Entries of the summary of a student that has seen so many images."""
        summary = load_summary(self.settings.run)
        facts, calls, macs = ImageFacts(data.image_shape, data.labels), None, None
        try:
            macs = counted(self.cfg, facts).macs
            if self.settings.asked:
                calls = images_seen * heun_calls(self.pipeline.guidance)
            elif each := sampling_calls(self.cfg, facts):
                calls = each * self.settings.count
        except Exception as error:  # a custom network's, or two networks: the run is not lost
            say(f"The calls of {self.settings.run} could not be counted: {error}")
        return {
            "teacher_images": summary.images_behind(starts_anew(self.cfg)),
            "teacher_calls": calls,
            "teacher_macs": macs,
        }


def set_as_asked(theirs: DictConfig, settings: TeacherPairs | TeacherModel) -> None:
    """Puts the steps and the scale that a student asks for into its teacher's configuration."""
    with open_dict(theirs):
        if not settings.asked and settings.steps is not None:
            theirs.sampler.steps = settings.steps
        if settings.scale is not None:
            theirs.guidance.scale = settings.scale


def heun_calls(guidance: Guidance) -> int:
    """The calls of a teacher for an image: Heun's two, each perhaps with labels and without."""
    return 4 if guidance.uses_strong and guidance.uses_weak else 2
