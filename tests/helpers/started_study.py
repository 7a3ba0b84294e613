"""A study in a process of its own, and the files that it writes."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path


def started(*arguments: str) -> subprocess.Popen:
    """Starts `diffusion-lab study` in the current folder."""
    command = [sys.executable, "-m", "diffusion_lab", "study", *arguments]
    # a job in the background of a script, as a runner of tests may be, ignores Ctrl-C
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    finally:
        signal.signal(signal.SIGINT, before)


def waits_for(path: str, seconds: float = 600) -> None:
    """Waits until there is a file of this pattern in outputs/."""
    end = time.monotonic() + seconds
    while not any(Path("outputs").glob(path)):
        assert time.monotonic() < end, f"no {path}"
        time.sleep(0.02)


def ends(process: subprocess.Popen, seconds: float = 600) -> tuple[int, str]:
    """The exit code of a process, and what it has said on standard error."""
    _, said = process.communicate(timeout=seconds)
    return process.returncode, said


def summaries(study: str) -> dict[Path, dict]:
    """The summaries of all runs of a study."""
    found = Path("outputs", study).rglob("summary.json")
    return {path: json.loads(path.read_text()) for path in found}
