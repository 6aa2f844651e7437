"""Songs: found below a folder, decoded to mono float32 with FFmpeg (PyAV), cut into segments, encoded.

Nothing here knows about shards: `SongAudio` serves one file as well as a library.
"""

import errno
import hashlib
import io
import os
import stat
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import numpy.typing as npt
import soundfile as sf

Pcm = npt.NDArray[np.float32]

# Endings that are known; any other file is opened to see whether it holds audio.
AUDIO = frozenset(
    ".mp3 .mp2 .ogg .oga .opus .flac .wav .wave .bwf .w64 .rf64 .aif .aiff .aifc .m4a .m4b .aac .alac .wma .ape"
    " .wv .mpc .tta .tak .ac3 .eac3 .dts .mka .spx .au .snd .caf .dsf .dff .ra .amr .shn".split()
)
NOT_AUDIO = frozenset(
    ".jpg .jpeg .png .gif .bmp .tif .tiff .webp .svg .ico .heic .psd .cue .m3u .m3u8 .pls .xspf .wpl .asx .txt .log"
    " .nfo .md .pdf .doc .docx .odt .rtf .htm .html .xml .json .yaml .yml .toml .csv .ini .cfg .url .lnk .desktop"
    " .db .sqlite .sqlite3 .parquet .sfv .md5 .sha1 .sha256 .accurip .ffp .par2 .torrent .lrc .srt .ass .sub .idx"
    " .zip .rar .7z .gz .xz .bz2 .tar .exe .dll .so .py .sh .bat .part .crdownload .tmp .bak .mid .midi".split()
)

SILENCE = 1e-4  # largest |sample| that still counts as silence (-80 dBFS)
BLOCK = 1 << 16  # source samples handled at once
# FFmpeg's default resampler (32 taps) lets aliases through at -12 dB and loses 3 dB at 7.5 kHz. With these, for
# 44.1 and 48 kHz to 16 kHz, the passband is flat to 7.5 kHz and aliases stay below -90 dB.
RESAMPLER = "filter_size=192:cutoff=0.96"


class BadSong(Exception):
    """A file that cannot be packed, and why. `transient`: worth another try next time (permission, disk)."""

    def __init__(self, reason: str, transient: bool = False) -> None:
        super().__init__(reason, transient)
        self.reason, self.transient = reason, transient


class NoAudio(BadSong):
    """A file that holds no audio stream and does not pretend to."""


@dataclass(frozen=True)
class SongFile:
    """A file below the music folder; `name` is relative to it, posix, and always encodes as UTF-8."""

    path: Path
    name: str
    bytes: int
    mtime_ns: int
    problem: str = ""


def find_songs(music: Path, leave_out: Path | None = None) -> tuple[list[SongFile], int]:
    """All files below `music` that may hold audio, sorted by name, and the number of files passed over.

    Links to folders are followed, each folder once (so a loop ends), real folders before linked ones. Hidden files
    and folders and the folder `leave_out` are not looked into. A folder or link that cannot be read comes back as a
    `SongFile` with its `problem`.
    """
    files: list[SongFile] = []
    passed_over = 0
    seen = {_identity(leave_out)} if leave_out and leave_out.exists() else set()
    real, linked = [music], list[Path]()
    while real or linked:
        folder = real.pop() if real else linked.pop(0)
        try:
            if _identity(folder) in seen:
                continue
            seen.add(_identity(folder))
            entries = sorted(os.scandir(folder), key=lambda e: e.name)
        except OSError as e:
            files.append(SongFile(folder, _name(folder, music), 0, 0, f"folder cannot be read: {e.strerror}"))
            continue
        for entry in entries:
            path = Path(entry.path)
            suffix = path.suffix.lower()
            try:
                info = entry.stat()
            except OSError as e:
                if suffix in AUDIO:
                    files.append(SongFile(path, _name(path, music), 0, 0, f"cannot be read: {e.strerror}"))
                else:
                    passed_over += 1
                continue
            if stat.S_ISDIR(info.st_mode):
                if not entry.name.startswith("."):
                    (linked if entry.is_symlink() else real).append(path)
            elif stat.S_ISREG(info.st_mode) and suffix not in NOT_AUDIO and not entry.name.startswith("."):
                files.append(SongFile(path, _name(path, music), info.st_size, info.st_mtime_ns))
            else:
                passed_over += 1
    return sorted(files, key=lambda f: f.name), passed_over


def _identity(folder: Path) -> tuple[int, int]:
    info = folder.stat()
    return info.st_dev, info.st_ino


def _name(path: Path, music: Path) -> str:
    return os.fsencode(path.relative_to(music).as_posix()).decode("utf-8", "backslashreplace")


