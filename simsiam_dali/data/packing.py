"""A music folder becomes a shard set: find, decode what is new, drop duplicates, split, shuffle, write, replace."""

import csv
import dataclasses
import errno
import io
import itertools
import json
import math
import shutil
import signal
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from simsiam_dali.data.commit import MANIFEST, STAGING, commit, locked, named_files, roll_forward
from simsiam_dali.data.pack_song import Cut, DecodeSettings, Job, Packed, Refused, Result, do_job
from simsiam_dali.data.ratings import RatingsFile
from simsiam_dali.data.shards import (
    FILES,
    FORMAT_VERSION,
    REFUSED,
    SEGMENTS,
    SONGS,
    SPLITS,
    FileSum,
    Manifest,
    ShardSet,
    changed,
    read_index,
    read_manifest,
    read_table,
    write_file,
    write_manifest,
    write_shard,
    write_table,
)
from simsiam_dali.data.songs import SongFile, find_songs
from simsiam_dali.data.splits import assign_splits, group_key
from simsiam_dali.data.tags import Tags, merged
from simsiam_dali.data.workers import Died, run_all
from simsiam_dali.errors import UserError

_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class PackSettings(DecodeSettings):
    """make_shards' options that the shards depend on; see its `--help`."""

    val_fraction: float = 0.1
    split_by: str = "album"
    segments_per_shard: int = 256
    seed: int = 0

    @property
    def decode(self) -> DecodeSettings:
        """The part that a song's segments depend on."""
        return DecodeSettings(self.sample_rate, self.segment_seconds, self.codec, self.min_seconds)


@dataclass
class Song:
    """A song that is packed, with every other file that holds the same audio; `file` is the first by name."""

    file: SongFile
    packed: Packed
    tags: Tags
    others: list[SongFile] = field(default_factory=list)
    split: str = ""


@dataclass
class Report:
    """What a run did: `counts` of the set, `(file, reason)` lists, and how fast it decoded (seconds)."""

    counts: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    decoded_songs: int = 0
    decoded_seconds: float = 0.0
    decoding_took: float = 0.0
    unchanged: bool = False


def pack(
    music: Path,
    out: Path,
    settings: PackSettings,
    workers: int,
    ratings: Path | None = None,
    replace: bool = False,
) -> Report:
    """Pack the folder `music` into the set at `out`; whatever happens, `out` holds the old set or the new one.

    Files that the last run packed with the same decode settings are not decoded again. `replace` allows writing over
    a set that was packed from another folder. Raises `UserError` for what the user can mend, a full disk included.
    """
    if not music.is_dir():
        raise UserError(f"{music}: no such folder of music")
    rated = RatingsFile.read(ratings, music) if ratings else None
    try:
        out.mkdir(parents=True, exist_ok=True)
        with locked(out, wait=False):
            roll_forward(out)
            return _Packer(music.resolve(), out, settings, workers, rated, replace).run()
    except OSError as e:
        if e.errno in _DISK_FULL:
            shutil.rmtree(out / STAGING, ignore_errors=True)
            raise UserError(
                f"no space left for {out}: its shards are as they were, what was begun is removed"
            ) from e
        if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise UserError(f"cannot write shards to {out}: {e.strerror} ({e.filename})") from e
        raise


