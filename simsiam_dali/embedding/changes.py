"""What has changed in a music folder since its songs were embedded, by names, sizes and modification times."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.records import FileRecord
from simsiam_dali.packing.find import SongFile

SETTLE_SECONDS = 5.0
"""A file that was modified less than this before now may still be being written."""


@dataclass
class Changes:
    """`known`: records that still hold, and those of files that are left alone; all other lists are of files.

    `decode`: new or changed, or refused before for a reason that may have passed. `waiting`: modified just now.
    `unreadable`: files or folders that cannot be read now, so that nothing is known of what they hold. `gone`: records
    of files that are not there.
    """

    known: dict[str, FileRecord] = field(default_factory=dict)
    decode: list[SongFile] = field(default_factory=list)
    waiting: list[SongFile] = field(default_factory=list)
    unreadable: list[SongFile] = field(default_factory=list)
    gone: list[FileRecord] = field(default_factory=list)

    @property
    def moved(self) -> list[FileRecord]:
        """Those of `gone` whose size and time a new file has: moved or renamed, as far as that tells."""
        come, moved = Counter((file.bytes, file.mtime_ns) for file in (*self.decode, *self.waiting)), []
        for record in self.gone:
            if come[key := (record.bytes, record.mtime_ns)]:
                come[key] -= 1
                moved.append(record)
        return moved


def compare(found: Iterable[SongFile], records: dict[str, FileRecord], now: float) -> Changes:
    """What has changed between `records` and the files `found`, all those of the music folder. now: Unix time, s."""
    changes, seen = Changes(), set[str]()
    for file in found:
        seen.add(file.name)
        record = records.get(file.name)
        if file.problem:
            changes.unreadable.append(file)
        elif record and record.holds_for(file):
            changes.known[file.name] = record
        elif abs(now - file.mtime_ns / 1e9) < SETTLE_SECONDS:  # abs: a file server's clock may be ahead
            changes.waiting.append(file)
            if record:
                changes.known[file.name] = record
        else:
            changes.decode.append(file)
    closed = {file.name for file in changes.unreadable}
    for name, record in records.items():
        if closed and (name in closed or not closed.isdisjoint(map(str, Path(name).parents))):
            changes.known[name] = record
        elif name not in seen:
            changes.gone.append(record)
    return changes


def refuse_loss(changes: Changes, records: dict[str, FileRecord], music: Path) -> None:
    """Raise UserError when more than half of the songs are gone, as when a disk is not mounted."""
    songs = {record.audio_hash for record in records.values() if record.audio_hash}
    there = {*changes.known, *(file.name for file in changes.decode), *(record.path for record in changes.moved)}
    left = {record.audio_hash for record in records.values() if record.audio_hash and record.path in there}
    if not songs or len(songs - left) * 2 <= len(songs):
        return
    gone = "none" if not left else f"only {len(left)}"
    raise UserError(
        f"{music} holds {gone} of the {len(songs)} songs of the table: is a disk not mounted? Nothing was changed;"
        " give --replace to drop what is gone"
    )
