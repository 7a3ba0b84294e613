"""Prints how much anonymous memory a program takes that reads a zip of images as training does.

    python -m helpers.anonymous_memory ZIP TEST_ZIP FOLDER

FOLDER gets the decoded images. JSON tells the bytes of the training split, the sums of the pixels
trained on and of the validation images, and RssAnon in bytes, at the start and at its peak.
"""

import json
import sys
import threading
from pathlib import Path

from torch import Tensor

from diffusion_lab.data import ImageDataModule
from diffusion_lab.data.loader import PassLoader, TensorLoader
from diffusion_lab.data.source import ImageZip

BATCH = 64


def anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


class Watch(threading.Thread):
    """Keeps the highest value of `anonymous`, every 20 ms."""

    def __init__(self):
        super().__init__(daemon=True)
        self.highest, self.done = 0, threading.Event()

    def run(self) -> None:
        while not self.done.wait(0.02):
            self.highest = max(self.highest, anonymous())


def sum_of(images: Tensor) -> int:
    return int(images.numpy().sum(dtype="int64"))  # torch's sum would copy them to int64


def main(path: str, test_path: str, folder: str) -> None:
    watch, start = Watch(), anonymous()
    watch.start()
    source = ImageZip(path, test_path=test_path, store=True, store_dir=folder)
    data = ImageDataModule(source)
    data.prepare_data()
    images, labels = data.reference_images(), data.reference_labels()
    found = {"bytes": images.nbytes, "fingerprint": data.fingerprint}
    loader = TensorLoader(images, labels, BATCH, 0, chosen=data.train_rows().places)
    found["trained"] = sum(
        sum_of(loader.batch_at(start).images[: loader.count - start])
        for start in range(0, loader.count, BATCH)
    )
    found["validation"] = sum(map(sum_of, data.validation_rows().batches(BATCH)))
    found["validated_on"] = sum(len(ids) for *_, ids in PassLoader(*data.validated_on(), BATCH))
    watch.done.set()
    watch.join()
    print(json.dumps(found | {"start": start, "peak": watch.highest}))


if __name__ == "__main__":
    main(*sys.argv[1:])
