"""What a backbone's keys may be: one sentence, with the key, for what they may not."""

from collections.abc import Sequence


def check_option(key: str, value: str, options: Sequence[str]) -> None:
    """Raises ValueError for a value that is not among a key's options."""
    if value not in options:
        raise ValueError(f"backbone.{key}={value} is unknown; use one of {', '.join(options)}")


def check_sizes(**sizes: int) -> None:
    """Raises ValueError unless each of these keys holds a whole number of at least 1."""
    for key, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"backbone.{key}={value} must be a whole number of at least 1")


def check_list(key: str, values: Sequence[int], least: int) -> None:
    """Raises ValueError unless a key holds a list of whole numbers of at least `least`."""
    whole = isinstance(values, Sequence) and not isinstance(values, str)
    if not whole or not all(type(value) is int and value >= least for value in values):
        raise ValueError(
            f"backbone.{key}={values} must be a list of whole numbers of at least {least}"
        )


def check_number(key: str, value: float, least: float, most: float) -> None:
    """Raises ValueError unless a key holds a number between two others."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:
        raise ValueError(f"backbone.{key}={value} must be a number from {least:g} to {most:g}")


def check_flags(**flags: bool) -> None:
    """Raises ValueError unless each of these keys is true or false."""
    for key, value in flags.items():
        if not isinstance(value, bool):
            raise ValueError(f"backbone.{key}={value} must be true or false")
