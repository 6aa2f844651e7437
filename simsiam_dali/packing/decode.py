"""A song decoded by FFmpeg, or by libsndfile where that decodes more of it."""

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from simsiam_dali.packing.ffmpeg import FFmpegAudio
from simsiam_dali.packing.libsndfile import LibsndfileAudio
from simsiam_dali.packing.song_audio import SHORT, BadSong, NotDecodable, SongAudio

T = TypeVar("T")


def decode(path: Path, sample_rate: int | None, use: Callable[[SongAudio], T]) -> tuple[SongAudio, T]:
    """The song at `sample_rate` in Hz (None: its own), and what `use` has made of its blocks.

    Where FFmpeg does not open the file, finds no way on in it, or gives less than the file declares, libsndfile is
    tried: it passes over headers in the middle of Ogg Vorbis, on which FFmpeg gives up. If it decodes more, `use` is
    called again with its blocks, and the song's note says so. `use` iterates `blocks()` to the end.
    Raises `BadSong` as `SongAudio.blocks` does.
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
    """How much of it libsndfile decodes, 0 where it does not open it."""
    audio = LibsndfileAudio(path)
    try:
        for _ in audio.blocks():
            pass
    except BadSong as e:
        if e.transient:
            raise
        return 0.0
    return audio.seconds
