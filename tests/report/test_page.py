"""The page of a comparison: self-contained, escaped, accessible, and working in a browser."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from helpers.fake_runs import NAME, STUDY_PROTOCOL, UNET, fake_group, fake_run
from PIL import Image

from diffusion_lab.report.arms import COLOUR_OF
from diffusion_lab.report.comparison import Report
from diffusion_lab.report.figures import COLOURS
from diffusion_lab.report.frame import collect
from diffusion_lab.report.page import compare, grid_noise
from diffusion_lab.report.records import read

VOID = {"meta", "input", "img", "br", "link", "path", "use", "rect", "circle"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The index.html of two compositions with three seeds each, and a third with one."""
    folder = tmp_path_factory.mktemp("page")
    runs = folder / "runs"
    more = {f"kid/{NAME}": 0.2, f"recall/{NAME}": 0.4, f"recall_real/{NAME}": 0.8}
    fake_group(runs, "dit", [100.0, 110.0, 90.0], metrics=more)
    fake_group(runs, "unet", [150.0, 162.0, 144.0], config=UNET, metrics=more)
    fake_run(runs / "one", 130.0, config={"backbone": {"_target_": "lab.<script>&\"'"}})
    fake_run(runs / "cut<b>", 1.0, 9, summary={"finished": False})
    compare([str(runs)], str(folder / "comparison"))
    return folder / "comparison/index.html"


def test_the_question_of_a_study_is_the_title(tmp_path):
    for name, config in (("dit", {}), ("unet", UNET)):
        protocol = STUDY_PROTOCOL | {"stop": "are three seeds enough?"}
        fake_group(tmp_path / "runs", name, [1.0, 2.0], config=config | {"protocol": protocol})
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    text = (tmp_path / "out/index.html").read_text()
    for tag in ("title", "h1"):
        assert f"<{tag}>{STUDY_PROTOCOL['question']}</{tag}>" in text
    assert "are three seeds enough?</li>" in text  # without a full stop


@pytest.mark.parametrize(
    "other",
    [
        {"conditioning": {"_target_": "diffusion_lab.backbone.conditioning.Unconditional"}},
        {"data": {"pad": 32}},
        {"data": {"source": {"path": "others"}}},
        {"data": {"source": {"image_size": [32, 32]}}},
    ],
)
def test_grids_of_other_classes_or_sizes_have_other_noise(tmp_path, other):
    own = fake_run(tmp_path / "own", 1.0), fake_run(tmp_path / "more", 2.0, config=UNET)
    assert len({grid_noise(run) for run in read(own)[0]}) == 1
    fake_run(tmp_path / "other", 3.0, config=UNET | other)
    assert len({grid_noise(run) for run in read([own[0], tmp_path / "other"])[0]}) == 2


@pytest.mark.long
@pytest.mark.usefixtures("real_plots")
def test_arms_keep_their_colours_and_pairs_of_many_are_a_matrix(tmp_path):
    networks = ("UNet", "DiT", "Mamba2", "Other")
    for place, name in enumerate(networks):
        config = {"backbone": {"_target_": f"diffusion_lab.backbone.{name}"}}
        fids = [100.0 + 20 * place + each for each in (0, 3, -2)]
        fake_group(tmp_path / "runs", name, fids, config=config)
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert [COLOUR_OF[name] for name in networks[:3]] == [0, 1, 2]
    for name in ("fid_gaps", "fid_by_seed", "fid_against_images"):
        svg = (tmp_path / f"out/plots/{name}.svg").read_text()
        assert {COLOURS[0], COLOURS[1], COLOURS[2]} <= set(re.findall("#[0-9a-f]{6}", svg))
    text = (tmp_path / "out/index.html").read_text()
    matrix = text[text.index('id="pairs-fid-all-caption"') :].partition("</table>")[0]
    assert matrix.count("<tr>") == 5
    assert matrix.count("<td class") == 16


