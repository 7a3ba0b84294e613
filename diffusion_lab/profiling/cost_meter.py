"""The cost of configurations in one unit, counted, or timed against a reference."""

from omegaconf import DictConfig

from diffusion_lab.common.formats import amount
from diffusion_lab.common.progress import say
from diffusion_lab.profiling.costs import cost_of, image_facts, model_on
from diffusion_lab.profiling.timing import Bench, device_and_precision, median_seconds

UNITS = ("params", "macs", "step_time")
CONFIRMATIONS = 3  # measurements of the time that was found


class CostMeter:
    """Measures configurations in the unit `cfg.by`, and the `target`, which a reference costs.

    A step is timed in turns with one of the reference. Raises UserError for what cannot be built.
    """

    def __init__(self, cfg: DictConfig, reference: DictConfig):
        self.by = cfg.by
        self.facts = image_facts(cfg)
        self.device, self.precision = device_and_precision(cfg)
        self.timed_steps = cfg.timed_steps
        for each in (cfg, reference):
            model_on("meta", each, self.facts)  # the search takes what is refused for a wrong size
        self.bench = self.prepare(reference) if cfg.by == "step_time" else None
        self.target = self.seconds(self.bench)[0] if self.bench else self.cost(reference)

    def cost(self, cfg: DictConfig) -> float:
        """What a configuration costs."""
        if self.bench is not None:
            ratio = self.ratio(self.bench, self.prepare(cfg))
            say(f"backbone of {amount(self.params(cfg))} parameters: {ratio:.3f} of the time")
            return ratio * self.target
        return self.params(cfg) if self.by == "params" else cost_of(cfg, self.facts).macs

    def params(self, cfg: DictConfig) -> int:
        """The number of parameters."""
        model, _ = model_on("meta", cfg, self.facts)
        return sum(parameter.numel() for parameter in model.denoiser.parameters())

    def summary(self, cfg: DictConfig) -> dict[str, float]:
        """What is worth knowing of both sides, whatever is to agree."""
        macs = cost_of(cfg, self.facts).macs
        return {"params": self.params(cfg), "macs": macs, "flops": 2 * macs}

    def confirm(self, cfg: DictConfig) -> tuple[float, float, float]:
        """The lowest, the median and the highest time by the reference's, measured anew."""
        assert self.bench is not None, "what is counted needs no confirmation"
        bench = self.prepare(cfg)
        low, *_, high = ratios = sorted(self.ratio(self.bench, bench) for _ in range(CONFIRMATIONS))
        return low, ratios[CONFIRMATIONS // 2], high

    def prepare(self, cfg: DictConfig) -> Bench:
        """A model that is ready to be timed."""
        bench = Bench(cfg, *self.facts, self.device, self.precision)
        bench.compile(cfg.compile)
        return bench

    def seconds(self, *benches: Bench) -> list[float]:
        """The median seconds of a training step of each, taken in turns."""
        return median_seconds([each.train for each in benches], self.device, self.timed_steps)

    def ratio(self, reference: Bench, bench: Bench) -> float:
        """The time of a step by that of the reference."""
        theirs, ours = self.seconds(reference, bench)
        return ours / theirs
