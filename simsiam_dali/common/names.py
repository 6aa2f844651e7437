"""When two names are the same artist's, album's or genre's: without case, Unicode variants and placeholders."""

import unicodedata
from collections.abc import Iterable

# Names that players write where they know none, beyond those that packing drops; compared as `name_key` gives them, and
# without brackets around them.
_NO_NAME = {
    *("", "?", "-", "n/a", "none", "null", "unknown", "unknown artist", "unknown album", "no artist", "no album"),
    *("unbekannt", "unbekannter künstler", "unbekannter interpret", "unbekanntes album"),
    *("artiste inconnu", "album inconnu", "artista desconocido", "álbum desconocido"),
    *("artista sconosciuto", "album sconosciuto", "onbekende artiest", "onbekend album"),
}
# Names of no artist in particular: nothing that songs share, but a compilation's owner.
_VARIOUS = {"various artists", "various", "va", "v.a.", "v/a", "verschiedene interpreten", "varios artistas"}
_COMPILATION = "various artists"


def name_key(name: str) -> str:
    """What names that differ only in case, whitespace or Unicode's ways of writing have in common."""
    folded = unicodedata.normalize("NFKC", name).casefold()
    return " ".join(unicodedata.normalize("NFKC", folded).split())


def artist_keys(names: Iterable[str]) -> list[str]:
    """Keys of a song's artists, without repeats, placeholders, and names of no artist in particular."""
    return [key for key in known_keys(names) if key not in _VARIOUS]


def album_keys(titles: Iterable[str], album_artist: str, artists: Iterable[str]) -> list[tuple[str, str]]:
    """Keys of a song's albums: the title, and whose it is, since two artists' "Greatest Hits" are two albums.

    An album is its album artist's, else the song's first artist's; a compilation's tracks share the owner "Various
    Artists". Albums of nobody that is known are unknown. A song has one `album_artist` for all its albums.
    """
    owner = next(iter(known_keys([album_artist, *artists])), None)
    if owner is None:
        return []
    return [(title, _COMPILATION if owner in _VARIOUS else owner) for title in known_keys(titles)]


def known_keys(names: Iterable[str]) -> list[str]:
    """Keys of names, without repeats and placeholders."""
    keys = dict.fromkeys(name_key(name) for name in names)
    return [key for key in keys if key.strip("<>[](){} ") not in _NO_NAME]
