"""What the shards in place already know of a song, so that packing again decodes only what is new."""

from collections import defaultdict
from dataclasses import asdict
from typing import Any

from simsiam_dali.data.shards import FILES, SPLITS, ShardSet, changed, read_index, read_table
from simsiam_dali.packing.pack_song import Cut, DecodeSettings, Packed, Refused

FileKey = tuple[str, int, int]  # name, bytes, mtime_ns


def damaged_shards(old: ShardSet) -> set[str]:
    """Names of the tars whose content, or whose index, is not what was packed."""
    return {
        tar
        for split in SPLITS
        for tar in old.names(split)
        for path in (old.root / tar, (old.root / tar).with_suffix(".idx"))
        # Read in full, or copying would bless a rotten shard with a new checksum.
        if changed(path, old.manifest.files[path.name], always_sum=True)
    }


def known_outcomes(old: ShardSet, settings: DecodeSettings, damaged: set[str]) -> dict[FileKey, Packed | Refused]:
    """What became of each file that need not be decoded again."""
    if any(old.manifest.settings[name] != value for name, value in asdict(settings).items()):
        return {}
    cuts = _cuts(old, damaged)
    rates = dict(zip(old.segments["song"], old.segments["sample_rate"], strict=True))
    known: dict[FileKey, Packed | Refused] = {}
    for file in _rows(read_table(old.root / FILES)):
        key = (file["path"], file["bytes"], file["mtime_ns"])
        if file["status"] == "refused":
            if not file["retry"]:
                known[key] = Refused(file["reason"])
        elif file["song"] in cuts:
            song = old.songs.loc[file["song"]]
            known[key] = Packed(
                sample_rate=int(rates[file["song"]]),
                source_rate=int(song["sample_rate"]),
                channels=int(song["channels"]),
                duration=float(song["duration"]),
                audio_hash=song["audio_hash"],
                note=file["reason"],
                cuts=cuts[file["song"]],
            )
    return known


def _cuts(old: ShardSet, damaged: set[str]) -> dict[int, tuple[Cut, ...]]:
    """Where each song's segments lie, for songs with every segment in a sound shard."""
    found: dict[int, list[Cut]] = defaultdict(list)
    lost = set()
    for shard, rows in old.segments.groupby("shard"):
        if shard in damaged or shard not in old.manifest.files:
            lost |= set(rows["song"])
            continue
        tar = old.root / str(shard)
        for row, members in zip(_rows(rows), read_index(tar.with_suffix(".idx")), strict=True):
            offset, size, _ = members[old.codec]
            found[row["song"]].append(Cut(row["start"], row["seconds"], tar, offset, size))
    return {song: tuple(sorted(cuts, key=lambda cut: cut.start)) for song, cuts in found.items() if song not in lost}


def _rows(table: Any) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = table.to_dict("records")
    return rows
