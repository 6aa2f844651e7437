"""The page in Chromium, served by the command: map, sound, search, paths, radio, ratings, playlists, accessibility."""

import contextlib
import functools
import io
import json
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib.image
import numpy as np
import pytest
import soundfile as sf
from helpers.served import with_map, write_library
from helpers.small_music import environment

from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.packing.ratings import RatingsFile

if TYPE_CHECKING:
    from selenium import webdriver
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait as Wait
else:
    webdriver = pytest.importorskip("selenium.webdriver")
    By = pytest.importorskip("selenium.webdriver.common.by").By
    Wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="needs chromium and chromedriver")

SONGS = 40
SECONDS = 60
"""What a change of the page may take on a busy machine."""
FLAGS = (
    *("--headless=new", "--no-sandbox", "--disable-gpu", "--enable-unsafe-swiftshader", "--disable-dev-shm-usage"),
    *("--autoplay-policy=no-user-gesture-required", "--window-size=1300,900"),
)


class Server:
    """The command with a table, as typed; on any free port."""

    def __init__(self, table: Path, *options: str) -> None:
        command = [sys.executable, "-m", "simsiam_dali.serve", str(table), "--port", "0", *options]
        pipe, env = subprocess.PIPE, environment()
        # As in a terminal: tests that were started in the background of a script inherit a SIGINT that is ignored.
        interrupts = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
        self.process = subprocess.Popen(
            command, cwd=table.parent, stdout=pipe, stderr=pipe, text=True, env=env, preexec_fn=interrupts
        )
        assert self.process.stdout is not None
        self.line = self.process.stdout.readline()
        self.url = self.line.split(" ")[0]

    def stop(self) -> tuple[int, str]:
        """Ctrl-C; returns the exit status and what it printed since its first line."""
        self.process.send_signal(signal.SIGINT)
        out, err = self.process.communicate(timeout=SECONDS)
        return self.process.returncode, out + err


@pytest.fixture(scope="module")
def table(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_map(write_library(tmp_path_factory.mktemp("library"), SONGS, seconds=8.0))


@pytest.fixture(scope="module")
def server(table: Path) -> Iterator[Server]:
    server = Server(table)
    yield server
    assert server.stop() == (0, "\n")


@pytest.fixture(scope="module")
def chrome(tmp_path_factory: pytest.TempPathFactory) -> Iterator["webdriver.Chrome"]:
    options = webdriver.ChromeOptions()
    assert CHROMIUM is not None
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    yield driver
    driver.quit()


class Page:
    """The page in the browser."""

    def __init__(self, chrome: "webdriver.Chrome", url: str) -> None:
        self.chrome = chrome
        chrome.get(url)
        self.until("document.documentElement.dataset.ready")

    def js(self, expression: str, *arguments: object) -> Any:
        return self.chrome.execute_script(f"return {expression}", *arguments)

    def until(self, expression: str, *arguments: object) -> None:
        """Wait until a JavaScript expression is true."""
        Wait(self.chrome, SECONDS, 0.05).until(lambda _: self.js(expression, *arguments), expression)

    def press(self, name: str) -> None:
        self.chrome.find_element(By.ID, name).click()

    def type(self, text: str) -> None:
        self.chrome.find_element(By.TAG_NAME, "body").send_keys(text)

    def search(self, text: str) -> list[str]:
        box = self.chrome.find_element(By.ID, "search")
        box.clear()
        box.send_keys(text)
        self.until("document.getElementById('list-name').textContent === 'Found'")
        return self.titles("list")

    def titles(self, name: str) -> list[str]:
        return self.js(f"[...document.querySelectorAll('#{name} .title')].map(e => e.textContent)")

    def select(self, number: int) -> None:
        """Search a song and click it in the list."""
        assert self.search(f"title {number}")[0] == f"Title {number}"
        self.chrome.find_element(By.CSS_SELECTOR, "#list button.song").click()
        self.until("document.getElementById('song').textContent === arguments[0]", f"Title {number}")

    def colours(self) -> int:
        """How many colours a screenshot of the map shows."""
        png = self.chrome.find_element(By.ID, "stage").screenshot_as_png
        pixels = matplotlib.image.imread(io.BytesIO(png))
        return len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0))


