"""The songs and shards that are measured: the user's, or generated ones, kept in a cache."""

import os
import sys
from pathlib import Path

from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import PackSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from make_demo_music import SONGS_PER_ARTIST, make_library

SONG_SECONDS = (120.0, 126.0)
"""Length of the generated songs: two segments of 60 s each."""


def cache_folder() -> Path:
    """Where generated songs and their shards stay for the next run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simsiam_dali" / "benchmarks"


def generated_music(segments: int, workers: int) -> Path:
    """A folder of generated songs, at least `segments` x 60 s."""
    songs = -(-segments // (2 * SONGS_PER_ARTIST)) * SONGS_PER_ARTIST
    folder = cache_folder() / f"songs-{songs}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    make_library(folder, songs, seed=0, seconds=SONG_SECONDS, workers=workers)
    return folder


def packed(
    music: Path, workers: int, codec: str = "flac", sample_rate: int | None = 16000, seconds: float = 60
) -> Path:
    """Shards of the songs in `music`, all for training; packed only when the cache has none, or songs have changed.

    sample_rate: Hz, None keeps each song's own. seconds: length of a segment.
    """
    name = f"{music.resolve().name}-{codec}-{sample_rate or 'native'}-{seconds:g}s"
    settings = PackSettings(
        codec=codec, sample_rate=sample_rate, segment_seconds=seconds, val_fraction=0.0, min_seconds=min(5.0, seconds)
    )
    pack(music, cache_folder() / "shards" / name, settings, workers, replace=True)
    return cache_folder() / "shards" / name
