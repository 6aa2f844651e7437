"""The page's player without a browser: its module in Node.js, with an audio element that plays nothing."""

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import simsiam_dali.serving

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(not NODE, reason="needs Node.js")
STATIC = Path(simsiam_dali.serving.__file__).parent / "static"

PRELUDE = """
import {Player} from "./player.js";
import {setTimeout as later} from "node:timers/promises";

/* Songs play where `plays` says so, and else fail, as when the server answers 404. After 200 it fails no more. */
class Audio extends EventTarget {
  loads = [];
  plays = () => true;
  set src(url) {
    this.loads.push(url);
    this.error = this.plays(url) ? null : {code: 4};
    if (this.loads.length < 200) setImmediate(() => this.dispatchEvent(new Event(this.error ? "error" : "playing")));
  }
  play() { return Promise.resolve(); }
  pause() {}
  load() {}
  removeAttribute() {}
}
globalThis.MediaError = {MEDIA_ERR_DECODE: 3};
globalThis.fetch = async () => ({status: 404});
const audio = new Audio();
const problems = [];
const listen = (player) => player.addEventListener("problem", ({detail}) => problems.push(detail));
"""


def run(tmp_path: Path, script: str) -> Any:
    """What a script reports, which follows `PRELUDE` and leaves it in `result`."""
    for name in ("player.js", "api.js"):
        shutil.copy(STATIC / name, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')  # as a browser reads the files
    (tmp_path / "test.js").write_text(f"{PRELUDE}{script}\nconsole.log(JSON.stringify(result));")
    assert NODE
    done = subprocess.run([NODE, "test.js"], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_radio_stops_after_five_songs_that_do_not_play(tmp_path: Path) -> None:
    """As when the music's disk is away; it says so once, and tries again when a song is chosen."""
    result = run(tmp_path, """
let asked = 0;
const player = new Player(audio, async (last) => { asked++; return [1, 2, 3].map((n) => last + n); });
listen(player);
audio.plays = () => false;
player.play([0, 1, 2, 3], true);
await later(300);
const first = {place: player.place, loads: audio.loads.length, asked};
player.start(0);
await later(300);
const result = {first, loads: audio.loads.length, problems};
""")  # fmt: skip
    assert result["first"] == {"place": 4, "loads": 10, "asked": 2}  # each once more as WAV
    assert result["loads"] == 20
    last = "its file is missing, or outside the music folder; stopped after 5 songs in a row that did not play"
    assert [place for place, text in enumerate(result["problems"]) if "stopped" in text] == [4, 9]
    assert result["problems"][4] == last


def test_songs_that_do_not_play_are_passed_over_while_others_play(tmp_path: Path) -> None:
    result = run(tmp_path, """
const player = new Player(audio, async () => []);
listen(player);
audio.addEventListener("playing", () => setImmediate(() => audio.dispatchEvent(new Event("ended"))));
audio.plays = (url) => /[05](\\?|$)/.test(url); // /audio/0, /audio/5, /audio/10, ...
player.play(Array.from({length: 31}, (_, n) => n));
await later(500);
const stopped = problems.filter((text) => text.includes("stopped")).length;
const result = {song: player.song, problems: problems.length, stopped};
""")  # fmt: skip
    assert result == {"song": 30, "problems": 24, "stopped": 0}


QUEUES = """
const waiting = [];
const player = new Player(audio, (last) => new Promise((answer, refuse) => waiting.push({last, answer, refuse})));
listen(player);
player.play([1, 2], true);
"""


@pytest.mark.parametrize("then", ["player.play([10, 11])", "player.clear()", "player.play([10, 11], true)"])
@pytest.mark.parametrize("late", ["answer([3])", "refuse(new Error('late'))"])
def test_what_was_asked_for_an_earlier_radio_is_dropped(tmp_path: Path, then: str, late: str) -> None:
    script = f"{QUEUES} {then}; const before = [...player.queue]; waiting[0].{late}; await later(10);"
    result = run(tmp_path, f"{script} const result = {{before, queue: player.queue, problems}};")
    assert result["queue"] == result["before"]
    assert result["problems"] == []


def test_a_new_radio_is_extended_while_an_earlier_one_waits_for_songs(tmp_path: Path) -> None:
    result = run(tmp_path, f"""{QUEUES}
player.play([10, 11], true);
player.start(1); // asks no second time
const asked = waiting.map(({{last}}) => last);
waiting[0].answer([3]);
await later(10);
player.start(1);
waiting[1].answer([12]);
await later(10);
const result = {{asked, again: waiting.length, queue: player.queue}};
""")  # fmt: skip
    assert result == {"asked": [2, 11], "again": 2, "queue": [10, 11, 12]}