@pytest.mark.usefixtures("real_plots")
def test_arms_whose_short_names_are_equal_have_their_whole_names(tmp_path):
    names = ["a network of very many layers, 1", "a network of very many layers, 2"]
    for place, name in enumerate(names):
        config = {"arm": name, "backbone": {"width": place}}
        fake_group(tmp_path, f"{place}", [100.0 + 9 * place, 101.0], config=config)
    report = Report(collect([tmp_path]))
    assert all(all(f">{name}<" in each.file for name in names) for each in report.figures)


class Outline(HTMLParser):
    """Collects unclosed tags, ids and references to them, images, tables, headings and links."""

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.references, self.images, self.tables = [], [], [], [], []
        self.headings, self.links = [], []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if tag not in VOID:
            self.open.append(tag)
        if "id" in attributes:
            self.ids.append(attributes["id"])
        for name in ("aria-labelledby", "for"):
            self.references += attributes.get(name, "").split()
        if tag == "img":
            self.images.append(attributes)
        if tag in ("table", "caption", "th"):
            self.tables.append((tag, attributes))
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "a":
            self.links.append(attributes["href"])

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag


def outline(page):
    parser = Outline()
    parser.feed(page.read_text())
    parser.close()
    return parser


@pytest.mark.long
def test_the_page_is_well_formed_and_described(page):
    found = outline(page)
    assert found.open == []
    assert len(found.ids) == len(set(found.ids))
    assert set(found.references) <= set(found.ids)
    assert all(image["alt"] for image in found.images)
    assert len(found.images) == 6  # a strip and a grid of each composition
    kinds = [kind for kind, _ in found.tables]
    assert kinds.count("table") == kinds.count("caption") >= 4
    assert all(each.get("scope") in ("col", "row") for kind, each in found.tables if kind == "th")
    assert found.headings[0] == 1
    assert found.headings.count(1) == 1
    assert all(b - a <= 1 for a, b in zip(found.headings, found.headings[1:], strict=False))
    assert found.links[0] == "#verdict"  # a link to skip the head of the page
    for svg in re.findall(r"<svg.*?</svg>", page.read_text(), re.DOTALL):
        assert re.search(r'role="img" aria-labelledby="(\S+) (\S+)"', svg)
        assert re.search(r"<desc[^>]*>\S", svg)


def test_the_page_asks_for_nothing_from_elsewhere(page):
    text = page.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<]+", text))
    assert addresses <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert "default-src 'none'" in text
    sources = re.findall(r"\bsrc=\"([^\"]{0,20})", text)
    assert all(source.startswith("data:image/") for source in sources)


def test_names_are_escaped(page):
    text = page.read_text()
    assert text.count("<script>") == 1
    assert "&lt;script&gt;&amp;&#34;" in text
    assert "cut&lt;b&gt;" in text


def test_every_colour_of_a_plot_follows_the_theme(page):
    text = page.read_text()
    svgs = re.findall(r"<svg.*?</svg>", text, re.DOTALL)
    assert len(svgs) > 2
    assert not any(re.search(r"#[0-9a-f]{6}\b", svg) for svg in svgs)
    used = set(re.findall(r"var\((--\w+)\)", "".join(svgs)))
    assert {"--ink", "--grid", "--c0", "--c1", "--c2"} <= used
    for name in used:
        assert len(re.findall(rf"{name}: #", text)) == 2, "in light and in dark"


@pytest.mark.parametrize("kept", [8, 100])  # bytes, of which the first are the header
def test_a_damaged_grid_is_left_out_and_named(tmp_path, capfd, kept):
    for width in (1, 2):
        folder = fake_run(tmp_path / f"runs/{width}", 1.0, config={"backbone": {"width": width}})
    grid = folder / "samples/step_9999999.png"
    Image.effect_noise((400, 400), 100.0).save(grid)
    data = grid.read_bytes()
    grid.write_bytes(data[:kept] + data[kept:].replace(b"IDAT", bytes(4)))
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    drawn = outline(tmp_path / "out/index.html").images
    assert drawn
    assert all("width=1" in each["alt"] for each in drawn)
    assert folder.name in capfd.readouterr().err


