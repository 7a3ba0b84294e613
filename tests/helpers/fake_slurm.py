"""A stand-in for SLURM: sbatch accepts every job as job 17, and squeue says what a test writes."""

import os
from pathlib import Path

import pytest

JOB = "17"


class FakeSlurm:
    """The programs of SLURM in a folder on the PATH."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder = folder
        folder.mkdir()
        self.program("srun", "exit 1")
        self.program("sbatch", f"echo $1 >> {folder}/submitted; echo Submitted batch job {JOB}")
        self.says()
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def program(self, name: str, line: str) -> None:
        (self.folder / name).write_text(f"#!/bin/sh\n{line}\n")
        (self.folder / name).chmod(0o755)

    def says(self, *jobs: str) -> None:
        """Makes squeue print these lines, such as 17_0|PENDING|Resources."""
        (self.folder / "queue").write_text("".join(f"{job}\n" for job in jobs))
        self.program("squeue", f"cat {self.folder}/queue")

    def is_silent(self) -> None:
        """Makes squeue fail, as if the controller did not answer."""
        self.program("squeue", "echo slurm_load_jobs error: Unable to contact >&2; exit 1")

    @property
    def script(self) -> str:
        """The script of the last job that was submitted."""
        return Path((self.folder / "submitted").read_text().splitlines()[-1]).read_text()

    @property
    def submissions(self) -> int:
        """How often sbatch was called."""
        file = self.folder / "submitted"
        return len(file.read_text().splitlines()) if file.exists() else 0
