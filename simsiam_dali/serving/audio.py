"""A song as a browser plays it: the file itself, or for other formats the decoded audio as a WAV that is never stored.

A WAV of 16-bit samples has its size at hand before anything is decoded, so that a browser can ask for any part of it:
seeking in a transcoded song is a seek in the file.
"""

import math
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import av

from simsiam_dali.packing.ffmpeg import OPEN_OPTIONS
from simsiam_dali.packing.find import file_of

PLAYED = {
    ("mp3", "mp3"): "audio/mpeg",
    ("mp3", "mp3float"): "audio/mpeg",
    ("flac", "flac"): "audio/flac",
    **{("ogg", codec): "audio/ogg" for codec in ("vorbis", "opus", "flac")},
    **{("wav", codec): "audio/wav" for codec in ("pcm_u8", "pcm_s16le", "pcm_s24le", "pcm_s32le", "pcm_f32le")},
    ("mov,mp4,m4a,3gp,3g2,mj2", "aac"): "audio/mp4",
    ("aac", "aac"): "audio/aac",
    **{("matroska,webm", codec): "audio/webm" for codec in ("vorbis", "opus")},
}
"""Container and codec, by FFmpeg's names, that current browsers play: the type to send."""
MAX_RATE = 48_000
_LAYOUTS = {1: "mono", 2: "stereo"}
_SAMPLE = 2  # bytes
HEADER = 44
_BLOCK = 1 << 16  # bytes sent at once


class NotPlayable(Exception):
    """A song that cannot be sent, and why."""


@dataclass(frozen=True)
class Audio:
    """A file to play: sent as `media_type`, or where that is None transcoded to `frames` samples of each channel.

    `rate`: in Hz; `channels`: 1 or 2, to which more are mixed down.
    """

    path: Path
    media_type: str | None
    rate: int
    frames: int
    channels: int

    @property
    def frame_bytes(self) -> int:
        """Size of one sample of all channels."""
        return _SAMPLE * self.channels

    @property
    def wav_bytes(self) -> int:
        """Size of the transcoded file."""
        return HEADER + self.frame_bytes * self.frames


def song_file(name: str, music: Path) -> Path:
    """The file of a song of the table, with links resolved. Raises NotPlayable where it is missing or outside."""
    try:
        path, folder = file_of(name, music).resolve(strict=True), music.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as e:  # missing, a loop of links, or a null character
        raise NotPlayable("the file is missing: does --music name another folder now?") from e
    if not path.is_relative_to(folder):
        raise NotPlayable("the file is a link that leads out of the music folder")
    if not path.is_file():
        raise NotPlayable("this is not a regular file")
    return path


def inspect(path: Path, seconds: float) -> Audio:
    """How to send a file; `seconds`: the table's length, for files that state none. Raises NotPlayable."""
    try:
        info = path.stat()
        return _inspect(path, info.st_mtime_ns, info.st_size, seconds)
    except (OSError, av.FFmpegError) as e:
        raise NotPlayable(f"the file cannot be played: {e.strerror}") from e


@lru_cache(maxsize=1024)
def _inspect(path: Path, _mtime_ns: int, _size: int, seconds: float) -> Audio:
    with path.open("rb") as file, _container(file) as container:
        stream = next(iter(container.streams.audio), None)
        if stream is None or stream.codec_context is None or not stream.sample_rate:  # 0: its header is none
            raise NotPlayable("the file cannot be played: it holds no audio that FFmpeg decodes")
        if stream.duration and stream.time_base:
            seconds = float(stream.duration * stream.time_base)
        elif container.duration:
            seconds = container.duration / av.time_base
        rate = min(stream.sample_rate, MAX_RATE)
        media_type = PLAYED.get((container.format.name, stream.codec_context.name))
        frames = round(seconds * rate) if math.isfinite(seconds) and seconds > 0 else 0
        # Sizes in a WAV are 32 bits: what is longer than six hours at 48 kHz is cut.
        frames = min(frames, (2**32 - 1 - HEADER) // (2 * _SAMPLE))
        return Audio(path, media_type, rate, frames, 1 if stream.channels == 1 else 2)


def _container(file: object) -> "av.container.InputContainer":
    return av.open(file, "r", metadata_errors="replace", options=OPEN_OPTIONS)


def wav_header(audio: Audio) -> bytes:
    """The 44 bytes before the samples: http://soundfile.sapp.org/doc/WaveFormat/."""
    data, size = audio.wav_bytes - HEADER, audio.frame_bytes
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, audio.channels, audio.rate, size * audio.rate, size, 16)
    return struct.pack("<4sI4s", b"RIFF", 36 + data, b"WAVE") + form + struct.pack("<4sI", b"data", data)


def wav_part(audio: Audio, start: int, end: int) -> Iterator[bytes]:
    """Bytes `start` up to `end` of the transcoded song, in blocks."""
    if start < HEADER:
        yield wav_header(audio)[start:end]
    first = max(start - HEADER, 0)
    skip, left = first % audio.frame_bytes, end - HEADER - first
    samples = _samples(audio, first // audio.frame_bytes)
    while left > 0:
        # Silence where less is decoded than the file states: what was promised must come.
        block = next(samples, bytes(_BLOCK))[skip : skip + left]
        skip, left = 0, left - len(block)
        yield block


def _samples(audio: Audio, first: int) -> Iterator[bytes]:
    """16-bit samples from number `first` on, in blocks; damaged packets are left out, as in packing.

    Formats whose packets have inexact times begin up to 0.1 s off.
    """
    resampler = av.AudioResampler("s16", _LAYOUTS[audio.channels], audio.rate)
    with audio.path.open("rb") as file, _container(file) as container:
        stream = container.streams.audio[0]
        time_base = float(stream.time_base or 0)
        begin = (stream.start_time or 0) * time_base
        if first:
            container.seek(round((begin + first / audio.rate) * av.time_base), backward=True)
        skip: int | None = None if first else 0
        for packet in container.demux(stream):
            try:
                frames = packet.decode()
            except av.error.InvalidDataError:
                continue
            for frame in frames:
                if skip is None:  # the seek went to a key frame before the wanted sample
                    at = (frame.pts * time_base - begin) * audio.rate if frame.pts is not None else first
                    skip = max(0, first - round(at)) * audio.frame_bytes
                for ready in resampler.resample(frame):
                    data = ready.to_ndarray().tobytes()
                    if skip < len(data):
                        yield data[skip:]
                    skip = max(0, skip - len(data))
        for ready in resampler.resample(None):
            yield ready.to_ndarray().tobytes()


def byte_range(header: str, size: int) -> tuple[int, int] | None:
    """Start and end of the part that a Range header asks for, end not before start where it can be sent.

    None for no header, several parts or none that is understood: all is sent then, as RFC 9110 allows.
    """
    found = re.fullmatch(r"bytes=(\d{0,18})-(\d{0,18})", header.strip())
    if not found or found[0].endswith("=-"):
        return None
    first, last = found[1], found[2]
    if not first:
        return max(0, size - int(last)), size
    end = min(int(last) + 1, size) if last else size
    return (int(first), end) if not last or int(last) >= int(first) else None
