"""A subset of a shard set, read from the same tars: for work that needs only some segments of a large library."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simsiam_dali.data.format import index_text, read_index, row_of
from simsiam_dali.data.shards import ShardSet


@dataclass(frozen=True)
class Subset(ShardSet):
    """The segments of a set that `subset_indexes` (shard -> index) list. The tables stay whole, and so do the rows."""

    subset_indexes: dict[str, Path] | None = None
    counts: dict[str, int] | None = None  # split -> segments

    def names(self, split: str) -> list[str]:
        """The shards that hold one of the segments."""
        return [name for name in super().names(split) if name in (self.subset_indexes or {})]

    def indexes(self, split: str) -> list[Path]:
        """An index of these segments alone, for each of `tars(split)`."""
        return [(self.subset_indexes or {})[name] for name in self.names(split)]

    def count(self, split: str) -> int:
        """Number of these segments in the split."""
        return (self.counts or {}).get(split, 0)


def subset_of(shards: ShardSet, rows: np.ndarray, folder: Path) -> Subset:
    """The segments `rows (n,)` of a set; their indexes are written to `folder`, and needed while they are read."""
    chosen = shards.segments.iloc[rows]
    indexes: dict[str, Path] = {}
    for shard, own in chosen.groupby("shard").groups.items():
        wanted = set(own.tolist())
        samples = read_index((shards.root / str(shard)).with_suffix(".idx"))
        indexes[str(shard)] = folder / f"{len(indexes)}.idx"
        indexes[str(shard)].write_text(index_text(members for members in samples if row_of(members) in wanted))
    counts = {str(split): len(own) for split, own in chosen.groupby("split")}
    return Subset(shards.root, shards.manifest, shards.songs, shards.segments, shards.address, indexes, counts)
