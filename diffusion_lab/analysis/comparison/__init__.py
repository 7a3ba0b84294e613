"""The comparison of runs: grouped by composition, tested over seeds, told in words and pictures."""

from diffusion_lab.analysis.comparison.comparing import compare
