"""Hydra's plugin for `hydra/launcher=slurm`; Hydra looks for plugins in this namespace alone."""

from importlib.util import find_spec

if find_spec("hydra_plugins.hydra_submitit_launcher"):  # the extra `slurm`
    from hydra_plugins.diffusion_lab_slurm._launcher import SlurmLauncher
