"""A callback that records which images each step saw, and can end a run by a fault."""

import json
from pathlib import Path
from zlib import crc32

from lightning.pytorch.callbacks import Callback

SEEN = ["+callbacks.seen._target_=helpers.seen_images.SeenImages", "++callbacks.seen.folder=seen"]


class SeenImages(Callback):
    """Appends [step, the place in the step, hashes of the images] to `folder`/rank*.jsonl."""

    def __init__(self, folder: str, die_at: int | None = None):
        self.folder = Path(folder)
        self.die_at = die_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
        if trainer.global_step == self.die_at:
            raise RuntimeError("the fault that a test asked for")
        accumulate, rank = trainer.accumulate_grad_batches, trainer.global_rank
        place = batch_idx % accumulate * trainer.world_size + rank
        hashes = [crc32(image.numpy().tobytes()) for image in batch[0]]
        self.folder.mkdir(exist_ok=True)
        with (self.folder / f"rank{rank}.jsonl").open("a") as file:
            file.write(json.dumps([trainer.global_step, place, hashes]) + "\n")


def seen(folder: Path) -> dict[int, list[int]]:
    """The hashes of each step in the order of the global batch; of repeated steps, the last."""
    steps: dict[int, dict[int, list[int]]] = {}
    for path in sorted(folder.glob("rank*.jsonl")):
        for line in path.read_text().splitlines():
            step, place, hashes = json.loads(line)
            steps.setdefault(step, {})[place] = hashes
    return {
        step: [image for place in sorted(parts) for image in parts[place]]
        for step, parts in steps.items()
    }
