"""Rows of loss and speed."""

from types import SimpleNamespace

import torch

from diffusion_lab.callbacks import Throughput


def test_a_window_that_is_gone_on_with_is_where_the_module_is():
    throughput = Throughput()
    # a checkpoint is read before the module has gone to its device
    saved = {"losses_since_the_last_row": torch.tensor([1.0, 2.0])}
    throughput.on_load_checkpoint(None, SimpleNamespace(device=torch.device("cpu")), saved)
    module = SimpleNamespace(device=torch.device("meta"))
    throughput.on_train_start(SimpleNamespace(callbacks=[]), module)
    assert [loss.device.type for loss in throughput._losses] == ["meta", "meta"]
