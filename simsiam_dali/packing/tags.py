"""Read a song's tags with mutagen, in one form for all formats."""

import contextlib
import itertools
import math
import re
import signal
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import mutagen
from mutagen.id3 import ID3, TextFrame

MAX_CHARACTERS = 300  # of one value
MAX_VALUES = 100  # of one field
_MAX_READ = 10_000  # characters of a value, and values of a field, that are cleaned before that
# Directional embeddings, overrides and isolates: they reorder the text around them, even a terminal's next column.
_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
PARSE_SECONDS = 30.0
"""CPU time limit for one file's tags, s. Mutagen needs 15 s for a text of 10 MB, and hours for a million short ones."""
_UNKNOWN = {"", "<unknown>", "(none)", "<none>", "[unknown]", "unknown artist", "unknown album", "unknown genre"}
_YEAR = re.compile(r"(?<!\d)(1[5-9]\d\d|20\d\d)(?!\d)")

# Field -> its names in ID3, Vorbis comments / APEv2, MP4 and ASF, the best first; compared without case.
_NAMES = {
    "title": ("TIT2", "title", "\xa9nam"),
    "artists": ("TPE1", "artists", "artist", "\xa9ART", "Author"),
    "albums": ("TALB", "album", "\xa9alb", "WM/AlbumTitle"),
    "album_artist": ("TPE2", "albumartist", "album artist", "album_artist", "aART", "WM/AlbumArtist"),
    "year": (
        *("TDOR", "originaldate", "originalyear", "WM/OriginalReleaseYear"),
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
    """Not a TimeoutError, which is an OSError, which mutagen catches."""


def read_tags(path: Path) -> Tags:
    """The tags of `path`, in any format; empty, with a note, if they cannot be parsed.

    In the main thread only, such as a worker's: signals limit the time.
    """
    signal.signal(signal.SIGVTALRM, _stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, PARSE_SECONDS)
    try:
        with path.open("rb") as file:
            audio = mutagen.File(file)
            values = _values(audio.tags) if audio is not None and audio.tags is not None else {}
    except Exception as e:  # mutagen raises many kinds on broken tags, and audio without tags is still audio
        return Tags(note=f"tags cannot be read ({type(e).__name__})")
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)

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


def _stop(*_: object) -> None:
    raise TookTooLong


def merged(first: Tags, other: Tags) -> Tags:
    """`first` with the albums of both, and with the fields that only `other` has."""
    missing = [f.name for f in fields(Tags) if getattr(first, f.name) in ("", (), None)]
    albums = tuple(dict.fromkeys(first.albums + other.albums))
    rating = other.rating if math.isnan(first.rating) else first.rating
    return replace(first, **{name: getattr(other, name) for name in missing} | {"albums": albums, "rating": rating})


def clean(values: Iterable[str]) -> tuple[str, ...]:
    """At most `MAX_VALUES` of `values`, cut to `MAX_CHARACTERS`; no control characters, repeats or placeholders."""
    kept: dict[str, None] = {}
    for value in itertools.islice(values, _MAX_READ):
        text = _cut(" ".join("".join(map(_harmless, value[:_MAX_READ])).split()))
        if text.casefold() not in _UNKNOWN:
            kept[text] = None
        if len(kept) == MAX_VALUES:
            break
    return tuple(kept)


def _harmless(c: str) -> str:
    """A space for control characters and lone surrogates, which terminals and UTF-8 tables do not accept."""
    return " " if unicodedata.category(c) in ("Cc", "Cs") or c in _DIRECTIONS else c


def _cut(text: str) -> str:
    return text if len(text) <= MAX_CHARACTERS else text[: MAX_CHARACTERS - 1] + "…"


def _values(tags: Any) -> dict[str, list[str]]:
    """Any of mutagen's tag containers as lower-case name -> texts."""
    values: dict[str, list[str]] = {}
    for name, content in _id3_items(tags) if isinstance(tags, ID3) else tags.items():
        texts = values.setdefault(name.lower().removeprefix("----:com.apple.itunes:").removeprefix("txxx:"), [])
        for value in content[:_MAX_READ] if isinstance(content, list | tuple) else [content]:
            if isinstance(value, bytes):  # an MP4 freeform value
                value = value[:_MAX_READ].decode("utf-8", "replace")
            # An APEv2 value may hold several, separated by zero bytes.
            texts += str(value)[:_MAX_READ].split("\0")
    return values


def _id3_items(tags: ID3) -> Iterator[tuple[str, Any]]:
    for frame in tags.values():
        if frame.FrameID == "POPM":
            yield "POPM", frame.rating
        elif isinstance(frame, TextFrame):
            texts = [str(text)[:_MAX_READ] for text in frame.text[:_MAX_READ]]
            if frame.FrameID == "TCON":  # may hold numbers of a list
                frame.text = texts
                texts = frame.genres
            yield frame.desc if frame.FrameID == "TXXX" else frame.FrameID, texts


def _rating(values: Mapping[str, list[str]]) -> float:
    """The first rating found, FMPS first, since its scale is specified; NaN if there is none."""
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
            with contextlib.suppress(ValueError):
                if not math.isnan(rating := scale(float(text[:MAX_CHARACTERS]))):
                    return rating
    return math.nan


def _fraction(value: float) -> float:
    return value if 0 <= value <= 1 else math.nan


def popm_rating(value: float) -> float:
    """ID3 POPM byte to 0.2, 0.4 ... 1.0, that is one to five stars; 0 is unrated.

    Windows writes 1, 64, 128, 196, 255 for its stars, others neighbouring values, so players read ranges: up to 63,
    127, 191, 251 and 255.
    """
    if not 0 < value <= 255:
        return math.nan
    return next(stars / 5 for stars, top in enumerate((63, 127, 191, 251, 255), 1) if value <= top)


def _microsoft_rating(value: float) -> float:
    """WM/SharedUserRating: 1, 25, 50, 75, 99 for one to five stars; 0 is unrated."""
    return (1 + round(value / 25)) / 5 if 0 < value <= 100 else math.nan


def vorbis_rating(value: float) -> float:
    """A RATING comment, whose scale is not specified, to 0..1; 0 is unrated.

    A value below 1 is a fraction, up to 5 counts stars, up to 100 is a percentage, up to 255 is on POPM's scale.
    """
    if not 0 < value <= 255:
        return math.nan
    if value < 1:
        return value
    if value <= 5:
        return value / 5
    return value / 100 if value <= 100 else value / 255
