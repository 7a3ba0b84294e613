"""Checks that a killed and resumed run ends as if it had not been killed.

    python experiments/faults/kills.py [--kills 20] [--out outputs/faults]

trains a tiny model of FashionMNIST once undisturbed. Then it starts the same run again and again,
kills each by SIGKILL at a random moment after its first checkpoint, every second one while a
checkpoint is being written, resumes it to the end, and compares it bit for bit with the first:
weights, averages, optimiser, schedule, states of callbacks, and logged rows. Writes results.json
and table.md.
"""

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from PIL import Image

from diffusion_lab.common.files import UNFINISHED
from diffusion_lab.runs import checkpoints

HERE = Path(__file__).parent
STEPS, CHECKPOINT_EVERY = 60, 3
RUN = [
    "data=fashion_mnist",
    "backbone=dit",
    "backbone.width=64",
    "backbone.heads=2",
    "backbone.depth=2",
    "backbone.patch=4",
    # keeps a history of losses, which a resumed run must restore
    "objective/time_sampler=second_moment",
    "objective.time_sampler.bins=10",
    "objective.time_sampler.history=2",
    "micro_batch_size=8",
    "batch_size=16",
    "sampler.steps=2",
    "lr_schedule=cosine",
    "lr_schedule.warmup_images=100",
    f"trainer.max_steps={STEPS}",
    "trainer.log_every_n_steps=1",
    "trainer=cpu",
    f"callbacks.checkpoint.every_n_steps={CHECKPOINT_EVERY}",
    "callbacks.sample_grid.every_n_steps=20",
    "callbacks.sample_grid.columns=2",
    "callbacks.evaluation=null",
    "validate_every_n_steps=15",
    "data.validation_size=100",
    "logger=none",
]
MEASURED = ("seconds", "train/images_per_second")  # measured by the clock
SECONDS_FOR_A_START = 300


def start(*overrides: str) -> subprocess.Popen:
    """Starts `diffusion-lab train` in a process of its own."""
    command = [sys.executable, "-m", "diffusion_lab", "train", *overrides]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen) -> str:
    """Waits for the end of a process, and returns its output."""
    said = process.communicate()[1]
    if process.returncode:
        sys.exit(said)
    return said


def rows(folder: Path) -> list[dict]:
    """Reads the complete rows of metrics.jsonl, without values measured by the clock."""
    found = []
    for line in (folder / "metrics.jsonl").read_text().splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        found.append({key: value for key, value in row.items() if key not in MEASURED})
    return found


def wait(process: subprocess.Popen, condition) -> None:
    """Waits until the condition holds; exits if the process ends before."""
    deadline = time.monotonic() + SECONDS_FOR_A_START
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            sys.exit(f"it was not killed in time: {process.communicate()[1]}")


def writing(folder: Path) -> bool:
    """Whether a checkpoint is being written, or was when the process died."""
    return any(name.endswith(UNFINISHED) for name in os.listdir(folder / checkpoints.FOLDER))


def kill(process: subprocess.Popen, folder: Path, draw: random.Random, while_writing: bool) -> None:
    """Kills a run at a random moment after its first checkpoint and before its last steps."""
    wait(process, (folder / checkpoints.LAST).exists)
    step = draw.randrange(CHECKPOINT_EVERY, STEPS - 2 * CHECKPOINT_EVERY)
    wait(process, lambda: len([row for row in rows(folder) if "train/loss" in row]) >= step)
    if while_writing:
        wait(process, lambda: writing(folder))
    else:
        time.sleep(draw.uniform(0, 0.2))  # some steps' time, to hit any part of a step
    process.send_signal(signal.SIGKILL)
    process.wait()


def corrupt(folder: Path) -> list[str]:
    """Lists damaged files, except those whose names mark them as unfinished."""
    bad = []
    for path in sorted(folder.rglob("*")):
        if path.name.endswith(UNFINISHED) or path.is_dir():
            continue
        if path.suffix == ".ckpt":
            whole = checkpoints.damage(path) is None
        elif path.suffix == ".png":
            with Image.open(path) as image:
                whole = image.load() is not None
        elif path.suffix == ".json":
            whole = bool(json.loads(path.read_text()))
        else:
            whole = path.stat().st_size > 0
        if not whole:
            bad.append(str(path.relative_to(folder)))
    return bad


