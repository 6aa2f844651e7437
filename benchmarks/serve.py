"""How quick the local page is with 100,000 songs: `python benchmarks/serve.py --out results/serve/NAME.json`.

Writes a table of made vectors and tags to a scratch folder (no audio), starts `python -m simsiam_dali.serve` on it, and
opens the page in Chromium, which runs already. Measured are

    ready        seconds from the start of the server's process to the page's mark "ready" (the map drawn, the search
                 usable), and CPU seconds of the server until then
    search made  from then until the server has what nearest songs, paths and radio need
    nearest, path, radio, explore    each request as the page makes it, 5 times with other songs
    frame        the time between two frames while the map is panned and zoomed
    memory       the largest resident set of the server's process (VmHWM), and of the process that computes UMAP

UMAP is computed at the lowest priority while the requests are timed, unless --wait-for-map lets it finish first.
"""

import argparse
import json
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any

import machine
import numpy as np
import pandas as pd
import torch

from simsiam_dali.embedding.table import Embeddings, write_embeddings
from simsiam_dali.evaluation.within_song import WithinSong

FRAMES = """
const done = arguments[arguments.length - 1], marks = document.getElementById("marks"), times = [];
let last = 0, left = arguments[0];
const step = now => {
  if (last) times.push(now - last);
  last = now;
  if (!left--) return done(times);
  const key = ["ArrowLeft", "+", "ArrowRight", "-"][left % 4];
  marks.dispatchEvent(new KeyboardEvent("keydown", {key, bubbles: true}));
  requestAnimationFrame(step);
};
requestAnimationFrame(step);
"""


