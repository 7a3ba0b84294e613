"""The studies of conf/study at a tiny size, by keys of the command line alone."""

TINY = [  # of all studies
    "data.source._target_=helpers.tiny_data.TinyData",
    "data.validation_size=20",
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=1",
    "logger=none",
    "batch_size=8",
    "metrics.num_samples=8",
    "metrics.reference_size=16",
    "common.callbacks.sample_grid=null",
    "common.callbacks.evaluation.also_steps=null",
    "seeds=0",
    "stages.classifier.train-extractor.epochs=1",
    "jobs=2",
]


FIRST_STAGE = [
    "batch_size=8",
    "autoencoder.channels=8",
    "autoencoder.multipliers=[1,2]",
    "metrics.num_samples=8",
    "metrics.reference_size=16",
    "callbacks.sample_grid=null",
]


def each(stages: list[str], *settings: str) -> list[str]:
    return [f"stages.{stage}.{setting}" for stage in stages for setting in settings]


def tuned(*stages: str, length: str, command: str = "train") -> list[str]:
    rates = f"{command}.optimizer.lr=[2e-3,4e-3]"
    return each([*stages], rates, "grow=0", "num_samples=8", length)


STUDIES = {
    "unet_vs_dit": [
        "sampler.steps=1",
        "arms=U-Net,DiT,DiT on patches of 2 x 2,U-Net at half its rate",
        "budget.images=16",
        *tuned("tune", "tune patches", length="images=8"),
        "stages.seconds.seconds=1",
    ],
    "few_steps": [
        "common.sampler.steps=1",
        "arms.Teacher.sampler.steps=1",
        "budget.flops=400_000_000",
        "arms.Teacher.callbacks.evaluation.also_steps=null",
        "arms.Reflow.objective.teacher.count=8",
        "arms.Reflow.objective.teacher.steps=2",
        "arms.Consistency tuning.objective.loss.stage_images=4",
        "stages.tune ect.train.objective.loss.stage_images=4",
        *tuned("tune", length="share=0.25"),
        *tuned("tune ect", "tune distillation", length="share=0.125"),
        *tuned("tune reflow", length="images=8"),
    ],
    "families": [
        *(f"arms.Diffusion {where}.sampler.steps=1" for where in ("on pixels", "in latents")),
        "arms.Diffusion on pixels.backbone.channels=8",
        "arms.Diffusion in latents.backbone.channels=8",
        "arms.Diffusion in latents.backbone.stage.head_channels=null",
        "arms.Autoregressive.backbone.width=16",
        "arms.GAN.backbone.channels=8",
        "arms.GAN.backbone.multipliers=[1,2]",
        *(f"arms.VAE.{setting}" for setting in FIRST_STAGE),
        *each(["kl", "vq"], *(f"train-autoencoder.{setting}" for setting in FIRST_STAGE)),
        *each(["kl", "vq", "VAE"], "seconds=1"),
        *tuned("tune pixels", "tune latents", "tune codes", length="seconds=1"),
        *tuned("tune VAE", length="seconds=1", command="train-autoencoder"),
        *each(["pixels", "latents", "codes"], "seconds=1"),
    ],
    "low_data": [
        "sampler.steps=1",
        "arms=DiT",
        "budget.images=16",
        "axes.data.0.1 %.data.fraction=0.25",
        "axes.data.1 %.data.fraction=0.5",
        "axes.data.10 %.data.fraction=0.75",
        *tuned("tune", length="images=8"),
        *each(
            ["copies", "copies of all"],
            "memorization.num_samples=8",
            "memorization.control_images=8",
        ),
    ],
    "latent": [
        "sampler.steps=1",
        *each(["kl"], *(f"train-autoencoder.{setting}" for setting in FIRST_STAGE), "seconds=1"),
        "axes.time.300 s.budget.seconds=1",
        "axes.time.600 s.budget.seconds=1",
        *tuned("tune pixels", "tune latents", length="seconds=1"),
    ],
    "scaling": [
        "sampler.steps=1",
        "arms=DiT",
        "budget.tolerance=0.5",
        "axes.images.20k images.budget.images=8",
        "axes.images.40k images.budget.images=16",
        "axes.images.80k images.budget.images=32",
        *tuned("tune", length="images=8"),
    ],
}