class _Packer:
    def __init__(
        self,
        music: Path,
        out: Path,
        settings: PackSettings,
        workers: int,
        ratings: RatingsFile | None,
        replace: bool,
    ) -> None:
        self.music, self.out, self.settings = music, out, settings
        self.workers, self.ratings, self.replace = workers, ratings, replace
        self.report = Report()
        self.old = self._old_set()

    def run(self) -> Report:
        files, passed_over = find_songs(self.music, leave_out=self.out)
        if not files:
            raise UserError(
                f"{self.music}: no audio file in this folder ({passed_over} other files passed over)"
            )
        results = self._look_at(files)
        songs = _distinct(results)
        self._tell(results, passed_over)
        if not songs:
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.report.refused[:3])
            raise UserError(f"{self.music}: none of its {len(files)} audio files can be packed ({reasons})")
        self._split(songs)
        if self.ratings:
            self._rate(songs)
        self._write(songs, results)
        return self.report

    def _old_set(self) -> ShardSet | None:
        """What `out` holds already, if it can serve; its shards may be damaged, its tables are not."""
        if not (self.out / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.out)
            if manifest.music != str(self.music) and not self.replace:
                raise UserError(
                    f"{self.out} holds the shards of {manifest.music}: name another --out, or give --replace"
                )
        except UserError:
            if self.replace:
                return None
            raise
        for name in (SONGS, SEGMENTS, FILES):
            if problem := changed(self.out / name, manifest.files[name], always_sum=True):
                self.report.remarks.append(f"{self.out / name} {problem}: everything was decoded again")
                return None
        return ShardSet(self.out, manifest, read_table(self.out / SONGS), read_table(self.out / SEGMENTS))

    def _look_at(self, files: list[SongFile]) -> list[tuple[SongFile, Result]]:
        """Decode what is new, read all tags; in the order of `files`."""
        known = self._known()
        cache = self.out / STAGING / "songs"
        cache.mkdir(parents=True, exist_ok=True)
        jobs = [
            Job(file, self.settings.decode, cache, known.get((file.name, file.bytes, file.mtime_ns)))
            for file in files
        ]
        began = time.monotonic()
        results: dict[SongFile, Result] = {}
        with tqdm(total=len(jobs), unit="song", smoothing=0.1) as bar:
            for job, result in run_all(do_job, jobs, min(self.workers, len(jobs))):
                if isinstance(result, Died):
                    reason = f"ended the process that decoded it (exit code {result.exit_code})"
                    result = Result(Refused(reason, retry=True), Tags())
                results[job.file] = result
                self.report.decoded_songs += result.decoded_seconds > 0
                self.report.decoded_seconds += result.decoded_seconds
                self.report.decoding_took = time.monotonic() - began
                speed = self.report.decoded_seconds / self.report.decoding_took
                bar.set_postfix_str(f"{speed:.0f}x realtime", refresh=False)
                bar.update()
        return [(file, results[file]) for file in files]

    def _known(self) -> dict[tuple[str, int, int], Packed | Refused]:
        """(name, bytes, mtime) -> what the last run made of that file, where it still serves."""
        old = self.old
        if old is None or any(old.manifest.settings[k] != v for k, v in asdict(self.settings.decode).items()):
            return {}
        damaged = {
            tar.name
            for tar in old.tars("train") + old.tars("val")
            for path in (tar, tar.with_suffix(".idx"))
            if changed(path, old.manifest.files[path.name], always_sum=True)
        }
        if damaged:
            self.report.remarks.append(f"{len(damaged)} damaged shards: their songs were decoded again")
        cuts: dict[int, list[Cut]] = {}
        places = {
            name: iter(read_index((old.root / name).with_suffix(".idx")))
            for name in set(old.segments["shard"]) - damaged
        }
        for row in old.segments.itertuples():
            if row.shard not in damaged:
                offset, size, _ = next(places[row.shard])[old.codec]
                cuts.setdefault(row.song, []).append(
                    Cut(row.start, row.seconds, str(old.root / row.shard), offset, size)
                )
        rates = dict(zip(old.segments["song"], old.segments["sample_rate"], strict=True))
        broken = set(old.segments["song"][old.segments["shard"].isin(damaged)])
        known: dict[tuple[str, int, int], Packed | Refused] = {}
        for file in read_table(old.root / FILES).itertuples():
            key = (file.path, file.bytes, file.mtime_ns)
            if file.status == "refused":
                if not file.retry:
                    known[key] = Refused(file.reason)
            elif file.song not in broken:
                song = old.songs.loc[file.song]
                known[key] = Packed(
                    sample_rate=int(rates[file.song]),
                    source_rate=int(song["sample_rate"]),
                    channels=int(song["channels"]),
                    duration=float(song["duration"]),
                    audio_hash=song["audio_hash"],
                    note=file.reason,
                    cuts=tuple(sorted(cuts[file.song], key=lambda cut: cut.start)),
                )
        return known

    def _tell(self, results: list[tuple[SongFile, Result]], passed_over: int) -> None:
        for file, result in results:
            if isinstance(result.outcome, Packed):
                note = "; ".join(filter(None, [result.outcome.note, result.tags.note]))
                if note:
                    self.report.notes.append((file.name, note))
            elif result.outcome.audio:
                self.report.refused.append((file.name, result.outcome.reason))
            else:
                passed_over += 1
        self.report.counts |= {"refused": len(self.report.refused), "passed_over": passed_over}

    def _split(self, songs: list[Song]) -> None:
        old, settings = self.old, self.settings
        kept: dict[str, str] = {}
        if old is not None:
            drawn_by = ("val_fraction", "split_by", "seed")
            if all(old.manifest.settings[name] == getattr(settings, name) for name in drawn_by):
                kept = dict(zip(old.songs["audio_hash"], old.songs["split"], strict=True))
            else:
                self.report.remarks.append(
                    "the split was drawn anew: --val-fraction, --split-by or --seed changed"
                )
        splits = assign_splits(
            [group_key(settings.split_by, s.tags, s.file.name, s.packed.audio_hash) for s in songs],
            [kept.get(s.packed.audio_hash) for s in songs],
            settings.val_fraction,
            settings.seed,
        )
        for song, split in zip(songs, splits, strict=True):
            song.split = split

    def _rate(self, songs: list[Song]) -> None:
        assert self.ratings is not None
        matched = 0
        for song in songs:
            for file in (song.file, *song.others):
                rating = self.ratings.lookup(file.path, song.tags.title, song.tags.artists)
                if rating is not None:
                    song.tags = dataclasses.replace(song.tags, rating=rating)
                    matched += 1
                    break
        self.report.remarks.append(
            f"{matched} of {len(songs)} songs found among the {len(self.ratings)} of {self.ratings.source}"
        )

    def _write(self, songs: list[Song], results: list[tuple[SongFile, Result]]) -> None:
        """Stage the whole set, then let it take the old one's place."""
        settings = self.settings
        staged = self.out / STAGING / "new"
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        order = _shuffled(songs, settings)
        segments = _segment_rows(songs, order, settings)
        song_rows = [_song_row(song) for song in songs]
        files = {
            SONGS: write_table(staged / SONGS, song_rows),
            SEGMENTS: write_table(staged / SEGMENTS, segments),
            FILES: write_table(staged / FILES, _file_rows(songs, results)),
            REFUSED: write_file(staged / REFUSED, _refused_csv(self.report.refused)),
        }
        self.report.counts |= _counts(songs, segments)
        if self._is_same(files):
            self.report.unchanged = True
            shutil.rmtree(self.out / STAGING)
            return
        ours = set(named_files(self.out)) | ({MANIFEST} if self.old else set())
        shards = {row["shard"] for row in segments}
        names = {*files, *shards, *(Path(name).stem + ".idx" for name in shards), MANIFEST}
        if not self.replace and (foreign := sorted(n for n in names - ours if (self.out / n).exists())):
            raise UserError(
                f"{self.out / foreign[0]} was not written by make_shards: move it, or give --replace"
            )
        numbered = zip(itertools.count(), segments, order, strict=False)
        with tqdm(total=len(segments), unit="segment", desc="writing") as bar:
            for shard, rows in itertools.groupby(numbered, key=lambda numbered: numbered[1]["shard"]):
                samples = (
                    (segment["key"], _sample(row, cut, song_rows[segment["song"]], settings.codec))
                    for row, segment, (_, cut) in rows
                )
                files |= write_shard(staged / shard, _counted(samples, bar))
        write_manifest(
            staged, Manifest(FORMAT_VERSION, str(self.music), asdict(settings), self.report.counts, files)
        )
        # From here a signal waits: the set is complete, and moving it takes no time.
        signals = {signal.SIGINT, signal.SIGTERM}
        before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
        try:
            commit(self.out, staged)
            shutil.rmtree(self.out / STAGING, ignore_errors=True)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _is_same(self, tables: dict[str, FileSum]) -> bool:
        """Whether the set in place was made from the same songs, tags and settings, and is whole."""
        if self.old is None:
            return False
        manifest = self.old.manifest
        return (
            manifest.settings == asdict(self.settings)
            and manifest.music == str(self.music)
            and all(manifest.files[name].sha256 == table.sha256 for name, table in tables.items())
            and not any(changed(self.out / name, file) for name, file in manifest.files.items())
        )


