"""Stability of training: gradients that leave their usual size, as at too high a learning rate."""

from collections.abc import Iterator, Sequence

from diffusion_lab.analysis.comparison.groups import Group

# of 162 runs of studies, those whose loss stayed calm had at most 27; from 45 on it rose by 12 %
SPIKE = 40  # times the median


def reservations(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on each group in whose training gradients spiked."""
    for group in groups:
        spikes = [spike for run in group.runs if (spike := run.gradient_spike) >= SPIKE]
        if spikes:
            yield (
                f"Gradients spiked in {len(spikes)} of {len(group.runs)} runs of {group.name}, to "
                f"{max(spikes):.0f} times their median; a lower learning rate may suit it better"
            )
