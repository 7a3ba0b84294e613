"""Runs side by side: grouped by composition, tested over seeds, and told in words and pictures."""

from .report import compare

__all__ = ["compare"]