def _distinct(results: list[tuple[SongFile, Result]]) -> list[Song]:
    """One song for each audio; tags of all its files are merged, the first file's first."""
    songs: dict[str, Song] = {}
    for file, result in results:
        if isinstance(result.outcome, Packed):
            song = songs.setdefault(result.outcome.audio_hash, Song(file, result.outcome, result.tags))
            if song.file is not file:
                song.others.append(file)
                song.tags = merged(song.tags, result.tags)
    return list(songs.values())


def _shuffled(songs: list[Song], settings: PackSettings) -> list[tuple[int, Cut]]:
    """(song row, segment), the training ones first, each split in its seeded random order."""
    order: list[tuple[int, Cut]] = []
    for number, split in enumerate(SPLITS):
        cuts = [(i, cut) for i, song in enumerate(songs) if song.split == split for cut in song.packed.cuts]
        order += [cuts[i] for i in np.random.default_rng([settings.seed, number]).permutation(len(cuts))]
    return order


def _segment_rows(
    songs: list[Song], order: list[tuple[int, Cut]], settings: PackSettings
) -> list[dict[str, Any]]:
    in_split: Counter[str] = Counter()
    rows = []
    for row, (song, cut) in enumerate(order):
        split = songs[song].split
        shard = f"{split}-{in_split[split] // settings.segments_per_shard:06d}.tar"
        in_split[split] += 1
        rows.append(
            {"song": song, "key": f"{row:09d}", "split": split, "shard": shard}
            | {"start": cut.start, "seconds": cut.seconds, "sample_rate": songs[song].packed.sample_rate}
        )
    return rows


