"""Decode a song with FFmpeg, or with libsndfile if that decodes more of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from simsiam_dali.packing.ffmpeg import FFmpegAudio
from simsiam_dali.packing.libsndfile import LibsndfileAudio
from simsiam_dali.packing.song_audio import SHORT, BadSong, NotDecodable, SongAudio

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
        if not audio.short:
            return audio, used
        reason = f"FFmpeg gives only {audio.seconds:.1f} s of it"
    except NotDecodable as e:
        refused, reason = e, f"with FFmpeg it {e.reason}"
    if _libsndfile_seconds(path) > audio.seconds + SHORT:
        other = LibsndfileAudio(path, sample_rate, reason=reason)
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
