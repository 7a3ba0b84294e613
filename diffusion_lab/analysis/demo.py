"""The command `demo`: a page on this machine on which one or two runs draw, step by step.

Each drawing is that of a command line of `sample`, which the page shows. The page gets drawings as
server-sent events, and asks for the training images that are nearest to theirs.
"""

import asyncio
import base64
import io
import json
import re
import shlex
import socket
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import uvicorn
from hydra import compose
from jinja2 import Environment, FileSystemLoader
from omegaconf import DictConfig
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route
from torch import Tensor

from diffusion_lab.analysis.evaluate import ROWS, SWEEPS
from diffusion_lab.analysis.sample import wanted_labels
from diffusion_lab.assembly.config_keys import as_list, flat
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.assembly.objects import read_data
from diffusion_lab.assembly.sentences import MISTAKES, conf_dir, sentence, text_of
from diffusion_lab.common.files import read_rows
from diffusion_lab.common.formats import amount
from diffusion_lab.common.images import as_pil, to_float
from diffusion_lab.common.labels import Classes
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.families.diffusion.run import DiffusionRun, open_diffusion_run
from diffusion_lab.metrics.neighbours import RELATIVE, nearest_view
from diffusion_lab.metrics.quantity import REAL
from diffusion_lab.report.page import PARTS
from diffusion_lab.runs.checkpoints import file_of
from diffusion_lab.runs.current import CHECKPOINT, CurrentWeights
from diffusion_lab.runs.opened import inherited
from diffusion_lab.runs.results import Record, Sampling, differing, evaluations_of, sampling_of
from diffusion_lab.runs.search import run_at

HERE = "127.0.0.1"
OPENING = ("average", "step", "data_root", "device", "precision")  # keys that `sample` has, too
CONTROLS = {  # of the page -> the key or group of `sample` that each sets
    "label": "labels",
    "sampler": "sampler",
    "steps": "sampler.steps",
    "guidance": "guidance",
    "scale": "guidance.scale",
    "seed": "seed",
}
GROUPS = {  # without options that another family draws with, or that need files
    "sampler": {"codes"},
    "guidance": {"autoguidance", "classifier", "logits"},
}
PICTURES = 50  # most steps of a drawing that are shown
KEPT = 20  # drawings of a run that are kept for questions about their images
ROWS_AT_ONCE = 10_000  # training images that are compared at once
Show = Callable[..., None]  # the name of an event, and its facts
Asked = Mapping[str, str]  # control -> what was chosen; nothing or "" for the run's own