@pytest.fixture
def page(chrome: "webdriver.Chrome", server: Server) -> Iterator[Page]:
    chrome.get_log("browser")  # what other tests left
    page = Page(chrome, server.url)
    yield page
    assert [line for line in chrome.get_log("browser") if line["level"] == "SEVERE"] == []


def test_one_line_tells_the_address_and_what_is_served(server: Server, table: Path) -> None:
    music = re.escape(str(table.parent / "music"))
    assert re.fullmatch(
        rf"http://127\.0\.0\.1:\d+/ serves {SONGS} songs, {SONGS} of their files found in {music}; Ctrl-C ends it\n",
        server.line,
    )


def test_the_map_is_drawn_and_a_click_on_it_plays(page: Page) -> None:
    shown = page.colours()
    page.chrome.execute_script("document.getElementById('points').hidden = true")
    assert shown > page.colours() + 20  # the points have colours of their own, and edges
    page.chrome.execute_script("document.getElementById('points').hidden = false")
    box = page.js("document.getElementById('marks').getBoundingClientRect().toJSON()")
    chain = webdriver.ActionChains(page.chrome, duration=0)
    found = page.js(
        """fetch("/api/positions").then(answer => answer.arrayBuffer()).then(raw => [...new Float32Array(raw)])"""
    )
    x, y = found[:2]
    scale = min(box["width"], box["height"]) / 2 - 24
    left, top = box["x"] + box["width"] / 2 + x * scale, box["y"] + box["height"] / 2 - y * scale
    chain.w3c_actions.pointer_action.move_to_location(round(left), round(top))
    chain.perform()
    page.until("!document.getElementById('tip').hidden")
    hovered = page.js("document.getElementById('tip').firstChild.textContent")
    chain.click().perform()
    page.until("document.getElementById('audio').currentTime > 0.3")
    assert page.js("document.getElementById('song').textContent") == hovered
    assert page.js("document.querySelector('#playing b').textContent") == hovered
    page.until("document.getElementById('list-name').textContent === 'Nearest songs'")
    assert len(page.titles("list")) == 25
    assert hovered not in page.titles("list")


@pytest.mark.parametrize("by", ["genre", "artist", "folder", "decade", "year", "rating", "cluster"])
def test_the_map_is_coloured_by_what_is_chosen(page: Page, by: str) -> None:
    page.chrome.find_element(By.ID, "colour").send_keys(by)
    page.until("document.querySelector('#legend b').textContent === arguments[0]", by)
    assert page.js("document.querySelectorAll('#legend li').length") > 2


def test_search_finds_words_in_any_order_without_accents_and_case(page: Page) -> None:
    assert page.search("ÁRTIST 3 title 27") == ["Title 27"]
    titles = page.search("title 3")
    assert titles[0] == "Title 3"
    assert {f"Title {i}" for i in range(30, 40)} < set(titles)
    assert page.search("nothing like it") == []


def test_every_format_plays_to_its_end_and_the_queue_plays_on(page: Page) -> None:
    for number in range(5):
        page.select(number)
        page.until("document.getElementById('audio').currentTime > 0.2")
    page.press("clear")
    assert page.search("title 1")
    page.press("play-all")
    first, second = page.titles("list")[:2]
    page.until("document.getElementById('audio').currentTime > 0.1")
    assert page.js("document.querySelector('#playing b').textContent") == first
    page.js("document.getElementById('audio').currentTime = document.getElementById('audio').duration - 0.2")
    page.until("document.querySelector('#playing b').textContent === arguments[0]", second)
    page.until("document.getElementById('audio').currentTime > 0.1")


