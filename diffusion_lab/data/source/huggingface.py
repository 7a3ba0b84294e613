"""Image data sets of the Hugging Face hub, or on disk in its formats, read by `datasets`."""

import io
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from diffusion_lab.common import messages
from diffusion_lab.common.formats import some
from diffusion_lab.common.ranges import settings
from diffusion_lab.data.source.acquire import DataError
from diffusion_lab.data.source.image_files import FileSource
from diffusion_lab.data.source.listing import ImageFiles, Listed, labelled

SAVED = ("dataset_dict.json", "state.json")  # save_to_disk writes one of these


@settings
class HuggingFace(FileSource):
    """Images in a column of a data set, named `<split>/<index>`.

    `path` is a name on the hub, a folder, a folder of save_to_disk, or a parquet file. Labels are
    class labels, texts, numbers or lists of them; they are not read if `label_column` is None.
    """

    config: str | None = None
    split: str = "train"
    test_split: str | None = None
    image_column: str = "image"
    label_column: str | None = "label"

    @property
    def splits(self) -> tuple[str, str | None]:
        return self.split, self.test_split

    def find(self, split: str, classes: tuple[str, ...] | None) -> ImageFiles:
        """Lists the rows of a split, in order."""
        if split not in self._splits_found:
            raise DataError(
                f"{'split' if split == self.split else 'test_split'}={split} is not a split of "
                f"{self.path}, which has {some(list(self._splits_found))}"
            )
        rows = self._splits_found[split]
        for key, column in (("image", self.image_column), ("label", self.label_column)):
            if column is not None and column not in rows.column_names:
                raise DataError(
                    f"{key}_column={column} is not a column of {self.path}; write one of "
                    f"{some(rows.column_names)}{' or null' if key == 'label' else ''}"
                )
        classes, labels = self._labels(rows, classes)
        images = rows.select_columns(self.image_column)
        try:
            images = images.cast_column(self.image_column, self._package.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise DataError(
                f"image_column={self.image_column} of {self.path} contains no images; write one of "
                f"{some(rows.column_names)}"
            ) from error

        def stream(name: str) -> BinaryIO:
            image = images[int(name.rpartition("/")[2])][self.image_column]
            content = image["bytes"]
            return Path(image["path"]).open("rb") if content is None else io.BytesIO(content)

        names = [f"{split}/{index}" for index in range(len(rows))]
        where, state = f"{self.path} ({split})", f"{rows._fingerprint} {self.image_column}"
        return ImageFiles(where, names, classes, labels, stream, lambda name: state)

    def _labels(self, rows, classes: tuple[str, ...] | None) -> tuple[tuple[str, ...], Listed]:
        """The names of the classes, and the labels of a split."""
        if self.label_column is None or (classes == () and not self.label_size):
            return (), [0] * len(rows)
        where = f"the column {self.label_column} of {self.path}"
        labels: list[Any] = [int(x) if isinstance(x, bool) else x for x in rows[self.label_column]]
        if None in labels:
            raise DataError(
                f"{where} has no label in row {labels.index(None)}; give a column with a label in "
                "each row, or write label_column=null to train without labels"
            )
        names = getattr(rows.features[self.label_column], "names", ())  # of a ClassLabel column
        if names and classes and not set(names).isdisjoint(classes):  # in another order, maybe
            known: dict[Any, str] = dict(enumerate(names))
            labels = [known.get(label, str(label)) for label in labels]
        if not self.label_size and all(isinstance(label, str) for label in labels):
            classes = tuple(sorted(set(labels))) if classes is None else classes
            if strange := sorted(set(labels) - set(classes)):
                raise DataError(
                    f"{where} has {some(strange)}, but the classes are {some(classes)}; list all "
                    "of them in classes"
                )
            places = {name: place for place, name in enumerate(classes)}
            return classes, [places[label] for label in labels]
        if classes is None and names:
            classes = tuple(names)
        named = {str(index): label for index, label in enumerate(labels)}
        return labelled(named, classes, self.label_size, where)

    @cached_property
    def _splits_found(self) -> dict:
        """The splits of the data set by name; raises DataError if it cannot be loaded."""
        datasets, path = self._package, Path(self.path)
        try:
            if any((path / name).is_file() for name in SAVED):
                found = datasets.load_from_disk(self.path)
            elif path.is_file():
                found = datasets.load_dataset("parquet", data_files=self.path)
            else:
                found = datasets.load_dataset(self.path, self.config)
        except Exception as error:  # network, file formats, names: datasets raises anything
            reason = str(error).strip().partition("\n")[0]
            raise DataError(
                f"path={self.path} cannot be loaded ({reason}); write a name on the hub, a folder "
                "or a parquet file, and config if there are several configurations"
            ) from error
        return {self.split: found} if isinstance(found, datasets.Dataset) else dict(found)

    @cached_property
    def _package(self) -> Any:
        return messages.package("datasets", "huggingface", "a data set of Hugging Face")
