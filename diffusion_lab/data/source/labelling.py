"""Labels of image files: of a dataset.json or a CSV beside them, as classes, numbers or captions.

A label is a class if it is a whole number, a vector if it is another number or a list of them, and
a caption if it is a text.
"""

import csv
import io
import json
from collections import Counter
from collections.abc import Sequence
from typing import Any

from diffusion_lab.common.formats import some
from diffusion_lab.common.labels import LARGEST, LONGEST, TEXT, is_caption, is_number
from diffusion_lab.data.source.listing import by_number
from diffusion_lab.data.source.verified_files import DataError

LABELS = "dataset.json"  # {"labels": [["00000/img00000000.png", 7], ...]}, or null for none
Listed = Sequence[int | list[float] | str]  # classes, vectors of equal lengths, or captions


def labels_of(content: bytes, where: str) -> dict[str, Any] | None:
    """The label of each image in a dataset.json, in its order; None if it says that there are none.

    `where` names the dataset.json in errors (DataError).
    """
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where} is not valid JSON ({error}); fix it") from error
    pairs = found.get("labels") if isinstance(found, dict) else found
    if pairs is None and isinstance(found, dict):
        return None
    form = (
        f'{where} must be {{"labels": [["name.png", 0], ...]}}, or have null in place of the list'
    )
    if not isinstance(found, dict) or not isinstance(pairs, list) or not pairs:
        raise DataError(form)
    for pair in pairs:
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise DataError(f"{form}, but it has {json.dumps(pair)[:60]}")
    return _once([(name, label) for name, label in pairs], where)


def labels_in_csv(content: bytes, where: str, as_text: bool = False) -> dict[str, Any]:
    """The label of each image in a CSV: titles, then names, each with numbers or a caption.

    Labels are captions if none is a number, or if they are to be taken `as_text`. `where` names the
    CSV in errors (DataError).
    """
    try:
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline="")))
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"{where} is not a readable CSV ({error}); fix it") from error
    titles, *rows = [line for line in lines if line] or [[]]
    if len(titles) < 2 or not rows:
        raise DataError(
            f"{where} must have a line of titles, and for each image its name and its numbers, or "
            "its caption"
        )
    pairs: list[tuple[str, Any]] = []
    texts = len(titles) == 2 and (as_text or not any(map(_numbers_in, rows)))
    for row in rows:
        if len(row) != len(titles) or not (texts or _numbers_in(row)):
            raise DataError(
                f"{where} has the line {','.join(row)[:60]}; it must have a name and "
                f"{len(titles) - 1} numbers, as many as there are titles, or, like all others, a "
                "caption"
            )
        pairs.append((row[0], row[1] if texts else _numbers_in(row)))
    return _once(pairs, where)


def labelled(
    named: dict[str, Any], classes: tuple[str, ...] | None, size: int | str | None, where: str
) -> tuple[tuple[str, ...], Listed]:
    """The classes and the labels of images by their names; only classes have classes.

    `size` is the length of vectors, 0 for classes, TEXT for captions; None infers it, unless
    `classes` are given. Raises DataError.
    """
    given = list(named.values())
    if size is None:
        size = 0 if classes is not None else _size_of(given)
    if size == 0:
        return by_number(list(named), given, classes, where), given
    if size == TEXT:
        for name, label in named.items():
            if not isinstance(label, str) or not is_caption(label):
                raise DataError(
                    f"{where} labels {name} with {str(label)[:60]!r}; a caption must have 1 to "
                    f"{LONGEST} bytes"
                )
        return (), given
    vectors = [label if isinstance(label, list) else [label] for label in given]
    for name, vector in zip(named, vectors, strict=True):
        if not all(map(is_number, vector)) or len(vector) != size:
            raise DataError(
                f"{where} labels {name} with {str(named[name])[:60]}; a label must be "
                f"{'a number' if size == 1 else f'{size} numbers'} of at most {LARGEST:.4g}, like "
                "the others"
            )
    return (), [[float(v) for v in vector] for vector in vectors]


def check_all(labelled: Sequence[str], names: Sequence[str], where: str) -> None:
    """Raises DataError unless all images, and no others, are labelled."""
    if absent := sorted(set(labelled) - set(names)):
        raise DataError(f"{where} has labels for missing images, {some(absent)}; remove them")
    if unlabelled := sorted(set(names) - set(labelled)):
        raise DataError(f"{where} has no label for {some(unlabelled)}; label all images or none")


def _numbers_in(row: Sequence[str]) -> list[float]:
    """The numbers after the name in a row of a CSV; none if one of them is no number."""
    try:
        return [float(cell) for cell in row[1:]]
    except ValueError:
        return []


def _size_of(labels: Sequence[Any]) -> int | str:
    """The length of vectors; TEXT if all are texts, 0 if all are whole numbers or anything else."""
    if all(isinstance(label, str) for label in labels):
        return TEXT
    first = next((label for label in labels if isinstance(label, float | list)), 0)
    return len(first) if isinstance(first, list) else int(isinstance(first, float))


def _once(pairs: Sequence[tuple[str, Any]], where: str) -> dict[str, Any]:
    twice = [name for name, count in Counter(name for name, _ in pairs).items() if count > 1]
    if twice:
        raise DataError(f"{where} labels {some(twice)} more than once; keep one label for each")
    return dict(pairs)
