"""Jobs run under a real SLURM, on two nodes that are both this machine."""

import json
import os
import pty
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from helpers.paths import ROOT, TESTS
from helpers.refusals import sentence_of
from helpers.tiny_runs import TINY, rows, summary_of, wandb_runs
from helpers.tiny_study import STUDY

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        os.getuid() != 0 or not all(map(shutil.which, ("sbatch", "slurmctld", "munged"))),
        reason="needs SLURM, munge and root: make test-slurm",
    ),
]
SCRIPTS = Path(__file__).parent / "slurm"
PATIENCE = 600.0  # seconds to wait for slow steps on a busy machine
LAUNCHER = ["hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1"]
TRAIN = ["train", *LAUNCHER, *TINY, "name=x", "callbacks.evaluation=null"]
LEFT = ["hydra.launcher.wait=false", "callbacks.sample_grid=null"]


def called(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def wait_for(what: Callable[[], object], log: Callable[[], str] = lambda: "") -> object:
    """Returns what `what` returns, once that is true."""
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if value := what():
            return value
        time.sleep(0.1)
    raise AssertionError(f"waited in vain\n{log()}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """The folder of a cluster with two nodes."""
    folder = tmp_path_factory.mktemp("slurm")
    subprocess.run([SCRIPTS / "start.sh", folder], check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(folder / "slurm.conf"))
        yield folder
        called("scancel", "--full", "--state=RUNNING", "--user=root")
        called("scancel", "--user=root")
        subprocess.run([SCRIPTS / "stop.sh", folder], check=True)


@pytest.fixture
def submit(cluster, tmp_path, monkeypatch) -> Callable[..., subprocess.Popen]:
    """submit("seed=0,1") starts diffusion-lab train on the cluster, in tmp_path."""
    monkeypatch.chdir(tmp_path)
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_SILENT": "true",
        "PYTHONPATH": f"{TESTS}{os.pathsep}{ROOT}",
        # no name server knows the names of these nodes, and they are on no other network
        "MASTER_ADDR": "127.0.0.1",
        "GLOO_SOCKET_IFNAME": "lo",
    }.items():
        monkeypatch.setenv(name, value)

    def start(*arguments: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "diffusion_lab", *TRAIN, *arguments]
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        return subprocess.Popen(command, text=True, **pipe)

    return start


@pytest.fixture
def kill_node(cluster) -> Iterator[Callable[[str, str], None]]:
    """kill_node("node1", job) ends the node's daemon and all of the job's processes there."""
    killed = []

    def kill(node: str, job: str) -> None:
        listed = called("scontrol", "listpids", job, node).splitlines()[1:]
        tasks = [line.split()[0] for line in listed]
        parents = {called("ps", "-o", "ppid=", "-p", task) for task in tasks}
        steps = [p for p in parents if called("ps", "-o", "args=", "-p", p)[:10] == "slurmstepd"]
        daemon = (cluster / f"slurmd.{node}.pid").read_text().strip()
        called("kill", "-KILL", daemon, *steps, *tasks)
        killed.append(node)
        # SLURM itself notices after SlurmdTimeout, five minutes
        called("scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=dead")

    yield kill
    for node in killed:
        called("slurmd", "-N", node)
        # refused if it has come back by itself
        subprocess.run(["scontrol", "update", f"NodeName={node}", "State=RESUME"], check=False)
    wait_for(
        lambda: called("sinfo", "--noheader", "--partition=normal", "--format=%D %t") == "2 idle"
    )


def logs() -> str:
    return "\n".join(path.read_text() for path in sorted(Path("outputs").rglob("*.out")))


def finish(launcher: subprocess.Popen) -> None:
    try:
        out, _ = launcher.communicate(timeout=PATIENCE)
    except subprocess.TimeoutExpired:
        launcher.kill()
        raise AssertionError(f"{launcher.communicate()[0]}\n{logs()}") from None
    assert launcher.returncode == 0, f"{out}\n{logs()}"


def runs() -> list[Path]:
    return sorted(path.parent for path in Path("outputs/x").glob("*/config.yaml"))


def status(path: str) -> list[dict]:
    """The rows that `diffusion-lab status` shows."""
    shown = called(sys.executable, "-m", "diffusion_lab", "status", path, "json=true")
    return json.loads(shown.splitlines()[-1])["runs"]


def losses(run: Path) -> list[int]:
    return [row["step"] for row in rows(run) if "train/loss" in row]


def state(job: str) -> str:
    return called("squeue", "--noheader", f"--jobs={job}", "--format=%T")


def training(name: str, steps: int) -> tuple[str, Path]:
    """The job of this name and its run, once the run has logged `steps` steps."""

    def far_enough() -> bool:
        return any(len(losses(run)) >= steps for run in runs() if (run / "metrics.jsonl").exists())

    wait_for(far_enough, logs)
    (job,) = set(called("squeue", "--noheader", f"--name={name}", "--format=%F").split())
    (run,) = runs()
    return job, run


def restart_now(job: str) -> None:
    """Starts a requeued job now, which SLURM would let wait for two minutes."""
    wait_for(lambda: state(job) == "PENDING", logs)
    called("scontrol", "update", f"JobId={job}", "StartTime=now")


def assert_whole(run: Path, steps: int) -> None:
    assert runs() == [run]
    assert (summary_of(run)["finished"], summary_of(run)["steps"]) == (True, steps)
    assert losses(run) == list(range(1, steps + 1))
    assert len(wandb_runs(run)) == 1


def test_a_job_of_two_tasks_trains_one_model(submit):
    finish(submit("hydra.launcher.tasks_per_node=2"))
    (run,) = runs()
    assert_whole(run, 4)
    assert summary_of(run)["ranks"] == 2
    assert "micro-batch 4 x 1 accumulated x 2 ranks" in logs()


def test_tasks_of_srun_measure_as_one_process(submit, lab, refusal, run_folder):
    line = ["evaluate", "run=run", "device=cpu", "precision=32-true", "batch_size=4", "json=true"]
    srun = ["srun", "--nodes=2", "--ntasks-per-node=1", sys.executable, "-m", "diffusion_lab"]
    (found,) = called(*srun, *line).splitlines()
    alone = json.loads(lab(*line)[1])
    assert json.loads(found) == pytest.approx(alone, rel=3e-6, abs=1e-6)
    launcher = [*LAUNCHER, "hydra.launcher.tasks_per_node=2"]
    job = [sys.executable, "-m", "diffusion_lab", *line, *launcher]
    finish(subprocess.Popen(job, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    (found,) = (each for each in logs().splitlines() if each.startswith("{"))
    assert json.loads(found) == pytest.approx(alone, rel=3e-6, abs=1e-6)
    wrong = [*line, "seed=-1"]
    done = subprocess.run([*srun, *wrong], check=False, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence_of(done.stderr) == refusal(*wrong)


def test_a_sweep_is_an_array_of_jobs_with_a_folder_each(submit):
    finish(submit("seed=0,1"))
    assert [summary_of(run)["finished"] for run in runs()] == [True, True]
    configs = [(run / "config.yaml").read_text() for run in runs()]
    assert sorted("seed: 1\n" in config for config in configs) == [False, True]
    groups = {line for config in configs for line in config.splitlines() if "  group: " in line}
    assert len(groups) == 1
    names = sorted(path.name for path in Path("outputs").rglob("*_log.out"))
    first = names[0].split("_")[0]  # the array's id
    assert names == [f"{first}_0_0_log.out", f"{first}_1_0_log.out"]


def test_a_study_is_submitted_at_once_and_ends_by_itself(submit, kill_node, tmp_path):
    arms = STUDY["arms"] | {"Uneven": {"backbone.width": 17}}  # cannot be divided among its heads
    (tmp_path / "conf/study").mkdir(parents=True)
    text = yaml.safe_dump(STUDY | {"arms": arms}, sort_keys=False)
    (tmp_path / "conf/study/tiny.yaml").write_text(text)
    command = [sys.executable, "-m", "diffusion_lab", "study", "tiny", "--config-dir=conf"]
    command += [*LAUNCHER, "stages.train.images=4800"]
    subprocess.run(command, check=True, timeout=PATIENCE)
    study = Path("outputs/tiny")
    ids = json.loads((study / "slurm.json").read_text())
    assert len(ids) == 2 + 1 + 6 + 1  # trials, what is best of them, trainings, and the page
    waiting = called("squeue", "--noheader", "--states=PENDING", "--format=%E")
    assert "afterany" in waiting  # stages wait for one another
    run = study / "train/Narrow_seed-0"
    wait_for(lambda: (run / "metrics.jsonl").exists() and losses(run), logs)
    job = next(each for title, each in ids.items() if title.startswith("train: Narrow, seed 0"))
    number, node = called("squeue", "--noheader", f"--jobs={job}", "--format=%A %N").split()
    kill_node(node, number)
    wait_for(lambda: state(job) == "PENDING", logs)
    assert {"queued", "running"} & {row["state"] for row in status("outputs/tiny")}
    subprocess.run(command, check=True, timeout=PATIENCE)  # sends again only what has failed
    again = json.loads((study / "slurm.json").read_text())
    assert all("Uneven" in title for title, each in again.items() if ids[title] != each)

    def ended() -> bool:
        for each in called(
            "squeue", "--noheader", "--states=PENDING", "--format=%i %r"
        ).splitlines():
            if each.endswith("BeginTime"):  # requeued, and else waits for two minutes
                called("scontrol", "update", f"JobId={each.split()[0]}", "StartTime=now")
        return not called("squeue", "--noheader")

    wait_for(ended, logs)
    assert "Restarts=1" in called("scontrol", "show", "job", job)
    assert (study / "page/index.html").exists()
    assert (study / "jobs/page.json").exists()  # else it would be submitted again
    trained = sorted(path.parent for path in study.rglob("summary.json"))
    assert [summary_of(each)["finished"] for each in trained] == [True] * (2 + 4)
    steps = [losses(each) for each in trained if each.parent.name == "train"]
    assert steps == [list(range(50, 601, 50))] * 4  # each is trained once


def test_a_job_whose_time_is_up_saves_requeues_itself_and_goes_on(submit):
    launcher = submit("hydra.launcher.nodes=2", "hydra.launcher.name=two", "trainer.max_steps=600")
    job, run = training("two", 15)
    called("scancel", "--signal=USR2", job)  # as SLURM does before a job's end
    restart_now(job)
    stopped = summary_of(run)["steps"]
    assert 15 <= stopped < 600
    finish(launcher)
    assert_whole(run, 600)
    assert summary_of(run)["ranks"] == 2
    assert "Restarts=1" in called("scontrol", "show", "job", job)
    assert f"Stopped at step {stopped}; everything is saved." in logs()
    assert "The job was requeued" in logs()


def test_a_job_that_makes_room_for_a_more_urgent_one_goes_on_after_it(submit):
    launcher = submit("hydra.launcher.name=patient", "trainer.max_steps=600")
    job, run = training("patient", 15)
    called("sbatch", "--wait", "--partition=urgent", "--nodes=2", "--exclusive", "--wrap=true")
    restart_now(job)
    assert 15 <= summary_of(run)["steps"] < 600
    finish(launcher)
    assert_whole(run, 600)


def test_a_task_that_fails_ends_its_job_and_says_why(submit):
    launcher = submit("hydra.launcher.tasks_per_node=2", "hydra.launcher.name=bad", "batch_size=7")
    try:
        wait_for(lambda: "cannot be divided evenly among 2 ranks" in logs(), logs)
        wait_for(lambda: not called("squeue", "--noheader", "--name=bad"), logs)
        assert not runs()
    finally:
        launcher.kill()  # else it asks an accounting database, which this cluster lacks


def test_jobs_that_are_left_are_seen_by_status_until_they_end(submit):
    one_by_one = ["-m", "study_name=x", "seed=0,1,2", "hydra.launcher.array_parallelism=1"]
    finish(submit(*one_by_one, *LEFT, "hydra.launcher.name=left", "trainer.max_steps=600"))
    assert called("squeue", "--noheader", "--name=left")
    job, _ = training("left", 1)
    rows = status("outputs/x")
    assert [row["state"] for row in rows] == ["running", "queued", "queued"]
    assert [row["job"] for row in rows] == [f"{job}_{number}" for number in range(3)]
    assert (rows[0]["max_steps"], rows[1]["reason"]) == (600, "JobArrayTaskLimit")
    assert rows[0]["step"] >= 1
    assert rows[0]["images_per_second"] > 0
    assert rows[0]["seconds_left"] > 0
    assert status(rows[0]["run"])[0]["state"] in ("running", "finished")
    wait_for(lambda: not called("squeue", "--noheader", "--name=left"), logs)
    assert [row["state"] for row in status("outputs")] == ["finished"] * 3


def test_a_cancelled_job_is_saved_and_stays_out_of_the_queue(submit):
    study = ["-m", "study_name=x", "callbacks.sample_grid=null", "trainer.max_steps=600"]
    study += ["seed=0,1", "hydra.launcher.array_parallelism=1", "hydra.launcher.name=dropped"]
    finish(submit(*study, "hydra.launcher.wait=false"))
    job, run = training("dropped", 15)
    called("scancel", job)
    wait_for(lambda: not called("squeue", "--noheader", "--name=dropped"), logs)
    assert "The job could not be requeued" in logs()
    steps = summary_of(run)["steps"]
    assert (summary_of(run)["finished"], steps >= 15) == (False, True)
    rows = status("outputs/x")
    assert [(row["state"], row["step"]) for row in rows] == [("stopped", steps), ("not started", 0)]
    finish(submit(*study))
    assert [row["state"] for row in status("outputs/x")] == ["finished", "finished"]
    assert losses(run) == list(range(1, 601))


def test_a_job_whose_node_dies_goes_on_elsewhere_from_its_last_checkpoint(submit, kill_node):
    often = "callbacks.checkpoint.every_n_steps=10"
    finish(submit(*LEFT, "hydra.launcher.name=moves", "trainer.max_steps=600", often))
    job, run = training("moves", 25)
    node = called("squeue", "--noheader", f"--jobs={job}", "--format=%N")
    kill_node(node, job)
    wait_for(lambda: state(job) == "PENDING", logs)
    called("scontrol", "update", f"JobId={job}", "StartTime=now+1hour")
    (row,) = status("outputs")
    assert (row["state"], row["reason"]) == ("queued", "BeginTime")
    assert 25 <= row["step"] < 600
    restart_now(job)
    wait_for(lambda: state(job) not in ("PENDING", "RUNNING"), logs)
    assert_whole(run, 600)
    shown = called("scontrol", "show", "job", job)
    assert "Restarts=1" in shown
    assert f"BatchHost={node}\n" not in shown
    (row,) = status("outputs")
    assert (row["state"], row["step"]) == ("finished", 600)


def test_a_shell_that_srun_gives_to_a_person_is_no_task(cluster, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    asked = (
        "import sys; from diffusion_lab.compute import slurm; sys.exit(3 + slurm.started_by_srun())"
    )
    task = [sys.executable, "-c", asked]
    named = ["srun", "--job-name=dev"]
    assert subprocess.run([*named, *task], check=False).returncode == 4
    assert os.waitstatus_to_exitcode(pty.spawn([*named, "--pty", *task])) == 3
