"""Tables and numbers in README.md files are those of the records that their marks name."""

import json
import re
import runpy
import shutil
from pathlib import Path

import pytest
import stated
import tables
from helpers.fake_runs import UNET, fake_group
from helpers.pages import EXPERIMENTS
from helpers.paths import ROOT
from helpers.refusals import assert_names

from diffusion_lab.analysis.publishing import publish
from diffusion_lab.report.tables import NONE

SAMPLED = ROOT / "experiments/sampled.py"
END = "<!-- end of table -->"
STEPS = "network,seed,steps,fid,fid_real\n" + "\n".join(
    f"UNet,{seed},{steps},{fid},50"
    for seed, steps, fid in ((0, 10, 100), (1, 10, 110), (0, 20, 90), (1, 20, 92))
)


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> Path:
    """A published comparison, a CSV file, and a JSON file of each of two runs."""
    folder, runs = (tmp_path_factory.mktemp(name) for name in ("question", "mine"))
    fake_group(runs, "dit", [100.0, 110.0, 90.0])
    fake_group(runs, "unet", [150.0, 162.0, 144.0], config=UNET)
    publish([str(runs)], str(folder / "published"))
    (folder / "rows.csv").write_text(STEPS)
    for run, share in (("a", 0.25), ("b", 0.5)):
        report = folder / "runs" / run / "memory/report.json"
        report.parent.mkdir(parents=True)
        report.write_text(f'{{"pixels": {{"nearer": {share}}}}}')
    return folder


@pytest.fixture
def readme(records, tmp_path) -> Path:
    """A README beside the records."""
    return Path(shutil.copytree(records, tmp_path / "experiments/question")) / "README.md"


def write(readme: Path, *blocks: str) -> None:
    readme.write_text(
        "\n\n".join(["# A question", *(f"{b}\nold\n{END}" for b in blocks), "The end."])
    )


def run(readme: Path, *arguments: str) -> int:
    return tables.main(arguments, readme.parents[1])


def lines(readme: Path) -> list[str]:
    return [line for line in readme.read_text().splitlines() if line.startswith("|")]


def pages() -> list:
    """The pages that have tables or numbers."""
    known = (*EXPERIMENTS, *(ROOT / name for name in tables.QUOTING))
    return [
        pytest.param(page, id=page.parent.name)
        for page in known
        if tables.OPENS in page.read_text() or stated.OPENS in page.read_text()
    ]


@pytest.mark.long
@pytest.mark.parametrize("page", pages())
def test_the_tables_of_a_page_are_those_of_its_folders(page):
    changed = []
    tables.rewritten(page, str(page), changed)
    assert changed == []


def test_a_table_is_written_once_and_a_changed_number_is_found(readme, capsys):
    write(readme, "<!-- table published -->")
    assert run(readme, "--check") == 1
    assert readme.read_text().count("old") == 1  # a check changes nothing
    assert run(readme) == 0
    text = readme.read_text()
    assert text.startswith("# A question\n\n<!-- table published -->\n| composition | seeds |")
    assert text.endswith(f"{END}\n\nThe end.")
    assert "| DiT | 3 | " in text
    assert "100.0 ± 24.8" in text
    assert run(readme, "--check") == 0
    capsys.readouterr()
    readme.write_text(text.replace("100.0 ± 24.8", "99.0 ± 24.8"))
    assert run(readme, "--check") == 1
    assert_names(capsys.readouterr().err, "question/README.md", "table published")
    assert run(readme) == 0
    assert readme.read_text() == text


def test_columns_and_rows_are_chosen_in_their_order(readme):
    write(
        readme,
        '<!-- table published columns=fid,images_seen rows="real images,UNet" -->',
        "<!-- table published columns=fid_std -->",
    )
    assert run(readme) == 0
    assert lines(readme)[:4] == [
        "| composition | seeds | FID | Images |",
        "| --- | ---: | ---: | ---: |",
        "| real images |  | 96.3 |  |",
        "| UNet | 3 | 152.0 ± 22.8 | 6.4k |",
    ]
    assert lines(readme)[4:6] == ["| composition | seeds | FID std |", "| --- | ---: | ---: |"]
    assert run(readme, "--check") == 0


