"""Write a small music library by synthesis: artists that sound different, albums, tags, an owner's ratings.

    python tools/make_demo_music.py DIR [--songs 192] [--seed 0] [--seconds 18 32] [--workers N]

Each artist has four songs on two albums: a FLAC, an OGG Vorbis, an MP3 and a WAV, at four sample rates, in an
order of its own, so neither format, rate nor channels tell the artist. The owner likes bright and fast music
and has rated four songs in five. The same command writes the same bytes again, given the same versions of the
libraries. A run that is killed leaves at most a hidden folder DIR/../.NAME.*.part, which may be deleted.
"""

import argparse
import json
import multiprocessing
import os
import secrets
import shutil
import signal
import struct
import sys
import threading
import zlib
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from math import ceil, log2
from pathlib import Path

import mutagen
import mutagen.id3 as id3
import numpy as np
import soundfile
from demo_synth import Style, brightness, compose, draw_styles, master, record
from mutagen.ogg import OggPage
from tqdm import tqdm

from simsiam_dali.common.errors import UserError, one_line_errors

LIBRARY_VERSION = 3  # raise it when the same arguments give another library
MARKER = "demo_music.json"  # written last: where it stands, the library is complete
SONGS_PER_ARTIST = 4
RATED_SHARE = 0.8
MAX_SECONDS = 600.0

# The extension, and libsndfile's format and subtype.
FORMATS = {
    "flac": ("FLAC", "PCM_16"),
    "ogg": ("OGG", "VORBIS"),
    "mp3": ("MP3", "MPEG_LAYER_III"),
    "wav": ("WAV", "PCM_16"),
}
RATES = (22_050, 32_000, 44_100, 48_000)  # Hz
CHANNELS = (1, 2, 2, 2)

# Stars as Windows Media Player writes them into POPM; other players read the same five values.
POPM_EMAIL = "Windows Media Player 9 Series"
POPM_VALUES = {1: 1, 2: 64, 3: 128, 4: 196, 5: 255}

# fmt: off
ARTIST_FIRST = [
    "Amber", "Białe", "Copper", "Dunkle", "Électrique", "Forest",
    "Golden", "Hollow", "Ночной", "Iron", "Little", "Marble",
]
ARTIST_LAST = [
    "Antennas", "Bären", "Cartographers", "Dunes", "雪", "Engines",
    "Fjørd", "Ghosts", "Harbour", "Lanterns", "Tides", "Wolves",
]
WORDS_FIRST = [
    "After", "Before", "Beneath", "Déjà", "Every", "Inside", "Końcowy",
    "Leaving", "Long", "Mañana", "No", "Only", "Über", "Without",
]
WORDS_LAST = [
    "Answer", "Bridges", "Café", "Daylight", "Echo", "Föhn", "Gravity",
    "Morning", "Niño", "Orbit", "Rain", "Signal", "東京", "Water",
]
# fmt: on


@dataclass(frozen=True)
class Song:
    """One file to be written: how it sounds, how it is stored and what its tags say (all but the rating)."""

    path: Path  # in the library
    seed: tuple[int, int]
    style: Style
    seconds: float
    extension: str
    rate: int
    channels: int
    title: str
    artist: str
    album: str
    album_artist: str
    date: str
    track: int

    def on(self, album: str, track: int) -> "Song":
        """Return the same recording on a compilation."""
        path = Path("Various Artists", album, f"{track:02} - {self.title}.{self.extension}")
        return replace(self, path=path, album=album, album_artist="Various Artists", track=track)


def plan_library(songs: int, seed: int, seconds: tuple[float, float]) -> list[Song]:
    """Draw all songs of a library; `seconds` is the shortest and the longest."""
    rng = np.random.default_rng(seed)
    artists = ceil(songs / SONGS_PER_ARTIST)
    names = [" ".join(pair) for pair in product(ARTIST_FIRST, ARTIST_LAST)]
    words = [" ".join(pair) for pair in product(WORDS_FIRST, WORDS_LAST)]
    if artists > len(names):
        raise UserError(f"--songs {songs} is too many: at most {len(names) * SONGS_PER_ARTIST}")
    rng.shuffle(names)
    plan: list[Song] = []
    for artist, style in zip(names, draw_styles(artists, rng), strict=False):
        titles = rng.choice(words, SONGS_PER_ARTIST + 2, replace=False).tolist()
        albums, first_year = titles[SONGS_PER_ARTIST:], int(rng.integers(1972, 2018))
        years = (first_year, first_year + int(rng.integers(1, 7)))
        storage = zip(*(rng.permutation(np.array(x)).tolist() for x in (list(FORMATS), RATES, CHANNELS)), strict=True)
        for index, (extension, rate, channels) in enumerate(storage):
            album, track = index // 2, index % 2 + 1
            title = titles[index]
            plan.append(
                Song(
                    path=Path(artist, albums[album], f"{track:02} - {title}.{extension}"),
                    seed=(seed, len(plan)),
                    style=style,
                    seconds=round(rng.uniform(*seconds), 1),
                    extension=extension,
                    rate=rate,
                    channels=channels,
                    title=title,
                    artist=artist,
                    album=albums[album],
                    album_artist=artist,
                    date=f"{years[album]}-{rng.integers(1, 13):02}-15" if album else str(years[album]),
                    track=track,
                )
            )
    return plan[:songs]