def differences(first: object, second: object, where: str = "") -> list[str]:
    """The places at which two trees of tensors and plain values differ in any bit."""
    if isinstance(first, torch.Tensor):
        return [] if torch.equal(first, second) else [where]
    if isinstance(first, dict):
        if first.keys() != second.keys():
            return [where]
        pairs = [(first[key], second[key], f"{where}/{key}") for key in first]
    elif isinstance(first, list | tuple):
        if len(first) != len(second):
            return [where]
        pairs = [(a, b, f"{where}/{i}") for i, (a, b) in enumerate(zip(first, second, strict=True))]
    else:
        return [] if first == second else [where]
    return [found for pair in pairs for found in differences(*pair)]


def compare(whole: Path, folder: Path) -> list[str]:
    """Lists the places where a run differs from the undisturbed one."""
    states = [torch.load(f / checkpoints.LAST, weights_only=True) for f in (whole, folder)]
    parts = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "callbacks")
    found = [place for part in parts for place in differences(*(s[part] for s in states), part)]
    return found + differences(rows(whole), rows(folder), "metrics.jsonl")


def trial(number: int, whole: Path, out: Path, draw: random.Random) -> dict:
    """Runs one trial: a run is killed and resumed."""
    folder = out / f"killed_{number:02}"
    process = start(*RUN, f"run_dir={folder}")
    kill(process, folder, draw, while_writing=number % 2 == 1)
    made = max(row["step"] for row in rows(folder))
    found = {
        "killed_after_step": made,
        "while_writing_a_checkpoint": writing(folder),
        "corrupt_files": corrupt(folder),
    }
    saved = torch.load(checkpoints.newest_intact(folder), weights_only=True)["global_step"]
    finish(start(f"resume={folder}"))
    found |= {
        "steps_lost": made - saved,
        "differences": compare(whole, folder),
        "left_over": [str(p.name) for p in folder.rglob(f"*{UNFINISHED}")],
    }
    shutil.rmtree(folder)
    return found


def table(trials: list[dict]) -> str:
    """Writes a table of all kills, and of each kind."""
    lines = [
        "| killed | runs | resumed and equal bit for bit | steps lost, mean and most "
        "| corrupt files | files left over |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    kinds = {"while a checkpoint was written": [True], "at another moment": [False]}
    for name, kind in {**kinds, "all": [True, False]}.items():
        chosen = [each for each in trials if each["while_writing_a_checkpoint"] in kind]
        if not chosen:
            continue
        lost = [each["steps_lost"] for each in chosen]
        lines.append(
            f"| {name} | {len(chosen)} | {sum(not each['differences'] for each in chosen)} "
            f"| {sum(lost) / len(lost):.1f}, {max(lost)} "
            f"| {sum(len(each['corrupt_files']) for each in chosen)} "
            f"| {sum(len(each['left_over']) for each in chosen)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/faults"))
    arguments = parser.parse_args()
    if arguments.out.exists():
        sys.exit(f"{arguments.out} exists already; choose another folder by --out")
    os.environ["OMP_NUM_THREADS"] = "1"  # the same sums in the same order
    began, draw = time.monotonic(), random.Random(arguments.seed)
    whole = arguments.out / "whole"
    finish(start(*RUN, f"run_dir={whole}"))
    trials = []
    for number in range(arguments.kills):
        trials.append(trial(number, whole, arguments.out, draw))
        print(json.dumps(trials[-1]), flush=True)
    report = {
        "kills": len(trials),
        "steps": STEPS,
        "checkpoint_every": CHECKPOINT_EVERY,
        "seconds": round(time.monotonic() - began),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "trials": trials,
    }
    (HERE / "results.json").write_text(json.dumps(report, indent=1) + "\n")
    (HERE / "table.md").write_text(table(trials))
    print(table(trials))


if __name__ == "__main__":
    main()
