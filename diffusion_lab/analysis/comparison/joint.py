"""A joint model of all compositions and seeds, beside the tests of pairs."""

from dataclasses import dataclass

import numpy as np
from scipy import stats

from diffusion_lab.analysis.comparison.groups import LEVEL
from diffusion_lab.analysis.comparison.pairs import DataSize
from diffusion_lab.metrics import Quantity


@dataclass(frozen=True)
class Joint:
    """A two-way model, value = composition + seed + noise, of compositions with common seeds.

    The noise is pooled over all compositions, which the tests of pairs do not do, so it has more
    degrees of freedom, and assumes that all compositions vary alike.
    """

    metric: Quantity
    size: str  # the label of the DataSize
    compositions: int
    seeds: int
    p: float  # of the F-test that all compositions are equal
    half_width: float  # of the 95 % interval of a gap between two compositions, uncorrected

    def __str__(self) -> str:
        at = f"At {self.size}: " if self.size else ""
        return (
            f"{at}Joint model of {self.compositions} compositions and {self.seeds} seeds: equal "
            f"{self.metric.title} has p = {self.p:.2g}, and each gap ± "
            f"{self.metric.gap(self.half_width)} (95 %)"
        )


def joint_model(size: DataSize, metric: Quantity) -> Joint | None:
    """Fits the model to at least three compositions over their common seeds, at least two.

    Returns None for fewer, and if the noise is 0.
    """
    by_seed = [group.by_seed(metric.name) for group in size.groups]
    seeds = sorted(set.intersection(*map(set, by_seed)))
    if len(by_seed) < 3 or len(seeds) < 2:
        return None
    values = np.array([[each[seed] for seed in seeds] for each in by_seed])  # (k, n)
    k, n = values.shape
    rows, columns = values.mean(1, keepdims=True), values.mean(0, keepdims=True)
    noise = ((values - rows - columns + values.mean()) ** 2).sum() / ((k - 1) * (n - 1))
    if noise <= 1e-18 * np.square(values).max():
        return None
    between = n * ((rows - values.mean()) ** 2).sum() / (k - 1)
    degrees = (k - 1) * (n - 1)
    width = stats.t.isf(LEVEL / 2, degrees) * np.sqrt(2 * noise / n)
    p = stats.f.sf(between / noise, k - 1, degrees)
    return Joint(metric, size.label, k, n, float(p), float(width))
