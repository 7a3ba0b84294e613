"""Stability of training: gradients that leave their usual size, as at too high a learning rate."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.runs import published

LARGEST, MEAN = "train/grad_norm_max", "train/grad_norm"
# of 162 runs of studies, those whose loss stayed calm had at most 27; from 45 on it rose by 12 %
SPIKE = 40  # times the median
BEGINNING = 0.1  # the share of training that is left out, as all gradients are large in it


def reservations(groups: Sequence[Group]) -> Iterator[str]:
    """Yields a sentence on each group in whose training gradients spiked."""
    for group in groups:
        spikes = [spike for run in group.runs if (spike := largest_spike(run)) >= SPIKE]
        if spikes:
            yield (
                f"Gradients spiked in {len(spikes)} of {len(group.runs)} runs of {group.name}, to "
                f"{max(spikes):.0f} times their median; a lower learning rate may suit it better"
            )


def largest_spike(run: Run) -> float:
    """`spike_in` the rows of a run, before a published run left out some of them."""
    thinned = published.facts_of(run.folder).get(published.THINNED)
    return thinned[published.SPIKE] if thinned else spike_in(run.rows)


def spike_in(rows: Iterable[dict]) -> float:
    """The largest gradient norm in rows of metrics.jsonl by its median; 0 if it is not logged."""
    known = [row for row in rows if {LARGEST, MEAN} <= row.keys()]
    known = known[int(BEGINNING * len(known)) :]
    usual = statistics.median(row[MEAN] for row in known) if known else 0
    return max(row[LARGEST] for row in known) / usual if usual else 0