class Resampler:
    """libswresample from one rate to another, mono float32, fed block by block."""

    def __init__(self, rate_in: int, rate_out: int) -> None:
        self._rate_in = rate_in
        self._graph = graph = av.filter.Graph()
        nodes = [
            graph.add_abuffer(
                sample_rate=rate_in, format="flt", layout="mono", time_base=Fraction(1, rate_in)
            ),
            graph.add("aresample", f"{rate_out}:{RESAMPLER}"),
            graph.add("aformat", f"sample_fmts=flt:channel_layouts=mono:sample_rates={rate_out}"),
            graph.add("abuffersink"),
        ]
        for node, following in zip(nodes, nodes[1:], strict=False):
            node.link_to(following)
        graph.configure()
        self._pts = 0

    def __call__(self, block: Pcm | None) -> Iterator[Pcm]:
        """Feed `block` (None: no more will come) and give what is ready."""
        frame = None
        if block is not None:
            frame = av.AudioFrame.from_ndarray(block[None], format="flt", layout="mono")
            frame.sample_rate, frame.time_base, frame.pts = (
                self._rate_in,
                Fraction(1, self._rate_in),
                self._pts,
            )
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

    `sample_rate` None keeps the file's own rate. `audio_hash` is over the mono audio at the source's rate as 16-bit
    values, so it depends neither on tags nor on `sample_rate`.
    """

    path: Path
    sample_rate: int | None = None
    source_rate: int = 0
    channels: int = 0
    seconds: float = 0.0
    peak: float = 0.0
    damaged: int = 0
    declared: float | None = None
    _hash: "hashlib._Hash" = field(default_factory=hashlib.sha256, repr=False)

    def blocks(self) -> Iterator[Pcm]:
        """Mono float32 blocks at `sample_rate`, down to the last packet that decodes.

        Channels are averaged. Damaged packets are skipped and counted. Raises `BadSong` for a file that cannot be
        read or opened or that holds NaN or infinite samples, `NoAudio` where there is no audio stream.
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
    def audio_hash(self) -> str:
        """Hex sha256 of what was decoded."""
        return self._hash.hexdigest()

    @property
    def note(self) -> str:
        """What is wrong with a file that could be decoded all the same; empty for a sound one."""
        notes = []
        if self.declared is not None and self.declared - self.seconds > 0.25:
            notes.append(f"truncated: {self.seconds:.1f} of {self.declared:.1f} s")
        elif _ogg_without_end(self.path):
            notes.append(f"truncated: the Ogg stream has no last page, {self.seconds:.1f} s decoded")
        if self.damaged:
            notes.append(f"{self.damaged} damaged packet{'s' * (self.damaged > 1)} skipped")
        if self.peak > 2:
            notes.append(f"clipped: samples of up to {self.peak:.3g} times full scale")
        return "; ".join(notes)

    def _measure(self, pcm: Pcm, rate: int) -> None:
        peak = float(np.abs(pcm).max(initial=0))
        if not np.isfinite(peak):
            raise BadSong("holds NaN or infinite samples")
        self.peak = max(self.peak, peak)
        self.seconds += len(pcm) / rate
        self._hash.update(to_int16(pcm).tobytes())

    def _gathered(self) -> Iterator[tuple[Pcm, int]]:
        """(mono block of about `BLOCK` samples, its rate): codecs' frames are too short to work on one by one."""
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
                # A file object, not a name: reading errors come as Python's, and any byte may stand in a name.
                options = {"protocol_whitelist": "file"}
                with av.open(file, metadata_errors="replace", options=options) as container:
                    if not container.streams.audio:
                        raise (BadSong if known else NoAudio)("holds no audio stream")
                    yield from self._decode(container, container.streams.audio[0])
        except av.error.FFmpegError as e:
            raise (BadSong if known else NoAudio)(f"does not open as audio ({e.strerror})") from e
        except OSError as e:
            raise BadSong(f"cannot be read: {e.strerror}", transient=True) from e

    def _decode(
        self, container: av.container.InputContainer, stream: av.AudioStream
    ) -> Iterator[av.AudioFrame]:
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
    scale = 1 if pcm.dtype.kind == "f" else np.iinfo(pcm.dtype).max + 1
    return total * np.float32(1 / (channels * scale))


def _declared_seconds(
    container: av.container.InputContainer, stream: av.AudioStream, path: Path
) -> float | None:
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
    """Whether the file is an Ogg stream whose last page lacks the end-of-stream flag (RFC 3533, section 6)."""
    with path.open("rb") as file:
        if file.read(4) != b"OggS":
            return False
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 66_000))  # a page holds at most 65,307 bytes
        tail = file.read()
    at = tail.rfind(b"OggS")
    return at < 0 or at + 5 >= len(tail) or not tail[at + 5] & 4


@dataclass(frozen=True)
class Segment:
    """`pcm`: float32 `(length,)`; `start` and `samples` (the true length, less than `length` where wrapped)."""

    start: int
    samples: int
    pcm: Pcm


def cut_segments(blocks: Iterable[Pcm], length: int) -> Iterator[Segment]:
    """Cut a song into segments of `length` samples, back to back, holding two segments in memory at most.

    A remainder of at least half a segment becomes one more segment that ends where the song ends; a shorter one is
    left out. A song shorter than one segment is repeated to fill one.
    """
    start, filled = 0, 0
    previous, current = None, np.empty(length, np.float32)
    for block in blocks:
        while len(block):
            part = block[: length - filled]
            current[filled : filled + len(part)] = part
            filled, block = filled + len(part), block[len(part) :]
            if filled == length:
                yield Segment(start, length, current)
                previous, current = current, np.empty(length, np.float32)
                start, filled = start + length, 0
    if previous is None:
        if filled:
            yield Segment(0, filled, np.resize(current[:filled], length))
    elif 2 * filled >= length:
        yield Segment(start - length + filled, length, np.concatenate([previous[filled:], current[:filled]]))


def to_int16(pcm: Pcm) -> npt.NDArray[np.int16]:
    """16-bit values of `pcm`, clipped at full scale."""
    return np.rint(np.clip(pcm, -1, 1) * np.float32(32767)).astype(np.int16)


def encode(pcm: Pcm, sample_rate: int, codec: str) -> bytes:
    """`pcm` as a 16-bit mono file in memory; `codec` is flac, wav or ogg (Vorbis)."""
    out = io.BytesIO()
    subtype = "VORBIS" if codec == "ogg" else "PCM_16"
    with sf.SoundFile(out, "w", sample_rate, 1, subtype, format=codec.upper()) as file:
        for at in range(0, len(pcm), BLOCK):  # libsndfile's Vorbis encoder overflows its stack on long writes
            file.write(to_int16(pcm[at : at + BLOCK]))
    return out.getvalue()
