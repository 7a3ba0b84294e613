"""The page of `diffusion-lab demo`: its drawings, answers and refusals, and it in a browser."""

import asyncio
import base64
import io
import json
import re
import shlex
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from helpers.compositions import composed
from helpers.paths import CONF
from helpers.refusals import assert_names
from hydra import initialize_config_dir
from PIL import Image
from starlette.testclient import TestClient

from diffusion_lab.analysis import demo
from diffusion_lab.analysis.demo import HERE, ShownRun, listen
from diffusion_lab.assembly.sentences import HYDRA_VERSION
from diffusion_lab.common.files import read_rows
from diffusion_lab.runs import checkpoints


@pytest.fixture
def shown(run_folder) -> Iterator[list[ShownRun]]:
    """The finished run, which draws eight images on the page."""
    cfg = composed("demo", "num_samples=8", "device=cpu")
    with initialize_config_dir(str(CONF), **HYDRA_VERSION):  # as while the command runs
        yield [ShownRun.open(run_folder.relative_to(run_folder.parent), cfg, threading.Lock())]


@pytest.fixture
def client(shown) -> TestClient:
    return TestClient(demo.app(shown), base_url=f"http://{HERE}")


def drawn(client: TestClient, **asked: object) -> list[tuple[str, dict]]:
    """The events of a drawing: names and facts."""
    text = client.get("/draw/0", params=asked).text
    events = (event.split("\n") for event in text.strip().split("\n\n"))
    return [(name[7:], json.loads(data[6:])) for name, data in events]


