"""The studies of conf/study, tiny, from nothing to their pages, stopped and killed on the way."""

import os
import signal
import time
from pathlib import Path

import pytest
from helpers.commands import prepare_for_commands
from helpers.small_studies import STUDIES, TINY
from helpers.started_study import ends, started, summaries, waits_for
from helpers.tiny_runs import rows

from diffusion_lab.runs.progress import is_locked

pytestmark = pytest.mark.slow
BEGUN = {  # the stages in which a study is stopped by Ctrl-C, and killed
    "unet_vs_dit": ("tune", "train"),
    "few_steps": ("start-EDM", "reflow"),
    "families": ("kl", "codes"),
    "low_data": ("tune", "train"),
    "latent": ("kl", "latents"),
    "scaling": ("tune", "train"),
}


def finished(name: str) -> dict[Path, dict]:
    return {path: run for path, run in summaries(name).items() if run["finished"]}


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_ends_with_each_run_once_and_its_page(name, tmp_path, monkeypatch):
    prepare_for_commands(monkeypatch, tmp_path)
    command = [name, *TINY, *STUDIES[name]]
    stopped, killed = BEGUN[name]
    first = started(*command)
    waits_for(f"{name}/{stopped}*/**/config.yaml")
    os.kill(first.pid, signal.SIGINT)
    code, said = ends(first)
    assert code == 130, said
    before = finished(name)
    second = started(*command)
    waits_for(f"{name}/{killed}/*/config.yaml")
    os.kill(second.pid, signal.SIGKILL)
    ends(second)
    while any(map(is_locked, (path.parent for path in Path("outputs").rglob("config.yaml")))):
        time.sleep(0.1)
    before |= finished(name)
    code, said = ends(started(*command))
    assert code == 0, said
    runs = summaries(name)
    assert runs == finished(name)
    assert runs | before == runs, "what had finished is not trained again"
    for path in runs:
        steps = [row["step"] for row in rows(path.parent) if "train/loss" in row]
        assert steps == sorted(set(steps)), path
    made = Path("outputs", name)
    assert (made / "record/card.json").is_file()
    pages = {path: path.stat().st_mtime for path in made.glob("page*/**/index.html")}
    assert pages
    code, said = ends(started(*command))
    assert code == 0, said
    assert summaries(name) == runs
    assert pages == {path: path.stat().st_mtime for path in pages}
