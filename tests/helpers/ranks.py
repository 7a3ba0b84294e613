"""Runs commands and functions on ranks that are forked from this process, in place of torchrun."""

import io
import json
import multiprocessing
import os
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist

from helpers.commands import command_line

RANKS = 2
PATIENCE = 200  # seconds


class Ended(NamedTuple):
    """How a command ended: its exit code, and what it wrote to standard output and error."""

    code: int
    out: str
    err: str


def called(patch: pytest.MonkeyPatch, *arguments: str) -> Ended:
    """Runs a command in this process."""
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        code = command_line(patch, *arguments)
    return Ended(code, out.getvalue(), err.getvalue())


def on_two_ranks(lines: Mapping[str, Sequence[str]], folder: Path) -> list[dict[str, Ended]]:
    """Runs commands by names, one after the other, on two connected ranks; how they ended on each.

    `folder` is for the ranks' answers.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # a new process would import for seconds
    places = [folder / f"rank{rank}.json" for rank in range(RANKS)]
    ranks = [
        context.Process(target=_rank, args=(rank, port, lines, place))
        for rank, place in enumerate(places)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(PATIENCE)
        process.kill()
    answers = [json.loads(place.read_text()) for place in places]
    return [{name: Ended(*ended) for name, ended in answer.items()} for answer in answers]


def _rank(rank: int, port: int, lines: Mapping[str, Sequence[str]], place: Path) -> None:
    variables = {
        "TORCHELASTIC_RUN_ID": "x",
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": port,
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": RANKS,
        "LOCAL_WORLD_SIZE": RANKS,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, str(value))
        ended = {name: called(patch, *arguments) for name, arguments in lines.items()}
        place.write_text(json.dumps(ended))
        os._exit(0)  # without what pytest does at its end


def on_ranks(world: int, folder: Path, work: Callable, *arguments: object) -> list:
    """The results of work(rank, ...) on each of `world` connected ranks.

    `folder` is for the ranks' answers. A rank waits 30 seconds for the others.
    """
    given = (world, folder, work, arguments)
    torch.multiprocessing.start_processes(_work, given, nprocs=world, start_method="fork")
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]


def _work(rank: int, world: int, folder: Path, work: Callable, arguments: tuple) -> None:
    place, patience = f"file://{folder}/connections", timedelta(seconds=30)
    dist.init_process_group("gloo", place, patience, world, rank)
    torch.save(work(rank, *arguments), folder / f"rank{rank}.pt")
    dist.destroy_process_group()
