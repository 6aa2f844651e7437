"""What a song's own tags say, read with mutagen and brought to one form."""

import contextlib
import itertools
import math
import re
import signal
import threading
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mutagen
from mutagen.id3 import ID3, TextFrame

LONGEST = 300  # characters kept of one value
MOST = 100  # values kept of one field
_LOOKED_AT = 10_000  # characters of a value, and values of a field, that are looked at before that
# They turn the text around them, even a terminal's next column: embeddings, overrides and isolates of direction.
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
PARSE_SECONDS = 30.0
"""Seconds of CPU for one file's tags. Mutagen takes 15 for a text of 10 MB, and hours for a million short ones."""
_UNKNOWN = {
    "",
    "<unknown>",
    "(none)",
    "<none>",
    "[unknown]",
    "unknown artist",
    "unknown album",
    "unknown genre",
}
_YEAR = re.compile(r"(?<!\d)(1[5-9]\d\d|20\d\d)(?!\d)")

# Field -> its names in ID3, Vorbis comments / APEv2, MP4 and ASF, the best first; compared without case.
_NAMES = {
    "title": ("TIT2", "title", "\xa9nam"),
    "artists": ("TPE1", "artists", "artist", "\xa9ART", "Author"),
    "albums": ("TALB", "album", "\xa9alb", "WM/AlbumTitle"),
    "album_artist": ("TPE2", "albumartist", "album artist", "album_artist", "aART", "WM/AlbumArtist"),
    "year": (
        *("TDOR", "originaldate", "originalyear", "TXXX:originalyear", "WM/OriginalReleaseYear"),
        *("TDRC", "date", "year", "\xa9day", "WM/Year", "TDRL"),
    ),
    "genres": ("TCON", "genre", "\xa9gen", "WM/Genre"),
}


@dataclass(frozen=True, slots=True)
class Tags:
    """Cleaned tags; empty, None and NaN mean unknown. `rating` is in 0..1."""

    title: str = ""
    artists: tuple[str, ...] = ()
    albums: tuple[str, ...] = ()
    album_artist: str = ""
    year: int | None = None
    genres: tuple[str, ...] = ()
    rating: float = math.nan
    note: str = ""


class TookTooLong(Exception):
    """Not a TimeoutError, which is an OSError and as such caught by mutagen."""


def read_tags(path: Path) -> Tags:
    """The tags of `path`, whatever its format; tags that cannot be parsed are none, with a note."""
    try:
        with _time_limit(PARSE_SECONDS), path.open("rb") as file:
            audio = mutagen.File(file)
            values = _values(audio.tags) if audio is not None and audio.tags is not None else {}
    except Exception as e:  # mutagen lets many kinds escape on broken tags, and audio without tags is still audio
        return Tags(note=f"tags cannot be read ({type(e).__name__})")

    def field(name: str) -> tuple[str, ...]:
        return next((found for key in _NAMES[name] if (found := clean(values.get(key.lower(), ())))), ())

    years = (_YEAR.search(v) for key in _NAMES["year"] for v in clean(values.get(key.lower(), ())))
    return Tags(
        title=_cut(" / ".join(field("title"))),
        artists=field("artists"),
        albums=field("albums"),
        album_artist=_cut(" / ".join(field("album_artist"))),
        year=next((int(y[0]) for y in years if y), None),
        genres=field("genres"),
        rating=_rating(values),
    )


@contextlib.contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    """TookTooLong after so many seconds of CPU; in a main thread, such as a packing worker's, since a signal tells."""

    def stop(*_: object) -> None:
        raise TookTooLong

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def merged(first: Tags, other: Tags) -> Tags:
    """`first` with the albums of both, and with what only `other` knows."""
    albums = tuple(dict.fromkeys(first.albums + other.albums))
    rating = other.rating if math.isnan(first.rating) else first.rating
    return Tags(
        title=first.title or other.title,
        artists=first.artists or other.artists,
        albums=albums,
        album_artist=first.album_artist or other.album_artist,
        year=other.year if first.year is None else first.year,
        genres=first.genres or other.genres,
        rating=rating,
        note=first.note or other.note,
    )