@pytest.mark.slow
@pytest.mark.usefixtures("real_plots")
def test_the_page_stays_small_with_many_large_grids(tmp_path):
    rng = np.random.default_rng(0)
    for width in range(30):
        folder = fake_run(
            tmp_path / "runs" / str(width), 1.0, config={"backbone": {"width": width}}
        )
        noise = rng.integers(0, 255, (500, 500, 3)).astype(np.uint8)
        Image.fromarray(noise.repeat(2, 0).repeat(2, 1)).save(folder / "samples/step_9999999.png")
    compare([str(tmp_path / "runs")], str(tmp_path / "out"))
    assert (tmp_path / "out/index.html").stat().st_size < 10_000_000
    assert len(outline(tmp_path / "out/index.html").images) == 30


def opened(browser, page, **settings):
    """The page in a new tab, and a list of its console messages, errors and web requests."""
    tab = browser.new_context(offline=True, **settings).new_page()
    heard = []
    tab.on("console", lambda message: heard.append(message.text))
    tab.on("pageerror", lambda error: heard.append(str(error)))
    tab.on(
        "request",
        lambda request: heard.append(request.url) if request.url.startswith("http") else None,
    )
    tab.goto(page.as_uri())
    return tab, heard


@pytest.mark.slow
def test_the_page_works_in_a_browser(browser, page):
    tab, heard = opened(browser, page)
    names, column = "table.main tbody th", "table.main tbody td[data-label=FID]"
    assert tab.locator("#verdict svg:visible").count() == 2
    assert tab.locator(names).first.inner_text().endswith("DiT")
    for image in tab.locator("img").all():
        image.evaluate("image => image.loading = 'eager'")
    tab.wait_for_function("[...document.images].every(i => i.complete && i.naturalWidth)")

    # tables are sorted by mouse and by keyboard, and the status says so
    header = tab.locator("table.main th").filter(has_text="FID").first
    values = [
        float(each) for each in tab.locator(column).evaluate_all("a => a.map(c => c.dataset.value)")
    ]
    header.locator("button").click()
    assert header.get_attribute("aria-sort") == "ascending"
    header.locator("button").focus()
    tab.keyboard.press("Enter")
    assert header.get_attribute("aria-sort") == "descending"
    after = [
        float(each) for each in tab.locator(column).evaluate_all("a => a.map(c => c.dataset.value)")
    ]
    assert after == sorted(values, reverse=True) != values
    assert tab.locator("table.main th[aria-sort=none]").count() > 3

    # the first link that Tab reaches skips to the verdict
    tab.reload()
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.getAttribute('href')") == "#verdict"
    assert heard == []


@pytest.mark.slow
def test_text_can_be_read_in_light_and_in_dark_and_the_page_fits_a_telephone(browser, page):
    """Every colour of text and markers has a contrast of 4.5 with the page (WCAG 2.2, AA)."""
    for scheme in ("light", "dark"):
        tab, heard = opened(
            browser, page, color_scheme=scheme, viewport={"width": 390, "height": 800}
        )
        colours = tab.evaluate(
            """names => Object.fromEntries(names.map(name => [name,
            getComputedStyle(document.documentElement).getPropertyValue('--' + name).trim()]))""",
            ["paper", "ink", "soft", "accent", "chosen", "raised", *(f"c{i}" for i in range(8))],
        )
        for name in colours.keys() - {"paper", "chosen", "raised"}:
            for ground in ("paper", "raised") + (("chosen",) if name in ("ink", "soft") else ()):
                ratio = contrast(colours[name], colours[ground])
                assert ratio >= 4.5, f"{name} on {ground} in {scheme}: {ratio:.2f}"
        assert tab.evaluate("document.documentElement.scrollWidth") <= 390
        assert heard == []


def contrast(a: str, b: str) -> float:
    """The contrast ratio of two colours #rrggbb, as WCAG defines it."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return sum(weight * p for weight, p in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    high, low = sorted((luminance(a), luminance(b)), reverse=True)
    return (high + 0.05) / (low + 0.05)
