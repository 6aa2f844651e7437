"""Playlists as files: XSPF (https://www.xspf.org/spec), M3U8 (UTF-8, extended), and a CSV table."""

import csv
import io
import math
import os
import unicodedata
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote_from_bytes

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write, refuse_failed_write

MARK = "simsiam_dali.recommend"
"""At the top of each playlist of this command: only such files are replaced without --replace."""
CSV_COLUMNS = ("rank", "similarity", "predicted_rating", "std", "artist", "title", "album", "seconds", "path")
_NAMESPACE = "http://xspf.org/ns/0/"


@dataclass(frozen=True)
class Entry:
    """A song of a playlist. `path`: absolute, or relative to the playlist's folder; seconds: NaN = unknown.

    scores: by the names of `CSV_COLUMNS`; `note`: the first score as text.
    """

    path: str
    artist: str
    title: str
    album: str
    seconds: float
    scores: Mapping[str, float]
    note: str


def one_line(text: str) -> str:
    """`text` with a space for each character that breaks a line or that XML does not allow."""
    replaced = ("Cc", "Cs", "Zl", "Zp")
    return "".join(" " if unicodedata.category(c) in replaced or c in "\ufffe\uffff" else c for c in text).strip()


def xspf(entries: Sequence[Entry], title: str) -> tuple[str, list[str]]:
    """The playlist in XSPF, and the paths that it cannot hold (none)."""
    root = ET.Element("playlist", version="1", xmlns=_NAMESPACE)
    ET.SubElement(root, "title").text = one_line(title)
    ET.SubElement(root, "creator").text = MARK
    tracks = ET.SubElement(root, "trackList")
    for entry in entries:
        track = ET.SubElement(tracks, "track")
        named = {"title": entry.title, "creator": entry.artist, "annotation": entry.note, "album": entry.album}
        for name, text in {"location": uri(entry.path), **named}.items():
            if one_line(text):
                ET.SubElement(track, name).text = one_line(text)
        if math.isfinite(entry.seconds):
            ET.SubElement(track, "duration").text = str(round(entry.seconds * 1000))
    ET.indent(root)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n{ET.tostring(root, encoding="unicode")}\n', []


def uri(path: str) -> str:
    """A path as a URI: `file://` for an absolute one, else a relative reference; the file name's bytes in percent."""
    text = quote_from_bytes(os.fsencode(path), safe="/")
    return f"file://{text}" if path.startswith("/") else text


def _is_utf8(path: str) -> bool:
    """Whether UTF-8 can hold a path: bytes of a file name that are not UTF-8 became surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in path)


def m3u8(entries: Sequence[Entry], title: str) -> tuple[str, list[str]]:
    """The playlist in M3U8, and the paths that no line of UTF-8 can hold."""
    lines, left_out = ["#EXTM3U", f"# {MARK}", f"#PLAYLIST:{one_line(title)}"], []
    for entry in entries:
        if entry.path.splitlines() != [entry.path] or not _is_utf8(entry.path):
            left_out.append(entry.path)
            continue
        seconds = round(entry.seconds) if math.isfinite(entry.seconds) else -1
        name = f"{entry.artist} - {entry.title}" if entry.artist else entry.title
        # A line that begins with # is a comment, and players strip leading spaces.
        path = f"./{entry.path}" if entry.path.startswith("#") or entry.path[0].isspace() else entry.path
        lines += [f"#EXTINF:{seconds},{one_line(name)}", path]
    return "\n".join(lines) + "\n", left_out


def table(entries: Sequence[Entry], _title: str) -> tuple[str, list[str]]:
    """The playlist as CSV, and the paths that UTF-8 cannot hold."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    left_out = []
    for rank, entry in enumerate(entries, 1):
        if not _is_utf8(entry.path):
            left_out.append(entry.path)
            continue
        tags = {"artist": entry.artist, "title": entry.title, "album": entry.album}
        numbers = {name: f"{value:.4f}" for name, value in entry.scores.items()}
        seconds = f"{entry.seconds:.1f}" if math.isfinite(entry.seconds) else ""
        writer.writerow(
            {
                "rank": rank,
                **numbers,
                **{name: one_line(text) for name, text in tags.items()},
                "seconds": seconds,
                "path": entry.path,
            }
        )
    return out.getvalue(), left_out


FORMATS: dict[str, Callable[[Sequence[Entry], str], tuple[str, list[str]]]] = {"xspf": xspf, "m3u8": m3u8, "csv": table}
"""Option -> the function that returns the file's text and the paths that it cannot hold."""


def check_writable(path: Path, replace: bool) -> None:
    """Raise UserError when `path` is there and is no playlist of this command, unless `replace`."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path} cannot be written over ({e.strerror}): choose another file") from e
    ours = MARK.encode() in head or head.startswith(",".join(CSV_COLUMNS).encode())
    if head and not ours and not replace:
        raise UserError(f"{path} exists and is no playlist of this command: choose another file, or give --replace")


def write_playlist(path: Path, text: str) -> None:
    """Write the file atomically, and its folder where there is none. Raises UserError when it cannot."""
    with refuse_failed_write(path, "choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8", newline="")
