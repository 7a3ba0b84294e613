"""Files of others are read without executing anything: tensors and plain data, or a refusal."""

import io
import os
import pickle
import sys
from argparse import Namespace
from collections import OrderedDict
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from helpers.reduced import Reduced
from helpers.reference_networks import Reference
from helpers.refusals import assert_names, refused
from torch import nn

from diffusion_lab.runs.importing.kind import EDM2Files, EDMFiles
from diffusion_lab.runs.importing.reading import read

SOURCE = "raise SystemExit('the source code in a pickle was executed')"


@pytest.fixture
def nvidia(monkeypatch):
    """A function that describes a module as NVIDIA's `torch_utils.persistence` does."""
    persistence, util = ModuleType("torch_utils.persistence"), ModuleType("dnnlib.util")

    def _reconstruct_persistent_obj(meta):
        raise AssertionError("only its name may be used")

    class EasyDict(dict):
        pass

    for module, each in ((persistence, _reconstruct_persistent_obj), (util, EasyDict)):
        each.__module__, each.__qualname__ = module.__name__, each.__name__
        setattr(module, each.__name__, each)
        monkeypatch.setitem(sys.modules, module.__name__.split(".")[0], ModuleType("package"))
        monkeypatch.setitem(sys.modules, module.__name__, module)

    def described(name: str, **state: object) -> Reduced:
        meta = {"type": "class", "version": 6, "module_src": SOURCE, "class_name": name}
        return Reduced(_reconstruct_persistent_obj, EasyDict(meta | {"state": state}))

    return described


def written(path: Path, content: object) -> Path:
    """Writes a pickle, or a file of torch where that is the path's suffix; returns the path."""
    if path.suffix == ".pt":
        torch.save(content, path)
    else:
        path.write_bytes(pickle.dumps(content))
    return path


def module_state(module: nn.Module, **others: object) -> dict:
    """The state of a module as its pickle holds it, with other attributes and children."""
    return module.__dict__ | others


def test_weights_of_a_network_of_nvidia_are_read_and_its_code_is_not_run(tmp_path, nvidia):
    linear, norm = nn.Linear(3, 2), nn.BatchNorm1d(2)
    layers = nn.ModuleDict({"first": nn.Identity()})
    layers._modules["first"] = nvidia("Linear", **module_state(linear))
    outer = module_state(nn.Module(), sigma_data=0.5, skip_scale=np.sqrt(0.5), size=np.ones(2))
    outer["_modules"] = {"layers": layers, "norm": nvidia("Norm", **norm.__dict__), "none": None}
    network = nvidia("EDMPrecond", **outer)
    path = written(tmp_path / "net.pkl", {"ema": network, "loss_fn": nvidia("Loss", p=1)})
    found, owner = read(path)
    assert (owner.name, owner.state["sigma_data"]) == ("EDMPrecond", 0.5)
    expected = {f"layers.first.{k}": v for k, v in linear.state_dict().items()}
    expected |= {f"norm.{k}": v for k, v in norm.state_dict().items()}
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_settings_in_a_pickle_are_numbers(tmp_path, nvidia):
    path = tmp_path / "net.pkl"
    state = Reference.stored("edm_ddpmpp").state
    whole = {"_parameters": state, "_buffers": {}, "_modules": {}}
    for std in ("{_target_:os.mkdir,path:executed}", "${oc.env:HOME}", [0.5]):
        written(path, {"ema": nvidia("EDMPrecond", **whole, sigma_data=std)})
        with pytest.raises((ValueError, TypeError)):
            EDMFiles().read(path)
    written(path, {"ema": nvidia("EDMPrecond", **whole, sigma_data=0.25)})
    assert "denoiser.input_std=0.25" in EDMFiles().read(path).overrides
    written(path, {"ema": nvidia("VPPrecond", **whole)})
    with refused("VPPrecond"):
        EDMFiles().read(path)


def test_networks_of_edm2_are_read_from_their_pickles(tmp_path, nvidia):
    path = tmp_path / "net.pkl"
    whole = {"_parameters": Reference.stored("edm2").state, "_buffers": {}, "_modules": {}}
    encoder = nvidia("StandardRGBEncoder", scale=np.float32(0.5) / np.ones(4, np.float32))
    network = nvidia("Precond", **whole, sigma_data=0.25)
    written(path, {"ema": network, "encoder": encoder, "dataset_kwargs": {"path": "x"}})
    found = EDM2Files(head_channels=16).read(path)
    assert "denoiser.input_std=0.25" in found.overrides
    assert (found.shape, found.num_classes) == ((3, 16, 16), 5)
    written(path, {"ema": nvidia("EDMPrecond", **whole)})
    with refused("EDMPrecond"):
        EDM2Files().read(path)


