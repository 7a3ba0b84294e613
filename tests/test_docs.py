"""The documentation is true and whole: its commands, options and links, and it in a browser."""

import ast
import importlib
import re
import runpy
import shutil
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from functools import cache, partial
from html.parser import HTMLParser
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from helpers.pages import EXPERIMENTS, PAGES, WRITTEN, check_composes, commands_of
from helpers.paths import CONF, ROOT

DOCS = ROOT / "docs"
FAULTS = (DOCS / "pages/faults.md").read_text()
COPIED = ("Makefile", "conf", "diffusion_lab", "docs", "experiments", "pyproject.toml")
MADE = shutil.ignore_patterns(
    "__pycache__", ".cache", "site", "api", "options", "experiments", "tutorial"
)


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def options() -> Iterator[ModuleType]:
    """The script that writes the pages of options."""
    sys.path.append(str(DOCS))
    yield importlib.import_module("options")
    sys.path.remove(str(DOCS))


def test_a_name_that_is_imported_on_first_use_is_found_where_it_is_defined(options):
    defining = importlib.import_module("api").defining
    assert defining("diffusion_lab.metrics", "Metric") == "diffusion_lab.metrics.metric"


def test_no_option_is_without_a_word(options):
    files = CONF.rglob("*.yaml")
    assert [path for path in files if len(options.sentence_of(path.read_text())) < 5] == []


@pytest.mark.long
@pytest.mark.parametrize("page", [*WRITTEN, *EXPERIMENTS], ids=name_of)
def test_every_command_of_a_page_composes(page, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: name)  # launchers are not on every machine
    for line in commands_of(page):
        if "--config-dir" not in line:  # tested by test_own_parts.py
            check_composes(line)


def test_every_make_target_study_and_script_of_the_pages_exists():
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    studies = {path.stem for path in (CONF / "study").glob("*.yaml")} | {"..."}
    for page in [*WRITTEN, *EXPERIMENTS, ROOT / "README.md"]:
        text = page.read_text()
        for target in re.findall(r"(?:^    |`)make ([a-z-]+)(?=[`\s])", text, re.MULTILINE):
            assert target in targets, f"{page}: make {target}"
        for name in re.findall(r"make study NAME=([\w.]+)", text):
            assert name in studies, f"{page}: NAME={name}"
        for name in re.findall(r"experiments/[\w/]+\.(?:py|sh)\b", text):
            assert (ROOT / name).is_file(), f"{page}: {name}"


def test_every_page_is_in_the_navigation():
    def leaves(entries: list | str) -> Iterator[str]:
        if isinstance(entries, str):
            yield entries
        else:
            for entry in entries:
                for value in entry.values():
                    yield from leaves(value)

    named = set(leaves(tomllib.loads((DOCS / "zensical.toml").read_text())["project"]["nav"]))
    assert named - {"options/", "api/", "tutorial/tutorial.md"} == {page.name for page in WRITTEN}


def test_every_group_of_options_is_on_the_page_about_composing():
    text = (PAGES / "compose.md").read_text()
    for folder in (path for path in CONF.rglob("*") if path.is_dir() and list(path.glob("*.yaml"))):
        group = folder.relative_to(CONF).as_posix()
        top = group.split("/")[0]
        if top not in ("reconstruction", "hydra", "experiment") and group != "metrics/extractor":
            assert f"[`{group}`](../../conf/{group})" in text, group


def test_links_of_pages_lead_somewhere_on_github_too():
    for page in WRITTEN:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / link).exists(), f"{page}: {link}"


