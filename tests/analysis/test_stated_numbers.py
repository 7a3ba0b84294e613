"""Numbers in prose are those of the records that their marks name."""

import re
import shutil

import pytest
import tables
from helpers.fake_runs import UNET, fake_group
from helpers.refusals import assert_names

from diffusion_lab.analysis.publishing import publish

ROWS = "network,seed,steps,fid,fid_real\n" + "\n".join(
    f"UNet,{seed},{steps},{fid},50"
    for seed, steps, fid in ((0, 10, 100), (1, 10, 110), (0, 20, 90), (1, 20, 92))
)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """A published comparison, a CSV file, and a JSON file of each of two runs."""
    folder = tmp_path_factory.mktemp("experiments") / "question"
    runs = folder.parent / "mine"
    fake_group(runs, "dit", [100.0, 110.0, 90.0])
    fake_group(runs, "unet", [150.0, 162.0, 144.0], config=UNET)
    folder.mkdir()
    publish([str(runs)], str(folder / "published"))
    (folder / "rows.csv").write_text(ROWS)
    for run, share in (("a", 0.25), ("b", 0.5)):
        report = folder / "runs" / run / "memory/report.json"
        report.parent.mkdir(parents=True)
        report.write_text(f'{{"pixels": {{"nearer": {share}}}}}')
    return folder


@pytest.fixture
def page(records, tmp_path):
    """A page beside the records."""
    shutil.copytree(records, tmp_path / "experiments/question")
    return tmp_path / "experiments/question/README.md"


def run(page, *arguments):
    return tables.main(arguments, page.parents[1])


@pytest.mark.parametrize(
    ("mark", "number"),
    [
        ("published fid row=UNet", "152.0"),
        (
            "published fid row=DiT say=half",
            "24.8",
        ),  # t of 2 degrees of freedom, 4.303, by 10 / sqrt 3
        ("published fid row=UNet say=max", "162.0"),
        ('published fid row="real images"', "96.3"),
        ("published fid row=UNet less=DiT", "52.0"),
        # gaps of 50, 52 and 54: 52 less 4.303 by 2 / sqrt 3
        ("published fid row=UNet less=DiT say=low by=paired", "47.0"),
        ("published fid row=UNet less=DiT say=better by=welch", "9.0"),
        ("rows.csv fid row=steps=10", "105.0"),
        ("rows.csv fid row=steps=20 less=steps=10", "14.0"),
        # gaps of 10 and 18: 14 + 12.706 by 4
        ("rows.csv fid row=steps=20 less=steps=10 say=high", "64.8"),
        # 41 above real images in place of 55
        ("rows.csv fid row=steps=20 less=steps=10 say=relative", "25.5"),
        ("runs/*/memory/report.json pixels.nearer", "0.4"),
    ],
)
def test_a_number_is_written_from_its_record(page, mark, number):
    page.write_text(f"It is 0.0<!-- of {mark} -->, as we know.\n")
    assert run(page, "--check") == 1
    assert run(page) == 0
    assert page.read_text() == f"It is {number}<!-- of {mark} -->, as we know.\n"
    assert run(page, "--check") == 0


def test_decimals_and_commas_stay_as_they_stand(page):
    page.write_text(
        "1,000<!-- of published fid row=UNet --> 1.00<!-- of published fid row=UNet -->"
    )
    assert run(page) == 0
    assert re.findall(r"[\d.,]+(?=<)", page.read_text()) == ["152", "152.00"]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("1<!-- of published fid row=Mamba -->", "row=Mamba"),
        ("1<!-- of published fod row=UNet -->", "fod"),
        ("1<!-- of published fid row=UNet say=worst -->", "say=worst"),
        ("1<!-- of published fid row=UNet colour=red -->", "colour"),
        ("1<!-- of rows.csv fid row=network=UNet -->", "row=network=UNet"),  # two rows of a seed
        ("1<!-- of nowhere.csv fid row=steps=10 -->", "nowhere.csv"),
        ("1<!-- of rows.csv fod row=steps=10 -->", "fod"),
        ("1<!-- of runs/*/none/report.json pixels.nearer -->", "report.json"),
        ("much<!-- of published fid row=UNet -->", "README.md"),
    ],
)
def test_a_mark_that_names_nothing_is_refused(page, capsys, text, named):
    page.write_text(text)
    assert run(page) == 1
    assert_names(capsys.readouterr().err, "question/README.md", named)
    assert page.read_text() == text


def test_pages_that_quote_experiments_are_written_too(page):
    for name in ("README.md", "docs/pages/results.md"):
        path = page.parents[2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = f"{'../../' * name.count('docs')}experiments/question/published fid row=UNet"
        path.write_text(f"1<!-- of {mark} -->")
    assert run(page) == 0
    assert all(
        (page.parents[2] / name).read_text().startswith("152<")
        for name in ("README.md", "docs/pages/results.md")
    )
