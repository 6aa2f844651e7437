"""A part of a shard set, read from the same tars: for work that need not meet every segment of a large library."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simsiam_dali.data.format import index_text, read_index
from simsiam_dali.data.shards import ShardSet


@dataclass(frozen=True)
class Part(ShardSet):
    """Of a set, the segments that `kept` (shard to its index) lists. Its tables stay whole, so rows mean the same."""

    kept: dict[str, Path] | None = None
    counts: dict[str, int] | None = None  # split to segments

    def names(self, split: str) -> list[str]:
        """The shards that hold one of the segments."""
        return [name for name in super().names(split) if name in (self.kept or {})]

    def indexes(self, split: str) -> list[Path]:
        """An index of these segments alone, for each of `tars(split)`."""
        return [(self.kept or {})[name] for name in self.names(split)]

    def count(self, split: str) -> int:
        """Number of these segments in the split."""
        return (self.counts or {}).get(split, 0)


def part_of(shards: ShardSet, rows: np.ndarray, folder: Path) -> Part:
    """The segments `rows (n,)` of a set; their indexes are written to `folder`, and needed while they are read."""
    chosen = shards.segments.iloc[rows]
    kept: dict[str, Path] = {}
    for shard, own in chosen.groupby("shard").groups.items():
        wanted = set(own.tolist())
        samples = read_index((shards.root / str(shard)).with_suffix(".idx"))
        kept[str(shard)] = folder / f"{len(kept)}.idx"
        kept[str(shard)].write_text(index_text(s for s in samples if int(s["row"][2].partition(".")[0]) in wanted))
    counts = {str(split): len(own) for split, own in chosen.groupby("split")}
    return Part(shards.root, shards.manifest, shards.songs, shards.segments, shards.address, kept, counts)