def test_rows_have_the_names_that_they_are_given(readme):
    write(readme, '<!-- table published columns=fid rows=UNet,DiT names="U-Net, small,A DiT" -->')
    assert run(readme) == 1
    write(readme, '<!-- table published columns=fid rows=UNet,DiT names="small U-Net,A DiT" -->')
    assert run(readme) == 0
    assert [line.split(" | ")[0] for line in lines(readme)[2:]] == ["| small U-Net", "| A DiT"]


def test_compositions_of_two_folders_stand_in_one_table(readme, tmp_path):
    mamba = {"backbone": {"_target_": "diffusion_lab.backbone.Mamba2"}}
    fake_group(tmp_path / "later", "mamba2", [120.0, 132.0, 126.0], config=mamba)
    publish([str(tmp_path / "later")], str(readme.parent / "published_later"))
    write(readme, "<!-- table published,published_later columns=fid -->")
    assert run(readme) == 0
    names = [line.split(" | ")[0].strip("| ") for line in lines(readme)[2:]]
    assert sorted(names) == ["DiT", "Mamba2", "UNet", "real images"]


ROWS = """network,seed,sweep,steps,calls,fid,accuracy,fid_real
UNet,0,steps,20,20.0,90.0,0.85,50.0
UNet,0,steps,10,10.0,100.0,0.75,50.0
UNet,1,steps,10,10.0,110.0,0.8,50.0
UNet,1,steps,20,20.0,92.0,,50.0
DiT,0,steps,10,10.0,200.5,0.5,50.0
DiT,0,guidance,10,20.0,150.0,0.9,50.0
"""


def test_a_table_of_rows_has_means_over_seeds(readme):
    (readme.parent / "rows.csv").write_text(ROWS)
    block = "<!-- table rows.csv by=network,steps columns=calls,fid,accuracy where=sweep=steps -->"
    write(readme, block, "<!-- table rows.csv by=sweep columns=calls where=network=DiT -->")
    assert run(readme) == 0
    # Student's t of one degree of freedom, 12.706, by half of the difference
    assert lines(readme) == [
        "| network | steps | seeds | calls | FID | Accuracy |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
        "| UNet | 10 | 2 | 10 | 105.0 ± 63.5 | 77.5 ± 31.8 % |",
        "| UNet | 20 | 2 | 20 | 91.0 ± 12.7 | 85.0 % |",
        "| DiT | 10 | 1 | 10 | 200.5 | 50.0 % |",
        f"| real images |  |  |  | 50 | {NONE} |",
        "| sweep | seeds | calls |",
        "| --- | ---: | ---: |",
        "| steps | 1 | 10 |",
        "| guidance | 1 | 20 |",
    ]
    assert run(readme, "--check") == 0


def test_a_row_has_its_paired_difference_from_another(readme):
    rows = ["network,seed,scale,fid,kid"]
    fids = {("DiT", 1): (10, 20, 30), ("DiT", 2): (12, 25, 31), ("DiT", 3): (30, 41, 49)}
    fids[("UNet", 1)] = (7, 8, 9)
    for (network, scale), values in fids.items():
        rows += [f"{network},{seed},{scale},{fid},0" for seed, fid in enumerate(values)]
    (readme.parent / "rows.csv").write_text("\n".join(rows))
    write(readme, "<!-- table rows.csv by=network,scale columns=fid,kid against=scale=1 -->")
    assert run(readme) == 0
    cells = [[cell.strip() for cell in line.split("|")[-3:-1]] for line in lines(readme)[2:]]
    # gaps of 2, 5, 1 and of 20, 21, 19: t of two degrees of freedom is 2.219 and 34.64, its
    # limit 4.303; the lower p counts twice
    assert cells == [
        ["", ""],
        ["2.67 (-2.5 to 7.84)", "0.16"],
        ["20 (17.5 to 22.5)", "0.0017"],
        ["", ""],
    ]


