"""A folder with everything that checks a comparison: records and a card, without checkpoints."""

from diffusion_lab.analysis.publishing.folder import publish
