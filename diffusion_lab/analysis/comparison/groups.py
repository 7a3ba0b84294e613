"""Runs of one composition, seeds apart."""

import json
import math
import statistics
from dataclasses import dataclass
from functools import cached_property

from diffusion_lab.analysis.comparison.candidates import Run
from diffusion_lab.analysis.comparison.labels import names_of, varying
from diffusion_lab.build.config_keys import DATA_SIZE, Settings


@dataclass(frozen=True)
class Member:
    """A run, its settings, and its figures by the kinds that a comparison has: "fid", "kid", ..."""

    run: Run
    settings: Settings
    figures: dict[str, float]


@dataclass(frozen=True)
class Group:
    """The runs of one composition, by seed; `settings` are those that differ between groups."""

    name: str
    settings: Settings
    members: tuple[Member, ...]
    look: int = 0  # the place of its colour and mark

    @cached_property
    def by_seed(self) -> dict[int, Member]:
        return {member.run.seed: member for member in self.members}

    def figures(self, kind: str) -> dict[int, float]:
        """The finite figures of a kind, by seed."""
        found = ((seed, member.figures.get(kind)) for seed, member in self.by_seed.items())
        return {seed: value for seed, value in found if value is not None and math.isfinite(value)}

    def values(self, kind: str) -> list[float]:
        """The finite figures of a kind."""
        return list(self.figures(kind).values())

    def mean(self, kind: str) -> float:
        """The mean over the seeds, of which some must have a value."""
        return statistics.mean(self.values(kind))

    @property
    def jackknife(self) -> float | None:
        """The standard deviation of the only seed's FID over its samples, if there is one seed."""
        return self.members[0].figures.get("fid_std") if len(self.members) == 1 else None

    @property
    def apart_from_data(self) -> str:
        """The settings that tell it from others, but for the part of the data, as one word."""
        rest = {key: value for key, value in self.settings.items() if key not in DATA_SIZE}
        return json.dumps(rest, sort_keys=True)

    @property
    def data_size(self) -> tuple[object, ...]:
        """Which part of the data was trained on."""
        settings = self.members[0].settings
        return tuple(settings.get(key) for key in DATA_SIZE)


def grouped(members: list[Member]) -> tuple[list[Group], list[str]]:
    """Groups by settings, and a sentence on each run that a later one repeats.

    A group is named by the fewest settings that tell it from the others, classes first.
    """
    by_composition: dict[str, dict[int, Member]] = {}
    left_out = []
    for member in members:
        key = json.dumps(member.settings, sort_keys=True)
        seeds = by_composition.setdefault(key, {})
        if (other := seeds.get(member.run.seed)) is not None:
            older, newer = sorted((other, member), key=lambda each: each.run.finished_at)
            left_out.append(
                f"{older.run.folder} is left out: {newer.run.folder}, which finished later, has "
                "the same composition and the same seed"
            )
            member = newer
        seeds[member.run.seed] = member
    groups = list(by_composition.values())
    settings = [next(iter(seeds.values())).settings for seeds in groups]
    keys = varying(settings)
    names = names_of(settings, keys)
    return [
        Group(
            name,
            {key: own.get(key) for key in keys},
            tuple(seeds[seed] for seed in sorted(seeds)),
        )
        for name, own, seeds in zip(names, settings, groups, strict=True)
    ], left_out
