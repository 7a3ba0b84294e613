"""Runs side by side: grouped by composition, tested over seeds, and told in words and pictures."""

from diffusion_lab.analysis.comparison.comparing import compare
