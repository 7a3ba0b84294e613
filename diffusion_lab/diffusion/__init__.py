"""The theory: noise, denoiser, guidance, likelihood, schedules, objectives, samplers."""
