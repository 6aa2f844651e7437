"""Chosen songs as a table for the terminal, and as files: XSPF (https://www.xspf.org/spec), M3U8 (UTF-8), CSV."""

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

from rich.cells import cell_len, chop_cells

from simsiam_dali.common.errors import UserError, printable
from simsiam_dali.common.files import atomic_write, refuse_failed_write
from simsiam_dali.common.table import table_lines
from simsiam_dali.recommendation.choose import Choice
from simsiam_dali.recommendation.library import Library

MARK = "simsiam_dali.recommend"
"""At the top of each playlist of this command: only such files are replaced without --replace."""
CSV_COLUMNS = ("rank", "similarity", "predicted_rating", "std", "artist", "title", "album", "seconds", "path")

DUPLICATE_COLUMNS = (
    "group", "copy", "codec", "kbit_s", "seconds", "similarity", "bit_errors", "lag_seconds", "artist", "title", "path",
)  # fmt: skip


def terminal_table(library: Library, choice: Choice) -> list[str]:
    """The choice as a table for a terminal; paths are relative to the music folder."""
    head = ("", "similarity" if "similarity" in choice.scores else "rating", "artist - title", "album", "path")
    rows = [
        (
            str(i + 1),
            choice.score_text(i),
            truncate(library.name(row), 50),
            truncate(library.album[row], 30),
            printable(library.path[row]),
        )
        for i, row in enumerate(choice.rows)
    ]
    return table_lines(head, rows)


def truncate(text: str, columns: int) -> str:
    """`text` without control characters, cut where it is wider than `columns` on a terminal."""
    text = printable(text)
    return text if cell_len(text) <= columns else f"{chop_cells(text, columns - 1)[0]}…"


@dataclass(frozen=True)
class Entry:
    """A song of a playlist. `path`: as the player will read it; seconds: NaN = unknown.

    `tags`: artist, title and album, each in one line; `scores`: by the names of `CSV_COLUMNS`; `note`: them as text.
    """

    path: str
    tags: Mapping[str, str]
    seconds: float
    scores: Mapping[str, float]
    note: str


def playlist_entries(
    library: Library, choice: Choice, relative_to: Path | None, prefix: str | None = None
) -> list[Entry]:
    """The choice for playlists.

    Paths are relative to the folder `relative_to`; or those below the music folder behind `prefix`, which is the music
    folder as another machine sees it; or absolute where both are None.
    """
    name = next(iter(choice.scores), "").replace("_", " ")
    entries = []
    for i, row in enumerate(choice.rows):
        file = library.file(row)
        tags = {"artist": library.artist[row], "title": library.title[row], "album": library.album[row]}
        entries.append(
            Entry(
                path=player_path(file, library.music, relative_to, prefix),
                tags={tag: one_line(text) for tag, text in tags.items()},
                seconds=float(library.table["duration"].iloc[row]),
                scores={name: float(values[i]) for name, values in choice.scores.items()},
                note=f"{name} {choice.score_text(i)}".strip(),
            )
        )
    return entries


def player_path(file: Path, music: Path, relative_to: Path | None, prefix: str | None) -> str:
    """The absolute path `file`, a song below `music`, as `playlist_entries` describes it."""
    if prefix is not None:
        return str(Path(prefix) / file.relative_to(music))
    return os.path.relpath(file, relative_to.resolve()) if relative_to else str(file)


def one_line(text: str) -> str:
    """`text` with a space for each character that breaks a line or that XML does not allow."""
    replaced = ("Cc", "Cs", "Zl", "Zp")
    return "".join(" " if unicodedata.category(c) in replaced or c in "\ufffe\uffff" else c for c in text).strip()


def xspf(entries: Sequence[Entry], title: str) -> tuple[str, list[str]]:
    """The playlist in XSPF, and the paths that it cannot hold (none)."""
    root = ET.Element("playlist", version="1", xmlns="http://xspf.org/ns/0/")
    ET.SubElement(root, "title").text = one_line(title)
    ET.SubElement(root, "creator").text = MARK
    tracks = ET.SubElement(root, "trackList")
    for entry in entries:
        track = ET.SubElement(tracks, "track")
        tags = {"title": entry.tags["title"], "creator": entry.tags["artist"]}
        named = {"location": uri(entry.path), **tags, "annotation": entry.note, "album": entry.tags["album"]}
        if math.isfinite(entry.seconds):
            named["duration"] = str(round(entry.seconds * 1000))
        for name, text in named.items():
            if text:
                ET.SubElement(track, name).text = text
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
        name = " - ".join(filter(None, [entry.tags["artist"], entry.tags["title"]]))
        # A line that begins with # is a comment, and players strip leading spaces.
        path = f"./{entry.path}" if entry.path.startswith("#") or entry.path[0].isspace() else entry.path
        lines += [f"#EXTINF:{seconds},{name}", path]
    return "\n".join(lines) + "\n", left_out


def csv_table(entries: Sequence[Entry], _title: str) -> tuple[str, list[str]]:
    """The playlist as CSV, and the paths that UTF-8 cannot hold."""
    out = io.StringIO()
    writer = csv.DictWriter(out, CSV_COLUMNS, lineterminator="\n")
    writer.writeheader()
    for rank, entry in enumerate(entries, 1):
        if _is_utf8(entry.path):
            scores = {name: f"{value:.4f}" for name, value in entry.scores.items()}
            seconds = f"{entry.seconds:.1f}" if math.isfinite(entry.seconds) else ""
            writer.writerow({"rank": rank, **scores, **entry.tags, "seconds": seconds, "path": entry.path})
    return out.getvalue(), [entry.path for entry in entries if not _is_utf8(entry.path)]


FORMATS: dict[str, Callable[[Sequence[Entry], str], tuple[str, list[str]]]] = {
    "xspf": xspf,
    "m3u8": m3u8,
    "csv": csv_table,
}
"""Option -> the function that returns the file's text and the paths that it cannot hold."""


def check_writable(path: Path, replace: bool) -> None:
    """Raise UserError when `path` is there and was not written by this command, unless `replace`."""
    try:
        with path.open("rb") as file:
            head = file.read(1024)
    except FileNotFoundError:
        return
    except OSError as e:
        raise UserError(f"{path} cannot be written over ({e.strerror}): choose another file") from e
    tables = (",".join(columns).encode() for columns in (CSV_COLUMNS, DUPLICATE_COLUMNS))
    ours = MARK.encode() in head or head.startswith(tuple(tables))
    if head and not ours and not replace:
        raise UserError(f"{path} exists and was not written by this command: choose another file, or give --replace")


def write_playlist(path: Path, text: str) -> None:
    """Write the file atomically, and its folder where there is none. Raises UserError when it cannot."""
    with refuse_failed_write(path, "choose another file"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as part:
            part.write_text(text, encoding="utf-8", newline="")
