"""Pack a music folder into a shard set: find songs, decode new ones, split, shuffle, write, replace the old set."""

import contextlib
import csv
import errno
import io
import math
import shutil
import signal
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.commit import MANIFEST, STAGING, commit, lock_set, named_files, roll_forward
from simsiam_dali.data.format import FILES, FORMAT_VERSION, REFUSED, SEGMENTS, SONGS, Manifest, read_manifest
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.packing import assemble
from simsiam_dali.packing.assemble import Results, Songs, Spool
from simsiam_dali.packing.assign_split import assign_splits, group_key
from simsiam_dali.packing.find import SongFile, find_songs
from simsiam_dali.packing.pack_song import Job, Packed, PackSettings, Refused, Result, do_job
from simsiam_dali.packing.process_pool import Died, run_all
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.packing.reuse import PackedBefore, damaged_shards, old_set
from simsiam_dali.packing.write import write_file, write_manifest, write_shard, write_table

Executor = Callable[[Callable[[Job], Result], Iterable[Job], int], Generator[tuple[Job, Result | Died], None, None]]
"""Where jobs run: `process_pool.run_all` or `ray_pool.run_all`."""

FILES_SHOWN = 20

_NEW = "new"  # the folder of the new set, in STAGING
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


@dataclass
class Report:
    """The result of a run: `counts` of the set, `(file, reason)` lists, and how fast it decoded (in seconds)."""

    counts: dict[str, int] = field(default_factory=dict)
    refused: list[tuple[str, str]] = field(default_factory=list)
    notes: list[tuple[str, str]] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    decoded_songs: int = 0
    decoded_seconds: float = 0.0
    decoding_took: float = 0.0
    unchanged: bool = False

    def file_lines(self, out: Path | None = None) -> Iterator[str]:
        """Lines for the terminal: the refused files, and the packed ones with something wrong.

        out: the set whose tables hold them all, so that only the first `FILES_SHOWN` of each kind need a line.
        """
        tables = f"{REFUSED} lists all", f"the column note of {SONGS} has all"
        for title, files, table in zip(("refused", "warning"), (self.refused, self.notes), tables, strict=True):
            shown = FILES_SHOWN if out else len(files)
            for name, reason in files[:shown]:
                yield f"{title:8} {name if name.isprintable() else ascii(name)}: {reason}"
            if len(files) > shown:
                yield f"{title:8} {len(files) - shown} more; in {out}, {table}"


class NothingPacked(UserError):
    """None of the files can be packed. `rows`: each file's result, as in the table of files."""

    def __init__(self, text: str, rows: list[assemble.Row]) -> None:
        super().__init__(text)
        self.rows = rows


def pack(
    music: Path,
    out: Path,
    settings: PackSettings,
    workers: int,
    ratings: RatingsFile | None = None,
    replace: bool = False,
    files: Iterable[SongFile] | None = None,
    executor: Executor = run_all,
) -> Report:
    """Pack the folder `music` into the set at `out`; at any moment `out` holds the old set or the new one.

    ratings: override those in the tags. files: the files to pack, with names relative to `music`; None = every song
    below it. executor: where they are decoded. Files that the last run packed with the same decode settings are not
    decoded again. `replace` allows overwriting shards of another folder. Raises `UserError` for what the user can
    correct, a full disk included; `NothingPacked` where no file can be packed.
    """
    if not music.is_dir():
        raise UserError(
            f"{music}: is a file, name its folder" if music.is_file() else f"{music}: no such folder of music"
        )
    if music.resolve() == out.resolve():
        raise UserError(f"--out {out} is the folder of music itself: name another")
    passed_over = 0
    if files is None:
        files, passed_over = find_songs(music.absolute(), exclude=out)
    queue = deque(files)
    del files  # so that each is freed when it is decoded
    if not queue:
        raise UserError(f"{music}: no audio file in this folder ({passed_over} other files ignored)")
    try:
        out.mkdir(parents=True, exist_ok=True)
        with lock_set(out, wait=False):
            roll_forward(out)
            packer = _Packer(music.resolve(), out, settings, ratings, replace, executor)
            try:
                return packer.run(queue, passed_over, workers)
            finally:  # what is left of a set that was not committed; the decoded songs stay, for the next run
                shutil.rmtree(out / STAGING / _NEW, ignore_errors=True)
    except OSError as e:
        if e.errno in _DISK_FULL:
            raise UserError(
                f"no space left for {out}: its shards are as they were; free some, and the same command continues with"
                f" the songs decoded so far, kept in {out / STAGING} (or remove that folder)"
            ) from e
        if e.errno in _NO_ACCESS:
            raise UserError(f"cannot write shards to {out}: {e.strerror} ({e.filename})") from e
        raise


