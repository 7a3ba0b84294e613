"""The checkpoints of a run: the last one and the one before it, each written whole or not at all.

A checkpoint is torch's zip file, of tensors and plain data. Its checksums, which torch itself does
not look at, tell damage.
"""

import errno
import os
import zipfile
from pathlib import Path

import torch

from diffusion_lab.common.files import UNFINISHED, remove_unfinished, replacing, to_disk
from diffusion_lab.common.messages import UserError, say

FOLDER = Path("checkpoints")  # in that of the run
LAST, PREVIOUS, DAMAGED = FOLDER / "last.ckpt", FOLDER / "previous.ckpt", FOLDER / "damaged.ckpt"
LINK = f".{PREVIOUS.name}{UNFINISHED}"  # beside the last one: its name to be


def save(checkpoint: dict, path: Path) -> None:
    """Writes `path`; what was there becomes previous.ckpt beside it, once the new one is whole.

    Raises OSError, for a full disk too, and leaves both as they were.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        torch.save(checkpoint, file)
        to_disk(file)
        if path.exists():
            previous, link = (path.with_name(name) for name in (PREVIOUS.name, LINK))
            link.unlink(missing_ok=True)
            try:
                os.link(path, link)
            except OSError:  # no hard links here
                link = path
            os.replace(link, previous)


def exists(run: str | Path) -> bool:
    """Whether a run has saved anything."""
    return any((Path(run) / name).is_file() for name in (LAST, PREVIOUS))


def newest_whole(run: str | Path) -> Path:
    """The last checkpoint of a run, or the one before it if that is damaged or missing.

    Raises UserError if there is none, none that is whole, or one that cannot be read.
    """
    found = [path for name in (LAST, PREVIOUS) if (path := Path(run) / name).is_file()]
    if not found:
        raise UserError(f"{run} has no {LAST} yet; let it train to its first checkpoint")
    damages = []
    for path in found:
        reason = damage(path)
        if reason is None:
            return path
        damages.append(f"{path} is damaged ({reason})")
    raise UserError(f"{' and '.join(damages)}, and there is no other; train the run again")


def say_if_older(run: str | Path, used: Path) -> None:
    """Says that a checkpoint is not the last one, and why that is not used."""
    last = Path(run) / LAST
    if used.name != PREVIOUS.name:
        return
    reason = f"is damaged ({damage(last)})" if last.exists() else "is missing"
    say(f"{last} {reason}; the one before it, {used}, is used in its place")


def damage(path: Path) -> str | None:
    """The fault of a checkpoint, found by a look at every byte of it; None if there is none.

    Raises UserError where it cannot be read, which may pass and says nothing of what is in it.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if member := archive.testzip():
                return f"the checksum of its part {member} is wrong"
        # structure; the numbers themselves are not read
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except MemoryError as error:
        raise UserError(f"there is too little memory to read {path}") from error
    except Exception as error:  # zipfile and torch raise all kinds
        # but for a place that is not in the file, which is where damage may send them
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise UserError(
                f"{path} cannot be read ({error.strerror}); try again when it can"
            ) from error
        return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
    return None


def resume_from(run: Path) -> Path:
    """The newest whole checkpoint, with what a kill left out of its way; the run must be locked.

    Raises UserError if there is none.
    """
    whole, last = newest_whole(run), run / LAST
    say_if_older(run, whole)
    if whole != last and last.exists():
        os.replace(last, run / DAMAGED)  # or it would take the place of the one that is whole
    for folder in (run, run / FOLDER):
        remove_unfinished(folder)
    for folder in run.glob("*/"):
        remove_unfinished(folder, "step_*")  # training's; another command may be at its own
    return whole
