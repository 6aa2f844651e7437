"""Choose songs: those near others, a path, a radio, those with the highest predicted rating, or those to rate next."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from itertools import islice

import numpy as np

from simsiam_dali.common.errors import UserError, printable
from simsiam_dali.common.names import name_key
from simsiam_dali.evaluation.knn import cosine_blocks
from simsiam_dali.recommendation.library import Library, Variety
from simsiam_dali.recommendation.path import song_path
from simsiam_dali.recommendation.radio import radio
from simsiam_dali.recommendation.rating_model import MIN_RATED, RatingModel


@dataclass(frozen=True)
class Request:
    """The options of the command, of which one says what to choose.

    songs: these, in this order; path: those that lead from the first to the second; radio: an order around one;
    like: those near any of these, and not near those of `unlike`; top: the highest predicted ratings; else those to
    explore. A song is named as `Library.find` reads it. seed: of the radio.

    year: first and last; genre: a name, compared without case; min_rating: 0 to 1. A song whose tag is not known does
    not fit.
    """

    like: Sequence[str] | None = None
    unlike: Sequence[str] | None = None
    path: Sequence[str] | None = None
    radio: str | None = None
    seed: int = 0
    songs: Sequence[str] | None = None
    top: bool = False
    count: int = 25
    max_per_artist: int | None = None
    max_per_album: int | None = None
    exclude_same_artist: bool = False
    exclude_same_album: bool = False
    min_seconds: float | None = None
    year: tuple[int, int] | None = None
    genre: str | None = None
    min_rating: float | None = None


@dataclass(frozen=True)
class Choice:
    """Songs chosen, best first: `rows` of the table; `scores`, one per row, named as in `playlists.CSV_COLUMNS`.

    The scores are `similarity`, or `predicted_rating` and `std`; none of songs that were named one by one.
    """

    rows: list[int]
    scores: dict[str, np.ndarray]
    title: str

    def score_text(self, i: int) -> str:
        """The scores of the i-th song as text."""
        if "similarity" in self.scores:
            return f"{self.scores['similarity'][i]:.3f}"
        if "predicted_rating" not in self.scores:
            return ""
        return f"{self.scores['predicted_rating'][i]:.2f} ± {self.scores['std'][i]:.2f}"


def choose(library: Library, unit_vectors: np.ndarray, request: Request) -> Choice:
    """The songs that are requested, from the library's unit vectors `(N, D)`. Raises UserError when none is left."""
    if request.unlike and not request.like:
        raise UserError("--unlike goes with --like")
    if request.seed and not request.radio:
        raise UserError("--seed goes with --radio")
    if request.songs:
        named = [row for text in request.songs for row in library.find(text, "song")]
        return Choice(named, {}, f"{len(named)} songs")
    if request.path:
        return choose_path(library, unit_vectors, request)
    if request.radio:
        return choose_radio(library, unit_vectors, request)
    seeds, unlike = find_all(library, request.like, "--like"), find_all(library, request.unlike, "--unlike")
    if both := set(seeds) & set(unlike):
        raise UserError(f"{printable(library.name(min(both)))} is given with --like and with --unlike")
    rows = candidates(library, seeds, request, unlike)
    x, accept = unit_vectors[rows], Variety(library, request.max_per_artist, request.max_per_album)
    if request.like:
        similarity = nearest_cosine(unit_vectors[seeds], x)
        title = f"like {listed(library, seeds)}"
        if unlike:
            # Only what is above 0: else songs far from both would go before songs near those that are liked.
            similarity = similarity - nearest_cosine(unit_vectors[unlike], x).clip(min=0)
            title += f", unlike {listed(library, unlike)}"
        scores, ranking = {"similarity": similarity}, np.argsort(-similarity, kind="stable")
    else:
        model, rated = fit_ratings(library, unit_vectors)
        expected, std = model.predict(x)
        title = f"{'highest predicted' if request.top else 'most uncertain'} ratings, learned from {rated} songs"
        scores, ranking = {"predicted_rating": expected.clip(0, 1), "std": std}, np.argsort(-expected, kind="stable")
    if request.like or request.top:
        chosen = list(islice((i for i in ranking if accept(rows[i])), request.count))
    else:
        chosen = model.explore(x, request.count, lambda i: accept(rows[i]))
    return Choice(rows[chosen].tolist(), {name: values[chosen] for name, values in scores.items()}, title)


def named(request: Request) -> list[tuple[str, str]]:
    """Each song or folder that options of the request name, and the option."""
    radio = [request.radio] if request.radio else []
    options = ("--like", request.like), ("--unlike", request.unlike), ("--path", request.path), ("--radio", radio)
    return [(name, option) for option, names in options for name in names or ()]


def find_all(library: Library, names: Sequence[str] | None, option: str) -> list[int]:
    """Rows of all songs that are named, sorted, each once."""
    return sorted({row for text in names or () for row in library.find(text, option)})


