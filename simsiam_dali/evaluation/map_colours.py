"""What a map of songs is coloured by: the names that have a colour, and by which tag the most songs have one."""

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import pandas as pd

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ee9922", "#66ccee", "#aa3377", "#009988", "#bbaa22", "#663399", "#a0522d")
OTHER = "#c4c7cc"
COLOURED = len(PALETTE)


def categories(labels: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The names of the `COLOURED` commonest first labels, and each song's index among them `(N,)`, -1 for others."""
    first = [own[0] if own else None for own in labels]
    names = [name for name, _ in Counter(name for name in first if name is not None).most_common(COLOURED)]
    return names, np.array([names.index(name) if name in names else -1 for name in first], int)


def kinds(table: pd.DataFrame) -> dict[str, list[Sequence[str]]]:
    """What songs are coloured by, beside the rating: each song's labels, none where it has none."""
    folders = [path.partition("/")[0] if "/" in path else None for path in table["path"]]
    decades = [None if pd.isna(year) else f"{year // 10 * 10}s" for year in table["year"]]
    return {
        "genre": list(table["genres"]),
        "artist": list(table["artists"]),
        "folder": [[name] if name else [] for name in folders],
        "decade": [[name] if name else [] for name in decades],
    }


def commonest_kind(table: pd.DataFrame) -> str:
    """By what the most songs have a colour; of equals the rating, then the first kind."""
    coloured = {"rating": int(table["rating"].notna().sum())}
    for name, labels in kinds(table).items():
        names, index = categories(labels)
        coloured[name] = int((index >= 0).sum()) if len(names) > 1 else 0  # one colour tells nothing
    return max(coloured, key=lambda name: coloured[name])
