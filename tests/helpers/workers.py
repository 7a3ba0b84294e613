"""TinyData through torch's DataLoader, whose processes a test can kill."""

import os
import signal

from torch.utils.data import DataLoader, Dataset

from diffusion_lab.data import ImageBatch, ImageDataModule


class Endless(Dataset):
    """The training images over and over; the 60th is the end of the process that loads it."""

    def __init__(self, data):
        self.images, self.labels = data.train_images(), data.train_labels()

    def __len__(self):
        return 1_000_000

    def __getitem__(self, index):
        if index == 60:
            os.kill(os.getpid(), signal.SIGKILL)
        return ImageBatch(self.images[index % 64], self.labels[index % 64])


class DyingWorkers(ImageDataModule):
    """Loses its one process for data in the eighth batch of eight."""

    def train_dataloader(self):
        return DataLoader(Endless(self), self.micro_batch, num_workers=1, timeout=60)
