"""The report in a real browser: on a phone and a desk, light and dark, with nothing to fetch."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from test_analysis import comparison

from flora_lab.analysis import page, tables
from flora_lab.analysis.results import by_job, summarise
from flora_lab.methods import METHODS

SIZES = {"phone": (360, 800), "desk": (1280, 900)}
FLAGS = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
HOSTILE = {
    "job": "cola", "metric": "accuracy", "variant": "dora", "method": "dora", "budget": 7, "left_out": "<script>x()",
}  # fmt: skip


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    return [*comparison(), HOSTILE]


@pytest.fixture(scope="module")
def report(rows, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    page.write(rows, path)
    return path


@pytest.fixture(scope="module")
def chromium() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = next(filter(None, map(shutil.which, BROWSERS)))
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, Service(shutil.which("chromedriver")))
    yield driver
    driver.quit()


@pytest.fixture
def browser(chromium, report, request) -> webdriver.Chrome:
    """The page opened at a size, in light or dark."""
    size, scheme = request.param
    width, height = SIZES[size]
    screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": size == "phone"}
    chromium.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    dark = {"name": "prefers-color-scheme", "value": scheme}
    chromium.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [dark]})
    chromium.get(report.as_uri())
    return chromium


def test_the_page_is_one_small_file(report):
    text = report.read_text(encoding="utf-8")
    assert len(text) < 2e6 and "<script>" not in text and "&lt;script&gt;x()" in text
    assert not re.search(r'(?:src|href)\s*=\s*(?!"#|"data:,")|@import|url\((?!#)', text)


@pytest.mark.parametrize("browser", [(size, "light") for size in SIZES], indirect=True)
def test_it_fits_the_screen_and_fetches_nothing(browser, request):
    width = browser.execute_script("return window.innerWidth")
    assert width == SIZES[request.node.callspec.params["browser"][0]][0]
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    figures = browser.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(e => e.getBoundingClientRect().toJSON())"
    )
    assert len(figures) == 3 * 6 + 2
    assert all(box["width"] > 300 and box["height"] > 150 and box["right"] <= width for box in figures)
    # tables scroll in their boxes, and no text leaves its figure
    boxes = browser.execute_script("return [...document.querySelectorAll('.box')].map(e => e.offsetWidth)")
    assert len(boxes) == 6 and max(boxes) <= width
    outside = """return [...document.querySelectorAll('figure svg text')].filter(text => {
        const [a, b] = [text.getBoundingClientRect(), text.closest('svg').getBoundingClientRect()]
        return a.left < b.left - 1 || a.right > b.right + 1 || a.top < b.top - 1 || a.bottom > b.bottom + 1
    }).map(text => text.textContent)"""
    assert browser.execute_script(outside) == []
    assert browser.execute_script("return performance.getEntriesByType('resource').map(e => e.name)") == []
    assert browser.get_log("browser") == []


OVERLAPS = """return [...document.querySelectorAll('figure svg')].flatMap(svg => {
    const boxes = [...svg.querySelectorAll('text')].map(text => [text.textContent, text.getBoundingClientRect()])
    return boxes.flatMap(([name, a], n) => boxes.slice(n + 1).filter(([_, b]) =>
        Math.min(a.right, b.right) - Math.max(a.left, b.left) > 2 &&
        Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 0.45 * Math.min(a.height, b.height)
    ).map(([other]) => [svg.ariaLabel, name, other]))
})"""


@pytest.mark.parametrize("browser", [("desk", "light")], indirect=True)
def test_labels_do_not_overlap(browser):
    assert browser.execute_script(OVERLAPS) == []


@pytest.mark.parametrize("browser", [("desk", "light")], indirect=True)
def test_tables_hold_the_rows(browser, rows):
    shown = browser.execute_script(
        """return [...document.querySelectorAll('table')].map(table => [...table.rows].map(
            row => [...row.cells].map(cell => cell.textContent)))"""
    )
    jobs = by_job(summarise(rows)).values()
    made = [make(of) for make in (tables.comparison, tables.costs) for of in jobs]
    assert shown == [[table.columns, *table.lines] for table in made]
    assert len(made[0].lines) == 3 + 3 * (len(METHODS) - 3 + 2) + 3
    bold = browser.execute_script("return document.querySelector('table').querySelectorAll('b').length")
    assert bold == len(made[0].bold) >= 3


CONTRAST = """
const light = colour => {
    const [r, g, b] = colour.match(/[\\d.]+/g).map(v => v / 255).map(
        v => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * r + 0.7152 * g + 0.0722 * b + 0.05
}
const paper = light(getComputedStyle(document.body).backgroundColor)
const behind = cell => {
    const own = getComputedStyle(cell).backgroundColor
    return own.endsWith(', 0)') ? paper : light(own)
}
return [paper, Math.min(...[...document.querySelectorAll('h1, h2, h3, p, li, a, th, td, figcaption, svg')].map(e => {
    const [a, b] = [light(getComputedStyle(e).color), behind(e)]
    return Math.max(a, b) / Math.min(a, b)
})), Math.min(...[...document.querySelectorAll('figure svg text')].map(e => {
    const own = light(getComputedStyle(e).fill)
    return Math.max(own, paper) / Math.min(own, paper)
}))]
"""


@pytest.mark.parametrize("browser", [("desk", "light"), ("phone", "dark")], indirect=True)
def test_text_is_readable_in_light_and_dark(browser, request):
    paper, least, drawn = browser.execute_script(CONTRAST)
    assert (paper < 0.1) == (request.node.callspec.params["browser"][1] == "dark")
    assert least >= 4.5
    assert drawn >= 3.0  # of names in their method's colour; on dark a filter brightens them further
