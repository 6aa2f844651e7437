"""Small song tables for the tests of the evaluation."""

import numpy as np
import pandas as pd


def song_table(n: int, seed: int = 0, artists: int = 6, albums: int = 3) -> pd.DataFrame:
    """`n` songs dealt to the artists in turn, each artist's to its albums; three genres, one song in five unrated."""
    rng = np.random.default_rng(seed)
    artist = np.arange(n) % artists
    album = np.arange(n) // artists % albums
    rating = rng.integers(0, 11, n) / 10
    rating[::5] = np.nan
    return pd.DataFrame(
        {
            "song": np.arange(n),
            "path": [f"artist {a}/album {b}/{i}.flac" for i, (a, b) in enumerate(zip(artist, album, strict=True))],
            "title": [f"Title {i}" for i in range(n)],
            "artists": [[f"Artist {a}"] for a in artist],
            "albums": [[f"Album {b}"] for b in album],
            "album_artist": [f"Artist {a}" for a in artist],
            "year": pd.array([2000] * n, "Int64"),
            "genres": [[f"Genre {a % 3}"] for a in artist],
            "rating": rating,
            "duration": 200.0 + 7 * np.arange(n),
            "split": np.where(np.arange(n) % 3 == 0, "val", "train"),
        }
    )


def planted(classes: np.ndarray, width: int = 16, noise: float = 0.1, seed: int = 0) -> np.ndarray:
    """Vectors `(N, width)` float32 in one tight cluster a class."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((classes.max() + 1, width))
    return (centres[classes] + noise * rng.standard_normal((len(classes), width))).astype(np.float32)
