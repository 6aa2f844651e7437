"""Decode a song with libsndfile, for files that FFmpeg does not decode completely."""

import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import soundfile as sf

from simsiam_dali.packing.segments import Pcm
from simsiam_dali.packing.song_audio import BLOCK, BadSong, NotDecodable, SongAudio


@dataclass
class LibsndfileAudio(SongAudio):
    """Any format of libsndfile but MPEG audio; `reason`: why FFmpeg is not used."""

    reason: str = ""

    @property
    def note(self) -> str:
        """As of any song, and the reason for this decoder."""
        return "; ".join(filter(None, [f"decoded by libsndfile: {self.reason}", super().note]))

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