@pytest.mark.parametrize(
    ("link", "page"),
    [
        ("../../conf", "options/index.md"),
        ("../../conf/sampler", "options/sampler.md"),
        (
            "../../conf/objective/loss/weighting",
            "options/objective.md#objective-loss-weighting-options",
        ),
        ("../../conf/profile.yaml", "options/commands.md"),
        ("../../diffusion_lab/backbone", "api/backbone.md"),
        (
            "../../diffusion_lab/runs/models/unet/README.md",
            "diffusion_lab/runs/models/unet/README.md",
        ),
        ("../tutorial.ipynb", "tutorial/tutorial.md"),
        ("../../experiments/latent/README.md#protocol", "experiments/latent/README.md#protocol"),
        ("training.md", "training.md"),
    ],
)
def test_links_to_the_repository_are_links_to_pages_on_the_site(link, page):
    of_site = runpy.run_path(str(DOCS / "source_links.py"))["of_site"]
    assert of_site(f"See [a]({link}), [b]({link}).") == f"See [a]({page}), [b]({page})."


def test_the_rooms_are_the_real_ones():
    table = re.search(r"## The rooms\n.+?## ", (PAGES / "contributors.md").read_text(), re.DOTALL)
    package = ROOT / "diffusion_lab"
    rooms = [p.name + "/" for p in package.iterdir() if (p / "__init__.py").exists()]
    named = re.findall(r"^\| `(\S+)` \|", table[0], re.MULTILINE)
    assert set(named) == set(rooms)


def test_every_file_that_the_contributors_page_names_exists():
    for name in re.findall(r"`([\w/]+/\w+\.py)`", (PAGES / "contributors.md").read_text()):
        assert (ROOT / name).exists() or (ROOT / "diffusion_lab" / name).exists(), name


def keys_in(node: object, above: str = "") -> Iterator[str]:
    """The whole names of the keys of a configuration that have a value of their own."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from keys_in(value, f"{above}.{key}" if above else str(key))
    else:
        yield above


def test_every_key_of_an_option_is_on_its_page(options):
    for path in {*CONF.glob("*/**/*.yaml")} - {*CONF.glob("study/*")}:  # which are shown whole
        text = path.read_text()
        content = yaml.safe_load(text) or {}
        content.pop("defaults", None)
        keys = options.keys_of(text)
        found = {key.name for key in keys}
        assert all(key.comment in " ".join(text.replace("#", " ").split()) for key in keys), path
        assert not any(key.comment.startswith("- ") for key in keys), path
        for key in keys_in(content):
            if key and not key.endswith(("_partial_", "_convert_", "_recursive_")):
                # a value written in braces is one key with its braces
                shown = any(key == name or key.startswith(f"{name}.") for name in found)
                assert shown, f"{path}: {key}"


def test_the_page_on_faults_names_tests_that_exist_and_the_target_that_runs_them():
    rows = re.findall(r"^\| .+? \| (`test_.+`) \| `make (\S+)` \|$", FAULTS, re.MULTILINE)
    listed = {name: target for names, target in rows for name in re.findall(r"`(\w+)`", names)}
    found = {}
    for path in (ROOT / "tests").rglob("test_*.py"):
        text = path.read_text()
        for node in ast.parse(text).body if any(name in text for name in listed) else ():
            if isinstance(node, ast.FunctionDef) and node.name in listed:
                marks = set(map(ast.unparse, node.decorator_list))
                slower = (each for each in ("slow", "long") if f"pytest.mark.{each}" in marks)
                found[node.name] = "-".join(["test", *slower])
    assert found == listed


# ----------------------------------------------------------------------------------------------
# the built site


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The site, built as `make docs` does, in a copy of what it is made from."""
    pytest.importorskip("zensical", reason="pip install '.[docs]'")
    pytest.importorskip("latex2mathml", reason="pip install '.[docs]'")
    copy = tmp_path_factory.mktemp("docs")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            ignored = MADE if name == "docs" else shutil.ignore_patterns("__pycache__")
            shutil.copytree(source, copy / name, ignore=ignored)
        else:
            shutil.copy(source, copy / name)
    make = ["make", "docs", "-o", ".venv/docs", f"BIN={Path(sys.executable).parent}"]
    made = subprocess.run(make, cwd=copy, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    return copy / "docs/site"


class Page(HTMLParser):
    """The links of a page, and its anchors."""

    def __init__(self, path: Path):
        super().__init__()
        self.links: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag, attrs):
        for name, value in attrs:
            if name in ("href", "src") and value:
                self.links.append(value)
            elif name == "id" or (name == "name" and tag == "a"):
                self.anchors.add(value)