def test_a_table_across_a_key_has_a_column_for_each_of_its_values(readme):
    fids = {"ddim,,5": (10, 20), "ddim,,10": (4, 6), "heun,edm,5": (11, 23), "pc,,10": (0, 0)}
    rows = ["seed,sweep,sampler,grid,steps,fid,kid", "0,other,ddim,,5,1,0"]
    rows += [f"{s},all,{key},{fids[key][s]},0" for key in fids for s in (0, 1)]
    rows += ["2,all,ddim,,5,15,0"]  # a third seed
    (readme.parent / "rows.csv").write_text("\n".join(rows))
    options = "by=steps,sampler,grid columns=fid across=steps where=sweep=all,sampler=ddim|heun"
    write(
        readme,
        f"<!-- table rows.csv {options} -->",
        f"<!-- table rows.csv {options} against=sampler=ddim,grid= -->",
    )
    assert run(readme) == 0
    # Student's t of one degree of freedom, 12.706, by half of the difference
    assert lines(readme)[2:4] == [
        "| ddim |  | 2 to 3 | 15.0 ± 12.4 | 5.0 ± 12.7 |",
        "| heun | edm | 2 | 17.0 ± 76.2 |  |",
    ]
    assert lines(readme)[4:] == [
        "| sampler | grid | seeds | steps=5 | steps=10 |",
        "| --- | ---: | ---: | ---: | ---: |",
        "| ddim |  | 2 to 3 |  |  |",
        "| heun | edm | 2 | 2 (-10.7 to 14.7), p = 0.3 |  |",
    ]


def sample(monkeypatch, *arguments: object) -> None:
    """Runs the script that gathers the samplings and sweeps of runs in a file."""
    monkeypatch.setattr("sys.argv", ["sampled.py", *map(str, arguments)])
    runpy.run_path(str(SAMPLED), run_name="__main__")


@pytest.mark.parametrize("file", sorted(ROOT.glob("experiments/*/samplings.csv")))
def test_samplings_are_those_of_the_published_runs(file, tmp_path, monkeypatch):
    runs = sorted(file.parent.glob("published/runs/*"))
    again = tmp_path / "again.csv"
    sample(monkeypatch, again, *runs)
    rows = file.read_text().splitlines()
    assert len(rows) > 1
    assert sorted(again.read_text().splitlines()) == sorted(rows)


def test_sweeps_of_several_runs_become_one_file(tmp_path, monkeypatch):
    runs = fake_group(tmp_path / "mine", "unet", [150.0, 162.0], config=UNET)
    for run, fid in zip(runs, (7.0, 8.0), strict=True):
        for sweep, varied in (("steps", "steps"), ("guidance", "guidance.scale")):
            (run / "sweeps" / sweep).mkdir(parents=True)
            rows = f"seed,{varied},fid\n77,10,{fid}\n"  # the seed of samples
            (run / "sweeps" / sweep / "results.csv").write_text(rows)
    ways = [
        {"sampling": {"sampler": {"steps": steps}}, "metrics": {"fid/x": fid, "fid_real/x": 96.3}}
        for steps, fid in ((20, 150.0), (4, 120.0))
    ]
    (runs[0] / "summary.json").write_text(json.dumps(ways[0] | {"at_other_steps": ways[1:]}))
    (runs[1] / "summary.json").write_text('{"sampling": null, "metrics": {}}')  # not measured
    file = tmp_path / "all.csv"
    sample(monkeypatch, file, *runs)
    assert file.read_text().splitlines() == [
        "run,network,seed,sweep,sampling_seed,guidance.scale,fid,steps,fid_real",
        "unet_0,UNet,0,guidance,77,10,7.0,,",
        "unet_0,UNet,0,steps,77,,7.0,10,",
        "unet_0,UNet,0,trained,,,150.0,20,96.3",
        "unet_0,UNet,0,trained,,,120.0,4,96.3",
        "unet_1,UNet,1,guidance,77,10,8.0,,",
        "unet_1,UNet,1,steps,77,,8.0,10,",
    ]


