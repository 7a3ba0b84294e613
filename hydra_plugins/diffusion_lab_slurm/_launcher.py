"""The launcher of SLURM jobs: submitit's, which here notes their ids and may leave them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus
from hydra_plugins.hydra_submitit_launcher import submitit_launcher
from hydra_plugins.hydra_submitit_launcher.config import SlurmQueueConf


@dataclass
class SlurmConf(SlurmQueueConf):
    """The keys of the launcher, with their types."""

    _target_: str = "hydra_plugins.diffusion_lab_slurm._launcher.SlurmLauncher"
    wait: bool = True
    gpus_per_node: Any = "auto"


ConfigStore.instance().store(
    group="hydra/launcher", name="diffusion_lab_slurm", node=SlurmConf(), provider="diffusion_lab"
)


class SlurmLauncher(submitit_launcher.SlurmLauncher):
    """Submits the jobs of a sweep, and waits until they have ended if `wait` is true."""

    def __init__(self, wait: bool, **params: Any):
        super().__init__(**params)
        self.wait = wait

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        # imported late, as each command imports this file
        from diffusion_lab.common.messages import say
        from diffusion_lab.compute import slurm
        from diffusion_lab.runs import sweep_record

        assert self.config is not None
        sweep, study = Path(self.config.hydra.sweep.dir), self.config.get("study_name")
        executor = slurm.executor(self.params)
        state = Singleton.get_state()
        calls = [
            (list(overrides), "hydra.sweep.dir", number, f"job_id_for_{number}", state)
            for number, overrides in enumerate(job_overrides, initial_job_idx)
        ]
        jobs = executor.map_array(self, *zip(*calls, strict=True))
        ids = [job.job_id for job in jobs]
        sweep_record.add_slurm_jobs(sweep, study, initial_job_idx, ids)
        say(f"Submitted to SLURM: {ids[0]}" + (f" to {ids[-1]}" if len(ids) > 1 else ""))
        if self.wait:
            return [job.results()[0] for job in jobs]
        return [JobReturn(status=JobStatus.COMPLETED) for _ in jobs]