def linked(path: Path, site: Path) -> Path:
    """The file that a path stands for."""
    assert path.resolve().is_relative_to(site.resolve()), path
    return path / "index.html" if path.is_dir() else path


@pytest.mark.slow
def test_every_link_and_anchor_of_the_site_leads_somewhere(site):
    read, broken = cache(Page), []
    pages = [page for page in site.rglob("*.html") if page.name != "404.html"]
    assert len(pages) > len(WRITTEN)
    for page in pages:
        for link in read(page).links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            target = page.parent / unquote(parts.path) if parts.path else page
            target = linked(target, site)
            anchor = unquote(parts.fragment)
            if not target.exists() or (anchor and anchor not in read(target).anchors):
                broken.append(f"{page.relative_to(site)}: {link}")
    assert broken == []


class Silent(SimpleHTTPRequestHandler):
    """A server of files that says nothing."""

    def log_message(self, *_):
        pass


@pytest.fixture
def address(site) -> Iterator[str]:
    """Where the site is served."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def opened(browser, address: str, scheme: str):
    """A new tab, and a list of what it says, what fails in it and what it asks other servers."""
    tab = browser.new_context(color_scheme=scheme).new_page()
    heard: list[str] = []
    tab.on("console", lambda message: heard.append(f"{message.type}: {message.text}"))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on(
        "request",
        lambda request: (
            None
            if request.url.startswith((address, "data:", "blob:"))
            else heard.append(request.url)
        ),
    )
    return tab, heard


@pytest.mark.slow
def test_every_page_renders_in_light_and_dark(browser, address, site):
    grounds = {}
    for scheme in ("light", "dark"):
        tab, heard = opened(browser, address, scheme)
        for page in sorted(site.rglob("*.html") if scheme == "light" else site.glob("*.html")):
            name = page.relative_to(site).as_posix()
            tab.goto(address + name)
            assert tab.locator("article h1").first.is_visible(), name
            broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
            assert tab.evaluate(broken) == 0, name
            assert heard == [], name
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds[scheme] = [int(n) for n in re.findall(r"\d+", tab.evaluate(ground))[:3]]
    assert min(grounds["light"]) > 200
    assert max(grounds["dark"]) < 50


@pytest.mark.slow
def test_formulas_are_drawn_by_the_browser(browser, address):
    tab, _ = opened(browser, address, "light")
    tab.goto(address + "theory.html")
    assert tab.locator("math").count() > 50
    assert tab.locator("math[display=block]").first.bounding_box()["height"] > 10
    assert "$" not in tab.locator("article").inner_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "answer"),
    [
        ("checkpoint", "training.html#checkpoints-and-resuming"),
        ("add a metric", "own-parts.html#add-a-metric"),
        ("FID high", "metrics.html#why-is-my-fid-high"),
        ("resume", "start.html#stop-and-resume"),
        ("half_life_images", "training.html#averaged-weights"),
        ("max_rollbacks", "options/callbacks.html#non_finite"),
        ("multiple GPUs", "clusters.html#multiple-gpus-on-one-machine"),
    ],
)
def test_the_search_finds_the_page_that_answers(browser, address, words, answer):
    tab, heard = opened(browser, address, "light")
    tab.goto(address + "index.html")
    tab.locator(".md-search__button").click()
    tab.locator("dialog[aria-label=Search] input").fill(words)
    results = tab.locator("dialog[aria-label=Search] a")
    results.first.wait_for()
    links = results.evaluate_all("links => links.map(link => link.href)")
    found = [re.sub(r"\?[^#]*", "", link).removeprefix(address) for link in links]
    assert answer in found[:6]
    assert heard == []