def test_a_folder_without_a_run_is_named_and_nothing_is_written(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit) as ended:
        sample(monkeypatch, tmp_path / "all.csv", tmp_path / "no")
    assert ended.value.code == 2
    assert_names(capsys.readouterr().err.splitlines()[-1], tmp_path / "no", "config.yaml")
    assert not list(tmp_path.iterdir())


def test_a_table_of_tuning_has_the_mean_of_each_value(readme):
    tried = [
        {"values": {"optimizer.lr": 0.01}, "results": {"100": 3.0, "101": None}},
        {"values": {"optimizer.lr": 0.001}, "results": {"100": 400.0, "101": 410.2}},
    ]
    other = [{"values": {"optimizer.lr": 0.003}, "results": {"100": 7.25}}]
    found = {
        "backbone=dit": {"chosen": {"optimizer.lr": 0.001}, "tried": tried},
        "backbone=unet": {"chosen": {"optimizer.lr": 0.003}, "tried": other},
    }
    (readme.parent / "tuning.json").write_text(json.dumps(found))
    write(readme, "<!-- table tuning.json -->")
    assert run(readme) == 0
    head, _, *rows = lines(readme)
    assert head == "| optimizer.lr | 0.001 | 0.003 | 0.01 |"
    assert rows == [
        "| `backbone=dit` | **405.1** |  | diverged |",
        "| `backbone=unet` |  | **7.25** |  |",
    ]


def test_a_table_of_several_tunings_names_their_studies(readme):
    for study, result in (("b", 7.25), ("a", 8.5)):
        folder = readme.parent / "published" / "tuning" / study
        folder.mkdir(parents=True)
        tried = [{"values": {"optimizer.lr": 0.003}, "results": {"100": result}}]
        found = {"backbone=unet": {"chosen": {"optimizer.lr": 0.003}, "tried": tried}}
        (folder / "tuning.json").write_text(json.dumps(found))
    write(readme, "<!-- table published/tuning/*/tuning.json -->")
    assert run(readme) == 0
    rows = lines(readme)[2:]
    assert rows == ["| `backbone=unet` of a | **8.5** |", "| `backbone=unet` of b | **7.25** |"]


def test_a_changed_record_is_found(readme, capsys):
    write(readme, "<!-- table published -->")
    assert run(readme) == 0
    record = readme.parent / "published/runs/dit_0/summary.json"
    record.write_text(record.read_text().replace("100.0", "90.0"))
    assert run(readme, "--check") == 1
    assert_names(capsys.readouterr().err, "question/README.md", "table published")


@pytest.mark.parametrize(
    ("mark", "number"),
    [
        ("published fid row=UNet", "152.0"),
        # t of 2 degrees of freedom, 4.303, by 10 / sqrt 3
        ("published fid row=DiT say=half", "24.8"),
        ("published fid row=UNet say=max", "162.0"),
        ('published fid row="real images"', "96.3"),
        ("published fid row=UNet less=DiT", "52.0"),
        # gaps of 50, 52 and 54: 52 less 4.303 by 2 / sqrt 3
        ("published fid row=UNet less=DiT say=low by=paired", "47.0"),
        ("published fid row=UNet less=DiT say=better by=welch", "9.0"),
        ("rows.csv fid row=steps=10", "105.0"),
        ("rows.csv fid row=steps=10 less=steps=20", "14.0"),
        # gaps of 10 and 18: 14 + 12.706 by 4
        ("rows.csv fid row=steps=10 less=steps=20 say=high", "64.8"),
        # 41 above real images in place of 55
        ("rows.csv fid row=steps=10 less=steps=20 say=relative", "25.5"),
        ("runs/*/memory/report.json pixels.nearer", "0.4"),
    ],
)
def test_a_number_is_written_from_its_record(readme, mark, number):
    readme.write_text(f"It is 0.0<!-- of {mark} -->, as we know.\n")
    assert run(readme, "--check") == 1
    assert run(readme) == 0
    assert readme.read_text() == f"It is {number}<!-- of {mark} -->, as we know.\n"
    assert run(readme, "--check") == 0