def clean(values: Iterable[str]) -> tuple[str, ...]:
    """At most `MOST` of `values`, without control characters, over-long tails, repeats and ways of saying unknown."""
    kept: dict[str, None] = {}
    for value in itertools.islice(values, _LOOKED_AT):
        text = _cut(" ".join("".join(map(_harmless, value[:_LOOKED_AT])).split()))
        if text.casefold() not in _UNKNOWN:
            kept[text] = None
        if len(kept) == MOST:
            break
    return tuple(kept)


def _harmless(c: str) -> str:
    """A space for control characters and lone surrogates: neither a terminal nor a UTF-8 table takes them."""
    return " " if unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS else c


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _values(tags: Any) -> dict[str, list[str]]:
    """Any of mutagen's tag containers as lower-case name -> texts."""
    if isinstance(tags, ID3):
        return _id3_values(tags)
    values: dict[str, list[str]] = {}
    for name, content in tags.items():
        name = name.lower().removeprefix("----:com.apple.itunes:")
        for value in content[:_LOOKED_AT] if isinstance(content, list | tuple) else [content]:
            if isinstance(value, bytes):  # an MP4 freeform value
                value = value[:_LOOKED_AT].decode("utf-8", "replace")
            # An APEv2 value may hold several, divided by zero bytes.
            values.setdefault(name, []).extend(str(value)[:_LOOKED_AT].split("\0"))
    return values


def _id3_values(tags: ID3) -> dict[str, list[str]]:
    values: dict[str, list[str]] = {}
    for frame in tags.values():
        if frame.FrameID == "POPM":
            values.setdefault("popm", []).append(str(frame.rating))
        elif isinstance(frame, TextFrame):
            texts = [str(text)[:_LOOKED_AT] for text in frame.text[:_LOOKED_AT]]
            if frame.FrameID == "TCON":  # may hold numbers of a list
                frame.text = texts
                texts = frame.genres
            name = f"TXXX:{frame.desc}" if frame.FrameID == "TXXX" else frame.FrameID
            for key in {name.lower(), name.lower().removeprefix("txxx:")}:
                values.setdefault(key, []).extend(texts)
    return values


def _rating(values: Mapping[str, list[str]]) -> float:
    """The first rating found, FMPS first, since it alone says its scale; NaN where there is none."""
    scales = {
        "fmps_rating": _fraction,
        "fmps/rating": _fraction,
        "popm": popm_rating,
        "wm/shareduserrating": _microsoft_rating,
        "rating": vorbis_rating,
        "rate": vorbis_rating,
    }
    for name, scale in scales.items():
        for text in values.get(name, ()):
            try:
                rating = scale(float(text[:LONGEST]))
            except ValueError:
                continue
            if not math.isnan(rating):
                return rating
    return math.nan


def _fraction(value: float) -> float:
    return value if 0 <= value <= 1 else math.nan


def popm_rating(value: float) -> float:
    """ID3 POPM byte to 0.2, 0.4 ... 1.0, that is one to five stars; 0 is unrated.

    Windows writes 1, 64, 128, 196, 255 for its stars, others neighbouring values, so players read ranges: up
    to 63, 127, 191, 251 and 255.
    """
    if not 0 < value <= 255:
        return math.nan
    return next(stars / 5 for stars, top in enumerate((63, 127, 191, 251, 255), 1) if value <= top)


def _microsoft_rating(value: float) -> float:
    """WM/SharedUserRating: 1, 25, 50, 75, 99 for one to five stars; 0 is unrated."""
    return (1 + round(value / 25)) / 5 if 0 < value <= 100 else math.nan


def vorbis_rating(value: float) -> float:
    """A RATING comment, whose scale is nowhere written down, to 0..1; 0 is unrated.

    A value below 1 is a fraction, up to 5 counts stars, up to 100 is per cent, up to 255 is on POPM's scale.
    """
    if not 0 < value <= 255:
        return math.nan
    if value < 1:
        return value
    if value <= 5:
        return value / 5
    return value / 100 if value <= 100 else value / 255
