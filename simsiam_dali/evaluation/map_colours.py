"""What a map of songs is coloured by: the names that have a colour, and by which tag the most songs have one."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pandas as pd

PALETTE = ("#4477aa", "#ee6677", "#228833", "#ee9922", "#66ccee", "#aa3377", "#009988", "#bbaa22", "#663399", "#a0522d")
OTHER = "#c4c7cc"
COLOURED = len(PALETTE)


def categories(labels: Iterable[Sequence[str]]) -> tuple[list[str], np.ndarray]:
    """The names of the `COLOURED` commonest first labels, and each song's index among them `(N,)`, -1 for others."""
    first = [own[0] if own else None for own in labels]
    names = [name for name, _ in Counter(name for name in first if name is not None).most_common(COLOURED)]
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([-1 if name is None else number.get(name, -1) for name in first], int)


def kinds(table: pd.DataFrame) -> dict[str, list[Sequence[str]]]:
    """What songs are coloured by, beside the rating: each song's labels, none where it has none."""
    folders = [path.partition("/")[0] if "/" in path else None for path in table["path"].tolist()]
    years = table["year"].to_numpy(float, na_value=math.nan).tolist()
    decades = [None if math.isnan(year) else f"{year // 10 * 10:.0f}s" for year in years]
    return {
        "genre": list(table["genres"]),
        "artist": list(table["artists"]),
        "folder": [[name] if name else [] for name in folders],
        "decade": [[name] if name else [] for name in decades],
    }


def commonest_kind(table: pd.DataFrame) -> str:
    """By what the most songs have a colour; of equals the rating, then the first kind."""
    coloured = {name: categories(labels) for name, labels in kinds(table).items()}
    return most_coloured(int(table["rating"].notna().sum()), coloured)


def most_coloured(rated: int, coloured: Mapping[str, tuple[Sequence[str], np.ndarray]]) -> str:
    """`commonest_kind`, from the number of rated songs and the result of `categories` for each kind."""
    songs = {"rating": rated}
    for name, (names, index) in coloured.items():
        songs[name] = int((index >= 0).sum()) if len(names) > 1 else 0  # one colour tells nothing
    return max(songs, key=lambda name: songs[name])
