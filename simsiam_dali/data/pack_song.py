"""One song's way into the shards: decoded, cut and encoded into a file of its own, which a later run finds again."""

import contextlib
import hashlib
import json
import math
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from simsiam_dali.data.songs import (
    SILENCE,
    BadSong,
    NoAudio,
    Pcm,
    SongAudio,
    SongFile,
    cut_segments,
    encode,
)
from simsiam_dali.data.tags import Tags, read_tags


@dataclass(frozen=True)
class DecodeSettings:
    """What the bytes of a song's segments depend on. `sample_rate` in Hz, None = the song's own."""

    sample_rate: int | None = 16000
    segment_seconds: float = 60.0
    codec: str = "flac"
    min_seconds: float = 5.0


@dataclass(frozen=True)
class Cut:
    """An encoded segment: `start` and true length in seconds, and where its bytes lie."""

    start: float
    seconds: float
    file: str
    offset: int
    size: int


@dataclass(frozen=True)
class Packed:
    """A decoded song. `sample_rate` is the segments', `source_rate` the file's (Hz); `duration` in seconds."""

    sample_rate: int
    source_rate: int
    channels: int
    duration: float
    audio_hash: str
    note: str
    cuts: tuple[Cut, ...]


@dataclass(frozen=True)
class Refused:
    """A file that is not packed. `retry`: the reason may pass; `audio` False: it never was a song."""

    reason: str
    retry: bool = False
    audio: bool = True


@dataclass(frozen=True)
class Job:
    """A file to look at; `known` is what an earlier run found out, so that only its tags are read."""

    file: SongFile
    settings: DecodeSettings
    cache: Path
    known: Packed | Refused | None = None


@dataclass(frozen=True)
class Result:
    """What became of a file; `decoded_seconds` counts audio decoded in this run."""

    outcome: Packed | Refused
    tags: Tags
    decoded_seconds: float = 0.0


def do_job(job: Job) -> Result:
    """Read the file's tags and, unless that was done before, decode it and leave its segments in the cache.

    Raises `OSError` where the cache cannot be written.
    """
    if job.file.problem:
        return Result(Refused(job.file.problem, retry=True), Tags())
    outcome, seconds = job.known or _load(job), 0.0
    if outcome is None:
        try:
            outcome = _decode(job)
            seconds = outcome.duration
        except BadSong as e:
            return Result(Refused(e.reason, e.transient, not isinstance(e, NoAudio)), Tags())
    return Result(outcome, read_tags(job.file.path) if isinstance(outcome, Packed) else Tags(), seconds)


def _decode(job: Job) -> Packed:
    """Decode into `KEY.audio` (the encoded segments in a row) and `KEY.json`, whose presence says it is complete."""
    settings, target = job.settings, _cache_file(job, "audio")
    audio = SongAudio(job.file.path, settings.sample_rate)
    cuts: list[Cut] = []
    silent = 0
    scratch = target.with_suffix(f".{os.getpid()}.tmp")
    try:
        with scratch.open("wb") as out:
            for start, seconds, pcm in _segments(audio, settings.segment_seconds):
                if abs(pcm).max() < SILENCE:
                    silent += 1
                    continue
                assert audio.sample_rate is not None
                content = encode(pcm, audio.sample_rate, settings.codec)
                cuts.append(Cut(start, seconds, str(target), out.tell(), len(content)))
                out.write(content)
        if not audio.seconds:
            raise BadSong("holds no audio that decodes")
        if audio.peak < SILENCE or not cuts:
            raise BadSong("is silent")
        if audio.seconds < settings.min_seconds:
            raise BadSong(f"is too short ({audio.seconds:.1f} s, --min-seconds is {settings.min_seconds:g})")
        scratch.replace(target)
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()
    note = "; ".join(filter(None, [audio.note, f"{silent} silent segments left out" if silent else ""]))
    assert audio.sample_rate is not None
    packed = Packed(
        audio.sample_rate,
        audio.source_rate,
        audio.channels,
        audio.seconds,
        audio.audio_hash,
        note,
        tuple(cuts),
    )
    scratch.write_text(json.dumps(asdict(packed)))
    scratch.replace(_cache_file(job, "json"))
    return packed


def _segments(audio: SongAudio, segment_seconds: float) -> Iterator[tuple[float, float, Pcm]]:
    """(start in seconds, true seconds, samples): the rate that fixes the length is known from the first block on."""
    blocks = audio.blocks()
    first = next(blocks, None)
    if first is None:
        return
    assert audio.sample_rate is not None
    rate = audio.sample_rate

    def all_blocks() -> Iterator[Pcm]:
        yield first
        yield from blocks

    for segment in cut_segments(all_blocks(), segment_samples(segment_seconds, rate)):
        yield segment.start / rate, segment.samples / rate, segment.pcm


def segment_samples(segment_seconds: float, rate: int) -> int:
    """Samples in a segment of `segment_seconds` at `rate` Hz."""
    return math.ceil(segment_seconds * rate)


def _load(job: Job) -> Packed | None:
    """What an interrupted run has left of this very file, with these settings."""
    try:
        content = json.loads(_cache_file(job, "json").read_bytes())
        size = _cache_file(job, "audio").stat().st_size
    except (OSError, ValueError):
        return None
    cuts = tuple(Cut(**cut) for cut in content.pop("cuts"))
    return Packed(**content, cuts=cuts) if size == cuts[-1].offset + cuts[-1].size else None


def _cache_file(job: Job, suffix: str) -> Path:
    key = json.dumps([job.file.name, job.file.bytes, job.file.mtime_ns, asdict(job.settings)])
    return job.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.{suffix}"
