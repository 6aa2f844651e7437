"""How a file's audio is encoded: to tell the better one of two copies."""

import contextlib
from dataclasses import dataclass
from pathlib import Path

import av

from simsiam_dali.packing.ffmpeg import OPEN_OPTIONS

_LOSSLESS = 1 << 2  # AV_CODEC_PROP_LOSSLESS of libavcodec/codec_desc.h


@dataclass(frozen=True)
class Encoding:
    """codec: FFmpeg's name of it, empty where FFmpeg does not open the file; bit_rate: mean, kbit/s."""

    codec: str
    is_lossless: bool
    bit_rate: int


def read_encoding(path: Path, seconds: float) -> Encoding:
    """The encoding of a file that lasts `seconds`. Raises OSError for a file that cannot be read."""
    codec, is_lossless, bit_rate = "", False, None
    with (
        contextlib.suppress(av.error.FFmpegError),
        path.open("rb") as file,
        av.open(file, "r", metadata_errors="replace", options=OPEN_OPTIONS) as container,
    ):
        context = container.streams.audio[0].codec_context
        codec, bit_rate = context.codec.canonical_name, context.bit_rate
        is_lossless = bool(context.codec.properties & _LOSSLESS)
    # Pictures in the file count too where the stream states no bit rate.
    return Encoding(codec, is_lossless, round((bit_rate or path.stat().st_size * 8 / max(seconds, 1e-3)) / 1000))
