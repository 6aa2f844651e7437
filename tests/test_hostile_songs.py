"""Hostile songs: what a music folder may hold beside good files, and what packing makes of it."""

import csv
import ctypes
import os
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from helpers.small_music import make_shards, repeat_headers, sound, write_audio, write_song

from simsiam_dali.data.format import read_table, verify
from simsiam_dali.data.shards import open_shards
from simsiam_dali.packing.segments import without_ogg_serial

SHORT = ("--segment-seconds", "4", "--workers", "2")


def without_root_rights() -> None:
    """Root may read any file unless it gives up the right before the command starts."""
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    drop_from_bounding_set = 24
    for capability in (1, 2):  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
        if prctl(drop_from_bounding_set, capability, 0, 0, 0) != 0 and os.geteuid() == 0:
            raise OSError(ctypes.get_errno(), "prctl")


def cut(path: Path, share: float) -> None:
    os.truncate(path, int(path.stat().st_size * share))


def zero_4_kb_in_the_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 4096] = bytes(4096)
    path.write_bytes(content)


def declare_more(path: Path, samples: int) -> None:
    """Raise the end position that the last Ogg page states; the page keeps a valid checksum."""
    content = bytearray(path.read_bytes())
    at = content.rfind(b"OggS") + 6
    end = int.from_bytes(content[at : at + 8], "little")
    content[at : at + 8] = (end + samples).to_bytes(8, "little")
    path.write_bytes(without_ogg_serial(bytes(content)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything a music folder may hold, and the result of packing it: `music/`, `shards/`, `screen`."""
    root = tmp_path_factory.mktemp("hostile")
    music = root / "music"
    music.mkdir()
    # to be refused
    (music / "empty.mp3").touch()
    (music / "text.mp3").write_text("no music at all\n" * 300)
    (music / "playlist.mp3").write_text("#EXTM3U\n#EXTINF:5,\nhttp://localhost:1/a.mp3\n")
    write_song(music / "one second.ogg", 1, 1.0)
    write_audio(music / "silence.flac", np.zeros((6 * 22050, 1), np.float32))
    nan = sound(2, 6.0)
    nan[1000] = np.nan
    write_audio(music / "nan.wav", nan, subtype="FLOAT")
    write_song(music / "unreadable.ogg", 3)
    (music / "unreadable.ogg").chmod(0)
    (music / "dangling.mp3").symlink_to(root / "nowhere.mp3")
    (music / "self.mp3").symlink_to(music / "self.mp3")
    # to be kept as far as they decode
    cut(write_song(music / "truncated.ogg", 4, 12.0), 0.7)
    cut(write_song(music / "truncated.flac", 5, 12.0), 0.7)
    zero_4_kb_in_the_middle(write_song(music / "zeroed.ogg", 6, 12.0))
    declare_more(write_song(music / "fewer frames.ogg", 7, 9.0), 30 * 22050)
    repeat_headers(write_song(music / "headers twice.ogg", 21, 9.0, title="Twice"))
    # to be kept whole
    write_audio(music / "8 kHz.wav", sound(8, 6.0, 8000), 8000)
    write_audio(music / "96 kHz.flac", sound(9, 6.0, 96000, 2), 96000)
    write_audio(music / "24 bit.flac", sound(10, 6.0, 44100, 2), 44100, "PCM_24")
    write_audio(music / "six channels.flac", sound(11, 6.0, 48000, 6), 48000)
    write_song(music / "音楽" / "歌 – 夜.ogg", 12, title="夜")
    write_song(music / 'it\'s "50%" & $HOME; more.mp3', 13, title="quoted")
    write_song(music / "no tags.wav", 14)
    write_song(music / "eleven titles.ogg", 15, title=[f"Title {n}" for n in range(11)])
    write_song(music / "twice.flac", 16, title="Twice", album="First")
    write_song(music / "again" / "twice.flac", 16, title="Twice", album="Second")
    write_song(music / "new\nline.mp3", 17)
    write_song(music / "apple.m4a", 18)
    write_song(music / "other ending.xyz", 19)
    Path(os.fsdecode(bytes(music) + b"/latin-\xe9.mp3")).write_bytes(write_song(root / "latin.mp3", 20).read_bytes())
    # to be ignored
    for name in ("cover.jpg", "list.m3u", "disc.cue", "notes.txt", "unknown.data", ".hidden.mp3"):
        (music / name).write_bytes(b"\xff\xd8 something else")
    (music / "again" / "loop").symlink_to(music)

    result = make_shards(music, "--out", root / "shards", *SHORT, preexec_fn=without_root_rights)
    (root / "screen").write_text(result.stdout + result.stderr)
    assert result.returncode == 0, result.stderr
    return root


REFUSED = {
    "empty.mp3": "empty",
    "text.mp3": "audio",
    "playlist.mp3": "audio",
    "one second.ogg": "too short: 1.0 s",
    "silence.flac": "silent",
    "nan.wav": "NaN",
    "unreadable.ogg": "Permission denied",
    "dangling.mp3": "No such file",
    "self.mp3": "Too many levels of symbolic links",
}
DAMAGED = {  # name: what the note says, seconds decoded (from, to)
    "truncated.ogg": ("truncated", 5, 11),
    "truncated.flac": ("truncated: 8.", 8, 9),
    "zeroed.ogg": (" of 12.0 s", 9, 11.7),
    "fewer frames.ogg": ("truncated: 9.0 of 39.0 s", 8.99, 9.01),
    "headers twice.ogg": ("decoded by libsndfile: with FFmpeg it does not open as audio", 8.99, 9.01),
}
WHOLE = {
    "8 kHz.wav": 8000,
    "96 kHz.flac": 96000,
    "24 bit.flac": 44100,
    "six channels.flac": 48000,
    "音楽/歌 – 夜.ogg": 22050,
    'it\'s "50%" & $HOME; more.mp3': 22050,
    "no tags.wav": 22050,
    "eleven titles.ogg": 22050,
    "again/twice.flac": 22050,
    "new\nline.mp3": 22050,
    "apple.m4a": 22050,
    "other ending.xyz": 22050,
    "latin-\\xe9.mp3": 22050,
}


def songs_by_path(root: Path) -> pd.DataFrame:
    return open_shards(root).songs.set_index("path")


def test_refused_songs_are_listed_with_their_reason(hostile: Path) -> None:
    with (hostile / "shards" / "refused.csv").open(newline="") as file:
        refused = {row["path"]: row["reason"] for row in csv.DictReader(file)}
    assert refused.keys() == REFUSED.keys()
    for name, reason in REFUSED.items():
        assert reason in refused[name]
        assert f"refused  {name}: {refused[name]}" in (hostile / "screen").read_text()


def test_every_good_song_is_in_the_shards(hostile: Path) -> None:
    shards = open_shards(hostile / "shards")
    assert verify(hostile / "shards") == []
    songs = shards.songs.set_index("path")
    assert set(songs.index) == DAMAGED.keys() | WHOLE.keys()
    for name, rate in WHOLE.items():
        assert songs.loc[name, "sample_rate"] == rate
        assert songs.loc[name, "duration"] == pytest.approx(6.0, abs=0.15)
        assert songs.loc[name, "note"] == ""
    assert songs.loc["six channels.flac", "channels"] == 6
    counts = shards.segments.groupby("song").size()
    for row, duration in enumerate(shards.songs["duration"]):
        assert counts[row] == int(duration / 4) + (duration % 4 >= 2)


def test_damaged_songs_are_kept_up_to_where_they_decode(hostile: Path) -> None:
    songs = songs_by_path(hostile / "shards")
    for name, (note, least, most) in DAMAGED.items():
        assert note in songs["note"][name]
        assert least <= songs["duration"][name] <= most
        assert f"warning  {name}: {songs['note'][name]}" in (hostile / "screen").read_text()


def test_tags_and_duplicates(hostile: Path) -> None:
    songs = songs_by_path(hostile / "shards")
    assert songs.loc["eleven titles.ogg", "title"] == " / ".join(f"Title {n}" for n in range(11))
    assert songs.loc["no tags.wav", "title"] == ""
    assert songs.loc["音楽/歌 – 夜.ogg", "title"] == "夜"
    assert songs.loc["again/twice.flac", "albums"] == ["Second", "First"]
    assert songs.loc["again/twice.flac", "other_paths"] == ["twice.flac"]


def test_every_file_seen_is_in_the_table_of_files(hostile: Path) -> None:
    files = read_table(hostile / "shards" / "files.parquet").set_index("path")
    assert files["status"].value_counts().to_dict() == {
        "ok": len(DAMAGED) + len(WHOLE),
        "refused": len(REFUSED),
        "duplicate": 1,
    }
    assert files["song"]["twice.flac"] == files["song"]["again/twice.flac"]
    assert "1 duplicates, 9 refused, 6 other files ignored" in (hostile / "screen").read_text()
    assert "Traceback" not in (hostile / "screen").read_text()
