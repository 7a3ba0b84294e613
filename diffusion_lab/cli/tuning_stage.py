"""The first stage of a tuned study: sweeps over values until the best are inside their grids."""

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig

from diffusion_lab.build.config_keys import Means, means
from diffusion_lab.build.instantiate import instantiate
from diffusion_lab.build.overrides import key_of, parse, unquoted
from diffusion_lab.cli.sweep_plan import Left, composed, elements, listed
from diffusion_lab.common.files import add_to_json
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.runs.folder import load_summary
from diffusion_lab.training import study
from diffusion_lab.training.tuning import (
    FOLDER,
    Point,
    Tried,
    Tuning,
    average,
    file_of,
    has_diverged,
    name_of,
    refuse_tuned,
)

SEED = "seed"
Network = dict[str, str]  # a value of each of the keys whose combinations are tuned
Sweep = Callable[[list[str]], list[dict]]  # from overrides to the outcomes of all jobs


@dataclass(frozen=True)
class TuningStage:
    """A study's tuning runs; `overrides` are common to all of them."""

    tuning: Tuning
    study: str
    overrides: list[str]
    networks: list[Network]

    def try_all(
        self, networks: Sequence[Network], points: Sequence[Point], sweep: Sweep
    ) -> list[list[Tried]]:
        """Trains the runs of all combinations; returns what each network reached at each point.

        Raises UserError if a run failed for another reason than that its training diverged.
        """
        swept = {key: [each[key] for each in networks] for key in networks[0]}
        swept |= {key: [str(each[key]) for each in points] for key in points[0]}
        swept[SEED] = list(map(str, self.tuning.seeds))
        choices = [f"{k}=choice({','.join(dict.fromkeys(v))})" for k, v in swept.items()]
        reached, failed = {}, []
        for outcome in sweep([*self.overrides, *choices]):
            given = parse(outcome["overrides"])
            values = {key_of(each): unquoted(elements(each)[0]) for each in given}
            folder = Path(values["run_dir"]) if "run_dir" in values else None
            trained = "error" not in outcome
            if folder and (trained or has_diverged(folder)):
                place = tuple(values[key] for key in swept)
                reached[place] = self.result(folder) if trained else None
            else:
                failed.append(outcome.get("error", "a job ended without a result"))
        count = len(networks) * len(points) * len(self.tuning.seeds)
        if len(reached) < count:
            why = f", the first of them because {failed[0]}" if failed else ""
            raise UserError(
                f"{count - len(reached)} tuning runs of {self.study} failed{why}; mend that, and "
                "repeat the command"
            )

        def tried(network: Network, point: Point) -> Tried:
            words = [elements(each)[0] for each in parse(f"{k}={v}" for k, v in point.items())]
            chosen = [unquoted(value) for value in network.values()]
            places = {s: (*chosen, *words, s) for s in map(str, self.tuning.seeds)}
            return {"values": point, "results": {s: reached[p] for s, p in places.items()}}

        return [[tried(network, point) for point in points] for network in networks]

    def grow(self, tried: list[list[Tried]], sweep: Sweep) -> None:
        """Tries values beyond the ends that win, and adds them to what each network has tried.

        Raises Left once SLURM has all of their runs, if the command does not wait for them.
        """
        for grown in range(self.tuning.grow):
            left = None
            for point, numbers in self.beyond(tried, grown):
                networks = [self.networks[number] for number in numbers]
                for name in map(name_of, networks):
                    say(f"{name}: the best value is at an end, trying {written(point)}")
                try:
                    results = self.try_all(networks, [point], sweep)
                except Left as error:  # the other values can be submitted, too
                    left = error
                    continue
                for number, result in zip(numbers, results, strict=True):
                    tried[number] += result
            if left:
                raise left

    def beyond(self, tried: list[list[Tried]], grown: int) -> list[tuple[Point, list[int]]]:
        """The values to try next, each with the networks, by their numbers, that need it."""
        found: dict[tuple, tuple[Point, list[int]]] = {}
        for number, each in enumerate(tried):
            for point in self.tuning.beyond(each, grown):
                # a sweep takes all combinations: of two keys, also those that need other values
                alone = number if len(self.tuning.of) > 1 else None
                found.setdefault((written(point), alone), (point, []))[1].append(number)
        return list(found.values())

    def result(self, folder: Path) -> float | None:
        """The metric of a finished run; None for another run, or if it has no finite one."""
        if not load_summary(folder).get("finished"):
            return None
        with suppress(UserError):
            return study.final_metric(folder, self.tuning.metric)
        return None


