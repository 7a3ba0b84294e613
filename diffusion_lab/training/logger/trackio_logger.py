"""Trackio: a dashboard on this machine, without an account, from a database in outputs/."""

import os
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from diffusion_lab.assembly.config_keys import flat
from diffusion_lab.common.files import OUTPUTS
from diffusion_lab.common.messages import package
from diffusion_lab.training.clock import Clock
from diffusion_lab.training.logger.run_logger import Row, RunLogger, numbers_of

FOLDER = OUTPUTS / "trackio"  # the databases of projects, and the pictures of their runs


class Trackio(RunLogger):
    """A run in Trackio's database, which a resumed run continues after the last step there.

    Trackio writes twice a second, so a process that is killed may lose the rows in between there.
    """

    title = "Trackio"

    def __init__(
        self,
        run_dir: Path,
        clock: Clock,
        config: dict,
        resumed_from: int,
        run_id: str,
        project: str = "diffusion-lab",
        name: str | None = None,
        group: str | None = None,
        tags: list[str] | None = None,
    ):
        super().__init__(run_dir, clock, config, resumed_from)
        # the name is all by which Trackio finds a run again
        own = f"{name or self.label()}-{run_id}"
        self.facts: Row = {"project": project, "name": own, "group": group}
        self.settings = flat(config) | {"tags": ", ".join(tags or [])}

    @classmethod
    def require(cls) -> None:
        os.environ.setdefault("TRACKIO_DIR", str(FOLDER.resolve()))  # it is read by the import
        package("trackio", "trackio", "logger=trackio")

    @property
    def name(self) -> str:
        return self.facts["project"]

    @property
    def version(self) -> str:
        return self.facts["name"]

    def open(self) -> str:
        import trackio
        from trackio.sqlite_storage import SQLiteStorage

        last = SQLiteStorage.get_max_step_for_run(self.name, self.version)
        self._last = -1 if last is None else last
        with redirect_stdout(StringIO()):  # it says what the line below says
            self.run = trackio.init(**self.facts, config=self.settings, resume="allow", embed=False)
        return (
            f"Trackio: TRACKIO_DIR={os.environ['TRACKIO_DIR']} trackio show --project {self.name}"
        )

    def write(self, row: Row, step: int) -> None:
        if step > self._last:
            self.run.log(row, step)

    def draw(self, name: str, path: Path, caption: str, step: int) -> None:
        import trackio

        self.write(self.new({name: trackio.Image(path, caption=caption)}, step), step)

    def close(self, summary: Row | None) -> None:
        import trackio

        if summary:
            self.run.log(numbers_of(summary), summary["steps"])
        with redirect_stdout(StringIO()):
            trackio.finish()