def owner_rating(octaves: float, tempo: float, rng: np.random.Generator) -> float | None:
    """Rate a song by what is heard: the brighter (log2 of Hz) and the faster, the better, with a mood of +-0.05.

    Returns 0.2 to 1.0 in half stars (steps of 0.1), or None for a song that nobody has rated yet.
    """
    liking = 0.6 + 0.2 * (octaves - log2(750)) + 0.5 * log2(tempo / 110) + rng.normal(0, 0.05)
    half_stars = int(np.clip(round(10 * liking), 2, 10))
    return half_stars / 10 if rng.random() < RATED_SHARE else None


def write_song(root: Path, song: Song) -> float | None:
    """Synthesise, encode and tag one song below `root`; returns the owner's rating."""
    rng = np.random.default_rng(song.seed)
    mix, tempo = compose(song.style, song.seconds, rng)
    tilt = song.style.tilt + rng.normal(0, 0.6)
    rating = owner_rating(brightness(mix, tilt), tempo, rng)
    audio = master(record(mix, rng), tilt, song.rate, song.channels)
    path = root / song.path
    path.parent.mkdir(parents=True, exist_ok=True)
    container, subtype = FORMATS[song.extension]
    with soundfile.SoundFile(path, "w", song.rate, song.channels, subtype, format=container) as file:
        for block in np.array_split(audio, ceil(len(audio) / song.rate)):  # one long write overflows Vorbis's stack
            file.write(block)
    if song.extension == "ogg":
        _set_ogg_serial(path, song.seed[1])
    tag(path, song, rating)
    return rating


def _set_ogg_serial(path: Path, serial: int) -> None:
    """Replace the stream's number, which the encoder draws from the clock."""
    pages = []
    with path.open("rb") as file:
        while file.peek(1):
            pages.append(OggPage(file))
    for page in pages:
        page.serial = serial
    path.write_bytes(b"".join(page.write() for page in pages))


def tag(path: Path, song: Song, rating: float | None) -> None:
    """Write tags the way players do: Vorbis comments for FLAC and OGG, ID3 for MP3 and WAV.

    A rating becomes FMPS_RATING (0.0 to 1.0), in every third file RATING (0 to 100); or POPM, in whole stars.
    """
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    if song.extension in ("mp3", "wav"):
        frames = {
            id3.TIT2: song.title,
            id3.TPE1: song.artist,
            id3.TALB: song.album,
            id3.TPE2: song.album_artist,
            id3.TDRC: song.date,
            id3.TCON: song.style.genre,
            id3.TRCK: str(song.track),
        }
        for frame, text in frames.items():
            file.tags.add(frame(encoding=id3.Encoding.UTF8, text=[text]))
        if rating is not None:
            file.tags.add(id3.POPM(email=POPM_EMAIL, rating=POPM_VALUES[ceil(5 * rating)]))
    else:
        comments = {
            "TITLE": song.title,
            "ARTIST": song.artist,
            "ALBUM": song.album,
            "ALBUMARTIST": song.album_artist,
            "DATE": song.date,
            "GENRE": song.style.genre,
            "TRACKNUMBER": str(song.track),
        }
        if rating is not None and song.seed[1] % 3 == 0:
            comments["RATING"] = str(round(100 * rating))
        elif rating is not None:
            comments["FMPS_RATING"] = f"{rating:.1f}"
        file.tags.update(comments)
    file.save()


