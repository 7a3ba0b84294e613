"""Whether W&B's server, or another one, can be reached from here."""

import netrc
import os
import socket
from urllib.parse import urlparse

MODES = ("auto", "online", "offline")
REACH_SECONDS = 2.0  # how long to look for the server before a run goes offline


def why_offline(mode: str) -> str | None:
    """Returns why a run of this mode does not go to W&B's server, or None if it does."""
    if mode in ("online", "offline"):
        return "as requested" if mode == "offline" else None
    if os.environ.get("WANDB_MODE", "online") != "online":
        return f"WANDB_MODE={os.environ['WANDB_MODE']}"
    return why_unreachable()


def why_unreachable() -> str | None:
    """Returns why nothing can be sent to W&B's server, or None if it can."""
    address = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai"))
    host = address.hostname or ""
    if not os.environ.get("WANDB_API_KEY") and not _in_netrc(host):
        return "no API key; `wandb login` stores one"
    return no_connection(address.geturl())


def no_connection(url: str) -> str | None:
    """Returns that nothing answers at the host and port of a URL, or None if something does."""
    address = urlparse(url)
    host, port = address.hostname or "", address.port or (443 if address.scheme == "https" else 80)
    try:
        socket.create_connection((host, port), timeout=REACH_SECONDS).close()
    except OSError:
        return f"no connection to {host}"
    return None


def _in_netrc(host: str) -> bool:
    try:
        return netrc.netrc().authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False