def listed(library: Library, rows: Sequence[int]) -> str:
    """The names of the first three songs, and how many more there are."""
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return ", ".join(library.name(row) for row in rows[:3]) + more


def find_one(library: Library, text: str, option: str) -> int:
    """The row of the one song that `text` names. Raises UserError for a folder of several."""
    rows = library.find(text, option)
    if len(rows) > 1:
        raise UserError(f"{option} takes one song, and {printable(text)} is a folder of {len(rows)}")
    return rows[0]


def choose_radio(library: Library, x: np.ndarray, request: Request) -> Choice:
    """Songs around one, which is the first; x: unit vectors `(N, D)`. `similarity` is that to the song before."""
    assert request.radio is not None
    start = find_one(library, request.radio, "--radio")
    allowed = np.zeros(len(library), bool)
    allowed[candidates(library, [start], request)] = True
    accept = Variety(library, request.max_per_artist, request.max_per_album)
    order = radio(x, start, request.seed, allowed, library.recording, library.artists)
    rows = list(islice(filter(accept, order), request.count))
    return Choice(rows, {"similarity": step_cosine(x, rows)}, f"radio from {library.name(start)}")


def step_cosine(x: np.ndarray, rows: Sequence[int]) -> np.ndarray:
    """The cosine of each song with the one before, `(len(rows),)`; 1 for the first."""
    return np.r_[1.0, (x[rows[1:]] * x[rows[:-1]]).sum(axis=1)]


def choose_path(library: Library, x: np.ndarray, request: Request) -> Choice:
    """The songs from one to another, in their order; x: unit vectors `(N, D)`. Raises UserError where it cannot."""
    if request.max_per_artist or request.max_per_album:
        raise UserError("--max-per-artist and --max-per-album do not go with --path, which varies artists itself")
    if request.count < 3:
        raise UserError("--count: a path has at least 3 songs")
    assert request.path is not None
    start, end = (find_one(library, text, "--path") for text in request.path)
    if library.recording[start] == library.recording[end]:
        raise UserError("--path goes from one song to another: both are the same recording")
    allowed = np.zeros(len(library), bool)
    allowed[candidates(library, [start, end], request)] = True
    rows = song_path(x, (start, end), request.count, allowed, library.recording, library.artists)
    return Choice(rows, {"similarity": step_cosine(x, rows)}, f"path from {library.name(start)} to {library.name(end)}")


def candidates(library: Library, seeds: Sequence[int], request: Request, unlike: Sequence[int] = ()) -> np.ndarray:
    """Rows `(C,)` that may be chosen, beside the rows given, `seeds` and `unlike`. Raises UserError for none."""
    candidate = fitting(library, request) & ~np.isin(library.recording, library.recording[list(unlike)])
    if request.like or request.path or request.radio:
        candidate &= ~np.isin(library.recording, library.recording[seeds])
        excluded = (request.exclude_same_artist, library.artists), (request.exclude_same_album, library.albums)
        for exclude, keys in excluded:
            of_seeds = {key for row in seeds for key in keys[row]} if exclude else set()
            candidate &= np.array([of_seeds.isdisjoint(own) for own in keys])
    elif request.exclude_same_artist or request.exclude_same_album:
        raise UserError("--exclude-same-artist and --exclude-same-album go with --like, --path and --radio")
    elif request.min_rating is not None:
        raise UserError(
            "--min-rating goes with --like, --path and --radio: the other modes list songs without a rating"
        )
    else:  # songs without a rating, of which no other file has one either
        rated = np.isfinite(library.table["rating"].to_numpy(float))
        candidate &= ~np.isin(library.recording, library.recording[rated])
    if not candidate.any():
        raise UserError(
            f"none of the {len(library)} songs is left to recommend: all are given, rated or left out by an option"
        )
    return np.flatnonzero(candidate)


def fitting(library: Library, request: Request) -> np.ndarray:
    """Which songs fit the request's length, year, genre and rating, bool `(N,)`."""
    fits = np.ones(len(library), bool)
    if request.min_seconds is not None:
        fits &= ~(library.table["duration"].to_numpy(float) < request.min_seconds)
    if request.year is not None:
        fits &= library.table["year"].between(*request.year).fillna(False).to_numpy(bool)
    if request.genre is not None:
        wanted = name_key(request.genre)
        fits &= np.array([wanted in map(name_key, names) for names in library.table["genres"]])
    if request.min_rating is not None:
        fits &= (library.table["rating"] >= request.min_rating).to_numpy(bool)
    return fits


def nearest_cosine(seeds: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The cosine `(C,)` of each of the unit vectors `x (C, D)` with the nearest of `seeds (S, D)`."""
    return reduce(np.maximum, (cosine.max(axis=0) for _, cosine in cosine_blocks(seeds, x)))


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
