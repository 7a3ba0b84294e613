"""The comparison of runs: grouped by composition, tested over seeds, in words and pictures."""

from diffusion_lab.analysis.comparison.comparing import compare
