"""TinyData through torch's DataLoader, whose worker process dies."""

import os
import signal

from torch.utils.data import DataLoader, Dataset

from diffusion_lab.data import ImageBatch, ImageDataModule


class Endless(Dataset):
    """Repeats the training images; image 60 kills the process that loads it."""

    def __init__(self, data):
        self.images, self.labels = data.train_images(), data.train_labels()

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        if index == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return ImageBatch(self.images[index % 64], self.labels[index % 64])


class DyingWorkers(ImageDataModule):
    """A data module that loses its one worker in the eighth batch, at a batch size of 8."""

    def train_dataloader(self):
        return DataLoader(Endless(self), self.micro_batch, num_workers=1, timeout=60)
