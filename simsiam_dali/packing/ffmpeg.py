"""Decode a song with FFmpeg (PyAV)."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from simsiam_dali.packing.find import AUDIO
from simsiam_dali.packing.segments import Pcm
from simsiam_dali.packing.song_audio import BLOCK, BadSong, NoAudio, NotDecodable, SongAudio

UNOPENED = "does not open as audio"
OPEN_OPTIONS = {"protocol_whitelist": "file"}  # keeps a playlist in disguise from the network


class FFmpegAudio(SongAudio):
    """Any format of FFmpeg; damaged packets are skipped and counted."""

    def _decoded(self) -> Iterator[tuple[Pcm, int]]:
        """Mono blocks of about `BLOCK` samples and their rate: codecs' frames are too short to process one by one."""
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
                # A file object, not a name: read errors are Python's, and a name may hold any byte.
                with av.open(file, "r", metadata_errors="replace", options=OPEN_OPTIONS) as container:
                    if not container.streams.audio:
                        raise (NotDecodable if known else NoAudio)("holds no audio stream")
                    yield from self._decode(container, container.streams.audio[0])
        except av.error.FFmpegError as e:
            raise (NotDecodable if known else NoAudio)(f"{UNOPENED} ({e.strerror})") from e
        except OSError as e:
            raise BadSong(f"cannot be read: {e.strerror}", transient=True) from e

    def _decode(self, container: av.container.InputContainer, stream: av.AudioStream) -> Iterator[av.AudioFrame]:
        if stream.codec_context is None:
            raise NotDecodable("is in a codec that FFmpeg cannot decode")
        self.declared = _declared_seconds(container, stream, self.path)
        packets, progress = container.demux(stream), True
        while True:
            try:
                packet = next(packets, None)
            except av.error.FFmpegError as e:
                self._count_damage(e)
                if not progress:  # the demuxer cannot skip this position
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
    try:
        pcm = frame.to_ndarray()
    except ValueError as e:  # 64-bit integers, which PyAV does not convert
        raise NotDecodable(f"holds samples of a kind that cannot be read ({frame.format.name})") from e
    channels = len(frame.layout.channels)
    pcm = pcm if frame.format.is_planar else pcm.reshape(-1, channels).T
    total = np.add.reduce(pcm, axis=0, dtype=np.float32)
    if pcm.dtype == np.uint8:
        return (total / channels - 128) / 128
    full_scale = 2.0 ** (8 * pcm.dtype.itemsize - 1) if pcm.dtype.kind == "i" else 1.0
    return total * np.float32(1 / (channels * full_scale))


def _declared_seconds(container: av.container.InputContainer, stream: av.AudioStream, path: Path) -> float | None:
    """The length that the file states; None if FFmpeg only estimates it from the bit rate."""
    if container.format.name == "aac" or (container.format.name == "mp3" and not _mp3_has_length(path)):
        return None
    if stream.duration and stream.time_base:
        return float(stream.duration * stream.time_base)
    return container.duration / av.time_base if container.duration else None


def _mp3_has_length(path: Path) -> bool:
    """Whether the first MPEG frame carries a Xing, Info or VBRI header, which count the frames."""
    with path.open("rb") as file:
        head = file.read(10)
        if head[:3] == b"ID3" and len(head) == 10:  # the size of the tag before it, 7 bits a byte
            file.seek(10 + sum(b << shift for b, shift in zip(head[6:], (21, 14, 7, 0), strict=True)))
        first = file.read(4096)
    return any(mark in first for mark in (b"Xing", b"Info", b"VBRI"))