def test_decimals_and_commas_stay_as_they_stand(readme):
    readme.write_text(
        "1,000<!-- of published fid row=UNet --> 1.00<!-- of published fid row=UNet -->"
    )
    assert run(readme) == 0
    assert re.findall(r"[\d.,]+(?=<)", readme.read_text()) == ["152", "152.00"]


UNMADE = {  # tables, and what is named in their place
    "nowhere": "nowhere",
    "nowhere.csv": "nowhere.csv",
    "published columns=fid,fod": "columns=fod",
    "published rows=Mamba": "rows=Mamba",
    "published colour=red": "colour",
    "published rows=UNet,DiT names=U-Net": "names=",
    "rows.csv by=network": "columns=",
    "rows.csv columns=fid": "by=",
    "rows.csv by=net columns=fid": "by=net",
    "rows.csv by=network columns=fod": "columns=fod",
    "rows.csv by=network columns=sweep": "columns=sweep",
    "rows.csv by=network columns=fid where=sweep=ancestral": "where=sweep=ancestral",
    "rows.csv by=network columns=fid rows=UNet": "rows",
    "rows.csv by=network columns=fid against=steps=10": "against=steps=10",
    "rows.csv by=network,steps columns=fid against=steps=30": "against=steps=30",
    "rows.csv by=network columns=fid across=steps": "across=steps",
    "rows.csv by=network,steps columns=fid across=network,steps": "across=network,steps",
    "rows.csv by=network columns=fid": "by=network",  # seeds of 10 and of 20 steps
    "rows.csv by=steps,sweep columns=fid": "by=steps,sweep",  # seeds of both networks
    "rows.csv by=network columns=fid where=sweep=steps,network=Mamba": "network=Mamba",
}
UNKNOWN = {  # numbers, likewise
    "published fid row=Mamba": "row=Mamba",
    "published fod row=UNet": "fod",
    "published fid row=UNet say=worst": "say=worst",
    "published fid row=UNet colour=red": "colour",
    "published fid row=DiT less=UNet": "DiT is below UNet",
    "published fid row=UNet less=DiT by=wlech": "by=wlech",
    "published fid row=UNet say=detectable": "say=detectable",
    "published recall row=UNet less=DiT say=relative": "recall",
    "rows.csv fid row=network=UNet": "row=network=UNet",  # two rows of a seed
    "nowhere.csv fid row=steps=10": "nowhere.csv",
    "rows.csv fod row=steps=10": "fod",
    "runs/*/none/report.json pixels.nearer": "report.json",
}


@pytest.mark.parametrize(
    ("text", "named"),
    [
        *((f"<!-- table {words} -->\nold\n{END}", named) for words, named in UNMADE.items()),
        *((f"1<!-- of {words} -->", named) for words, named in UNKNOWN.items()),
        ("<!-- table published -->\n| a |\n", END),
        ("much<!-- of published fid row=UNet -->", "README.md"),
    ],
)
def test_a_table_or_number_that_cannot_be_made_is_named(readme, capsys, text, named):
    (readme.parent / "rows.csv").write_text(ROWS)
    readme.write_text(text)
    for arguments in ([], ["--check"]):
        assert run(readme, *arguments) == 1
        assert_names(capsys.readouterr().err, "question/README.md", named)
    assert readme.read_text() == text


def test_pages_that_quote_experiments_are_written_too(readme):
    for name in ("README.md", "docs/pages/results.md"):
        path = readme.parents[2] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        mark = f"{'../../' * name.count('docs')}experiments/question/published fid row=UNet"
        path.write_text(f"1<!-- of {mark} -->")
    assert run(readme) == 0
    assert all(
        (readme.parents[2] / name).read_text().startswith("152<")
        for name in ("README.md", "docs/pages/results.md")
    )
