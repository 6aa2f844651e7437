"""One song's audio: whatever FFmpeg (PyAV) decodes, as mono float32 at the wanted rate, block by block."""

import errno
import hashlib
import itertools
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from simsiam_dali.packing.find import AUDIO
from simsiam_dali.packing.segments import Pcm, to_int16

BLOCK = 1 << 16  # source samples handled at once
# FFmpeg's default resampler (filter_size=32) lets aliases through at -12 dB and loses 3 dB at 7.5 kHz. With
# these, from 44.1 and 48 kHz to 16 kHz, the passband is flat to 7.5 kHz and aliases stay below -90 dB.
RESAMPLER = "filter_size=192:cutoff=0.96"


class BadSong(Exception):
    """A file that cannot be packed, and why. `transient`: worth another try next time (permission, disk)."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason, transient)
        self.reason, self.transient = reason, transient


class NoAudio(BadSong):
    """A file that holds no audio stream and does not pretend to."""


class Resampler:
    """libswresample from one rate to another, mono float32, fed block by block."""

    def __init__(self, rate_in: int, rate_out: int) -> None:
        self._rate_in = rate_in
        self._graph = graph = av.filter.Graph()
        nodes = [
            graph.add_abuffer(sample_rate=rate_in, format="flt", layout="mono", time_base=Fraction(1, rate_in)),
            graph.add("aresample", f"{rate_out}:{RESAMPLER}"),
            graph.add("aformat", f"sample_fmts=flt:channel_layouts=mono:sample_rates={rate_out}"),
            graph.add("abuffersink"),
        ]
        for node, following in itertools.pairwise(nodes):
            node.link_to(following)
        graph.configure()
        self._pts = 0

    def __call__(self, block: Pcm | None) -> Iterator[Pcm]:
        """Feed `block` (None: no more will come) and give what is ready."""
        frame = None
        if block is not None:
            frame = av.AudioFrame.from_ndarray(block[None], format="flt", layout="mono")
            frame.sample_rate = self._rate_in
            frame.time_base, frame.pts = Fraction(1, self._rate_in), self._pts
            self._pts += len(block)
        self._graph.push(frame)
        while True:
            try:
                ready = self._graph.pull()
            except (BlockingIOError, EOFError):
                return
            assert isinstance(ready, av.AudioFrame)
            yield ready.to_ndarray()[0]


@dataclass
class SongAudio:
    """One file's audio: iterate once over `blocks()`; the other fields are complete after the last block.

    `sample_rate` (Hz) None keeps the file's own rate. `declared` is the length in seconds that the file states,
    None where it states none; `peak` the largest |sample|, full scale = 1; `damaged` counts packets,
    `stopped` says that FFmpeg found no way on.
    """

    path: Path
    sample_rate: int | None = None
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

        Channels are averaged. Damaged packets are skipped and counted. Raises `BadSong` for a file that cannot
        be read or opened, or that holds NaN or infinite samples; `NoAudio` where no audio was to be expected.
        """
        resampler, rate = None, 0
        for pcm, rate_in in self._gathered():
            self._measure(pcm, rate_in)
            self.sample_rate = self.sample_rate or rate_in
            if rate_in != rate:  # the first block, or a chained stream with another rate
                if resampler:
                    yield from resampler(None)
                resampler = None if rate_in == self.sample_rate else Resampler(rate_in, self.sample_rate)
                rate = rate_in
            if resampler:
                yield from resampler(pcm)
            else:
                yield pcm
        if resampler:
            yield from resampler(None)

    @property
    def seconds(self) -> float:
        """Length of what was decoded."""
        return sum(samples / rate for rate, samples in self._samples.items())

    @property
    def audio_hash(self) -> str:
        """Hex sha256 of the mono audio at its own rate, in 16 bits: neither tags nor `sample_rate` change it."""
        return self._hash.hexdigest()

    @property
    def note(self) -> str:
        """What is wrong with a file that could be decoded all the same; empty for a sound one."""
        notes = []
        if self.declared is not None and self.declared - self.seconds > 0.25:
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

    def _measure(self, pcm: Pcm, rate: int) -> None:
        peak = float(np.abs(pcm).max(initial=0))
        if not np.isfinite(peak):
            raise BadSong("holds NaN or infinite samples")
        self.peak = max(self.peak, peak)
        self._samples[rate] += len(pcm)
        self._hash.update(to_int16(pcm).tobytes())

    def _gathered(self) -> Iterator[tuple[Pcm, int]]:
        """Mono blocks of about `BLOCK` samples and their rate: codecs' frames are too short to work on singly."""
        waiting, count, rate = list[Pcm](), 0, 0
        for frame in self._frames():
            if waiting and (frame.sample_rate != rate or count >= BLOCK):
                yield np.concatenate(waiting), rate
                waiting, count = [], 0
            rate = frame.sample_rate
            waiting.append(mono(frame))
            count += frame.samples
        if waiting:
            yield np.concatenate(waiting), rate

    def _frames(self) -> Iterator[av.AudioFrame]:
        known = self.path.suffix.lower() in AUDIO
        try:
            with self.path.open("rb") as file:
                if not file.read(1):
                    raise BadSong("is empty (0 bytes)")
                file.seek(0)
                # A file object, not a name: errors in reading come as Python's, and a name may hold any byte.
                # The whitelist keeps a playlist in disguise from the network.
                options = {"protocol_whitelist": "file"}
                with av.open(file, "r", metadata_errors="replace", options=options) as container:
                    if not container.streams.audio:
                        raise (BadSong if known else NoAudio)("holds no audio stream")
                    yield from self._decode(container, container.streams.audio[0])
        except av.error.FFmpegError as e:
            raise (BadSong if known else NoAudio)(f"does not open as audio ({e.strerror})") from e
        except OSError as e:
            raise BadSong(f"cannot be read: {e.strerror}", transient=True) from e

    def _decode(self, container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
        if stream.codec_context is None:
            raise BadSong("is in a codec that FFmpeg cannot decode")
        self.declared = _declared_seconds(container, stream, self.path)
        packets, progress = container.demux(stream), True
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                self._count_damage(e)
                if not progress:  # the demuxer does not get past this place
                    self.stopped = True
                    return
                packets, progress = container.demux(stream), False
                continue
            if packet is None:
                return
            progress = True
            try:
                frames = packet.decode()
            except av.error.FFmpegError as e:
                self._count_damage(e)
                continue
            for frame in frames:
                if frame.samples:
                    self.source_rate = self.source_rate or frame.sample_rate
                    self.channels = max(self.channels, len(frame.layout.channels))
                    yield frame

    def _count_damage(self, error: av.error.FFmpegError) -> None:
        if error.errno == errno.EIO:  # the disk, not the file
            raise OSError(error.errno, os.strerror(error.errno)) from error
        self.damaged += 1


def mono(frame: av.AudioFrame) -> Pcm:
    """The mean of a frame's channels, float32 `(samples,)`, full scale = 1."""
    pcm = frame.to_ndarray()
    channels = len(frame.layout.channels)
    pcm = pcm if frame.format.is_planar else pcm.reshape(-1, channels).T
    total = np.add.reduce(pcm, axis=0, dtype=np.float32)
    if pcm.dtype == np.uint8:
        return (total / channels - 128) / 128
    full_scale = 2.0 ** (8 * pcm.dtype.itemsize - 1) if pcm.dtype.kind == "i" else 1.0
    return total * np.float32(1 / (channels * full_scale))


def _declared_seconds(container: av.container.InputContainer, stream: av.AudioStream, path: Path) -> float | None:
    """What the file says its length is; None where FFmpeg only guesses it from the bit rate."""
    if container.format.name == "aac" or (container.format.name == "mp3" and not _mp3_has_length(path)):
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _mp3_has_length(path: Path) -> bool:
    """Whether the first MPEG frame carries a Xing, Info or VBRI header, which count the frames."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:  # the tag before it tells its size, 7 bits a byte
            file.seek(10 + sum(b << shift for b, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        first = file.read(4096)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))


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
