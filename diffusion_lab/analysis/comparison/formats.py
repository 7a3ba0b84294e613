"""Numbers as people read them."""

from diffusion_lab.metrics.table import Metric


def minutes(seconds: float) -> str:
    """1.5 h, 6.6 min, 12 s."""
    for word, unit in (("h", 3600), ("min", 60)):
        if seconds >= 1.5 * unit:
            return f"{seconds / unit:.3g} {word}"
    return f"{seconds:.3g} s"


def plain(value: float) -> str:
    """468.8, 0.247, -0.0027."""
    return f"{value:.4g}" if abs(value) >= 0.1 else f"{value:.2g}"


def percent(value: float) -> str:
    """66.2 %."""
    return f"{value:.1f} %"


def gibibytes(size: float) -> str:
    """1.25 GiB."""
    return f"{size / 2**30:.3g} GiB"


def with_spread(mean: float, spread: float) -> tuple[str, str]:
    """Both to the second digit of the spread: 468.8 and 44.2, 0.2469 and 0.0042."""
    if spread <= 0:
        return f"{mean:.4g}", "0"
    digits = 1
    while digits < 9 and spread < 10 ** (1 - digits):
        digits += 1
    return f"{mean:.{digits}f}", f"{spread:.{digits}f}"


def number(value: float, metric: Metric) -> str:
    """In three digits; shares in percent."""
    return f"{100 * value:.3g} %" if metric.percent else f"{value:.3g}"


def gap(metric: Metric, *ends: float) -> str:
    """A gap or a width, or from one to another: 52, 47 to 57; of shares in percentage points."""
    scale = 100 if metric.percent else 1
    return " to ".join(f"{scale * end:.3g}" for end in ends) + " points" * metric.percent
