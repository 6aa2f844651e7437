"""Find the files of a music folder that may be songs; loops of links end."""

import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

# A file with any other suffix is opened to see whether it holds audio.
AUDIO = frozenset(
    """
    .mp3 .mp2 .ogg .oga .opus .flac .wav .wave .bwf .w64 .rf64 .aif .aiff .aifc .m4a .m4b .aac .alac .wma .ape
    .wv .mpc .tta .tak .ac3 .eac3 .dts .mka .spx .au .snd .caf .dsf .dff .ra .amr .shn
    """.split()  # noqa: SIM905 - readable as words
)
NOT_AUDIO = frozenset(
    """
    .jpg .jpeg .png .gif .bmp .tif .tiff .webp .svg .ico .heic .psd .cue .m3u .m3u8 .pls .xspf .wpl .asx .txt
    .log .nfo .md .pdf .doc .docx .odt .rtf .htm .html .xml .json .yaml .yml .toml .csv .ini .cfg .url .lnk
    .desktop .db .sqlite .sqlite3 .parquet .sfv .md5 .sha1 .sha256 .accurip .ffp .par2 .torrent .lrc .srt
    .ass .sub .idx .zip .rar .7z .gz .xz .bz2 .tar .exe .dll .so .py .sh .bat .part .crdownload .tmp .bak .mid
    .midi
    """.split()  # noqa: SIM905 - readable as words
)

_ESCAPED_BYTE = re.compile(rb"\\x([89a-f][0-9a-f])")


@dataclass(frozen=True, slots=True)
class SongFile:
    """A file below the music folder; `name` is relative to it, posix, and always encodes as UTF-8."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    problem: str = ""


def find_songs(music: Path, exclude: Path | None = None) -> tuple[list[SongFile], int]:
    """All files below `music` that may hold audio, sorted by name, and the number of other files.

    Links to folders are followed, each folder once (so a loop ends), real folders before linked ones. Hidden
    files and folders, and the folder `exclude`, are skipped. A folder or link that cannot be read is returned as
    a `SongFile` with its `problem`.
    """
    files: list[SongFile] = []
    passed_over = 0
    seen = {_identity(exclude)} if exclude and exclude.exists() else set()
    real, linked = [music], list[Path]()
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        try:
            if _identity(folder) in seen:
                continue
            seen.add(_identity(folder))
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as e:
            files.append(SongFile(folder, relative_name(folder, music), 0, 0, f"folder cannot be read: {e.strerror}"))
            continue
        for entry in entries:
            path = Path(entry.path)
            suffix, hidden = path.suffix.lower(), entry.name.startswith(".")
            try:
                info = entry.stat()
            except OSError as e:
                # A link that leads nowhere may have led to a folder of songs, on a disk that is not mounted.
                if suffix in AUDIO or (entry.is_symlink() and suffix not in NOT_AUDIO and not hidden):
                    files.append(SongFile(path, relative_name(path, music), 0, 0, f"cannot be read: {e.strerror}"))
                else:
                    passed_over += 1
                continue
            if stat.S_ISDIR(info.st_mode):
                if not hidden:
                    (linked if entry.is_symlink() else real).append(path)
            elif stat.S_ISREG(info.st_mode) and suffix not in NOT_AUDIO and not hidden:
                files.append(SongFile(path, relative_name(path, music), info.st_size, info.st_mtime_ns))
            else:
                passed_over += 1
    return sorted(files, key=lambda f: f.name), passed_over


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def relative_name(path: Path, music: Path) -> str:
    """A path's name below `music`, as `SongFile.name` has it."""
    return os.fsencode(path.relative_to(music).as_posix()).decode("utf-8", "backslashreplace")


def file_of(name: str, music: Path) -> Path:
    """Absolute path of the file that `relative_name` gave `name`, whether it is there or not."""
    path = (music / name).absolute()
    # A name is UTF-8 and has a file name's other bytes as \xNN; the file has the bytes.
    raw = _ESCAPED_BYTE.sub(lambda escaped: bytes([int(escaped[1], 16)]), os.fsencode(path))
    original = Path(os.fsdecode(raw))
    return original if original != path and not path.exists() and original.exists() else path