def test_a_path_leads_from_one_song_to_the_other(page: Page) -> None:
    page.select(1)
    page.press("path")
    page.select(2)
    page.until("document.getElementById('list-name').textContent === 'Path'")
    titles = page.titles("list")
    assert (titles[0], titles[-1]) == ("Title 1", "Title 2")
    assert len(titles) == len(set(titles)) == 12


def test_a_radio_of_twenty_songs_that_goes_on(page: Page) -> None:
    page.select(7)
    page.press("radio")
    page.until("document.getElementById('queue-name').textContent === 'Radio (21)'")
    titles = page.titles("queue")
    assert titles[0] == "Title 7"
    assert len(set(titles)) == 21
    page.until("document.getElementById('audio').currentTime > 0.1")
    page.chrome.find_elements(By.CSS_SELECTOR, "#queue button.song")[18].click()
    page.until(f"document.getElementById('queue-name').textContent === 'Radio ({SONGS})'")  # all that are left


def test_keys_play_pause_search_and_move(page: Page) -> None:
    page.select(4)
    page.until("!document.getElementById('audio').paused")
    page.js("document.activeElement.blur()")
    page.type(" ")
    page.until("document.getElementById('audio').paused")
    page.type("/")
    assert page.js("document.activeElement.id") == "search"
    marks = page.chrome.find_element(By.ID, "marks")
    page.js("arguments[0].focus()", marks)
    marks.send_keys("+++" + "\ue012" + "\ue007")  # zoom, left, Enter
    page.until("document.getElementById('list-name').textContent === 'Nearest songs'")
    assert page.js("document.querySelectorAll('#list li').length") == 25


def test_a_rating_survives_a_restart_and_is_read_by_packing(chrome: "webdriver.Chrome", table: Path) -> None:
    """Given by key; and the songs whose rating tells most, of which it is none then."""
    first = Server(table)
    page = Page(chrome, first.url)
    page.select(10)  # without a rating
    assert "not rated" in page.js("document.getElementById('rating').textContent")
    page.js("document.activeElement.blur()")
    page.type("4")
    page.until("document.getElementById('rating').textContent.includes('4 of 5')")
    page.press("explore")
    page.until("document.getElementById('list-name').textContent === 'Songs to rate'")
    unrated = {f"Title {i}" for i in range(0, SONGS, 5)} - {"Title 10"}
    assert set(page.titles("list")) == unrated
    assert first.stop() == (0, "\n")

    songs = read_song_embeddings(table)
    music = Path(songs.provenance["music"])
    read = RatingsFile.read(table.with_name("ratings.csv"), music)
    song: Any = songs.table.loc[10]
    assert read.lookup(music / song["path"], song["title"], song["artists"]) == 0.8
    second = Server(table)
    page = Page(chrome, second.url)
    page.select(10)
    assert "4 of 5" in page.js("document.getElementById('rating').textContent")
    assert second.stop() == (0, "\n")


def test_the_queue_is_saved_as_a_playlist_and_read_back(page: Page, table: Path) -> None:
    page.search("title 3")
    page.press("add-all")
    titles = page.titles("queue")
    page.press("save")
    page.chrome.find_element(By.ID, "playlist-name").send_keys("Ünser mix\n")
    page.until("!document.getElementById('saving').open")
    folder = table.parent / "playlists"
    lines = [line for line in (folder / "Ünser mix.m3u8").read_text("utf-8").splitlines() if not line.startswith("#")]
    assert [(folder / line).exists() for line in lines] == [True] * len(titles)
    page.until("document.getElementById('playlists').options.length === 2")
    page.chrome.find_element(By.ID, "playlists").send_keys("Ü")
    page.until("document.getElementById('list-name').textContent === 'Ünser mix'")
    assert page.titles("list") == titles


