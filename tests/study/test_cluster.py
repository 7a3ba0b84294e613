"""Jobs of a study that go to SLURM: in which tasks, and after which others."""

from itertools import count
from types import SimpleNamespace

from diffusion_lab.cli.study import cluster, document
from diffusion_lab.cli.study.jobs import Jobs
from diffusion_lab.cli.study.running import Records


def test_one_task_chooses_for_all_values_of_an_arm_after_all_of_their_trials(tmp_path, monkeypatch):
    numbers, sent = count(1), []

    def executor(params):
        def submit_array(tasks):
            ids = [str(next(numbers)) for _ in tasks]
            sent.extend((task, params, each) for task, each in zip(tasks, ids, strict=True))
            return [SimpleNamespace(job_id=each) for each in ids]

        return SimpleNamespace(submit_array=submit_array)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cluster.slurm, "queue", lambda _: {})
    monkeypatch.setattr(cluster.slurm, "executor", executor)
    jobs = Jobs(document.load("rates_by_width", {}, None), {})
    choosers = jobs.of("tune")
    submission = cluster.Submission(Records(jobs), ["hydra/launcher=slurm"], [], ["rates_by_width"])
    submission.submit(choosers)
    chosen = [(task, params, each) for task, params, each in sent if task.command == "study"]
    assert [task.arguments[-2:] for task, _, _ in chosen] == [
        ["stages=tune", "arms=AdamW"],
        ["stages=tune", "arms=AdamW with muP"],
    ]
    for (_, params, number), arm in zip(chosen, ("AdamW", "AdamW with muP"), strict=True):
        own = [job for job in choosers if job.point["arms"] == arm]
        assert {submission.ids[job.title] for job in own} == {number}
        trials = {submission.ids[trial.title] for job in own for trial in jobs.first_of(job)}
        assert len(trials) == 4 * 5 * 2  # widths, rates and seeds
        kind, *after = params["additional_parameters"]["dependency"].split(":")
        assert (kind, {*after}) == ("afterany", trials)
