"""Cut songs into segments of one length, and encode a segment as an audio file in memory."""

import io
import struct
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import soundfile as sf

Pcm = npt.NDArray[np.float32]

SILENCE = 1e-4  # largest |sample| that still counts as silence (-80 dBFS)
_WRITE = 1 << 16  # libsndfile's Vorbis encoder overflows its stack on long writes


@dataclass(frozen=True)
class Segment:
    """`pcm`: float32 `(length,)`; `start` and the true length in samples, less than `length` where repeated."""

    start: int
    samples: int
    pcm: Pcm


def cut_segments(blocks: Iterable[Pcm], length: int) -> Iterator[Segment]:
    """Cut a song into segments of `length` samples, back to back, with two segments in memory at most.

    A remainder of at least half a segment becomes one more segment that ends where the song ends; a shorter one
    is dropped. A song shorter than one segment is repeated to fill one.
    """
    start, filled = 0, 0
    previous, current = None, np.empty(length, np.float32)
    for block in blocks:
        while len(block):
            part, block = np.split(block, [length - filled])
            current[filled : filled + len(part)] = part
            filled += len(part)
            if filled == length:
                yield Segment(start, length, current)
                previous, current = current, np.empty(length, np.float32)
                start, filled = start + length, 0
    if previous is None:
        if filled:
            yield Segment(0, filled, np.resize(current[:filled], length))
    elif 2 * filled >= length:
        pcm = np.concatenate([previous[filled:], current[:filled]])
        yield Segment(start - length + filled, length, pcm)


def to_int16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """16-bit values of `pcm`, clipped at full scale."""
    return np.rint(np.clip(pcm, -1, 1) * np.float32(32767)).astype(np.int16)


def encode(pcm: Pcm, sample_rate: int, codec: str) -> bytes:
    """`pcm` as a 16-bit mono file, always the same bytes; `codec` is flac, wav or ogg (Vorbis)."""
    out = io.BytesIO()
    subtype = "VORBIS" if codec == "ogg" else "PCM_16"
    with sf.SoundFile(out, "w", sample_rate, 1, subtype, format=codec.upper()) as file:
        for at in range(0, len(pcm), _WRITE):
            file.write(to_int16(pcm[at : at + _WRITE]))
    return without_ogg_serial(out.getvalue()) if codec == "ogg" else out.getvalue()


_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


def without_ogg_serial(content: bytes) -> bytes:
    """An Ogg file with the random serial number of its stream set to 0, and its pages' checksums to match."""
    pages = bytearray(content)
    at = 0
    while at < len(pages):  # page layout: RFC 3533, section 6
        lacing = at + 27
        end = lacing + pages[at + 26] + sum(pages[lacing : lacing + pages[at + 26]])
        pages[at + 14 : at + 18] = pages[at + 22 : at + 26] = bytes(4)
        # Ogg's CRC is zlib's polynomial with the bits in the other order, and no inversion before or after.
        crc = zlib.crc32(pages[at:end].translate(_REVERSED_BITS), 0xFFFFFFFF) ^ 0xFFFFFFFF
        pages[at + 22 : at + 26] = struct.pack("<I", int(f"{crc:032b}"[::-1], 2))
        at = end
    return bytes(pages)
