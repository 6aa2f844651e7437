"""The songs and shards that are measured: the user's, or generated ones, kept in a cache.

Composing a song takes longer than everything that is measured on it, so only `COMPOSED` songs are composed, and the
others are these again, each begun at another place. To a decoder, an STFT or a page cache they are songs of their own.

    python benchmarks/material.py --segments 2048      makes them, and prints where the shards are
    python benchmarks/material.py --music DIR          packs these songs instead
"""

import argparse
import multiprocessing
import os
import secrets
import shutil
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from math import ceil, lcm
from pathlib import Path

import numpy as np
import soundfile
from tqdm import tqdm

from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.packing.find import AUDIO
from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import PackSettings

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tools"))
from make_demo_music import LIBRARY_VERSION, make_library

COMPOSED = 8
SONG_SECONDS = (120.0, 126.0)
"""Length of the generated songs: two segments of 60 s each."""
_SEGMENT_SECONDS = 60.0
MOST_WHOLE = 10_000
"""Segments up to which the material is a whole number of batches of every size."""
MATERIAL_VERSION = 2
"""Raise it when the same arguments give other songs."""


@dataclass(frozen=True)
class _Again:
    """A composed song to be written once more, begun `part` (0 to 1) of the way."""

    song: Path
    to: Path
    part: float


def cache_folder() -> Path:
    """Where generated songs and their shards stay for the next run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "simsiam_dali" / "benchmarks"


def enough_segments(batch_sizes: set[int], batches: int = 16) -> int:
    """The least number of segments that is a whole number of batches of each size, and `batches` of the largest."""
    together, least = lcm(*batch_sizes), batches * max(batch_sizes)
    # Sizes whose common multiple is far would ask for millions of segments: then a part of a batch is left over.
    return together * ceil(least / together) if together <= MOST_WHOLE else least


def packed_generated(segments: int, workers: int, codec: str = "flac", sample_rate: int | None = 16000) -> Path:
    """Shards of generated songs, `segments` of 60 s (one more where that is odd); made only when the cache has none.

    sample_rate: Hz, None keeps each song's own.
    """
    songs = ceil(segments / (SONG_SECONDS[0] // _SEGMENT_SECONDS))
    music = cache_folder() / f"songs-{songs}-v{LIBRARY_VERSION}.{MATERIAL_VERSION}"
    new = not music.exists()
    if new:
        _write_songs(music, songs, workers)
    shards = _shards(music, codec, sample_rate)
    return packed(music, workers, codec, sample_rate) if new or not (shards / MANIFEST).exists() else shards


def packed(music: Path, workers: int, codec: str = "flac", sample_rate: int | None = 16000) -> Path:
    """Shards of the songs in `music`, all for training; only songs that have changed are decoded again."""
    settings = PackSettings(
        codec=codec, sample_rate=sample_rate, segment_seconds=_SEGMENT_SECONDS, min_seconds=5.0, val_fraction=0
    )
    pack(music, _shards(music, codec, sample_rate), settings, workers, replace=True)
    return _shards(music, codec, sample_rate)


def _shards(music: Path, codec: str, sample_rate: int | None) -> Path:
    return cache_folder() / "shards" / f"{music.resolve().name}-{codec}-{sample_rate or 'native'}"


def _write_songs(folder: Path, count: int, workers: int) -> None:
    """Fill `folder` with `count` songs; it appears whole or not at all."""
    composed = folder.with_name(f"composed-v{LIBRARY_VERSION}")
    composed.parent.mkdir(parents=True, exist_ok=True)
    make_library(composed, COMPOSED, seed=0, seconds=SONG_SECONDS, workers=workers)
    songs = sorted(
        path for path in composed.rglob("*") if path.suffix.lower() in AUDIO and "Big Hits" not in path.parts
    )
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    part.mkdir()
    turns = ceil(count / len(songs))
    todo = [
        _Again(song, part / f"{number:05d}{song.suffix}", turn / turns)
        for number, (turn, song) in enumerate((n // len(songs), songs[n % len(songs)]) for n in range(count))
    ]
    try:
        with ProcessPoolExecutor(workers, multiprocessing.get_context("spawn")) as pool:
            bar = tqdm(pool.map(_write_again, todo, chunksize=4), total=count, unit="song", desc="benchmark songs")
            for _ in bar:
                pass
        part.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _write_again(again: _Again) -> None:
    """Write a song begun elsewhere, in the format, rate and channels of the composed one."""
    with soundfile.SoundFile(again.song) as file:
        audio, rate, container, subtype = (
            file.read(dtype="float32", always_2d=True),
            file.samplerate,
            file.format,
            file.subtype,
        )
    audio = np.roll(audio, -round(again.part * len(audio)), axis=0)
    with soundfile.SoundFile(again.to, "w", rate, audio.shape[1], subtype, format=container) as out:
        for block in np.array_split(audio, ceil(len(audio) / rate)):  # one long write overflows Vorbis's stack
            out.write(block)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--segments", type=int, metavar="N", help="of 60 s, as FLAC at 16 kHz")
    what.add_argument("--music", type=Path, metavar="DIR", help="songs to pack so; a shorter one is repeated")
    args, workers = parser.parse_args(), len(os.sched_getaffinity(0))
    print(packed(args.music, workers) if args.music else packed_generated(args.segments, workers))


if __name__ == "__main__":
    main()
