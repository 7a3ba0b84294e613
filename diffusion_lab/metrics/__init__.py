"""Feature extractors, distances between sets of features, and the metrics built from both.

The names below are imported on first use, so that reading records does not wait for torch.
"""

from importlib import import_module

HOMES = {
    "GenerativeMetrics": "generative",
    "Metric": "metric",
    "PreparedMetrics": "generative",
}


def __getattr__(name: str) -> object:
    if name in HOMES:
        return getattr(import_module(f"{__name__}.{HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