def test_views_of_one_storage_keep_their_place(tmp_path):
    whole = torch.arange(12.0).view(3, 4)
    parts = {"column": whole[:, 1], "transposed": whole.T, "whole": whole}
    found, _ = read(written(tmp_path / "net.pkl", parts))
    assert all(torch.equal(found[name], part) for name, part in parts.items())


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in a network"])
@pytest.mark.parametrize(
    "function",
    [os.mkdir, os.system, eval, exec, __import__, getattr, open, pickle.loads, torch.load],
    ids=lambda function: function.__name__,
)
def test_a_file_that_would_run_code_is_refused(tmp_path, nvidia, function, inside, suffix):
    bait = str(tmp_path / "executed")
    argument = {
        os.mkdir: bait,
        os.system: f"mkdir {bait}",
        eval: f"__import__('os').mkdir({bait!r})",
        exec: f"import os; os.mkdir({bait!r})",
        __import__: "this",
        open: bait,
    }.get(function, b"")
    more = {open: ("w",), getattr: ("mro",)}.get(function, ())
    content: object = Reduced(function, argument, *more)
    if inside:
        content = nvidia("EDMPrecond", _parameters={}, _modules={}, _buffers={}, x=content)
    path = written(tmp_path / f"net.{suffix}", {"ema": content, "w": torch.zeros(2)})
    with refused(path):
        read(path)
    assert not (tmp_path / "executed").exists()
    assert "this" not in sys.modules


def test_a_tensor_whose_numbers_are_a_program_is_refused(tmp_path):
    bait = tmp_path / "executed"
    inner = io.BytesIO()
    torch.save(Reduced(os.mkdir, str(bait)), inner, _use_new_zipfile_serialization=False)
    for content in (inner.getvalue(), pickle.dumps(Reduced(os.mkdir, str(bait)))):
        hostile = Reduced(torch.storage._load_from_bytes, content)
        path = written(tmp_path / "net.pkl", {"w": hostile})
        with refused(path):
            read(path)
    assert not bait.exists()


def test_an_object_outside_of_the_file_is_refused(tmp_path):
    class Pickler(pickle.Pickler):
        def persistent_id(self, obj):
            return "elsewhere" if obj == "outside" else None

    buffer = io.BytesIO()
    Pickler(buffer).dump({"w": "outside"})
    (tmp_path / "net.pkl").write_bytes(buffer.getvalue())
    with refused(tmp_path / "net.pkl"):
        read(tmp_path / "net.pkl")


def test_averaged_weights_of_a_training_script_are_taken(tmp_path, capfd):
    weights = {"w": torch.ones(2, dtype=torch.float16), "steps": torch.tensor(3)}
    checkpoint = {"model": {"w": torch.zeros(2)}, "ema": OrderedDict(weights), "opt": {"lr": 1.0}}
    arguments = Namespace(model="DiT-S/2", seed=0)
    path = written(tmp_path / "0400000.pt", checkpoint | {"args": arguments})
    found, _ = read(path)
    assert_names(capfd.readouterr().err, "ema", path)
    assert found["w"].dtype == torch.float32
    assert found["w"].tolist() == [1, 1]
    assert found["steps"].dtype == torch.int64


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_a_checkpoint_that_is_in_itself_is_refused(tmp_path, suffix):
    content: dict = {}
    content["ema"] = content
    path = written(tmp_path / f"net.{suffix}", content)
    with refused(path):
        read(path)


def test_a_module_in_itself_or_in_many_places_is_read_once(tmp_path, nvidia):
    state = {"_parameters": {"w": torch.ones(1)}, "_buffers": None, "_modules": {}}
    for _ in range(40):  # doubled each time
        inner = nvidia("Inner", **state)
        state = {"_parameters": None, "_modules": {"a": inner, "b": inner}}
    network = nvidia("Outer", **state)
    assert len(read(written(tmp_path / "net.pkl", {"ema": network}))[0]) == 1
    around = nn.ModuleDict()
    around._modules["self"] = around
    around._parameters["w"] = nn.Parameter(torch.ones(1))
    assert [*read(written(tmp_path / "net.pkl", around))[0]] == ["w"]


@pytest.mark.parametrize("missing", ["_parameters", "_buffers", "_modules"])
def test_an_object_without_parts_has_no_weights(tmp_path, nvidia, missing):
    network = nvidia("EDMPrecond", **{missing: None})
    path = written(tmp_path / "net.pkl", {"ema": network})
    with refused(path):
        read(path)


WHOLE = pickle.dumps({"w": torch.zeros(100)}, protocol=2)  # torch warns of another one
DAMAGED = {
    "empty": b"",
    "text": b"no weights",
    "half": WHOLE[: len(WHOLE) // 2],
    "cut inside a number": b"\x80\x02\x58\x00",
    "a tensor of nothing": pickle.dumps(
        {"w": Reduced(torch._utils._rebuild_tensor_v2, None, 0, (1,), (1,), False, OrderedDict())},
        protocol=2,
    ),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_or_hostile_file_is_named(tmp_path, content):
    for name in ("net.pkl", "net.pt", "net.safetensors"):
        (tmp_path / name).write_bytes(content)
        with refused(tmp_path / name):
            read(tmp_path / name)


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        {"w": "text"},
        {"w": torch.zeros(1), "n": 3},
        {"w": torch.eye(2).to_sparse()},
        {"w": torch.eye(2, device="meta")},
        {1: torch.eye(2)},
    ],
)
def test_a_file_of_other_things_than_named_weights_is_refused(tmp_path, content):
    path = written(tmp_path / "net.pt", content)
    with refused(path):
        read(path)


def test_files_of_other_kinds_are_refused(tmp_path):
    (tmp_path / "net.onnx").write_bytes(b"")
    for path in (tmp_path / "net.onnx", tmp_path / "missing.pt", tmp_path):
        with refused(path):
            read(path)
