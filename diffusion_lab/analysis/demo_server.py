"""The server of the command `demo`: the page, drawings as server-sent events, and neighbours."""

import asyncio
import json
import socket
import threading
import traceback
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import uvicorn
from jinja2 import Environment, FileSystemLoader
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.routing import Route

from diffusion_lab.analysis.demo_run import ShownRun, choices
from diffusion_lab.assembly.sentences import MISTAKES, sentence
from diffusion_lab.report.page import PARTS

Show = Callable[..., None]  # the name of an event, and its facts


class Left(Exception):
    """Ends a drawing that nobody waits for any more."""


def serve(shown: Sequence[ShownRun], listening: socket.socket, host: str) -> None:
    """Serves the page on a socket of this host until Ctrl-C."""
    config = uvicorn.Config(app(shown, host), log_level="warning", timeout_graceful_shutdown=1)
    uvicorn.Server(config).run([listening])


def app(shown: Sequence[ShownRun], host: str) -> Starlette:
    """The page and what it asks for; other names of this machine are refused."""
    facts = {"runs": [each.facts for each in shown], "choices": choices()}
    folder = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    style = (PARTS / "page.css").read_text()
    page = folder.get_template("demo.html").render(facts=facts, style=style)

    routes = [Route("/", lambda request: HTMLResponse(page))]
    for place, run in enumerate(shown):
        routes += [Route(f"/draw/{place}", partial(draw, run))]
        routes += [Route(f"/nearest/{place}", partial(nearest, run))]
    # another site's page could else ask under a name of its own that leads here
    hosts = Middleware(TrustedHostMiddleware, [host, "localhost"])
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
    """Calls `work` in a thread, and yields what it shows as server-sent events.

    If the browser leaves, the next call of the function that shows raises Left.
    """
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
