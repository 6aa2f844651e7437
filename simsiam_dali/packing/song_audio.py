"""One song's audio as mono float32 at a given rate, block by block, for either decoder."""

import contextlib
import hashlib
import itertools
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from simsiam_dali.packing.segments import Pcm, to_int16

BLOCK = 1 << 16  # source samples handled at once
SHORT = 0.25
"""Seconds by which a decoded length may differ from another: codecs pad to whole frames."""
MAX_RATE = 3_000_000
"""Hz: DSD512 decodes to 2.8 MHz. Of more, as in a damaged header, libswresample's filter does not fit in memory."""
# FFmpeg's default resampler (filter_size=32) passes aliases at -12 dB and loses 3 dB at 7.5 kHz. With
# these, from 44.1 and 48 kHz to 16 kHz, the passband is flat to 7.5 kHz and aliases stay below -90 dB.
RESAMPLER = "filter_size=192:cutoff=0.96"


class BadSong(Exception):
    """A file that cannot be packed, and why. `transient`: the reason may pass (permission, disk)."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason, transient)
        self.reason, self.transient = reason, transient


class NotDecodable(BadSong):
    """The decoder cannot decode the file; the other one may."""


class NoAudio(BadSong):
    """A file without an audio stream, whose suffix is not of audio."""


def resample(blocks: Iterable[Pcm], rate_in: int, rate_out: int) -> Iterator[Pcm]:
    """Mono float32 blocks at another rate in Hz, by libswresample."""
    if rate_in == rate_out:
        yield from blocks
        return
    graph, samples = av.filter.Graph(), 0
    graph.link_nodes(
        graph.add_abuffer(sample_rate=rate_in, format="flt", layout="mono", time_base=Fraction(1, rate_in)),
        graph.add("aresample", f"{rate_out}:{RESAMPLER}"),
        graph.add("aformat", f"sample_fmts=flt:channel_layouts=mono:sample_rates={rate_out}"),
        graph.add("abuffersink"),
    ).configure()
    for block in itertools.chain(blocks, [None]):
        frame = None
        if block is not None:
            frame = av.AudioFrame.from_ndarray(block[None], format="flt", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = rate_in, Fraction(1, rate_in), samples
            samples += len(block)
        graph.push(frame)
        with contextlib.suppress(BlockingIOError, EOFError):  # until it needs more, or has ended
            while True:
                ready = graph.pull()
                assert isinstance(ready, av.AudioFrame)
                yield ready.to_ndarray()[0]


@dataclass
class SongAudio(ABC):
    """One file's audio: iterate once over `blocks()`; the other fields are complete after the last block.

    `sample_rate` (Hz) None keeps the file's own rate. `declared` is the length in seconds that the file states,
    None if it states none; `peak` the largest |sample|, full scale = 1; `damaged` counts packets, `stopped`: the
    decoder could not continue after some of it; `decoder_note` tells why another decoder than FFmpeg is used.
    """

    path: Path
    sample_rate: int | None = None
    decoder_note: str = ""
    source_rate: int = 0
    channels: int = 0
    peak: float = 0.0
    damaged: int = 0
    stopped: bool = False
    declared: float | None = None
    _samples: Counter[int] = field(default_factory=Counter, repr=False)  # by rate
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)

    def blocks(self) -> Iterator[Pcm]:
        """Mono float32 blocks at `sample_rate`, down to the last packet that decodes.

        Channels are averaged. Damaged packets are skipped and counted. Raises `BadSong` for a file that cannot be read,
        that holds NaN or infinite samples, or a rate above `MAX_RATE`; `NotDecodable` for one that this decoder does
        not open; `NoAudio` for one that is no audio file.
        """
        for rate, part in itertools.groupby(self._decoded(), key=lambda block: block[1]):  # several in a chained stream
            if rate > MAX_RATE:
                raise BadSong(f"has a sample rate of {rate} Hz in its header")
            self.sample_rate = self.sample_rate or rate
            yield from resample((self._measured(pcm, rate) for pcm, _ in part), rate, self.sample_rate)

    @property
    def seconds(self) -> float:
        """Decoded length."""
        return sum(samples / rate for rate, samples in self._samples.items())

    @property
    def audio_hash(self) -> str:
        """Hex sha256 of the mono audio at its own rate, in 16 bits: neither tags nor `sample_rate` change it."""
        return self._hash.hexdigest()

    @property
    def is_truncated(self) -> bool:
        """Whether the file states more audio than was decoded."""
        return self.declared is not None and self.declared - self.seconds > SHORT

    @property
    def note(self) -> str:
        """What is wrong with a file that could be decoded nevertheless; empty for an intact one."""
        notes = [self.decoder_note] if self.decoder_note else []
        if self.is_truncated:
            notes.append(f"truncated: {self.seconds:.1f} of {self.declared:.1f} s")
        elif _ogg_without_end(self.path):
            notes.append(f"truncated: the Ogg stream has no last page, {self.seconds:.1f} s decoded")
        if self.stopped:
            notes.append(f"cannot be read beyond {self.seconds:.1f} s")
        elif self.damaged:
            notes.append(f"{self.damaged} damaged packet{'s' * (self.damaged > 1)} skipped")
        if self.peak > 2:
            notes.append(f"clipped: samples of up to {self.peak:.3g} times full scale")
        return "; ".join(notes)

    def _measured(self, pcm: Pcm, rate: int) -> Pcm:
        peak = float(np.abs(pcm).max(initial=0))
        if not np.isfinite(peak):
            raise BadSong("holds NaN or infinite samples")
        self.peak = max(self.peak, peak)
        self._samples[rate] += len(pcm)
        self._hash.update(to_int16(pcm).tobytes())
        return pcm

    @abstractmethod
    def _decoded(self) -> Iterator[tuple[Pcm, int]]:
        """Mono blocks of about `BLOCK` samples, and their rate."""


def _ogg_without_end(path: Path) -> bool:
    """Whether the file is an Ogg stream whose last page is not marked as the last (RFC 3533, section 6)."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 66_000))  # a page holds at most 65,307 bytes
        tail = file.read()
    at = tail.rfind(b"OggS")
    return at < 0 or at + 5 >= len(tail) or not tail[at + 5] & 4
