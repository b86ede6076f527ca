"""Pages in a real browser: headless Chromium, driven by Playwright, offline."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import torch
from job import job
from mlflow import MlflowClient
from playwright.sync_api import Browser, Page, expect, sync_playwright
from served import application, exported, over_http, student, teacher
from served import page as serving_page
from test_compare import EVIL, STEPS, Built, build

from fewstep.build import png as build_png
from fewstep.serving.app import Application
from fewstep.serving.generator import About, ImageRequest, ImageResult

WIDTHS = (1280, 390)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("no chromium on PATH; Debian has it: apt-get install chromium (as root)")
    quiet = ["--disable-gpu", "--no-first-run", "--disable-background-networking", "--disable-component-update"]
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # which Chromium refuses to root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=quiet + sandbox)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def built(store) -> Built:
    return build(store)


@pytest.fixture(scope="module")
def client(built) -> MlflowClient:
    return MlflowClient(built.uri)


@pytest.fixture(scope="module")
def written(built, tmp_path_factory) -> Path:
    """The page of the three runs."""
    out = tmp_path_factory.mktemp("page") / "compare.html"
    job("compare")([f"runs={json.dumps(built.ids)}", f"uri={built.uri}", f"out={out}"])
    return out


@pytest.fixture
def opened(browser, written) -> Iterator[Page]:
    """The page, opened from the disk; what it asked for and complained of is checked at the end."""
    context = browser.new_context(viewport={"width": WIDTHS[0], "height": 900}, offline=True)
    page = context.new_page()
    requests, complaints = [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(written.as_uri())
    yield page
    context.close()
    assert complaints == []
    assert [url for url in requests if not url.startswith("data:")] == [written.as_uri()]


def values(page: Page, selector: str) -> list[float]:
    """The numbers behind what is printed."""
    return [float(e.get_attribute("value")) for e in page.locator(f"{selector} data").all()]


def test_the_pages_scores_are_mlflows(opened, built, client):
    last = [client.get_run(run_id).data.metrics for run_id in built.ids]
    student = [metrics["score/fd_small"] for metrics in last]
    teacher = [metrics["score/teacher/heun-18/fd_small"] for metrics in last][:2]  # the third run has the first's seed
    rows = opened.locator("#scores tbody tr")
    expected = [teacher, student[:2], student[2:]]
    for i, of_seeds in enumerate(expected):
        spread = [statistics.stdev(of_seeds)] if len(of_seeds) > 1 else []
        assert values(opened, f"#scores tbody tr:nth-child({i + 1})") == [statistics.fmean(of_seeds), *spread]
    expect(rows.nth(1)).to_contain_text("1.500 ± 0.354")
    expect(rows.nth(2).get_by_role("img", name="best")).to_have_count(1)


def test_the_pages_curves_are_mlflows(opened, built, client):
    histories = [sorted(client.get_metric_history(i, "critic/denoise"), key=lambda m: m.step) for i in built.ids]
    plot = opened.locator("figure[data-metric='critic/denoise'] svg")
    plot.focus()
    for index in range(len(STEPS)):
        plot.press("ArrowRight")
        at = [history[index].value for history in histories]
        shown = values(opened, "figure[data-metric='critic/denoise'] .readout")
        assert sorted(shown) == pytest.approx(sorted([(at[0] + at[1]) / 2, at[2]]), rel=1e-15)
    expect(opened.locator(".readout:visible")).to_contain_text("320 images")

    opened.get_by_text("hours", exact=True).click()
    opened.get_by_text("log", exact=True).click()
    expect(opened.locator("figure[data-metric='health/match_gradient'] path").first).to_be_attached()
    opened.get_by_text("Choose metrics").click()
    box = opened.get_by_role("checkbox", name="images_per_s")
    box.uncheck()
    expect(opened.locator("figure[data-metric='images_per_s']")).to_have_count(0)
    box.check()
    expect(opened.locator("figure[data-metric='images_per_s'] svg")).to_have_attribute(
        "aria-label", re.compile(r"images_per_s against hours. A ends at 16.00, B ends at 16.00.")
    )
    opened.get_by_role("button", name="gan_weight 0.01").click()
    expect(opened.locator("figure[data-metric='critic/denoise'] g[data-group]")).to_have_count(1)


def test_the_slider_moves_every_grid_and_the_teacher_stands_first(opened, built, client, tmp_path):
    def sources() -> list[str]:
        return [image.get_attribute("src") for image in opened.locator("#samples img").all()]

    def grid(run_id: str, path: str) -> str:
        file = client.download_artifacts(run_id, f"grids/{path}.png", str(tmp_path))
        return "data:image/png;base64," + base64.b64encode(Path(file).read_bytes()).decode()

    first, second, third = built.ids
    slider = opened.get_by_role("slider", name="step")
    teacher = grid(first, "teacher/step-00000000")
    seen = []
    for step, shown in ((40, (40, 40)), (20, (20, 0)), (0, (0, 0))):
        assert slider.get_attribute("aria-valuetext") == f"step {step}"
        own = [grid(run, f"student/step-{at:08d}") for run, at in zip((first, third), shown, strict=True)]
        assert sources() == [teacher, *own]
        seen.append(own)
        slider.press("ArrowLeft")
    assert all(before != after for before, after in zip(*seen[::2], strict=True))
    slider.press("ArrowRight")
    expect(opened.locator("#samples figure").nth(2)).to_contain_text("step 0; none drawn at 20")

    opened.get_by_role("radio", name="1").check(force=True)  # the other seed, and its own teacher
    assert sources() == [grid(second, "teacher/step-00000000"), grid(second, "student/step-00000020")]


def test_text_of_a_run_is_text(opened):
    opened.get_by_text("with ids").click()
    expect(opened.get_by_text(EVIL).first).to_be_visible()
    assert opened.title() == "Comparison: 3 runs"


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_fits_the_screen_and_every_control_has_a_name(opened, width):
    opened.set_viewport_size({"width": width, "height": 844})
    opened.emulate_media(color_scheme="dark" if width == WIDTHS[0] else "light")
    for summary in opened.locator("summary").all():
        summary.click()
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    named = "e => [...(e.labels || []), e.getAttribute('aria-label'), e.textContent.trim()].some(Boolean)"
    assert [c for c in opened.locator("input, button, [tabindex]").all() if not c.evaluate(named)] == []


# The page of a server


@pytest.fixture
def visit(browser) -> Iterator[Callable[..., Page]]:
    """Opens the page of a server; at the end, only that server was asked and nothing was complained of."""
    requests, complaints, opened = [], [], []

    def go(address: str, width: int = WIDTHS[0]) -> Page:
        context = browser.new_context(viewport={"width": width, "height": 900})
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.goto(address)
        opened.append((context, address))
        return page

    yield go
    for context, _ in opened:
        context.close()
    assert [text for text in complaints if "with a status of 40" not in text] == []  # which the browser notes itself
    assert {url.split("/v1/")[0].rstrip("/") for url in requests if not url.startswith("data:")} == {opened[0][1]}


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Application:
    return application(student(exported(tmp_path_factory.mktemp("served"))), teacher())


@pytest.mark.parametrize("width", WIDTHS)
def test_the_page_of_a_server_draws_by_keyboard_alone(visit, served, width):
    with over_http(served) as address:
        page = visit(address, width)
        expect(page.locator("#facts")).to_contain_text("two-teacher: heun-3, 5 network calls an image, 16x16")
        for keys in (("Sn",), ("3",), ("7",), ()):  # a class by its name, images, seed, and the button
            page.keyboard.press("Tab")
            for key in keys:
                page.keyboard.type("7" if key == "Sn" else key)
        assert page.evaluate("document.activeElement.id") == "draw"
        assert page.locator("#class").evaluate("e => e.selectedOptions[0].textContent") == "7  Sneaker"
        page.keyboard.press("Enter")
        expect(page.locator("figure")).to_have_count(2, timeout=20_000)
        for role in ("student", "teacher"):
            images = page.locator(f"figure[data-role={role}] img")
            expect(images).to_have_count(3)
            assert images.nth(2).get_attribute("alt") == f"{role}: 7  Sneaker, image 3"
            assert images.evaluate_all("all => all.every(image => image.naturalWidth === 16)")
        expect(page.locator("figcaption").first).to_contain_text(re.compile("3 images in .+s, 2 network calls each"))
        expect(page.get_by_role("status")).to_contain_text(re.compile("times as fast|3 images drawn"))
        expect(page.locator("#draw")).to_be_focused()
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        named = "e => [...(e.labels || []), e.getAttribute('aria-label'), e.textContent.trim()].some(Boolean)"
        assert [c for c in page.locator("input, select, button").all() if not c.evaluate(named)] == []
        images = page.locator("#count")
        images.evaluate("e => { e.max = 99 }")
        images.fill("17")
        images.press("Enter")
        expect(page.get_by_role("alert")).to_have_text("n: 17 images, but a request may ask for 16")


def test_the_page_of_a_server_asks_for_the_token_and_keeps_prompts_as_text(visit):
    evil, token = "<img src=x onerror=alert(1)>", "a-token-of-thirty-two-characters"
    file = build_png(torch.zeros(1, 1, 1, dtype=torch.uint8))

    class Texts:
        about = About("texts", "student", "text", (1, 1), "few-step-4", 4)

        async def draw(self, ask: ImageRequest) -> ImageResult:
            return ImageResult((file,), 0.1, 1)

    app = Application([Texts()], serving_page(), token=hashlib.sha256(token.encode()).digest())
    with over_http(app) as address:
        page = visit(address)
        expect(page.locator("#token")).to_be_focused()
        page.keyboard.type("wrong")
        page.keyboard.press("Enter")
        expect(page.get_by_role("alert")).to_contain_text("Authorization: missing or wrong")
        page.locator("#token").fill(token)
        page.locator("#token").press("Enter")
        expect(page.locator("#text")).to_be_focused()
        page.keyboard.type(evil)
        page.keyboard.press("Enter")
        expect(page.locator("figure img")).to_have_attribute("alt", f"student: {evil}, image 1")
        assert page.locator("img").count() == 1
        assert page.evaluate("localStorage.length + sessionStorage.length + document.cookie.length") == 0


# MLflow's own page


@pytest.fixture(scope="module")
def server(built) -> Iterator[str]:
    """`mlflow server` on this machine only, one worker; its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    place = ["--backend-store-uri", built.uri, "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    process = subprocess.Popen(
        [sys.executable, "-m", "mlflow", "server", *place],
        env=os.environ | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        address, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 120
        while time.monotonic() < deadline and process.poll() is None:
            try:
                urllib.request.urlopen(f"{address}/health", timeout=1)
                break
            except OSError:
                time.sleep(0.2)
        else:
            pytest.fail(f"mlflow server did not come up; by hand: mlflow server {' '.join(place)}")
        yield address
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(20)


def test_mlflows_compare_page_shows_the_runs(browser, server, built, client):
    page = browser.new_page(viewport={"width": 1400, "height": 900})
    experiment = client.get_run(built.ids[0]).info.experiment_id
    runs = quote(json.dumps(built.ids))
    page.goto(f"{server}/#/compare-runs?runs={runs}&experiments={quote(json.dumps([experiment]))}")
    for text in ("plain", "more-gan", EVIL, "method.gan_weight", "score/fd_small", "by_images/critic/denoise"):
        expect(page.get_by_text(text, exact=True).first).to_be_attached(timeout=30_000)
    expect(page.get_by_text("Comparing 3 Runs")).to_be_visible()
    page.close()
