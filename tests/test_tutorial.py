"""The notebook docs/tutorial.ipynb: its code is public, its outputs are kept, and it runs."""

import ast
import base64
import importlib
import io
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace

import matplotlib
import pytest
from helpers.commands import prepare_for_commands
from helpers.paths import ROOT
from helpers.tiny_data import TinyData
from helpers.tiny_runs import PLAIN
from PIL import Image

import diffusion_lab
from diffusion_lab import runs

NOTEBOOK = ROOT / "docs/tutorial.ipynb"
SHARED = ("diffusion_lab.diffusion.schedule",)  # rooms of one file
PICTURES = 8  # the least number that a reader sees
SETTINGS = [*PLAIN, "study_name=tutorial", "callbacks.sample_grid=null", "budget.images=32"]
LARGEST = 300_000  # bytes, as the notebook is kept with its outputs


def code_cells(notebook: dict) -> list[dict]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def pictures(notebook: dict) -> list[Image.Image]:
    """The pictures among the outputs of a notebook."""
    outputs = [output for cell in code_cells(notebook) for output in cell["outputs"]]
    kept = [
        output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", ())
    ]
    return [Image.open(io.BytesIO(base64.b64decode("".join(each)))) for each in kept]


def check_was_run(notebook: dict) -> None:
    """Asserts that all cells were run in order, that none failed, and that pictures are there."""
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert "\\u001b" not in json.dumps(outputs)  # a terminal's colours, which a notebook is not
    found = pictures(notebook)
    assert len(found) >= PICTURES
    for picture in found:  # of one colour, it would show nothing
        low, high = picture.convert("L").getextrema()
        assert high - low > 100


@pytest.fixture(scope="module")
def kept() -> dict:
    return json.loads(NOTEBOOK.read_text())


def test_the_code_of_the_notebook_is_public(kept):
    for cell in code_cells(kept):
        for node in ast.walk(ast.parse("".join(cell["source"]))):
            if isinstance(node, ast.Import):
                assert not [a.name for a in node.names if a.name.startswith("diffusion_lab")]
            elif isinstance(node, ast.ImportFrom) and node.module.startswith("diffusion_lab"):
                module = importlib.import_module(node.module)
                of_all = module.__file__.endswith("__init__.py") or node.module in SHARED
                assert of_all, f"{node.module} is of one's own"
                names = [alias.name for alias in node.names]
                assert not [name for name in names if name.startswith("_")]
                if module is diffusion_lab:
                    assert set(names) <= set(diffusion_lab.__all__)
                assert all(hasattr(module, name) for name in names)
            elif isinstance(node, ast.Attribute):
                assert not node.attr.startswith("_")


def test_the_notebook_is_kept_as_it_was_run(kept):
    check_was_run(kept)
    assert NOTEBOOK.stat().st_size < LARGEST
    assert str(Path.home()) not in NOTEBOOK.read_text()


@pytest.fixture
def script(monkeypatch) -> Callable[[str], ModuleType]:
    """A function that imports a script of docs/ by its name."""
    monkeypatch.syspath_prepend(ROOT / "docs")
    return importlib.import_module


def test_the_page_shows_the_text_the_code_and_the_outputs(script, tmp_path, kept):
    page = script("tutorial").page_of(kept, tmp_path)
    assert page.count("```python") == len(code_cells(kept))
    assert "](pages/" not in page
    drawn = sorted(path.name for path in tmp_path.iterdir())
    assert len(drawn) == len(pictures(kept))
    assert all(f"]({name})" in page for name in drawn)


@pytest.mark.long
def test_the_code_of_the_notebook_runs_on_tiny_images(kept, tmp_path, monkeypatch):
    prepare_for_commands(monkeypatch, tmp_path)
    shown = SimpleNamespace(display=lambda *_, **__: None, Markdown=str)
    monkeypatch.setitem(sys.modules, "IPython.display", shown)
    own = 'FashionMNIST(os.environ.get("DIFFUSION_LAB_DATA", "data"))'
    names = {"TinyData": TinyData}
    with matplotlib.rc_context({"backend": "agg"}):
        for cell in code_cells(kept):
            code = "".join(cell["source"]).replace(own, "TinyData()")
            exec(code.replace("torch.tensor([9])", "torch.tensor([3])"), names)
            if "settings" in names:
                names["settings"] = SETTINGS
    assert (tmp_path / "outputs/tutorial/comparison/index.html").exists()


@pytest.mark.slow
def test_the_notebook_runs(script, tmp_path, monkeypatch):
    for needed in ("nbclient", "ipykernel"):
        pytest.importorskip(needed, reason="pip install '.[docs]'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    check_was_run(script("run_tutorial").run(tmp_path))
    folder = tmp_path / "outputs/tutorial"
    for name in ("unet", "dit"):
        summary = runs.load_summary(folder / name)
        assert summary.finished
        values = {key.partition("/")[0]: value for key, value in summary.metrics.items()}
        for metric in ("fid", "kid", "fid_real", "kid_real"):
            assert math.isfinite(values[metric])
        assert values["fid"] > values["fid_real"]
    assert (folder / "comparison/index.html").exists()
