"""The map and the report in a real browser: tags stay text, a click lists the nearest songs, nothing is fetched."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from helpers.evaluation_tables import planted, song_table

from simsiam_dali.evaluation import maps, report
from simsiam_dali.evaluation.plan import Evaluation, Options

if TYPE_CHECKING:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
else:
    webdriver = pytest.importorskip("selenium.webdriver")
    By = pytest.importorskip("selenium.webdriver.common.by").By
ActionChains = webdriver.ActionChains

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

HOSTILE = [
    "<script>alert(1)</script>",
    "</script><img src=x onerror=alert(2)>",
    "\u2028<!--<script>",
    "{{ 7 * 7 }} & 'quotes' \"too\"",
]
SONGS = 24


@pytest.fixture(scope="module")
def browser() -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    flags = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--window-size=1200,800")
    for flag in flags:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """map.html and report.html of songs whose first four have hostile titles, artists and genres."""
    folder = tmp_path_factory.mktemp("pages")
    table: Any = song_table(SONGS)  # pandas-stubs has no lists in cells
    x = planted(np.arange(SONGS) % 6, noise=0.6)
    for i, text in enumerate(HOSTILE):
        table.at[i, "title"] = text
        table.at[i, "artists"] = [text]
        table.at[i, "genres"] = [text]
    flat = {"first": x[:, :2], "second": x[:, 2:4]}
    html = report.map_page(maps.page_data(table, x, flat))
    (folder / "map.html").write_text(html)
    provenance = {
        "songs": SONGS,
        "held back": 0,
        "dimensions": 16,
        "compared": "half-whitened",
        "date": "today",
        "made by": {HOSTILE[0]: HOSTILE[1]},
    }
    done = Evaluation([], {"rating": [HOSTILE[0]], "artist": [], "album": [], "genre": []})
    (folder / "report.html").write_text(report.page(done, provenance, Options(), {}, html))
    return folder


def opened(browser: "webdriver.Chrome", page: Path) -> dict:
    """Open a page; returns the data of its map. Fails on an alert, an error of the script or a request."""
    browser.get(page.as_uri())
    return json.loads(
        browser.execute_script("return (document.getElementById('data') || {textContent: '0'}).textContent")
    )


def point(browser: "webdriver.Chrome", data: dict, song: int) -> tuple[int, int]:
    """Where a song is in the window: the unit square fills the canvas's shorter side but for 30 pixels."""
    box = browser.execute_script("return document.querySelector('canvas').getBoundingClientRect().toJSON()")
    scale = min(box["width"], box["height"]) - 60
    x, y = data["maps"]["first"][song]
    left, top = box["x"] + (box["width"] - scale) / 2, box["y"] + (box["height"] - scale) / 2
    return round(left + x * scale), round(top + (1 - y) * scale)


def pointer(browser: "webdriver.Chrome", x: int, y: int) -> ActionChains:
    chain = ActionChains(browser, duration=0)
    chain.w3c_actions.pointer_action.move_to_location(x, y)
    return chain


def test_tags_stay_text(browser: "webdriver.Chrome", pages: Path) -> None:
    data = opened(browser, pages / "map.html")
    assert data["title"][: len(HOSTILE)] == HOSTILE
    assert browser.execute_script("return document.scripts.length") == 2
    for song, text in enumerate(HOSTILE):
        pointer(browser, *point(browser, data, song)).perform()
        tip = browser.find_element(By.ID, "tip")
        assert tip.is_displayed()
        shown = browser.execute_script("return [...arguments[0].children].map(e => e.textContent)", tip)
        assert shown == [text, text]
    for by in ("genre", "artist"):
        browser.find_element(By.ID, "colour").send_keys(by)
        legend = browser.execute_script("return document.getElementById('legend').textContent")
        assert HOSTILE[0] in legend
    assert browser.execute_script("return document.images.length + document.scripts.length") == 2
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]


def test_a_click_lists_the_nearest_songs(browser: "webdriver.Chrome", pages: Path) -> None:
    data = opened(browser, pages / "map.html")

    def listed() -> list[str]:
        return browser.execute_script("return [...document.querySelectorAll('#chosen ol b')].map(e => e.textContent)")

    assert listed() == []
    for song in (0, 5):
        pointer(browser, *point(browser, data, song)).click().perform()
        assert browser.execute_script("return document.querySelector('#chosen h2').textContent") == data["title"][song]
        assert listed() == [data["title"][other] for other in data["near"][song]]
        assert len(listed()) == maps.NEAREST
    nearest = data["near"][5][0]
    browser.find_element(By.CSS_SELECTOR, "#chosen ol button").click()
    assert listed() == [data["title"][other] for other in data["near"][nearest]]
    browser.find_element(By.ID, "find").send_keys("Title 17\n")
    assert listed() == [data["title"][other] for other in data["near"][17]]


def test_the_map_moves_and_zooms_and_comes_back(browser: "webdriver.Chrome", pages: Path) -> None:
    data = opened(browser, pages / "map.html")
    x, y = point(browser, data, 7)
    shown = (
        "return document.getElementById('tip').style.display === 'block' && document.getElementById('tip').textContent"
    )
    title = data["title"][7]
    pointer(browser, x, y).perform()
    assert browser.execute_script(shown).startswith(title)
    chain = pointer(browser, x, y).click_and_hold()
    chain.w3c_actions.pointer_action.move_to_location(x + 40, y + 30)
    chain.release().perform()
    pointer(browser, x + 40, y + 30).perform()
    assert browser.execute_script(shown).startswith(title)
    assert not browser.find_elements(By.CSS_SELECTOR, "#chosen h2")  # a drag is no click
    browser.execute_script(
        "document.querySelector('canvas').dispatchEvent(new WheelEvent('wheel', {deltaY: -900, clientX: arguments[0],"
        " clientY: arguments[1], cancelable: true}))",
        *(x + 40, y + 30),
    )
    pointer(browser, x + 41, y + 30).perform()
    assert browser.execute_script(shown).startswith(title)  # what is under the pointer stays there
    browser.find_element(By.ID, "reset").click()
    pointer(browser, x, y).perform()
    assert browser.execute_script(shown).startswith(title)


def test_the_report_holds_the_map_and_escapes_too(browser: "webdriver.Chrome", pages: Path) -> None:
    opened(browser, pages / "report.html")
    assert HOSTILE[0] in browser.find_element(By.CSS_SELECTOR, ".note").text
    assert HOSTILE[1] in browser.find_element(By.TAG_NAME, "dl").text
    assert browser.execute_script("return document.scripts.length + document.images.length") == 0
    browser.switch_to.frame(browser.find_element(By.TAG_NAME, "iframe"))
    find = browser.find_element(By.ID, "find")
    find.send_keys("<script>alert\n")
    title = browser.execute_script("return document.querySelector('#chosen h2').textContent")
    assert title == HOSTILE[0]
    browser.switch_to.default_content()
    assert not [line for line in browser.get_log("browser") if line["level"] == "SEVERE"]
