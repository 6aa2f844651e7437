"""Pack one song: decode, cut and encode it into a file of its own, which an interrupted run finds again."""

import hashlib
import itertools
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from simsiam_dali.common.files import atomic_write
from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.find import SongFile
from simsiam_dali.packing.segments import SILENCE, cut_segments, encode
from simsiam_dali.packing.song_audio import BadSong, NoAudio, SongAudio
from simsiam_dali.packing.tags import Tags, read_tags


@dataclass(frozen=True)
class DecodeSettings:
    """The settings that the bytes of a song's segments depend on. `sample_rate` in Hz, None = the song's own."""

    sample_rate: int | None = 16000
    segment_seconds: float = 60.0
    codec: str = "flac"
    min_seconds: float = 5.0


@dataclass(frozen=True)
class PackSettings(DecodeSettings):
    """All options that the shards depend on; `pack --help` explains them."""

    val_fraction: float = 0.1
    split_by: str = "album"
    segments_per_shard: int = 256
    seed: int = 0

    @property
    def decode(self) -> DecodeSettings:
        """The settings that a song's segments depend on."""
        return DecodeSettings(self.sample_rate, self.segment_seconds, self.codec, self.min_seconds)


@dataclass(frozen=True, slots=True)
class Cut:
    """An encoded segment: `start` and true length in seconds, and where its bytes are."""

    start: float
    seconds: float
    file: Path
    offset: int
    size: int


@dataclass(frozen=True, slots=True)
class Packed:
    """A decoded song: its segments' rate and its source's in Hz, its `duration` in seconds."""

    sample_rate: int
    source_rate: int
    channels: int
    duration: float
    audio_hash: str
    note: str
    cuts: tuple[Cut, ...]


@dataclass(frozen=True, slots=True)
class Refused:
    """A file that is not packed. `retry`: the reason may pass; `audio` False: it is no song at all."""

    reason: str
    retry: bool = False
    audio: bool = True


@dataclass(frozen=True, slots=True)
class Job:
    """The file number `index`; `known` is its result in an earlier run, so that only its tags are read."""

    index: int
    file: SongFile
    settings: DecodeSettings
    cache: Path
    known: Packed | Refused | None = None


@dataclass(frozen=True, slots=True)
class Result:
    """The result for a file; `decoded_seconds` counts audio decoded in this run."""

    outcome: Packed | Refused
    tags: Tags = field(default_factory=Tags)
    decoded_seconds: float = 0.0


def do_job(job: Job) -> Result:
    """Read the file's tags and, unless that was done before, decode it and write its segments to the cache.

    Raises `OSError` if the cache cannot be written; a song that cannot be packed is returned as `Refused`.
    """
    if job.file.problem:
        return Result(Refused(job.file.problem, retry=True))
    outcome, decoded_seconds = job.known or _load(job), 0.0
    if outcome is None:
        try:
            outcome = _decode(job)
            decoded_seconds = outcome.duration
        except BadSong as e:
            return Result(Refused(e.reason, e.transient, not isinstance(e, NoAudio)))
        except OSError:
            raise
        except Exception as e:  # one song that a library fails on must not end a run of thousands
            return Result(Refused(f"cannot be decoded ({type(e).__name__}: {e})"))
    return Result(outcome, read_tags(job.file.path) if isinstance(outcome, Packed) else Tags(), decoded_seconds)


def _decode(job: Job) -> Packed:
    """Decode into `KEY.audio` (the encoded segments in a row); `KEY.json`, written last, marks it as complete."""
    settings, target = job.settings, _cache_file(job, "audio")

    with atomic_write(target) as scratch:

        def encode_all(audio: SongAudio) -> tuple[list[Cut], int]:
            cuts, silent, blocks = list[Cut](), 0, audio.blocks()
            first = list(itertools.islice(blocks, 1))  # with which the rate is known, if the song keeps its own
            rate = audio.sample_rate or 1
            length = max(1, round(settings.segment_seconds * rate))
            with scratch.open("wb") as out:
                for segment in cut_segments(itertools.chain(first, blocks), length):
                    if abs(segment.pcm).max() < SILENCE:
                        silent += 1
                        continue
                    content = encode(segment.pcm, rate, settings.codec)
                    cuts.append(Cut(segment.start / rate, segment.samples / rate, target, out.tell(), len(content)))
                    out.write(content)
            return cuts, silent

        audio, (cuts, silent) = decode(job.file.path, settings.sample_rate, encode_all)
        if not audio.seconds:
            raise BadSong("holds no audio that decodes")
        if audio.seconds < settings.min_seconds:
            raise BadSong(f"is too short: {audio.seconds:.1f} s, --min-seconds is {settings.min_seconds:g}")
        if not cuts:
            raise BadSong("is silent")
    assert audio.sample_rate is not None
    note = "; ".join(filter(None, [audio.note, f"{silent} silent segments left out" if silent else ""]))
    rates = audio.sample_rate, audio.source_rate
    packed = Packed(*rates, audio.channels, audio.seconds, audio.audio_hash, note, tuple(cuts))
    with atomic_write(_cache_file(job, "json")) as scratch:
        scratch.write_text(json.dumps(asdict(packed), default=str))
    return packed


def _load(job: Job) -> Packed | None:
    """The result of an interrupted run for this very file, with these settings."""
    audio = _cache_file(job, "audio")
    try:
        content = json.loads(_cache_file(job, "json").read_bytes())
        size = audio.stat().st_size
    except (OSError, ValueError):
        return None
    cuts = tuple(Cut(**{**cut, "file": audio}) for cut in content.pop("cuts"))
    return Packed(**content, cuts=cuts) if size == cuts[-1].offset + cuts[-1].size else None


def _cache_file(job: Job, suffix: str) -> Path:
    key = json.dumps([job.file.name, job.file.bytes, job.file.mtime_ns, asdict(job.settings)])
    return job.cache / f"{hashlib.sha256(key.encode()).hexdigest()}.{suffix}"
