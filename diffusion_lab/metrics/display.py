"""Figures for people: a line each, with the value that real images have."""

from collections.abc import Sequence

from rich.table import Table

WORDS = {
    "fid": "FID",
    "kid": "KID",
    "fid_infinity": "FID-infinity",
    "rfid": "rFID",
    "rkid": "rKID",
    "rfid_infinity": "rFID-infinity",
    "inception_score": "Inception Score",
    "accuracy": "Conditional accuracy",
}


def report(values: dict[str, float], class_names: Sequence[str] = ()) -> list[str]:
    """Lines of what `GenerativeMetrics.compute` returned: value, floor and whole name."""
    floors, lines = floors_of(values), []
    for name in measured_of_samples(values):
        metric, _, protocol = name.partition("/")
        line = f"{words_for(metric, class_names)} {with_spread(values, name)}"
        if metric in floors:
            line += f" (real images {floor_beside(floors[metric], protocol)})"
        lines.append(f"{line} [{name}]")
    return lines


def words_for(metric: str, class_names: Sequence[str]) -> str:
    """What people call a metric: fid_class3 is the FID of class 3, with its name if it has one."""
    kind, _, label = metric.partition("_class")
    if not label.isdecimal():
        return WORDS.get(metric, metric.capitalize())
    name = class_names[int(label)] if int(label) < len(class_names) else label
    # classes that have no names are called by their numbers
    return f"{WORDS[kind]} of class {label}" + ("" if name == label else f" ({name})")


def ceiling(values: dict[str, float], first_stage: dict[str, float]) -> dict[str, float]:
    """A first stage's figures of reconstructed images, those that were measured as `values` were.

    A model in its latents should not be expected beyond them. Where none was, it is all of them:
    their names say how they were measured.
    """
    figures = {name: value for name, value in first_stage.items() if name[:1] == "r"}
    return {name: value for name, value in figures.items() if name[1:] in values} or figures


def side_by_side(runs: dict[str, dict[str, float]]) -> Table:
    """A row a figure that all runs have, a column a run; for figures of one protocol."""
    first = next(iter(runs.values()))
    floors = floors_of(first)
    table = Table("", *runs, "real images")
    for name in measured_of_samples(first):
        if all(name in values for values in runs.values()):
            metric, _, protocol = name.partition("/")
            cells = [with_spread(values, name) for values in runs.values()]
            floor = floor_beside(floors[metric], protocol) if metric in floors else ""
            table.add_row(name, *cells, floor)
    return table


def floor_beside(floor: tuple[float, str], protocol: str) -> str:
    """A floor, and of how many images it is if these are fewer than the samples beside it."""
    value, measured = floor
    other = "" if measured == protocol else f" at {measured.rpartition('-')[2]} images"
    return f"{value:.4g}{other}"


def floors_of(values: dict[str, float]) -> dict[str, tuple[float, str]]:
    """The value of real images and its protocol, by metric."""
    floors = {}
    for name, value in values.items():
        metric, _, protocol = name.partition("/")
        if metric.endswith("_floor"):
            floors[metric.removesuffix("_floor")] = (value, protocol)
    return floors


def measured_of_samples(values: dict[str, float]) -> list[str]:
    """The names of figures of generated images, but for spreads."""
    return [name for name in values if not name.partition("/")[0].endswith(("_floor", "_std"))]


def with_spread(values: dict[str, float], name: str) -> str:
    """A value in four digits, with its standard deviation where that is known."""
    std = values.get(name.replace("/", "_std/", 1))
    return f"{values[name]:.4g}" + (f" ± {std:.2g}" if std is not None else "")
