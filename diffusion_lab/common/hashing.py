"""Checksums of bytes, texts, files and tensors, all of them sha256 in hexadecimal digits."""

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any


def of_bytes(content: bytes) -> str:
    """The checksum of some bytes."""
    return hashlib.sha256(content).hexdigest()


def of_text(text: str) -> str:
    """The checksum of a text in UTF-8."""
    return of_bytes(text.encode())


def of_file(path: Path) -> str:
    """The checksum of a file's content, read in parts."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def of_tensors(tensors: Iterable[Any] | Mapping[str, Any]) -> str:
    """The checksum of the types, shapes and values of tensors, and of the names of named ones."""
    import torch  # late, since checksums of files need none

    named: Any = tensors.items() if isinstance(tensors, Mapping) else ((None, t) for t in tensors)
    digest = hashlib.sha256()
    for name, tensor in named:
        header = f"{tensor.dtype} {tuple(tensor.shape)}"
        digest.update((header if name is None else f"{name} {header}").encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