def tune(name: str, flags: list[str], overrides: list[str], sweep: Sweep) -> None:
    """Tunes a study by calls of `sweep`, and writes what it found; does nothing if none is tuned.

    Finished runs are not repeated and stopped ones are resumed. Raises UserError if the study
    leaves open how its tuning runs should be.
    """
    stage = planned(name, flags, overrides)
    if stage is None:
        return
    tuning, points = stage.tuning, first_points(stage.tuning)
    count = len(stage.networks) * len(points) * len(tuning.seeds)
    say(f"Tuning {', '.join(tuning.values)} for {stage.study} by {tuning.metric}: {count} runs")
    tried = stage.try_all(stage.networks, points, sweep)
    stage.grow(tried, sweep)
    pairs = zip(stage.networks, tried, strict=True)
    found = {name_of(network): result_of(tuning, network, each) for network, each in pairs}
    add_to_json(file_of(stage.study), found)  # other commands may tune other networks of the study


def planned(name: str, flags: list[str], overrides: list[str]) -> TuningStage | None:
    """The tuning that a sweep needs before its runs; None if it needs none of its own."""
    cfg = composed(name, flags, overrides)
    if not cfg.get("tuning") or cfg.tuning.running:
        return None
    tuning: Tuning = instantiate(cfg, "tuning")
    if tuning.study_in(cfg) != cfg.study_name:
        return None
    parsed = dict(zip(overrides, parse(overrides), strict=True))
    given = {key_of(each): each for text, each in parsed.items() if "=" in text}
    refuse_tuned(tuning, given)
    varied, own = varied_in(cfg, given), set(map(key_of, parse(tuning.overrides)))
    check(tuning, varied, own, cfg)
    replaced = {SEED, "study_name", *tuning.of, *own}
    kept = [text for text, each in parsed.items() if key_of(each) not in replaced]
    runs = [*kept, *tuning.overrides_of_runs(), f"study_name={cfg.study_name}/{FOLDER}"]
    values = [elements(varied[key]) for key in tuning.of]
    networks = [dict(zip(tuning.of, chosen, strict=True)) for chosen in product(*values)]
    return TuningStage(tuning, cfg.study_name, runs, networks)


def varied_in(cfg: DictConfig, given: dict[str, Override]) -> dict[str, Override]:
    """The keys that a study or a sweep varies; `given` are those of the command line."""
    by_study = {key_of(each): each for each in parse(listed(cfg))}
    named = {
        key: each for key, each in given.items() if each.is_sweep_override() or key in by_study
    }
    return by_study | named


def check(tuning: Tuning, varied: dict[str, Override], fixed: set[str], cfg: DictConfig) -> None:
    """Raises UserError unless the tuning runs are complete, comparable, and not the study's own."""
    budget = cfg.get("budget")
    if tuning.images is not None and (not budget or budget.seconds is not None):
        raise UserError(
            f"tuning.images={tuning.images} needs a study with a budget of images; write "
            "budget=images budget.images=..., or tuning.images=null"
        )
    changing = [key for key in tuning.values if Means.LOSS in means(key)]
    if tuning.metric == "val/loss" and changing:
        raise UserError(
            f"val/loss is a different quantity for each {changing[0]}, so it cannot choose one; "
            "write tuning.metric=fid"
        )
    if missing := [key for key in tuning.of if key not in varied]:
        raise UserError(
            f"tuning.of contains {missing[0]}, which the study does not vary; remove it from "
            "tuning.of, or give it values"
        )
    if open_keys := sorted(varied.keys() - {SEED, *tuning.of} - fixed):
        key = open_keys[0]
        raise UserError(
            f"{key} varies in the study, but tuning does not say how; add it to tuning.of, or its "
            f"value to tuning.overrides, as in 'tuning.overrides=[\"{key}=...\"]'"
        )
    seeds = elements(varied[SEED]) if SEED in varied else [str(cfg.seed)]
    if both := [seed for seed in tuning.seeds if str(seed) in seeds]:
        raise UserError(
            f"tuning.seeds contains {both[0]}, a seed of the study itself; choose others, as in "
            "tuning.seeds=[100]"
        )


def first_points(tuning: Tuning) -> list[Point]:
    """The combinations of the values to begin with."""
    chosen = product(*tuning.values.values())
    return [dict(zip(tuning.values, values, strict=True)) for values in chosen]


def result_of(tuning: Tuning, network: Network, tried: list[Tried]) -> dict[str, object]:
    """Says and returns the result for a network, as tuning.json keeps it."""
    best, name = tuning.best(tried), name_of(network)
    if best is None:
        say(f"{name}: every tuning run failed")
        return {"chosen": None, "tried": tried}
    others = [f"{written(o['values'])}: {average(o):.4g}" for o in tried if o is not best]
    beside = f" ({', '.join(others)})" if others else ""
    say(f"{name}: {written(best['values'])}, {tuning.metric} {average(best):.4g}{beside}")
    if not tuning.inside(tried):
        say(f"{name}: this value is at an end of its grid; widen tuning.values, or tuning.grow")
    return {"chosen": best["values"], "tried": tried}


def written(point: Point) -> str:
    return " ".join(f"{key}={value:g}" for key, value in point.items())