def pixels(address: str) -> np.ndarray:
    """The pixels of a picture in a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))))


@pytest.mark.long
@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"label": 2, "sampler": "heun", "steps": 3, "scale": 1.5, "seed": 7},
        {"sampler": "ddpm", "steps": 2, "guidance": "interval"},
    ],
    ids=["own", "all", "noisy"],
)
def test_the_command_that_the_page_shows_draws_the_same_images(client, lab, asked):
    *steps, (name, end) = drawn(client, **asked)
    assert name == "end", end
    numbers = [facts["step"] for name, facts in steps if name == "step"]
    assert numbers == list(range(1, asked.get("steps", len(numbers)) + 1))
    assert all(pixels(facts["picture"]).shape == (2 * 8, 8 * 8) for _, facts in steps)
    command = shlex.split(end["command"])
    assert command[:3] == ["diffusion-lab", "sample", "run=run"]
    arrays = lab.drawn(*command[2:])
    film = np.concatenate([*arrays["images"][..., 0]], 1)
    assert np.array_equal(pixels(end["picture"]), film)
    if "label" in asked:
        assert arrays["labels"].tolist() == [2] * 8
        assert len(set(end["captions"])) == 1


@pytest.mark.long
def test_the_first_noise_is_the_same_and_the_last_estimate_is_nearly_the_image(client):
    *first, (_, end) = drawn(client, steps=4, sampler="ddim")
    other = drawn(client, steps=2, sampler="ddim")
    assert np.array_equal(pixels(first[0][1]["picture"])[:8], pixels(other[0][1]["picture"])[:8])
    gap = np.abs(pixels(first[-1][1]["picture"])[8:].astype(int) - pixels(end["picture"]))
    assert gap.max() <= 1  # DDIM's last step goes to the estimate


def test_a_wrong_choice_is_one_sentence(client):
    for asked, words in (
        ({"sampler": "few_step"}, "needs a model of few steps"),
        ({"sampler": "dpm_solvr"}, "did you mean dpm_solver"),
        ({"steps": "0"}, "sampler.steps=0 must be"),
        ({"label": "9"}, "labels=9 must be classes between 0 and 3"),
        ({"seed": "-1"}, "seed=-1 must be"),
        ({"sampler": "heun,sampler._target_=os.system"}, "is none of the choices"),
    ):
        [(name, facts)] = drawn(client, **asked)
        assert name == "failed"
        assert words in facts["words"]
        assert "\n" not in facts["words"]


@pytest.mark.long
def test_the_fid_of_a_setting_is_the_one_that_was_measured(lab, run_folder, request):
    lab.done("sample-sweep", "run=run", "sampler=heun", "steps=2,3", "seed=4", "device=cpu")
    client = request.getfixturevalue("client")
    [file] = run_folder.glob("sweeps/*/results.jsonl")
    for row, steps in zip(read_rows(file), (2, 3), strict=True):
        [said] = drawn(client, sampler="heun", steps=steps)[-1][1]["measured"]
        assert said.startswith(f"FID {row['fid']:.4g}, real images {row['fid_real']:.4g} (")
    assert drawn(client, sampler="heun", steps=1)[-1][1]["measured"] == []
    summary = json.loads((run_folder / "summary.json").read_text())["metrics"]
    [fid] = [value for name, value in summary.items() if name.startswith("fid/")]
    [said] = drawn(client)[-1][1]["measured"]  # from the end of training
    assert said.startswith(f"FID {fid:.4g}, ")


@pytest.mark.long
@pytest.mark.parametrize("chosen", [1, "best"])
def test_the_fid_of_a_step_is_the_one_that_was_measured_on_it(lab, run_folder, chosen):
    earlier = checkpoints.file_of(run_folder, 1)
    shutil.copy(run_folder / "checkpoints/last.ckpt", earlier)
    (run_folder / checkpoints.RANKED).write_text(json.dumps({"metric": "x", "values": {"1": 0}}))
    found = lab.result("evaluate", "run=run", "step=1", "device=cpu", "metrics.num_samples=8")
    cfg = composed("demo", "num_samples=1", "device=cpu", f"step={chosen}")
    with initialize_config_dir(str(CONF), **HYDRA_VERSION):
        shown = ShownRun.open(run_folder, cfg, threading.Lock())
        said = shown.draw({}, lambda *_: None)["measured"]
    fid = next(value for name, value in found.items() if name.startswith("fid/"))
    assert [line.split(",")[0] for line in said] == [f"FID {fid:.4g}"]


def test_the_nearest_training_image_is_found_by_pixels(client, shown, monkeypatch):
    monkeypatch.setattr(demo, "ROWS_AT_ONCE", 7)
    _, end = drawn(client)[-1]
    [images] = shown[0].drawn.values()
    training = None
    for place in (0, 5):
        found = client.get("/nearest/0", params={"command": end["command"], "place": place}).json()
        training = shown[0].opened.datamodule.train_images()
        gaps = (training.double() - images[place].double()).square().flatten(1).sum(1).sqrt()
        first, second = gaps.topk(2, largest=False).values.tolist()
        assert np.array_equal(pixels(found["picture"]), training[gaps.argmin()][0].numpy())
        assert f"training image {int(gaps.argmin()):,} of {len(training):,}" in found["words"]
        assert f"{first / second:.0%}" in found["words"]
    shown[0].drawn[end["command"]] = training[3:]  # copies
    found = client.get("/nearest/0", params={"command": end["command"], "place": 0}).json()
    assert "at 0% of" in found["words"]
    for wrong in ({"command": "sample", "place": 0}, {"command": end["command"], "place": 99}):
        assert "draw it again" in client.get("/nearest/0", params=wrong).json()["failed"]


def test_a_drawing_ends_when_nobody_waits_for_it(shown):
    seen = []

    def work(show):
        for step in range(3):
            show("step", step=step)
            seen.append(step)
            gone.wait(5)

    gone = threading.Event()

    async def leave():
        stream = demo.events(work)
        first = await anext(stream)
        await stream.aclose()
        gone.set()
        return first

    assert asyncio.run(leave()).startswith("event: step")
    assert seen == [0]


def test_the_page_answers_under_its_own_name_alone(client):
    page = client.get("/")
    assert page.status_code == 200
    assert not re.findall(r"https?://", page.text)
    assert client.get("/", headers={"host": "elsewhere.example"}).status_code == 400
    assert client.get("/draw/1").status_code == 404


def test_what_cannot_be_shown_is_refused_in_one_sentence(refusal, run_folder, monkeypatch):
    assert_names(refusal("demo"), "0 runs are given", "demo RUN")
    assert_names(refusal("demo", "run", "run", "run"), "3 runs are given")
    assert_names(refusal("demo", "nowhere", "port=0"), "nowhere")
    assert_names(refusal("demo", "run", "num_samples=0"), "num_samples=0 must be")
    with listen(0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        assert_names(refusal("demo", "run", f"port={port}"), f"port={port}", "in use", "port=0")
        assert taken.getsockname()[0] == HERE == "127.0.0.1"


@contextmanager
def served(shown: list[ShownRun]):
    """The address of the page, served in a thread."""
    listening = listen(0)
    server = uvicorn.Server(uvicorn.Config(demo.app(shown), log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        yield f"http://{HERE}:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(10)


@pytest.mark.slow
def test_the_page_draws_scrubs_and_finds_in_a_browser(browser, shown):
    with served(shown * 2) as address:
        for scheme in ("light", "dark"):
            page = browser.new_page(
                color_scheme=scheme,
                viewport={"width": 390, "height": 844},
                permissions=["clipboard-read", "clipboard-write"],
            )
            said, asked = [], []
            page.on("console", lambda message, said=said: said.append(message.text))
            page.on("pageerror", lambda error, said=said: said.append(str(error)))
            page.on("request", lambda request, asked=asked: asked.append(request.url))
            page.goto(address)
            ended = page.locator(".status", has_text="drawn in")
            ended.nth(1).wait_for()
            assert page.evaluate("document.documentElement.scrollWidth") <= 390
            page.select_option("select[name=sampler]", "ddpm")
            page.locator("code", has_text="sampler=ddpm").nth(1).wait_for()
            first = page.locator(".images canvas").first
            before = first.evaluate("each => each.toDataURL()")
            page.locator("#scrub").fill("1")
            assert first.evaluate("each => each.toDataURL()") != before
            assert page.locator("#at").inner_text().isdigit()
            page.locator(".images button").first.click()
            page.locator(".near img").first.wait_for()
            page.locator(".line button").first.click()
            page.locator(".line button", has_text="Copied").wait_for()
            copied = page.evaluate("navigator.clipboard.readText()")
            assert copied == page.locator("code").first.inner_text()
            page.select_option("select[name=sampler]", "few_step")
            page.locator(".failed", has_text="needs a model of few steps").nth(1).wait_for()
            assert said == []
            assert all(url.startswith((address, "data:")) for url in asked)
            page.close()