def test_a_playlist_of_that_name_is_replaced_only_when_asked(chrome: "webdriver.Chrome", server: Server) -> None:
    page = Page(chrome, server.url)
    for text, replaces in (("title 20", False), ("title 21", True)):
        page.search(text)
        page.press("add-all")
        page.press("save")
        page.chrome.find_element(By.ID, "playlist-name").send_keys("twice\n")
        if replaces:
            page.until("document.getElementById('saving-error').textContent.includes('another playlist')")
            page.press("replace")
            page.chrome.find_element(By.ID, "playlist-name").send_keys("\n")
        page.until("!document.getElementById('saving').open")
    chrome.get_log("browser")  # the refused request is logged


def test_a_format_that_browsers_do_not_play_is_heard(chrome: "webdriver.Chrome", tmp_path: Path) -> None:
    table = with_map(write_library(tmp_path, 12, seconds=3.0))
    music = tmp_path / "music"
    song = music / read_song_embeddings(table).table["path"][0]
    pcm, rate = sf.read(song)
    with song.open("wb") as file:  # an AIFF, whatever its name says
        sf.write(file, pcm, rate, "PCM_16", format="AIFF")
    server = Server(table)
    page = Page(chrome, server.url)
    page.select(0)
    page.until("document.getElementById('audio').currentTime > 0.3")
    assert page.js("document.getElementById('audio').duration") == pytest.approx(3.0, abs=0.1)
    assert server.stop() == (0, "\n")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(page: Page, scheme: str) -> None:
    axe = pytest.importorskip("axe_core_python")
    script = (Path(axe.__file__).parent / "axe.min.js").read_text("utf-8")
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
    page.select(3)
    page.press("nearest")
    page.until("document.getElementById('list-name').textContent === 'Nearest songs'")
    page.chrome.execute_script(script)
    found = page.js("axe.run()")["violations"]
    serious = [(f["id"], [n["html"] for n in f["nodes"]][:3]) for f in found if f["impact"] in ("serious", "critical")]
    assert serious == [], json.dumps(serious, indent=1)
    page.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_a_token_opens_the_page_once_and_is_gone_from_its_address(chrome: "webdriver.Chrome", table: Path) -> None:
    server = Server(table, "--token", "a-token-of-the-tests")
    assert server.url.endswith("/?token=a-token-of-the-tests")
    page = Page(chrome, server.url)
    assert page.js("location.search") == ""
    page.select(2)
    page.until("document.getElementById('audio').currentTime > 0.1")
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(server.url.partition("?")[0])
    assert server.stop() == (0, "\n")


def test_a_busy_port_is_one_line(server: Server, table: Path) -> None:
    found = re.search(r":(\d+)/", server.url)
    assert found
    port = found[1]
    command = [sys.executable, "-m", "simsiam_dali.serve", table.name, "--port", port]
    done = subprocess.run(command, cwd=table.parent, capture_output=True, text=True, env=environment())
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == f"error: port {port} of 127.0.0.1 is in use: choose another --port\n"


def running() -> list[str]:
    """The command lines of all processes."""
    commands = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):  # it has ended
            commands.append(file.read_text(errors="replace"))
    return commands


def test_ctrl_c_ends_it_while_a_song_is_read_and_the_map_is_computed(table: Path, tmp_path: Path) -> None:
    """A client that reads slowly, and a UMAP of another table: neither keeps the server or a process running."""
    own = tmp_path / table.name
    shutil.copy(table, own)
    server = Server(own, "--music", str(table.parent / "music"))
    urllib.request.urlopen(f"{server.url}api/songs").read()
    with urllib.request.urlopen(f"{server.url}audio/3?wav=1") as reading:
        reading.read(1)
        while not json.load(urllib.request.urlopen(f"{server.url}api/map"))["computing"]:
            pass
        assert server.stop() == (0, "\n")
    assert not [command for command in running() if "umap_process" in command and str(own) in command]
