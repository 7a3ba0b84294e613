"""The search for the best values of the keys that a stage tunes, for one of its choosers."""

import math

from diffusion_lab.cli.study.document import SEEDS, Choice, Settings
from diffusion_lab.cli.study.jobs import StudyJob
from diffusion_lab.cli.study.records import Records
from diffusion_lab.cli.study.values import Tried, average, best, beyond, first_values, several
from diffusion_lab.common.files import add_to_json, read_json
from diffusion_lab.common.messages import say
from diffusion_lab.training.tuned import has_diverged


class Search:
    """A search: `new` are the values to try next; it ends once there are none."""

    def __init__(self, records: Records, chooser: StudyJob):
        self.records, self.chooser = records, chooser
        self.stage = records.jobs.study.stages[chooser.stage]
        assert self.stage.choice is not None
        self.choice = self.stage.choice
        self.new = first_values(self.stage, chooser.name)
        self.tried: list[Tried] = []
        self.grown, self.unfinished = 0, ""

    def trials(self) -> list[StudyJob]:
        """The trainings with the new values, one for each seed of the tuning."""
        return [trial for values in self.new for trial in self._with(values)]

    def _with(self, values: Settings) -> list[StudyJob]:
        return self.records.jobs.trials(self.chooser, values)

    def needs_run(self, trial: StudyJob) -> bool:
        """Whether a trial has neither finished nor diverged."""
        return not self.records.done(trial) and not has_diverged(trial.made)

    def take(self) -> None:
        """Takes the results of the new values, and decides on the next."""
        for values in self.new:
            trials = self._with(values)
            self.unfinished = next((t.title for t in trials if self.needs_run(t)), self.unfinished)
            results = {trial.point[SEEDS]: result(trial, self.choice) for trial in trials}
            self.tried.append({"values": values, "results": results})
        growing = self.grown < self.choice.grow and not self.unfinished
        self.new = beyond(self.tried, self.choice.metric) if growing else []
        self.grown += 1
        for values in self.new:
            say(f"{self.chooser.title}: the best value is at an end, trying {written(values)}")

    def end(self) -> str | None:
        """Writes what was found for the trainings that need it; returns why that is nothing."""
        if self.unfinished:
            return f"it needs {self.unfinished}, which is not done"
        axes, point = self.stage.axes, self.chooser.point
        found, trial = best(self.tried, self.choice.metric), self._with({})[0].settings
        seconds = trial.get("budget.seconds")
        record = {
            "chosen": found and found["values"],
            "tried": self.tried,
            "metric": self.choice.metric,
            "values": several(self.stage),
            "seeds": [int(seed) for seed in self.stage.axes[SEEDS]],
            "num_samples": self.choice.num_samples,
            "images": trial.get("budget.images"),
            "overrides": [f"budget.seconds={seconds}"] if seconds else [],
            "of": [key for axis, name in point.items() for key in axes[axis][name]],
        }
        self.chooser.made.parent.mkdir(parents=True, exist_ok=True)
        add_to_json(self.chooser.made, {self.chooser.label: record})
        if found is None:
            return "every trial diverged"
        name, metric = self.chooser.title, self.choice.metric
        say(f"{name}: {written(found['values'])}, {metric} {average(found):.4g}")
        if beyond(self.tried, metric):
            say(f"{name}: this value is at an end of its grid; widen it, or raise grow")
        return None


def written(values: Settings) -> str:
    return " ".join(f"{key}={value}" for key, value in values.items())


def result(trial: StudyJob, choice: Choice) -> float | None:
    """The metric of a trial, from its training or its evaluation; None if it is not finite."""
    records = [read_json(trial.made / "summary.json")]
    if choice.measure is not None:
        records = list(map(read_json, (trial.made / "evaluations").glob("*.json")))
    for name, value in ((n, v) for each in records for n, v in each.get("metrics", {}).items()):
        if name == choice.metric or name.startswith(f"{choice.metric}/"):
            return value if math.isfinite(value) else None
    return None
