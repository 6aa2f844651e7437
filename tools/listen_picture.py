"""Take docs/listen.png: python tools/listen_picture.py demo/runs/*/embeddings.parquet --song "Leaving Orbit"

After `make demo`. Serves an embedding table, opens the page in Chromium, selects the song, starts its radio and lists
the nearest songs. Needs selenium, chromium, chromedriver, and fonts for the demo's names (fonts-noto-cjk).
"""

import argparse
import base64
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.support.ui import Select, WebDriverWait

from simsiam_dali.common.errors import UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 1300, 860  # px
SECONDS = 300.0
"""What the map may take on a busy machine."""
FLAGS = ("--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--autoplay-policy=no-user-gesture-required")


@contextmanager
def served(table: Path, scratch: Path) -> Iterator[str]:
    """The address of the page of a table; ratings and playlists go to `scratch`."""
    places = ["--ratings", scratch / "ratings.csv", "--playlists", scratch / "playlists"]
    words = [sys.executable, "-m", "simsiam_dali.serve", table, "--port", "0", *places]
    server = subprocess.Popen(list(map(str, words)), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        line = server.stdout.readline()
        if not line:
            raise UserError(f"simsiam_dali.serve could not serve {table}: see above")
        yield line.split(" ")[0]
    finally:
        server.terminate()
        server.wait()


def picture(browser: Any, url: str, song: str, colour: str) -> bytes:
    """The page as PNG."""
    metrics = {"width": WIDTH, "height": HEIGHT, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    browser.get(url)

    def until(expression: str) -> None:
        WebDriverWait(browser, SECONDS).until(lambda _: browser.execute_script(f"return {expression}"), expression)

    until("document.documentElement.dataset.ready")
    until("document.getElementById('state').textContent === 'UMAP'")
    Select(browser.find_element(By.ID, "colour")).select_by_visible_text(colour)
    browser.find_element(By.ID, "search").send_keys(song)
    until("document.getElementById('list-name').textContent === 'Found'")
    browser.find_element(By.CSS_SELECTOR, "#list button.song").click()
    until("!document.getElementById('selected').hidden")
    browser.find_element(By.ID, "radio").click()
    until("document.querySelectorAll('#queue li').length > 5")
    until("document.getElementById('audio').currentTime > 2")
    browser.find_element(By.ID, "nearest").click()
    until("document.getElementById('list-name').textContent === 'Nearest songs'")
    return base64.b64decode(browser.get_screenshot_as_base64())


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("table", type=Path, help="embedding table whose music is still where it was")
    add("--song", required=True, metavar="TITLE", help="what to search; the first song found is selected")
    add("--colour", default="genre", help="what the songs are coloured by (default: %(default)s)")
    add("--out", type=Path, default=ROOT / "docs" / "listen.png", help="PNG to write (default: docs/listen.png)")
    args = parser.parse_args()
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    with TemporaryDirectory() as name:
        for flag in (*FLAGS, f"--user-data-dir={name}/profile"):
            options.add_argument(flag)
        with served(args.table.resolve(), Path(name)) as url:
            browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
            try:
                args.out.write_bytes(picture(browser, url, args.song, args.colour))
            finally:
                browser.quit()


if __name__ == "__main__":
    main()