def write_table(path: Path, songs: int, width: int) -> None:
    """A table of made songs: 50 clusters of vectors, 2,000 artists, 20 genres, one song in fifty rated."""
    rng = np.random.default_rng(0)
    cluster, artist = rng.integers(0, 50, songs), rng.integers(0, 2000, songs)
    vectors = rng.standard_normal((50, width))[cluster] + 0.7 * rng.standard_normal((songs, width))
    table = pd.DataFrame(
        {
            "path": [f"Artist {a}/Album {i % 5}/{i}.mp3" for i, a in enumerate(artist)],
            "title": [f"A made title of a song {i}" for i in range(songs)],
            "artists": [[f"Artist {a}"] for a in artist],
            "albums": [[f"Album {i % 5}"] for i in range(songs)],
            "album_artist": [f"Artist {a}" for a in artist],
            "year": pd.array(rng.integers(1950, 2026, songs), "Int64"),
            "genres": [[f"Genre {c % 20}"] for c in cluster],
            "rating": np.where(rng.random(songs) < 0.02, rng.integers(0, 11, songs) / 10, np.nan),
            "duration": rng.uniform(60, 600, songs).round(1),
            "split": "train",
        }
    )
    segments = np.repeat(vectors[:2000], 3, axis=0)
    segments += 0.7 * rng.standard_normal(segments.shape)
    within = WithinSong.of_segments(segments, np.repeat(np.arange(len(segments) // 3), 3))
    (path.parent / "music").mkdir()
    provenance = {"music": str(path.parent / "music"), "rows": "songs"}
    write_embeddings(path, Embeddings.of_songs(table, np.arange(songs), vectors, provenance, within))


def memory(pid: int) -> tuple[int, int]:
    """Peak resident memory in MB of a process, and the largest of its children's."""
    children = Path(f"/proc/{pid}/task/{pid}/children")
    own = [pid]
    for thread in Path(f"/proc/{pid}/task").iterdir():
        own += map(int, (thread / "children").read_text().split()) if children.exists() else []
    peaks = []
    for one in own:
        status = Path(f"/proc/{one}/status").read_text()
        peaks.append(int(status.partition("VmHWM:")[2].split()[0]) // 1024)
    return peaks[0], max(peaks[1:], default=0)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process so far: on a busy machine it tells more than the clock."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def seconds_of(browser: Any, expression: str) -> float:
    """How long a promise of the page takes."""
    script = f"const begun = performance.now(); return ({expression}).then(() => performance.now() - begun)"
    return float(browser.execute_script(script)) / 1000


def summary(seconds: list[float]) -> dict[str, float]:
    """Median and largest, in ms."""
    return {"median_ms": round(statistics.median(seconds) * 1000, 1), "max_ms": round(max(seconds) * 1000, 1)}


def open_browser() -> Any:
    """Chromium without a window, started."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for flag in ("--headless=new", "--no-sandbox", "--enable-unsafe-swiftshader", "--window-size=1400,900"):
        options.add_argument(flag)
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))


def measure(table: Path, songs: int, wait_for_map: bool) -> dict[str, Any]:
    """Start the server, open the page, and time it."""
    browser = open_browser()
    browser.set_script_timeout(120)
    command = [sys.executable, "-m", "simsiam_dali.serve", str(table), "--port", "0"]
    begun = time.time()
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=table.parent)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split(" ")[0]
        listening = time.time() - begun
        browser.get(url)
        while not browser.execute_script("return performance.getEntriesByName('ready').length"):
            time.sleep(0.02)
        mark = "return performance.timeOrigin + performance.getEntriesByName('ready')[0].startTime"
        ready = browser.execute_script(mark) / 1000 - begun
        cpu = cpu_seconds(server.pid)
        state = json.loads(urllib.request.urlopen(f"{url}api/map").read())
        made = time.time()
        urllib.request.urlopen(f"{url}api/nearest/0").read()
        result: dict[str, Any] = {
            "listening_s": round(listening, 2),
            "ready_s": round(ready, 2),
            "cpu_until_ready_s": cpu,
            "search_made_s": round(time.time() - made, 2),
            "map_at_start": state["kind"],
        }
        print(result, file=sys.stderr, flush=True)
        map_begun = time.time()
        while wait_for_map and json.loads(urllib.request.urlopen(f"{url}api/map").read())["kind"] != "UMAP":
            result["umap_memory_mb"] = max(result.get("umap_memory_mb", 0), memory(server.pid)[1])
            time.sleep(1)
        if wait_for_map and state["kind"] != "UMAP":
            result["umap_s"] = round(time.time() - map_begun)
        rng = random.Random(0)
        post = "{method: 'POST', headers: {'content-type': 'application/json'}, body: '{\"start\": %d, \"seed\": 1}'}"
        asked = {
            "nearest": lambda a, _: f"'/api/nearest/{a}'",
            "path": lambda a, b: f"'/api/path?start={a}&end={b}'",
            "radio": lambda a, _: f"'/api/radio', {post % a}",
            "explore": lambda _, __: "'/api/explore'",
        }
        for name, request in asked.items():
            pairs = [(rng.randrange(songs), rng.randrange(songs)) for _ in range(5)]
            calls = [f"fetch({request(a, b)}).then(answer => answer.json())" for a, b in pairs]
            result[name] = summary([seconds_of(browser, call) for call in calls])
            print(name, result[name], file=sys.stderr, flush=True)
        result["frame"] = summary([ms / 1000 for ms in browser.execute_async_script(FRAMES, 60)])
        result["memory_mb"], umap = memory(server.pid)
        result["umap_memory_mb"] = max(result.get("umap_memory_mb", 0), umap)
        return result
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(30)
        browser.quit()


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--songs", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--width", type=int, default=256, help="dimensions of a vector (default: %(default)s)")
    parser.add_argument("--wait-for-map", action="store_true", help="measure the time of UMAP too")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to keep the result")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        table = Path(scratch) / "embeddings.parquet"
        write_table(table, args.songs, args.width)
        result = measure(table, args.songs, args.wait_for_map)
    document = {"songs": args.songs, "width": args.width, "load_at_start": os.getloadavg()[0], **result}
    print(json.dumps(document, indent=1))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        document = {"machine": machine.environment(torch.device("cpu")), **document}
        args.out.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
