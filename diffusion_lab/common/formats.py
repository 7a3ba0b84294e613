"""Numbers as people read them."""


def amount(value: float) -> str:
    """A number in three digits, with a letter for thousands, millions, ...: 35.7M."""
    for letter, unit in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= unit:
            return f"{value / unit:.3g}{letter}"
    return f"{value:.3g}"
