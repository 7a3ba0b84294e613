"""A simulated GPU finds the faults that a CPU does not see."""

from shutil import copytree

import pytest
import torch
from helpers import simulated_gpu
from helpers.gpu import only_simulated
from helpers.simulated_gpu import counts
from helpers.simulated_gpu.files import LoadedToGPU
from helpers.simulated_gpu.tensors import DeviceMixed
from helpers.tiny_runs import QUICK

from diffusion_lab.diffusion.sampler import UniPC

pytestmark = only_simulated


@pytest.fixture
def folder(lab, trained_once, tmp_path):
    """The folder of `lab`, with a run on the GPU."""
    copytree(
        trained_once("train", *QUICK, "trainer.max_steps=2", "run_dir=run"),
        tmp_path,
        dirs_exist_ok=True,
    )
    return tmp_path


def test_a_tensor_that_a_sampler_leaves_on_the_cpu(lab, folder, monkeypatch):
    walk = UniPC.walk

    def faulty(self, denoise, x, levels, schedule, randn_like):
        for moved in walk(self, denoise, x, levels, schedule, randn_like):
            yield moved + torch.zeros(x.shape)

    sample = ["sample", "run=run", "num_samples=2", "sampler=unipc", "output=drawn"]
    lab.done(*sample)
    monkeypatch.setattr(UniPC, "walk", faulty)
    lab.done(*sample, "device=cpu")
    with pytest.raises(DeviceMixed, match=r"on cuda:0, .* on cpu"):
        lab(*sample)


def test_a_file_that_is_loaded_without_a_device(lab, folder, monkeypatch):
    load = torch.load
    lab.done("train", "resume=run", "trainer.max_steps=3")
    monkeypatch.setattr(torch, "load", lambda *args, map_location, **more: load(*args, **more))
    with pytest.raises(LoadedToGPU, match=r"loads a tensor to cuda:0"):
        lab("train", "resume=run", "trainer.max_steps=4")


def test_an_operation_for_which_the_host_waits():
    counts.reset()
    values = torch.arange(4, device="cuda")
    assert (values + 1).sum().item() == 10
    assert values[values > 1].tolist() == [2, 3]
    torch.ones(3).to("cuda", non_blocking=True)
    torch.ones(3).to("cuda")
    found = {each.partition(" in ")[0]: times for each, times in counts.waits.items()}
    assert found == {
        "aten::_local_scalar_dense": 1,
        "aten::index by a mask": 1,
        "tolist": 1,
        "copy to the GPU": 1,
    }


def test_numbers_are_not_read_without_a_copy():
    with pytest.raises(TypeError, match="numpy"):
        torch.ones(3, device="cuda").numpy()


def test_other_versions_of_pytorch_are_refused_with_a_reason(monkeypatch):
    assert simulated_gpu.missing() == ""
    monkeypatch.setattr(torch, "__version__", "3.1.0")
    assert simulated_gpu.missing() == "GPUs are simulated with PyTorch 2.13, and this is 3.1.0"
