"""What configurations cost, counted or timed against a reference."""

from omegaconf import DictConfig

from diffusion_lab.backbone import counting
from diffusion_lab.common.formats import amount
from diffusion_lab.common.progress import say
from diffusion_lab.profiling.costs import costs_of, image_facts, model_on, place
from diffusion_lab.profiling.timing import Bench, median_seconds

CONFIRMATIONS = 3  # measurements of the time that was found


class Costs:
    """Parameters, MACs and step times; a time is taken in turns with the reference."""

    def __init__(self, cfg: DictConfig, reference: DictConfig):
        self.facts = image_facts(cfg)
        self.device, self.precision = place(cfg)
        self.bench = None
        for each in (cfg, reference):
            model_on("meta", each, self.facts)  # to hear now what it has to say
        if cfg.by == "step_time":
            self.bench = self.prepare(reference)
            (self.seconds,) = median_seconds([self.bench.train], self.device, cfg.timed_steps)

    def prepare(self, cfg: DictConfig) -> Bench:
        """A model that is ready to be timed."""
        bench = Bench(cfg, *self.facts, self.device, self.precision)
        bench.compile(cfg.compile)
        return bench

    def params(self, cfg: DictConfig) -> int:
        """Parameters."""
        model, _ = model_on("meta", cfg, self.facts)
        return sum(parameter.numel() for parameter in model.denoiser.parameters())

    def macs(self, cfg: DictConfig) -> int:
        """Multiply-accumulates of a network call on one image."""
        costs, _ = costs_of(cfg, self.facts)
        return counting.total(costs).macs

    def figures(self, cfg: DictConfig) -> dict[str, float]:
        """What is worth knowing of both sides, whatever is to agree."""
        macs = self.macs(cfg)
        return {"params": self.params(cfg), "macs": macs, "flops": 2 * macs}

    def step_time(self, cfg: DictConfig) -> float:
        """Seconds of a training step, if the reference took what it did at first."""
        steps = [self.bench.train, self.prepare(cfg).train]
        theirs, ours = median_seconds(steps, self.device, cfg.timed_steps)
        say(f"backbone of {amount(self.params(cfg))} parameters: {ours / theirs:.3f} of the time")
        return ours / theirs * self.seconds

    def confirm(self, cfg: DictConfig) -> list[float]:
        """Times of a configuration by the reference's, measured anew, from the lowest."""
        bench = self.prepare(cfg)
        ratios = []
        for _ in range(CONFIRMATIONS):
            theirs, ours = median_seconds(
                [self.bench.train, bench.train], self.device, cfg.timed_steps
            )
            ratios.append(ours / theirs)
        return sorted(ratios)
