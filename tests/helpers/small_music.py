"""Small songs for the packing tests: each seed sounds different, each suffix is a real file of its format."""

import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import mutagen
import numpy as np
import soundfile as sf

from simsiam_dali.packing.segments import without_ogg_serial

ROOT = Path(__file__).resolve().parents[2]
SUBTYPES = {".flac": "PCM_16", ".wav": "PCM_16", ".ogg": "VORBIS", ".mp3": "MPEG_LAYER_III"}


def sound(seed: int, seconds: float, rate: int = 22050, channels: int = 1) -> np.ndarray:
    """A tone in noise, float32 (samples, channels), peak below 0.5."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * rate)) / rate
    tone = 0.25 * np.sin(2 * np.pi * rng.uniform(200, 2000) * time)
    noise = 0.02 * rng.standard_normal((len(time), channels)).clip(-5, 5)
    return (tone[:, None] + noise).astype(np.float32)


def write_audio(path: Path, pcm: np.ndarray, rate: int = 22050, subtype: str | None = None) -> Path:
    """Write (samples, channels) as the format that the suffix says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".m4a":
        with av.open(str(path), "w") as container:
            stream = container.add_stream("aac", rate=rate, layout="mono")
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[:, :1].T), "fltp", "mono")
            frame.sample_rate, frame.time_base = rate, Fraction(1, rate)
            for part in (frame, None):
                container.mux(stream.encode(part))
        return path
    formats = {".ogg": "OGG", ".mp3": "MP3", ".flac": "FLAC", ".wav": "WAV"}
    suffix = path.suffix if path.suffix in formats else ".flac"
    kind = subtype or SUBTYPES[suffix]
    with path.open("wb") as out, sf.SoundFile(out, "w", rate, pcm.shape[1], kind, format=formats[suffix]) as file:
        file.write(pcm)
    return path


def repeat_headers(path: Path) -> Path:
    """Write the headers of an Ogg Vorbis file twice: FFmpeg refuses it, libsndfile passes the second ones over.

    Three songs of Debian's hyperrogue-music are so, by whatever cut them.
    """
    content, pages, at = path.read_bytes(), list[bytearray](), 0
    while at < len(content):  # page layout: RFC 3533, section 6
        size = 27 + content[at + 26] + sum(content[at + 27 : at + 27 + content[at + 26]])
        pages.append(bytearray(content[at : at + size]))
        at += size
    headers = [bytearray(page) for page in pages if page[6:14] == bytes(8)]  # they are at time 0
    for page in headers:
        page[5] = 0  # not the first page of a stream
    pages[len(headers) : len(headers)] = headers
    for number, page in enumerate(pages):
        page[18:22] = number.to_bytes(4, "little")
    path.write_bytes(without_ogg_serial(b"".join(pages)))  # with checksums to match
    return path


def write_song(path: Path, seed: int, seconds: float = 6.0, **tags: str | list[str]) -> Path:
    """A mono 22.05 kHz song with tags by mutagen's easy names."""
    write_audio(path, sound(seed, seconds))
    if tags:
        file = mutagen.File(path, easy=True)
        if file.tags is None:
            file.add_tags()
        for name, value in tags.items():
            file[name] = value
        file.save()
    return path


def make_shards(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(command(*arguments), capture_output=True, text=True, env=environment(), **options)


def said(stderr: str) -> list[str]:
    """The lines of an error output that are no progress bar."""
    return [line for line in stderr.replace("\r", "\n").splitlines() if line.strip() and "%|" not in line]


def command(*arguments: str | Path) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "make_shards.py"), *map(str, arguments)]


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT)}
