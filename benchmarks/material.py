"""The songs and shards that are measured: the user's, or generated ones, kept in a cache."""

import os
import sys
from pathlib import Path

from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import PackSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from make_demo_music import LIBRARY_VERSION, SONGS_PER_ARTIST, make_library

SONG_SECONDS = (120.0, 126.0)
"""Length of the generated songs: two segments of 60 s each."""


def cache_folder() -> Path:
    """Where generated songs and their shards stay for the next run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simsiam_dali" / "benchmarks"


def packed_generated(segments: int, workers: int, codec: str = "flac", sample_rate: int | None = 16000) -> Path:
    """Shards of generated songs, at least `segments` of 60 s; made only when the cache has none.

    sample_rate: Hz, None keeps each song's own.
    """
    songs = -(-segments // (2 * SONGS_PER_ARTIST)) * SONGS_PER_ARTIST
    music = cache_folder() / f"songs-{songs}-v{LIBRARY_VERSION}"
    music.parent.mkdir(parents=True, exist_ok=True)
    new = make_library(music, songs, seed=0, seconds=SONG_SECONDS, workers=workers)
    shards = _shards(music, codec, sample_rate)
    return packed(music, workers, codec, sample_rate) if new or not (shards / MANIFEST).exists() else shards


def packed(music: Path, workers: int, codec: str = "flac", sample_rate: int | None = 16000) -> Path:
    """Shards of the songs in `music`, all for training; only songs that have changed are decoded again."""
    settings = PackSettings(codec=codec, sample_rate=sample_rate, segment_seconds=60.0, min_seconds=5.0, val_fraction=0)
    pack(music, _shards(music, codec, sample_rate), settings, workers, replace=True)
    return _shards(music, codec, sample_rate)


def _shards(music: Path, codec: str, sample_rate: int | None) -> Path:
    return cache_folder() / "shards" / f"{music.resolve().name}-{codec}-{sample_rate or 'native'}"