@dataclass
class _Packer:
    music: Path
    out: Path
    settings: PackSettings
    ratings: RatingsFile | None
    replace: bool
    executor: Executor

    def __post_init__(self) -> None:
        self.report = Report()
        self.old = self._old_set()
        self.damaged = damaged_shards(self.old) if self.old else set()

    def run(self, files: deque[SongFile], passed_over: int, workers: int) -> Report:
        results = self._decode(files, workers)
        songs = Songs(results)
        self._report_files(results, passed_over)
        if not len(songs):
            reasons = "; ".join(f"{name} {reason}" for name, reason in self.report.refused[:3])
            why = reasons or "no audio by their names"
            text = f"{self.music}: none of its {len(results) or passed_over} files can be packed ({why})"
            raise NothingPacked(text, list(assemble.file_rows(songs, results)))
        self._split(songs)
        if self.ratings:
            self._rate(songs, self.ratings)
        elif lost := self._lost_ratings(songs):
            remark = f"{lost} songs were rated before and are not now: give --ratings again if there was one"
            self.report.remarks.append(remark)
        self._write(songs, results)
        return self.report

    def _old_set(self) -> ShardSet | None:
        """The set in `out`, if it can be reused; its tables are intact, its shards need not be."""
        if not (self.out / MANIFEST).exists():
            return None
        try:
            manifest = read_manifest(self.out)
        except UserError:
            if self.replace:
                return None
            raise
        if manifest.music != str(self.music) and not self.replace:
            raise UserError(f"{self.out} holds the shards of {manifest.music}: name another --out, or give --replace")
        for name in (SONGS, SEGMENTS, FILES):
            if problem := manifest.files[name].problem(self.out / name, always_hash=True):
                self.report.remarks.append(f"{self.out / name} {problem}: everything was decoded again")
                return None
        return old_set(self.out, manifest)

    def _decode(self, files: deque[SongFile], workers: int) -> Results:
        """Decode new songs, read all tags; in the order of `files`, which is empty afterwards."""
        if self.damaged:
            self.report.remarks.append(f"{len(self.damaged)} damaged shards: their songs were decoded again")
        decode = self.settings.decode
        known = PackedBefore(self.old, decode, self.damaged) if self.old else None
        cache = self.out / STAGING / "songs"
        cache.mkdir(parents=True, exist_ok=True)

        def jobs() -> Iterator[Job]:
            for index in range(len(results)):
                file = files.popleft()
                yield Job(index, file, decode, cache, known.of(file) if known else None)

        results: Results = Spool(len(files), self.out / STAGING)
        report, began = self.report, time.monotonic()
        with (
            tqdm(total=len(results), unit="song", smoothing=0.1) as bar,
            contextlib.closing(self.executor(do_job, jobs(), workers)) as done,
        ):
            for job, result in done:
                if isinstance(result, Died):
                    reason = f"ended the process that decoded it (exit code {result.exit_code})"
                    result = Result(Refused(reason, retry=True))
                results[job.index] = (job.file, result)
                report.decoded_songs += result.decoded_seconds > 0
                report.decoded_seconds += result.decoded_seconds
                report.decoding_took = time.monotonic() - began
                speed = report.decoded_seconds / report.decoding_took
                bar.set_postfix_str(f"{speed:.0f}x realtime", refresh=False)
                bar.update()
        return results

    def _report_files(self, results: Results, passed_over: int) -> None:
        for file, result in results:
            if isinstance(result.outcome, Packed):
                if note := "; ".join(filter(None, [result.outcome.note, result.tags.note])):
                    self.report.notes.append((file.name, note))
            elif result.outcome.audio:
                self.report.refused.append((file.name, result.outcome.reason))
            else:
                passed_over += 1
        self.report.counts = {"refused": len(self.report.refused), "passed_over": passed_over}

    def _split(self, songs: Songs) -> None:
        settings = self.settings
        kept: dict[str, str] = {}
        if self.old is not None:
            drawn_by = ("val_fraction", "split_by", "seed")
            if all(self.old.manifest.settings[name] == getattr(settings, name) for name in drawn_by):
                kept = dict(zip(self.old.songs["audio_hash"], self.old.songs["split"], strict=True))
            else:
                self.report.remarks.append("--val-fraction, --split-by or --seed changed: the split was drawn again")
        songs.splits = assign_splits(
            [group_key(settings.split_by, s.tags, s.file.name, s.packed.audio_hash) for s in songs],
            [kept.get(s.packed.audio_hash) for s in songs] if kept else [None] * len(songs),
            settings.val_fraction,
            settings.seed,
        )

    def _rate(self, songs: Songs, ratings: RatingsFile) -> None:
        for number, song in enumerate(songs):
            paths = (file.path for file in (song.file, *song.others))
            found = (ratings.lookup(path, song.tags.title, song.tags.artists) for path in paths)
            rating = next((r for r in found if r is not None), None)
            if rating is not None:
                songs.ratings[number] = rating
        self.report.remarks.append(
            f"{len(songs.ratings)} of {len(songs)} songs matched in {ratings.source} ({len(ratings)} ratings)"
        )

    def _lost_ratings(self, songs: Songs) -> int:
        """Number of songs that were rated in the old set and, without a ratings file, are not now."""
        if not self.old:
            return 0
        rated = set(self.old.songs["audio_hash"][self.old.songs["rating"].notna()])
        return sum(math.isnan(song.tags.rating) and song.packed.audio_hash in rated for song in songs)

    def _write(self, songs: Songs, results: Results) -> None:
        """Stage the whole set, then replace the old one by it; an identical set is not written."""
        staged = self.out / STAGING / _NEW
        shutil.rmtree(staged, ignore_errors=True)
        staged.mkdir()
        shards = assemble.shuffled_shards(songs, self.settings.seed, self.settings.segments_per_shard)
        self.report.counts |= assemble.counts(songs)
        refused = io.StringIO()
        csv.writer(refused, lineterminator="\n").writerows([("path", "reason"), *self.report.refused])
        files = {
            SONGS: write_table(staged / SONGS, map(assemble.song_row, songs)),
            SEGMENTS: write_table(staged / SEGMENTS, assemble.segment_rows(songs, shards)),
            FILES: write_table(staged / FILES, assemble.file_rows(songs, results)),
            REFUSED: write_file(staged / REFUSED, refused.getvalue().encode()),
        }
        old = self.old.manifest if self.old and not self.damaged else None
        made_from = str(self.music), asdict(self.settings)
        self.report.unchanged = (
            old is not None
            and (old.music, old.settings) == made_from
            and not any(old.files[name].problem(folder / name) for name in files for folder in (staged, self.out))
        )
        if self.report.unchanged:
            shutil.rmtree(self.out / STAGING, ignore_errors=True)
            return
        self._check_names({MANIFEST, *files, *shards, *(Path(shard).stem + ".idx" for shard in shards)})
        row = 0
        with tqdm(total=sum(map(len, shards.values())), unit="segment", desc="writing") as bar:
            for shard, pairs in shards.items():
                files |= write_shard(staged / shard, assemble.samples(songs, pairs, row, self.settings.codec))
                row += len(pairs)
                bar.update(len(pairs))
        manifest = Manifest(FORMAT_VERSION, *made_from, self.report.counts, files)
        write_manifest(staged, manifest)
        # The set is complete, and moving it is quick: signals wait.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            commit(self.out, staged)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _check_names(self, names: set[str]) -> None:
        """Raise UserError if a file that is not of the set has one of its names, unless `replace`."""
        ours = {*named_files(self.out), *([MANIFEST] if self.old else [])}
        foreign = sorted(name for name in names - ours if (self.out / name).exists())
        if foreign and not self.replace:
            raise UserError(f"{self.out / foreign[0]} was not written by pack: move it, or give --replace")