def _song_row(song: Song) -> dict[str, Any]:
    tags, packed = song.tags, song.packed
    return {
        "path": song.file.name,
        "other_paths": [file.name for file in song.others],
        **{name: value for name, value in asdict(tags).items() if name != "note"},
        "duration": packed.duration,
        "sample_rate": packed.source_rate,
        "channels": packed.channels,
        "audio_hash": packed.audio_hash,
        "split": song.split,
        "note": packed.note,
    }


def _file_rows(songs: list[Song], results: list[tuple[SongFile, Result]]) -> list[dict[str, Any]]:
    row_of = {song.packed.audio_hash: row for row, song in enumerate(songs)}
    rows = []
    for file, result in results:
        outcome = result.outcome
        common = {"path": file.name, "bytes": file.bytes, "mtime_ns": file.mtime_ns}
        if isinstance(outcome, Packed):
            row = row_of[outcome.audio_hash]
            status = "ok" if songs[row].file is file else "duplicate"
            rows.append(common | {"status": status, "reason": outcome.note, "retry": False, "song": row})
        elif outcome.audio:
            rows.append(common | {"status": "refused", "reason": outcome.reason, "retry": outcome.retry})
    return rows


def _counts(songs: list[Song], segments: list[dict[str, Any]]) -> dict[str, int]:
    counts = {"songs": len(songs), "duplicates": sum(len(song.others) for song in songs)}
    counts["seconds"] = round(sum(song.packed.duration for song in songs))
    for split in SPLITS:
        counts[f"{split}_songs"] = sum(song.split == split for song in songs)
        counts[f"{split}_segments"] = sum(segment["split"] == split for segment in segments)
    return counts


def _refused_csv(refused: list[tuple[str, str]]) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("path", "reason"), *refused])
    return out.getvalue().encode()


def _sample(row: int, cut: Cut, song: dict[str, Any], codec: str) -> dict[str, bytes]:
    with Path(cut.file).open("rb") as file:
        file.seek(cut.offset)
        audio = file.read(cut.size)
    rating = song["rating"]
    about = {
        "title": song["title"],
        "artist": "; ".join(song["artists"]),
        "albums": song["albums"],
        "year": song["year"],
        "genres": song["genres"],
        "rating": None if math.isnan(rating) else rating,
        "start": cut.start,
        "seconds": cut.seconds,
        "path": song["path"],
    }
    text = json.dumps(about, ensure_ascii=False).encode()
    return {codec: audio, "row": row.to_bytes(8, "little"), "json": text}


def _counted(
    samples: Iterator[tuple[str, dict[str, bytes]]], bar: Any
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for sample in samples:
        yield sample
        bar.update()
