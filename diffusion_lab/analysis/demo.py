"""The command `demo`: a page on this machine on which one or two runs draw, step by step."""

import socket
import threading
from pathlib import Path

from omegaconf import DictConfig

from diffusion_lab.analysis.demo_run import ShownRun
from diffusion_lab.assembly.config_keys import as_list
from diffusion_lab.assembly.instantiate import check_keys
from diffusion_lab.common.messages import UserError, say
from diffusion_lab.common.ranges import whole
from diffusion_lab.runs.search import run_at

HERE = "127.0.0.1"


def demo(cfg: DictConfig, overrides: list[str]) -> dict[str, object]:
    """Serves the page for the runs `cfg.paths` until Ctrl-C; returns its address.

    Raises UserError for a wrong number of runs, a run that cannot be opened, or a port in use.
    """
    try:
        from diffusion_lab.analysis.demo_server import serve
    except ImportError as error:
        raise UserError(
            f"demo needs {error.name}, which is not installed; write pip install "
            "'diffusion-lab[demo]'"
        ) from error
    check_keys(cfg, {"num_samples": whole(1, 100), "port": whole(0, 65535)})
    paths = [run_at(Path(str(path))) for path in as_list(cfg.paths)]
    if not 1 <= len(paths) <= 2:
        raise UserError(f"{len(paths)} runs are given; write diffusion-lab demo RUN, or RUN RUN")
    listening = listen(cfg.port)
    turn = threading.Lock()
    shown = [ShownRun.open(path, cfg, turn) for path in paths]
    address = f"http://{HERE}:{listening.getsockname()[1]}"
    say(f"Open {address} in a browser; Ctrl-C ends the demo")
    serve(shown, listening, HERE)
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
