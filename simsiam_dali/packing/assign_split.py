"""Assign songs to training or validation: by group, from a stable hash, so that a growing library moves none."""

import hashlib
from collections.abc import Sequence
from pathlib import PurePosixPath

from simsiam_dali.common.names import name_key
from simsiam_dali.packing.tags import Tags


def group_key(split_by: str, tags: Tags, name: str, audio_hash: str) -> str:
    """The group that stays in one split: the song's album, else its artist, else its folder, else the song itself.

    Names are compared by `name_key`: the files of an album may write its "é" as one character or as two.
    """
    if split_by == "song":
        return f"song:{audio_hash}"
    if split_by == "album" and tags.albums:
        return f"album:{name_key(tags.album_artist)}:{name_key(tags.albums[0])}"
    if tags.artists:
        return f"artist:{name_key(tags.artists[0])}"
    return f"folder:{PurePosixPath(name).parent}" if "/" in name else f"path:{name}"


def assign_splits(groups: Sequence[str], kept: Sequence[str | None], val_fraction: float, seed: int) -> list[str]:
    """The split of each song, `train` or `val`.

    `groups`: each song's group key; `kept`: the split it already has. A group goes to the split of its other songs,
    if there are any, else to validation if its hash, uniform in 0..1, is below `val_fraction`. If one split would be
    empty, the new group nearest to it moves there; a single group trains.
    """
    side: dict[str, str] = {}
    for group, split in zip(groups, kept, strict=True):
        if split is not None:
            side.setdefault(group, split)
    new = sorted(set(groups) - set(side), key=lambda group: _uniform(seed, group))
    side |= {group: "val" if _uniform(seed, group) < val_fraction else "train" for group in new}
    splits = {kept_split or side[group] for group, kept_split in zip(groups, kept, strict=True)}
    if new and splits == {"val"}:
        side[new[-1]] = "train"
    elif new and splits == {"train"} and val_fraction > 0 and len(set(groups)) > 1:
        side[new[0]] = "val"
    return [kept_split or side[group] for group, kept_split in zip(groups, kept, strict=True)]


def _uniform(seed: int, group: str) -> float:
    digest = hashlib.sha256(f"{seed}:{group}".encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2**64