def render_all(root: Path, plan: list[Song], workers: int) -> Iterator[float | None]:
    """Write all songs, in processes if `workers` is more than one; yields the ratings in the plan's order."""
    if workers == 1:
        yield from map(partial(write_song, root), plan)
        return
    with ProcessPoolExecutor(workers, initializer=_start_worker) as pool:
        try:
            yield from pool.map(partial(write_song, root), plan)
        finally:
            pool.shutdown(cancel_futures=True)


def _start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def write_extras(root: Path, plan: list[Song], ratings: list[float | None]) -> None:
    """Add what real folders also hold: a compilation of songs already there, a cover, a cue sheet, a list."""
    for track, index in enumerate(range(0, len(plan), 16), start=1):
        copy = plan[index].on("Big Hits", track)
        (root / copy.path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(root / plan[index].path, root / copy.path)
        tag(root / copy.path, copy, ratings[index])
    first = plan[0]
    album = (root / first.path).parent
    (album / "cover.png").write_bytes(_png(size=32, colour=(200, 80, 40)))
    cue = f'TITLE "{first.album}"\nFILE "{first.path.name}" WAVE\n  TRACK 01 AUDIO\n    INDEX 01 00:00:00\n'
    (album / "album.cue").write_text(cue, encoding="utf-8")
    best = [song.path.as_posix() for song, rating in zip(plan, ratings, strict=True) if (rating or 0) >= 0.8]
    (root / "Favourites.m3u8").write_text("\n".join(["#EXTM3U", *best, ""]), encoding="utf-8")


def _png(size: int, colour: tuple[int, int, int]) -> bytes:
    """Return a square of one colour as a PNG file."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", size, size, 8, 2, 0, 0, 0)  # 8 bits, RGB
    rows = (b"\0" + bytes(colour) * size) * size
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def make_library(folder: Path, songs: int, seed: int, seconds: tuple[float, float], workers: int) -> bool:
    """Write a library to `folder`, which must not exist or be empty; it appears there whole or not at all.

    Returns False, having written nothing, if that very library is there already. Raises UserError.
    """
    settings = {"version": LIBRARY_VERSION, "songs": songs, "seed": seed, "seconds": list(seconds)}
    folder = folder.resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        if _holds(folder, settings):
            return False
        raise UserError(f"{folder} is not an empty folder: name another one, nothing is overwritten")
    plan = plan_library(songs, seed, seconds)
    part = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.part")
    try:
        part.mkdir(parents=True)
        bar = tqdm(render_all(part, plan, workers), total=len(plan), unit="song", desc="demo music")
        ratings = list(bar)
        write_extras(part, plan, ratings)
        files = sorted(path.relative_to(part).as_posix() for path in part.rglob("*") if path.is_file())
        marker = json.dumps({**settings, "files": files}, ensure_ascii=False, indent=1)
        (part / MARKER).write_text(marker, encoding="utf-8")
        part.rename(folder)
    except (OSError, soundfile.LibsndfileError, BrokenProcessPool) as e:
        raise UserError(f"cannot write the library to {folder}: {e}") from e
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return True


def _holds(folder: Path, settings: dict[str, object]) -> bool:
    """Tell whether `folder` is a complete library made with these settings."""
    try:
        found = json.loads((folder / MARKER).read_text(encoding="utf-8"))
        files = found.pop("files")
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(found == settings) and all((folder / name).is_file() for name in files)


@one_line_errors
def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="where the library goes: a new or an empty folder")
    parser.add_argument("--songs", type=int, default=192, help="number of songs, four to an artist")
    parser.add_argument("--seed", type=int, default=0, help="0 or more; another seed gives other music")
    parser.add_argument(
        "--seconds", type=float, nargs=2, default=(18.0, 32.0), metavar=("LOW", "HIGH"), help="song length in seconds"
    )
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="number of processes")
    args = parser.parse_args()
    low, high = args.seconds
    if args.songs < 1 or args.workers < 1 or args.seed < 0:
        raise UserError("--songs and --workers must be 1 or more, --seed 0 or more")
    if not 1 <= low <= high <= MAX_SECONDS:
        raise UserError(f"--seconds {low:g} {high:g}: must be 1 <= LOW <= HIGH <= {MAX_SECONDS:g}")
    try:
        written = make_library(args.folder, args.songs, args.seed, (low, high), args.workers)
    except KeyboardInterrupt:
        print(f"stopped: {args.folder} was not written", file=sys.stderr)
        sys.exit(130)
    print(f"{args.folder}: {args.songs} songs " + ("written" if written else "were there already"))


if __name__ == "__main__":
    main()
