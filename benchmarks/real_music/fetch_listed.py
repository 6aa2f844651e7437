"""Sets of which each song is listed: python benchmarks/real_music/fetch_listed.py {fourth,fifth} DIR

Debian has few more games with music, so most of these songs come from the games' own repositories on GitHub. The fourth
set has 27 games, the fifth 176. SET_set.tsv names each song, at which commit, and its sum; both were listed before
anything was scored on them. Several licences forbid commercial use or are not stated: keep the songs to yourself. About
2 GB come over the network for the fourth set, most of it for one Debian package, and 1.7 GB for the fifth.

A song that is there already is left as it is; one that cannot be fetched, or is another file now, is named, and the
command ends with 1.
"""

import argparse
import csv
import hashlib
import http.client
import subprocess
import urllib.parse
import urllib.request
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from simsiam_dali.common.errors import UserError, one_line, one_line_errors
from simsiam_dali.common.files import atomic_write

SETS = ("fourth", "fifth")
GITHUB = "https://raw.githubusercontent.com"
DEBIAN = "debian:"
TIMEOUT = 60.0
"""Seconds that a server may be silent."""
FAILURES = (OSError, http.client.HTTPException, zipfile.BadZipFile)
"""Of a server, a connection that is cut, a package, an archive in it."""


@dataclass(frozen=True)
class Song:
    """file: below the folder. source: owner/name on GitHub, or debian:PACKAGE. path: in the repository."""

    file: str
    source: str
    commit: str
    path: str
    sha256: str


def listed(name: str) -> list[Song]:
    """The songs of a set."""
    with Path(__file__).with_name(f"{name}_set.tsv").open(newline="") as file:
        return [Song(*row) for row in list(csv.reader(file, delimiter="\t"))[1:]]


def from_github(song: Song, base: str) -> bytes:
    """A song's file. Raises OSError where it cannot be fetched."""
    address = f"{base}/{song.source}/{song.commit}/{urllib.parse.quote(song.path)}"
    with urllib.request.urlopen(address, timeout=TIMEOUT) as answer:
        return bytes(answer.read())


def from_debian(package: str, wanted: Iterable[str]) -> dict[str, bytes]:
    """sha256 -> content of the wanted files of a package, in its ZIP archives too. Raises OSError without the package.

    By sum, since a path changes with the version.
    """
    wanted = set(wanted)
    found: dict[str, bytes] = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        for command in (["apt-get", "download", "--quiet", package], ["sh", "-c", "dpkg-deb -x ./*.deb tree"]):
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
            if done.returncode:
                raise OSError((done.stderr.strip().splitlines() or [f"{command[0]} failed"])[-1])
        files = [path for path in (folder / "tree").rglob("*") if path.is_file() and not path.is_symlink()]
        for path in files:
            for content in contents_of(path):
                if (own := sum_of(content)) in wanted:
                    found[own] = content
    return found


def contents_of(path: Path) -> Iterator[bytes]:
    """The members of a ZIP archive, or the file."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for member in archive.namelist():
                yield archive.read(member)
    else:
        yield path.read_bytes()


def sum_of(content: bytes) -> str:
    """The sha256, in hex."""
    return hashlib.sha256(content).hexdigest()


def fetch(songs: Iterable[Song], folder: Path, base: str = GITHUB) -> list[str]:
    """Fetch what is not there yet; returns a line for each song that could not be had."""
    songs, missing = [song for song in songs if not (folder / song.file).exists()], []
    packages: dict[str, dict[str, bytes] | Exception] = {}  # each is asked for once, whatever comes of it
    for song in tqdm(songs, unit="song", disable=None):
        try:
            if song.source.startswith(DEBIAN):
                if song.source not in packages:
                    packages[song.source] = _package(song.source, songs)
                files = packages[song.source]
                if isinstance(files, Exception):
                    raise files
                content = files.get(song.sha256, b"")
            else:
                content = from_github(song, base)
        except FAILURES as e:
            missing.append(f"{song.file}: {one_line(e)}")
            continue
        if sum_of(content) != song.sha256:
            missing.append(f"{song.file}: {song.source} has another file now")
            continue
        (folder / song.file).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(folder / song.file) as part:
            part.write_bytes(content)
    return missing


def _package(source: str, songs: Iterable[Song]) -> dict[str, bytes] | Exception:
    try:
        return from_debian(source.removeprefix(DEBIAN), [song.sha256 for song in songs if song.source == source])
    except FAILURES as e:
        return e


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=SETS, help="which set")
    parser.add_argument("folder", type=Path, metavar="DIR", help="makes DIR/GAME/SONG")
    args = parser.parse_args()
    songs = listed(args.set)
    if missing := fetch(songs, args.folder):
        raise UserError(f"{len(missing)} of {len(songs)} songs are missing:\nerror: " + "\nerror: ".join(missing))
    print(f"{args.folder}: all {len(songs)} songs of {len({Path(song.file).parent for song in songs})} games")


if __name__ == "__main__":
    main()
