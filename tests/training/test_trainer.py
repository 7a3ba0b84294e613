"""The trainer: how seldom its ranks wait for one another."""

from types import SimpleNamespace

import lightning
import pytest
import torch
from helpers.paths import CONF
from hydra import compose, initialize_config_dir
from lightning.pytorch.callbacks import Timer

from diffusion_lab.training.module import VOTES
from diffusion_lab.training.trainer import TimeLimit, build_trainer


class Counting:
    """A strategy that counts its broadcasts."""

    def __init__(self):
        self.asked = 0

    def broadcast(self, value):
        self.asked += 1
        return value


@pytest.mark.parametrize(("ranks", "asked"), [(1, 3 * VOTES), (2, 3)])
def test_a_time_limit_is_asked_for_when_ranks_vote(ranks, asked):
    limit, strategy = TimeLimit("00:01:00:00"), Counting()
    assert limit.state_key == Timer("00:01:00:00").state_key  # of earlier checkpoints
    for step in range(1, 3 * VOTES + 1):
        trainer = SimpleNamespace(
            world_size=ranks, global_step=step, strategy=strategy, should_stop=False
        )
        limit.on_train_batch_end(trainer)
    assert strategy.asked == asked


def test_ranks_do_not_ask_for_a_signal_at_each_micro_batch(monkeypatch):
    def asks(*_, **__):
        raise KeyboardInterrupt  # Lightning passes over an Exception

    monkeypatch.setattr(torch.distributed, "broadcast", asks)
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("train", ["trainer.accelerator=cpu", "trainer.max_time=00:00:10:00"])
    trainer = build_trainer(cfg, SimpleNamespace(accumulate=1), torch.device("cpu"), [])
    assert isinstance(trainer, lightning.Trainer)
    trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert [type(each) for each in trainer.callbacks if isinstance(each, Timer)] == [TimeLimit]
