"""Decode a song with FFmpeg, or with libsndfile if that decodes more of it."""

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import soundfile as sf

from simsiam_dali.packing.ffmpeg import FFmpegAudio
from simsiam_dali.packing.segments import Pcm
from simsiam_dali.packing.song_audio import BLOCK, SHORT, BadSong, NotDecodable, SongAudio

T = TypeVar("T")


def decode(path: Path, sample_rate: int | None, use: Callable[[SongAudio], T]) -> tuple[SongAudio, T]:
    """The song at `sample_rate` in Hz (None: its own), and the result of `use`, which iterates `blocks()` to the end.

    If FFmpeg does not open the file, stops within it, or decodes less than the file declares, libsndfile is tried: it
    skips headers in the middle of Ogg Vorbis, where FFmpeg stops. If it decodes more, `use` is called again with its
    blocks, and the song's note has the reason. Raises `BadSong` as `SongAudio.blocks` does.
    """
    audio, refused = FFmpegAudio(path, sample_rate), None
    try:
        used = use(audio)
        if not (audio.stopped or audio.is_truncated):
            return audio, used
        reason = f"FFmpeg gives only {audio.seconds:.1f} s of it"
    except NotDecodable as e:
        refused, reason = e, f"with FFmpeg it {e.reason}"
    if _libsndfile_seconds(path) > audio.seconds + SHORT:
        other = LibsndfileAudio(path, sample_rate, decoder_note=f"decoded by libsndfile: {reason}")
        return other, use(other)
    if refused:
        raise refused
    return audio, used


def _libsndfile_seconds(path: Path) -> float:
    """Seconds that libsndfile decodes, 0 if it does not open the file."""
    audio = LibsndfileAudio(path)
    try:
        for _ in audio.blocks():
            pass
    except BadSong as e:
        if e.transient:
            raise
        return 0.0
    return audio.seconds


class LibsndfileAudio(SongAudio):
    """Any format of libsndfile but MPEG audio."""

    def _decoded(self) -> Iterator[tuple[Pcm, int]]:
        try:
            with _File(self.path) as file:
                yield from self._decode(file)
                if file.error is not None:
                    raise file.error
        except OSError as e:
            raise BadSong(f"cannot be read: {e.strerror}", transient=True) from e

    def _decode(self, file: "_File") -> Iterator[tuple[Pcm, int]]:
        head = file.read(3)
        if head == b"ID3" or (head[:1] == b"\xff" and head[1:2] >= b"\xe0"):
            # libsndfile's decoder (mpg123) decodes no more of damaged files than FFmpeg, and prints to the terminal.
            raise NotDecodable("is MPEG audio")
        file.seek(0)
        try:
            with _Stream(file) as song:
                self.source_rate, self.channels = song.samplerate, song.channels
                self.declared = song.frames / song.samplerate
                while len(pcm := song.read(BLOCK, dtype="float32", always_2d=True)):
                    yield np.add.reduce(pcm, axis=1) / np.float32(song.channels), song.samplerate
        except sf.LibsndfileError as e:
            if not self.seconds:
                raise NotDecodable(f"does not open with libsndfile ({e.error_string})") from e
            self.stopped = True


class _Stream(sf.SoundFile):
    """Read from start to end only: soundfile seeks after each block, and repeats audio after a lost page."""

    def seekable(self) -> bool:
        """Never."""
        return False


class _File(io.FileIO):
    """libsndfile treats a read error as the end of the file: `error` keeps it."""

    error: OSError | None = None

    def readinto(self, buffer: Any) -> int:
        """As of any file; 0 after an error."""
        try:
            return super().readinto(buffer) or 0
        except OSError as e:
            self.error = e
            return 0

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file, but a position before its start, as from a damaged header, is its start."""
        try:
            return super().seek(offset, whence)
        except OSError:
            return super().seek(0)
