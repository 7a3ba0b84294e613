"""Series of sizes: one network in several sizes, trained on several numbers of images."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from omegaconf import OmegaConf

from diffusion_lab.analysis.comparison import curves
from diffusion_lab.analysis.comparison.fairness import EQUAL_COST
from diffusion_lab.analysis.comparison.groups import Group
from diffusion_lab.analysis.comparison.names import ALL, names_of, varying
from diffusion_lab.build.config_keys import CLASS, Settings

NETWORK = "backbone."
LENGTH = ("trainer.max_steps", "trainer.max_time")  # a budget of images sets the steps
FOLLOWS = {"optimizer.vector_lr": "optimizer.lr"}  # a key that takes the value of another
COSTS, POINTS, SIZES = 3, 4, 2  # the fewest of a series: amounts of FLOPs, members, sizes


@dataclass(frozen=True)
class Member:
    """A composition of a series: its size in words, MACs per image, images seen and FLOPs."""

    group: Group
    size: str
    macs: float
    images: float
    flops: float


@dataclass(frozen=True)
class SizeSeries:
    """A network in several sizes and budgets; `members` are sorted by MACs, then by images."""

    name: str
    look: int
    members: tuple[Member, ...]

    @cached_property
    def sizes(self) -> list[str]:
        """The names of the sizes, from the smallest to the largest."""
        return list(dict.fromkeys(member.size for member in self.members))


def size_series(groups: Sequence[Group]) -> list[SizeSeries]:
    """Finds groups that differ in numbers below `backbone.`, tuned values and length alone.

    Texts, switches and classes below `backbone.` are no sizes. A series has at least 3 amounts of
    training FLOPs, 4 members, 2 sizes and 2 numbers of images.
    """
    alike: dict[str, list[Group]] = {}
    for group in groups:
        if group.values("macs"):
            alike.setdefault(json.dumps(_fixed(group), sort_keys=True), []).append(group)
    found = [members for own in alike.values() if (members := _members(own))]
    fixed = [_fixed(members[0].group) for members in found]
    names = [
        str(members[0].group.runs[0].settings[NETWORK + CLASS]).rpartition(".")[2]
        if name == ALL
        else name
        for name, members in zip(names_of(fixed, varying(fixed)), found, strict=True)
    ]
    named = zip(names, found, strict=True)
    return [SizeSeries(name, look, members) for look, (name, members) in enumerate(named)]


def _members(groups: Sequence[Group]) -> tuple[Member, ...]:
    """The members of a series; none if the groups are no series."""
    if len(groups) < POINTS:
        return ()
    found = []
    for group, size in zip(groups, _sizes(groups), strict=True):
        images = group.mean("images_seen")
        if (flops := curves.training_flops(group, images)) is None:
            return ()
        found.append(Member(group, size, group.mean("macs"), images, flops))
    counts = (
        distinct(member.flops for member in found) >= COSTS,
        distinct(member.macs for member in found) >= SIZES,
        distinct(member.images for member in found) >= SIZES,
    )
    found.sort(key=lambda member: (member.macs, member.size, member.images))
    return tuple(found) if all(counts) else ()


def distinct(amounts: Iterable[float]) -> int:
    """The number of amounts that differ by more than 5 % from the next smaller one."""
    count, last = 0, 0.0
    for amount in sorted(amounts):
        if amount > (1 + EQUAL_COST) * last:
            count, last = count + 1, amount
    return count


def _sizes(groups: Sequence[Group]) -> list[str]:
    """The name of each group's size: width=64."""
    sizes: list[Settings] = [
        {key: value for key, value in group.settings.items() if _is_size(key, value)}
        for group in groups
    ]
    unique = list({json.dumps(size, sort_keys=True): size for size in sizes}.values())
    names = names_of(unique, varying(unique))
    return [names[unique.index(size)] for size in sizes]


def _fixed(group: Group) -> Settings:
    """The settings that members of a series have in common, if they differ between any groups.

    Settings that were tuned for each size may differ.
    """
    tuned = OmegaConf.select(group.runs[0].config, "tuning.values") or {}
    return {
        key: value
        for key, value in group.settings.items()
        if key not in LENGTH and FOLLOWS.get(key, key) not in tuned and not _is_size(key, value)
    }


def _is_size(key: str, value: object) -> bool:
    """Whether a setting is a number, or a list of numbers, of the network."""
    values = value if isinstance(value, list) else [value]
    numbers = (isinstance(each, int | float) and not isinstance(each, bool) for each in values)
    return key.startswith(NETWORK) and all(numbers)
