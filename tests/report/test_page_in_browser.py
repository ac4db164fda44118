"""The page in a real browser: charts, clicks, keys, filters, the threshold, sorting, and no request and no error."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

import fastmem
from fastmem.reporter import printable
from tests.conftest import run
from tests.report.conftest import CLASSES

# named where a missing browser is to be a failure, as in continuous integration
BROWSER = os.environ.get("FASTMEM_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
if not BROWSER:
    pytest.skip("no Chromium on this machine", allow_module_level=True)
playwright_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

WIDE, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@dataclass
class Opened:
    """A page in a browser, with what it asked the network for and what it complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)

    def text(self, selector: str) -> str:
        return self.page.locator(selector).inner_text()

    def drawn(self, selector: str) -> str:
        """The text of a part of a chart."""
        return self.page.locator(selector).text_content()

    def count(self, selector: str) -> int:
        return self.page.locator(selector).count()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright_api.sync_playwright() as driver:
        # a container's root has no sandbox, and the page is our own
        started = driver.chromium.launch(executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def file(hostile_run, tmp_path_factory) -> Path:
    return fastmem.report(hostile_run.run, tmp_path_factory.mktemp("page") / "page.html")


@pytest.fixture
def opened(browser) -> Iterator[Callable[..., Opened]]:
    """A function that opens a file; afterwards nothing may have been asked for and nothing logged."""
    all_opened = []

    def open_page(path: Path, scheme: str = "light", viewport: dict[str, int] = WIDE) -> Opened:
        context = browser.new_context(viewport=viewport, color_scheme=scheme)
        found = Opened(context.new_page())
        found.page.on("request", lambda request: found.requests.append(request.url))
        found.page.on("console", lambda message: found.complaints.append(message.text))
        found.page.on("pageerror", lambda error: found.complaints.append(str(error)))
        found.page.on("dialog", lambda dialog: found.complaints.append(dialog.message))
        found.page.goto(path.as_uri())
        found.page.wait_for_selector("html[data-ready]")
        all_opened.append((found, path, context))
        return found

    yield open_page
    for found, path, context in all_opened:
        assert [url for url in found.requests if not url.startswith(("data:", "blob:"))] == [path.as_uri()]
        assert found.complaints == []
        assert found.page.evaluate("window.hacked") is None
        context.close()


def test_every_part_has_its_charts(opened, file):
    page = opened(file)
    for name in ("unit-map", "owned-chart", "similarity-chart", "edits-chart", "sweep-chart"):
        assert page.count(f"#{name} .main-svg") > 0, name
    assert page.count("#unit-map .heatmaplayer image") == 1
    assert page.count(".tile") == 4
    # bands of random units, and marks of the Pareto front and of the run's own edit
    legend = page.drawn("#sweep-chart .legend")
    assert "random, x0.5: all seeds" in legend
    assert "not beaten in both" in legend
    assert "kept in this run" in legend


def test_a_click_on_the_map_opens_a_unit(opened, file):
    page = opened(file)
    before = page.text("#unit-panel h3")
    page.page.locator("#unit-map").scroll_into_view_if_needed()
    area = page.page.locator("#unit-map .nsewdrag").bounding_box()
    # another unit of the first of two blocks
    page.page.mouse.click(area["x"] + area["width"] / 3, area["y"] + area["height"] / 4)
    page.page.wait_for_function("before => document.querySelector('#unit-panel h3').innerText !== before", arg=before)
    assert page.text("#unit-panel h3").startswith("Block 0, unit ")
    assert page.text("#unit-status").startswith("block 0, unit ")
    assert page.count("#unit-panel .strip img") > 0
    assert page.count("#unit-panel .barlayer .point") == len(CLASSES)


def test_keys_move_on_the_map_and_open_a_unit(opened, file):
    page = opened(file)
    page.page.locator("#unit-map").focus()
    start = page.text("#unit-status")
    page.page.keyboard.press("ArrowDown" if "block 0" in start else "ArrowUp")
    moved = page.text("#unit-status")
    assert moved != start
    page.page.keyboard.press("Enter")
    # every block has more units than the list, so one that cannot be opened says so
    assert page.text("#unit-status").startswith(moved.split(":")[0])
    page.page.locator("#unit-list button").nth(3).focus()
    wanted = page.page.evaluate("document.activeElement.innerText").split("\n")[0]
    page.page.keyboard.press("Enter")
    assert page.text("#unit-panel h3").lower().startswith(wanted)


def test_the_colour_the_order_and_the_positions_of_the_map_change(opened, file):
    page = opened(file)
    for name, value, title in (("order", "number", "unit"), ("segment", "2", "unit"), ("colour", "1", "unit")):
        page.page.locator(f"#unit-{name}").select_option(value)
        assert page.drawn("#unit-map .xtitle") == title
    assert page.drawn("#unit-map .cbtitle") == "gap"
    page.page.locator("#unit-rings").uncheck()
    assert page.count("#unit-map .scatterlayer .point") == 1


def extracted(page: Opened) -> tuple[int, int]:
    found = re.fullmatch(r"(\d+) of (\d+)", page.text("#gallery-train-count").replace(",", ""))
    return int(found[1]), int(found[2])


def move_threshold(page: Opened, value: float) -> None:
    page.page.locator("#gallery-threshold").evaluate(
        "(slider, value) => { slider.value = value; slider.dispatchEvent(new Event('input')); }", value
    )
    page.page.wait_for_timeout(200)


def test_the_threshold_counts_again(opened, file, hostile_run):
    page = opened(file)
    main = hostile_run.story().main
    train = main.verdicts["train"]
    similarity = train.similarity[main.longest, train.candidate]
    assert extracted(page) == (main.document.extracted[main.longest_key], len(similarity))
    for threshold in (0.0, 0.5, 0.95, 1.0):
        move_threshold(page, threshold)
        assert extracted(page) == (int((similarity > threshold).sum()), len(similarity)), threshold
        assert page.text("#gallery-threshold-value") == f"{threshold:.3f}"
        yes = page.count("#gallery-cards article.yes")
        assert yes == extracted(page)[0]
    page.page.locator("#gallery-reset").click()
    assert extracted(page)[0] == main.document.extracted[main.longest_key]


def test_the_gallery_filters_by_class_prefix_set_and_verdict(opened, file):
    page = opened(file)
    assert page.count("#gallery-cards article") == 9
    page.page.locator("#gallery-class").select_option(label=CLASSES[1])
    assert page.count("#gallery-cards article") == 3
    assert all(
        name.startswith("x</") for name in page.page.locator("#gallery-cards h3 span:first-child").all_inner_texts()
    )
    page.page.locator("#gallery-class").select_option("")
    page.page.locator("#gallery-set").select_option("heldout")
    assert page.count("#gallery-cards article") == 9
    assert "held out" in page.text("#gallery-cards article:first-child h3")
    page.page.locator("#gallery-set").select_option("all")
    move_threshold(page, 0.0)
    shown = {}
    for value in ("yes", "no", ""):
        page.page.locator("#gallery-verdict").select_option(value)
        shown[value] = page.count("#gallery-cards article")
    assert shown["yes"] + shown["no"] == shown[""] == 18
    # the longest prefix alone has pictures of completions
    assert page.count("#gallery-cards article:first-child img") == 4
    page.page.locator("#gallery-prefix").select_option("0")
    assert "kept of 3 tokens" in page.text("#gallery-cards article:first-child")
    page.page.locator("#gallery-extraction").select_option(label="edit halved")
    assert page.page.locator("#gallery-verdict option").all_inner_texts()[-2:] == [
        "stopped by the edit",
        "new with the edit",
    ]


def test_the_table_of_risk_sorts_in_both_directions_and_finds_names(opened, file):
    page = opened(file)
    rows = "#risk-table tbody tr"

    def column(place: int) -> list[str]:
        return page.page.locator(f"{rows} td.number:nth-of-type({place})").all_inner_texts()

    for name in ("loss", "owned units"):
        button = page.page.locator("#risk-table thead button", has_text=name)
        button.click()
        at = {"owned units": 3, "loss": 5}[name]
        first = [float(text.replace(",", "")) for text in column(at)]
        button.click()
        second = [float(text.replace(",", "")) for text in column(at)]
        assert first == sorted(first, reverse=name != "loss")
        assert second == sorted(second, reverse=name == "loss")
        assert page.count("#risk-table th[aria-sort]") == 1
    page.page.locator("#risk-find").fill("{{ 7*7 }}")
    found = page.page.locator(f"{rows} th").all_inner_texts()
    assert found
    assert all("{{ 7*7 }}" in text for text in found)


def test_names_that_are_markup_are_shown_as_text(opened, file, hostile_run):
    page = opened(file)
    shown = page.page.locator("#gallery-cards h3 span:first-child").all_inner_texts()
    assert set(shown) < set(map(printable, hostile_run.names))
    assert any(name.startswith("x</script><script>") for name in shown)
    assert any("<script>window.hacked=1;" in name for name in shown)
    # neither in a list of options, nor in a chart
    assert CLASSES[2] in page.page.locator("#gallery-class option").all_inner_texts()
    labels = page.page.locator("#unit-panel .xtick text").all_text_contents()
    assert any(label.startswith("<img src=x") for label in labels)
    assert page.count("img[src=x]") == 0
    assert page.count("main b") == 0


@pytest.mark.parametrize(("scheme", "viewport"), [("dark", WIDE), ("light", PHONE)], ids=["dark", "phone"])
def test_the_page_fits_a_phone_and_the_dark(opened, file, scheme, viewport):
    page = opened(file, scheme, viewport)
    assert page.page.evaluate("document.documentElement.scrollWidth") <= viewport["width"]
    dark = page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", dark)[:3])) < 150) == (scheme == "dark")
    page.page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")
    assert page.count("#unit-map .heatmaplayer image") == 1


def test_a_page_without_images_has_none(opened, hostile_run, tmp_path):
    page = opened(fastmem.report(hostile_run.run, tmp_path / "page.html", images=False))
    assert page.count("main img") == 0
    assert page.count("#gallery-cards article") == 9
    assert page.count("#unit-list button") == 12
    assert "without pictures" in page.text("#provenance")
    assert "data:image/webp" not in (tmp_path / "page.html").read_text().split('id="data"')[1][:200_000]


def test_parts_whose_stage_has_not_run_name_the_command(opened, toy_model, toy_source, tmp_path):
    fastmem.score(toy_model, toy_source, views=1, check_classes=False, pictures=False, out=tmp_path / "run")
    run = fastmem.open_run(tmp_path / "run", model=toy_model, data=toy_source)
    page = opened(fastmem.report(run))
    told = page.page.locator(".missing code").all_inner_texts()
    for stage in ("extract", "mitigate", "sweep"):
        assert f"fastmem {stage} --run {run.path}" in told
    assert page.count("#unit-map .heatmaplayer image") == 1


def test_5000_candidates_can_be_used(opened, file, tmp_path):
    text = file.read_text()
    start = text.index('id="data">') + len('id="data">')
    stop = text.index("</script>", start)
    document = json.loads(text[start:stop])
    extraction = document["extractions"][0]
    wanted, before = 5000, extraction["heldout"]
    places = [i % before for i in range(wanted)] + [before + i % before for i in range(wanted)]
    extraction["heldout"] = wanted
    for name in ("image", "candidate", "ceiling", "rebuilt", "made"):
        extraction[name] = [extraction[name][i] for i in places]
    for name in ("similarity", "match", "original", "nearest", "nearest_similarity"):
        extraction[name] = [[row[i] for i in places] for row in extraction[name]]
    for name in ("image", "owned", "hits", "loss", "similarity", "candidate"):
        rows = document["risk"][name]
        document["risk"][name] = [rows[i % len(rows)] for i in range(wanted)]
    written = json.dumps(document).replace("<", "\\u003c").replace(">", "\\u003e")
    (tmp_path / "page.html").write_text(text[:start] + written + text[stop:])
    page = opened(tmp_path / "page.html")
    assert extracted(page)[1] == 5000
    seconds = page.page.evaluate(
        """() => { const start = performance.now(), slider = document.getElementById('gallery-threshold');
        for (const value of [0.2, 0.4, 0.6, 0.8]) { slider.value = value; slider.dispatchEvent(new Event('input')); }
        document.querySelector('#risk-table thead button').click();
        return (performance.now() - start) / 1000; }"""
    )
    # a bound for the slowest of machines; the lists are drawn in parts
    assert seconds < 5
    assert page.count("#gallery-cards article") == 24
    assert page.count("#risk-table tbody tr") == 25
    assert page.count("*") < 20_000


@pytest.mark.heavy
def test_the_demo_ends_with_five_lines_and_a_small_page(opened, capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FASTMEM_HOME", str(tmp_path / "home"))
    code, out, err = run(capsys, "demo", "--out", tmp_path / "run")
    assert code == 0, err
    lines = out.strip().splitlines()
    assert [line[:2] for line in lines[2:7]] == ["1.", "2.", "3.", "4.", "5."]
    file = tmp_path / "run" / "report.html"
    assert lines[-1] == f"Open in a browser: {file}"
    assert file.stat().st_size < 10e6
    page = opened(file)
    for name in ("unit-map", "owned-chart", "similarity-chart", "edits-chart"):
        assert page.count(f"#{name} .main-svg") > 0, name
    assert page.text("#gallery-train-count") in lines[2]
    assert page.count("#gallery-cards article") == 24
    page.page.locator("#cards-pager button", has_text="next").click()
    assert page.text("#cards-pager span").startswith("25 to 48")