@dataclass(frozen=True)
class ShownRun:
    """A run on the page."""

    path: Path
    opened: DiffusionRun
    step: int | None  # of a checkpoint other than the newest
    command: list[str]  # the command line of `sample` without what the page asks
    evaluations: list[Record]
    turn: threading.Lock  # held by the run that takes a step, so that two share the processor
    drawn: dict[str, Tensor] = field(default_factory=dict)  # the last drawings by command

    @classmethod
    def open(cls, path: Path, cfg: DictConfig, turn: threading.Lock) -> "ShownRun":
        """Opens the run in a folder; raises UserError for one that draws no images."""
        given = {key: cfg[key] for key in OPENING if cfg[key] not in (None, "auto")}
        given = {"run": path, **given, "num_samples": cfg.num_samples}
        command = [f"{key}={text_of(str(value))}" for key, value in given.items()]
        asked = compose("sample", command)
        opened = open_diffusion_run(asked)  # which finds the number of step=best
        if max(opened.datamodule.native_shape[1:]) == 1:
            raise UserError(f"{path} draws points in the plane; give a run that draws images")
        earlier = None if asked.step is None else file_of(path, asked.step)
        found = evaluations_of(path, opened.saved.seed, CurrentWeights(path, earlier))
        for sweep in sorted((path / SWEEPS).glob(f"*/{ROWS}")):
            for row in read_rows(sweep):
                if row.get(CHECKPOINT) == opened.weights[CHECKPOINT]:  # none in older rows
                    names = ("fid", f"fid{REAL}")
                    metrics = {f"{name}/{row['protocol']}": row[name] for name in names}
                    found.append({"sampling": row["sampling"], "metrics": metrics})
        return cls(path, opened, asked.step, command, found, turn)

    @property
    def facts(self) -> dict[str, object]:
        """The facts of the run that the page needs."""
        kind = self.opened.datamodule.labels
        parameters = sum(each.numel() for each in self.opened.model.denoiser.parameters())
        return {
            "name": str(self.path),
            "network": type(self.opened.model.denoiser.backbone).__name__,
            "parameters": amount(parameters),
            "shape": self.opened.datamodule.native_shape,
            "classes": kind.names if self.opened.conditional and isinstance(kind, Classes) else (),
        }

    def overrides(self, asked: Asked) -> list[str]:
        """The overrides of `sample` for what was chosen; raises UserError for other characters."""
        found = list(self.command)
        for control, key in CONTROLS.items():
            if not re.fullmatch(r"[\w.+-]*", value := asked.get(control, "")):
                raise UserError(f"{control}={value} is none of the choices")
            if value and (control != "label" or self.opened.conditional):
                found.append(f"{key}={value}")
        return found

    def draw(self, asked: Asked, show: Callable[[int, str], None]) -> dict[str, object]:
        """Draws the images that `sample` draws; returns the last picture and facts about it.

        `show` gets the number of each step, at most PICTURES of them, and its picture: the noisy
        images in a row, above the estimates. May raise UserError.
        """
        overrides = self.overrides(asked)
        with self.turn:  # Hydra has one state for all threads
            cfg = compose("sample", overrides)
        cfg.step = self.step  # as opening the run would write it
        cfg = inherited(cfg, self.opened.saved, ("sampler", "guidance"), overrides)
        check_keys(cfg, {"seed": whole(0)})
        pipeline = self.opened.pipeline(cfg)
        labels = wanted_labels(cfg, pipeline, self.opened.datamodule.labels)
        last: tuple[Tensor, ...] = ()  # call of the network: noisy images, estimates
        step, every, began = 0, -(-pipeline.steps // PICTURES), time.perf_counter()

        def see(*call: Tensor) -> None:
            nonlocal last
            last = call

        def on_step() -> None:
            nonlocal step
            step += 1
            self.turn.release()
            try:
                if step % every == 0:
                    decoded = map(pipeline.first_stage.decode, last)
                    show(step, picture(*map(self.images, decoded)))
            finally:
                self.turn.acquire()

        with self.turn, self.opened.autocast:
            ids = range(cfg.num_samples)
            images = self.images(pipeline.watched(see)(ids, cfg.seed, labels, on_step))
        command = shlex.join(["diffusion-lab", "sample", *overrides])
        self.drawn[command] = images
        while len(self.drawn) > KEPT:
            del self.drawn[next(iter(self.drawn))]
        kind = self.opened.datamodule.labels
        captions = [] if labels is None else [kind.caption(label) for label in labels]
        return {
            "picture": picture(images),
            "captions": captions,
            "command": command,
            "seconds": time.perf_counter() - began,
            "measured": self.measured(sampling_of(cfg)),
        }

    def images(self, batch: Tensor) -> Tensor:
        """The images of a batch of the model, uint8 (B, C, H, W), of native size on the CPU."""
        return self.opened.datamodule.to_native(batch.cpu())

    def measured(self, sampling: Sampling) -> list[str]:
        """The FIDs that were measured with this sampler and guidance, whatever the seed."""
        found: dict[str, float] = {}
        for each in self.evaluations:
            if set(differing(flat(each["sampling"]), flat(sampling))) <= {"seed"}:
                found |= each["metrics"]
        return [
            f"FID {value:.4g}, real images {found[f'fid{REAL}/{protocol}']:.4g} ({protocol})"
            for (metric, _, protocol), value in ((n.partition("/"), v) for n, v in found.items())
            if metric == "fid"
        ]

    def nearest(self, command: str, place: int) -> dict[str, object]:
        """The training image that is nearest by pixels to an image that was drawn, and how near.

        Reads the data at the first call. Raises UserError for images that are not kept any more.
        """
        if command not in self.drawn or not 0 <= place < len(self.drawn[command]):
            raise UserError("this image is not kept any more; draw it again")
        image, data = self.drawn[command][place], self.opened.datamodule
        with self.turn:
            read_data(self.opened.saved, data)
            training = data.train_images()
            views = [to_float(each)[None].flatten(1) for each in (image, image.flip(-1))]
            views = views if self.opened.mirrored else views[:1]
            found = [
                nearest_view(views, to_float(part).flatten(1), min(2, len(part)))
                for part in training.split(ROWS_AT_ONCE)
            ]
        starts = range(0, len(training), ROWS_AT_ONCE)
        distances = torch.cat([near for near, _ in found], 1)[0]
        index = torch.cat([at + start for (_, at), start in zip(found, starts, strict=True)], 1)[0]
        near = distances.topk(2, largest=False)
        first = int(index[near.indices[0]])
        share = (near.values[0] / near.values[1].clamp(min=1e-12)).item()
        return {
            "picture": picture(training[first][None]),
            "caption": data.labels.caption(data.train_labels()[first]) if data.num_classes else "",
            "words": f"training image {first:,} of {len(training):,}, at {share:.0%} of the "
            f"distance of the second nearest; a copy has less than {RELATIVE:.0%}",
        }


def picture(*rows: Tensor) -> str:
    """Rows of images, uint8 (B, C, H, W) each, as a PNG in a data URI, without gaps."""
    whole_picture = torch.cat([torch.cat([*images], -1) for images in rows], -2)
    as_pil(whole_picture).save(data := io.BytesIO(), "png")
    return f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"


class Left(Exception):
    """Ends a drawing that nobody waits for any more."""


def demo(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Serves the page for the runs `cfg.paths` until Ctrl-C; returns its address.

    Raises UserError for a wrong number of runs, a run that cannot be opened, or a port in use.
    """
    check_keys(cfg, {"num_samples": whole(1, 100), "port": whole(0, 65535)})
    paths = [run_at(Path(str(path))) for path in as_list(cfg.paths)]
    if not 1 <= len(paths) <= 2:
        raise UserError(f"{len(paths)} runs are given; write diffusion-lab demo RUN, or RUN RUN")
    listening = listen(cfg.port)
    turn = threading.Lock()
    shown = [ShownRun.open(path, cfg, turn) for path in paths]
    address = f"http://{HERE}:{listening.getsockname()[1]}"
    say(f"Open {address} in a browser; Ctrl-C ends the demo")
    config = uvicorn.Config(app(shown), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listening])
    return {"address": address}


def listen(port: int) -> socket.socket:
    """A socket on this machine's own address alone; raises UserError if the port is taken."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((HERE, port))
    except OSError as error:
        raise UserError(
            f"port={port} cannot be used ({error.strerror}); write another, or port=0 for any"
        ) from error
    return listening


def app(shown: Sequence[ShownRun]) -> Starlette:
    """The page and what it asks for; other names of this machine are refused."""
    choices = {
        group: sorted({path.stem for path in (conf_dir() / group).glob("*.yaml")} - without)
        for group, without in GROUPS.items()
    }
    facts = {"runs": [each.facts for each in shown], "choices": choices}
    folder = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    style = (PARTS / "page.css").read_text()
    page = folder.get_template("demo.html").render(facts=facts, style=style)

    routes = [Route("/", lambda request: HTMLResponse(page))]
    for place, run in enumerate(shown):
        routes += [Route(f"/draw/{place}", partial(draw, run))]
        routes += [Route(f"/nearest/{place}", partial(nearest, run))]
    # another site's page could else ask under a name of its own that leads here
    hosts = Middleware(TrustedHostMiddleware, [HERE, "localhost"])
    return Starlette(routes=routes, middleware=[hosts])


async def draw(run: ShownRun, request: Request) -> StreamingResponse:
    """The events of a drawing: `step` for each, and `end`, or `failed`."""
    asked = dict(request.query_params)

    def work(show: Show) -> None:
        show("end", **run.draw(asked, lambda at, picture: show("step", step=at, picture=picture)))

    return StreamingResponse(events(work), media_type="text/event-stream")


async def nearest(run: ShownRun, request: Request) -> JSONResponse:
    """The training image that is nearest to an image of a drawing."""
    asked = request.query_params
    try:
        place = int(asked.get("place", ""))
        found = await run_in_threadpool(run.nearest, asked.get("command", ""), place)
    except ValueError as error:
        found = {"failed": str(error)}
    return JSONResponse(found)


async def events(work: Callable[[Show], None]) -> AsyncIterator[str]:
    """Calls `work` in a thread, and yields what it shows as server-sent events."""
    loop, left = asyncio.get_running_loop(), threading.Event()
    shown: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue()

    def put(event: tuple[str, dict[str, Any]] | None) -> None:
        loop.call_soon_threadsafe(shown.put_nowait, event)

    def show(name: str, **facts: Any) -> None:
        if left.is_set():
            raise Left
        put((name, facts))

    def run() -> None:
        try:
            work(show)
        except Left:
            return
        except MISTAKES as error:
            put(("failed", {"words": sentence(error)}))
        except Exception:  # the page must not wait for ever
            traceback.print_exc()
            put(("failed", {"words": "drawing failed, as the terminal says"}))
        put(None)

    loop.run_in_executor(None, run)
    try:
        while (event := await shown.get()) is not None:
            name, facts = event
            yield f"event: {name}\ndata: {json.dumps(facts)}\n\n"
    finally:
        left.set()
