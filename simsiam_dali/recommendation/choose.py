"""Choose songs: those nearest to others, those with the highest predicted rating, or those to rate next."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from simsiam_dali.common.errors import UserError
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.recommendation.library import Library, Variety
from simsiam_dali.recommendation.rating_model import MIN_RATED, RatingModel
from simsiam_dali.recommendation.search import SongIndex

_SEARCHED = 4
"""Neighbours searched for, as a multiple of the songs requested: some are skipped for variety."""


@dataclass(frozen=True)
class Request:
    """The options of the command: songs like those named in `like`, else the `top` ones, else those to explore."""

    like: Sequence[str] | None = None
    top: bool = False
    count: int = 25
    max_per_artist: int | None = None
    max_per_album: int | None = None
    exclude_same_artist: bool = False
    exclude_same_album: bool = False
    min_seconds: float | None = None

    def variety(self, library: Library) -> Variety:
        """A new filter by `max_per_artist` and `max_per_album`."""
        return Variety(library, self.max_per_artist, self.max_per_album)


@dataclass(frozen=True)
class Choice:
    """Songs chosen, best first: `rows` of the table; `scores`, one per row, named as in `playlists.CSV_COLUMNS`."""

    rows: list[int]
    scores: dict[str, np.ndarray]
    title: str
    remarks: list[str] = field(default_factory=list)

    def score_text(self, i: int) -> str:
        """The scores of the i-th song as text."""
        if "similarity" in self.scores:
            return f"{self.scores['similarity'][i]:.3f}"
        return f"{self.scores['predicted_rating'][i]:.2f} ± {self.scores['std'][i]:.2f}"


def choose(library: Library, vectors: np.ndarray, request: Request) -> Choice:
    """The songs that are requested, from their vectors `(N, D)`. Raises UserError when none is left."""
    candidate = np.ones(len(library), bool)
    if request.min_seconds is not None:
        candidate &= ~(library.table["duration"].to_numpy(float) < request.min_seconds)
    seeds = np.empty(0, int)
    if request.like:
        seeds = np.unique(np.concatenate([library.find(text) for text in request.like]))
        candidate &= ~np.isin(library.recording, library.recording[seeds])
        excluded = (request.exclude_same_artist, library.artists), (request.exclude_same_album, library.albums)
        for exclude, keys in excluded:
            of_seeds = {key for row in seeds for key in keys[row]} if exclude else set()
            candidate &= np.array([of_seeds.isdisjoint(own) for own in keys])
    else:
        if request.exclude_same_artist or request.exclude_same_album:
            raise UserError("--exclude-same-artist and --exclude-same-album go with --like")
        candidate &= unrated(library)
    rows = np.flatnonzero(candidate)
    if not len(rows):
        raise UserError(f"none of the {len(library)} songs is left to recommend: all are rated, given or excluded")
    x = unit(vectors)
    if request.like:
        return like(library, x, seeds, rows, request)
    return (top if request.top else explore)(library, x, rows, request)


def like(library: Library, x: np.ndarray, seeds: np.ndarray, candidates: np.ndarray, request: Request) -> Choice:
    """The songs nearest to any of the `seeds` (rows), among the rows `candidates`; `x`: all songs' unit vectors."""
    index = SongIndex(x[candidates], len(seeds))
    k, rows, cosines = request.count, list[int](), list[float]()
    while len(rows) < request.count:
        k, accept, rows, cosines = _SEARCHED * k, request.variety(library), [], []
        for row, cosine in zip(*index.nearest(x[seeds], k), strict=True):
            if len(rows) < request.count and accept(int(candidates[row])):
                rows.append(int(candidates[row]))
                cosines.append(float(cosine))
        if k >= len(candidates):
            break
    named = ", ".join(library.name(int(row)) for row in seeds[:3])
    title = f"like {named}" + (f" and {len(seeds) - 3} more" if len(seeds) > 3 else "")
    remarks = ["the search is approximate: with so many songs to compare, a few that are near may be missing"]
    return Choice(rows, {"similarity": np.array(cosines)}, title, remarks if index.approximate else [])


def fit_ratings(library: Library, x: np.ndarray) -> tuple[RatingModel, int]:
    """A model of the rated songs, and how many they are. Raises UserError where they are too few or all equal."""
    rating = library.table["rating"].to_numpy(float)
    rated = np.flatnonzero(np.isfinite(rating))
    if len(rated) < MIN_RATED:
        raise UserError(
            f"{len(rated)} of {len(library)} songs have a rating, but {MIN_RATED} are needed to learn from: rate more, "
            "pack again with python -m simsiam_dali.pack (--ratings FILE for a player's library or a CSV), and embed "
            "again"
        )
    if np.ptp(rating[rated]) == 0:
        raise UserError(f"all {len(rated)} rated songs have the same rating, so there is nothing to learn: rate others")
    return RatingModel(x[rated], rating[rated]), len(rated)


def unrated(library: Library) -> np.ndarray:
    """Songs `(N,)` bool without a rating, of which no other file has one either."""
    rated = np.isfinite(library.table["rating"].to_numpy(float))
    return ~np.isin(library.recording, library.recording[rated])


def top(library: Library, x: np.ndarray, candidates: np.ndarray, request: Request) -> Choice:
    """The songs with the highest predicted rating among the rows `candidates`."""
    model, n = fit_ratings(library, x)
    expected, std = model.predict(x[candidates])
    accept, chosen = request.variety(library), list[int]()
    for i in np.argsort(-expected, kind="stable"):
        if len(chosen) < request.count and accept(int(candidates[i])):
            chosen.append(int(i))
    return _rated_choice(candidates, expected, std, chosen, f"highest predicted ratings, learned from {n} songs")


def explore(library: Library, x: np.ndarray, candidates: np.ndarray, request: Request) -> Choice:
    """The songs among the rows `candidates` whose ratings would be most informative."""
    model, n = fit_ratings(library, x)
    accept = request.variety(library)
    chosen = model.explore(x[candidates], request.count, lambda i: accept(int(candidates[i])))
    expected, std = model.predict(x[candidates])
    return _rated_choice(candidates, expected, std, chosen, f"most uncertain ratings, learned from {n} songs")


def _rated_choice(
    candidates: np.ndarray, expected: np.ndarray, std: np.ndarray, chosen: list[int], title: str
) -> Choice:
    scores = {"predicted_rating": expected[chosen].clip(0, 1), "std": std[chosen]}
    return Choice([int(row) for row in candidates[chosen]], scores, title)
