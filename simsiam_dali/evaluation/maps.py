"""Maps of a library: t-SNE and UMAP of the vectors, as pictures and as one interactive page without a server."""

import io
import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from simsiam_dali.evaluation.knn import nearest_others
from simsiam_dali.evaluation.map_colours import OTHER, PALETTE, categories, commonest_kind, kinds

matplotlib.use("Agg")

MIN_SONGS = 10
"""Fewer songs are shown by their first two principal components instead of t-SNE and UMAP."""
NEAREST = 10
_PCA_DIMS = 50


def project(unit_vectors: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Unit vectors `(N, D)` in two dimensions, `(N, 2)` each: UMAP and t-SNE, or PCA of a few songs."""
    x = _reduced(unit_vectors, seed)
    if len(x) < MIN_SONGS:
        flat = PCA(min(2, *x.shape)).fit_transform(x) if len(x) > 1 else np.zeros((1, 1))
        return {"PCA": np.pad(flat, ((0, 0), (0, 2 - flat.shape[1])))}
    tsne = TSNE(perplexity=min(30, (len(x) - 1) / 3), init="pca", random_state=seed)
    return {"UMAP": _umap(x, seed), "t-SNE": tsne.fit_transform(x)}


def project_umap(unit_vectors: np.ndarray, seed: int) -> np.ndarray:
    """The UMAP `(N, 2)` of `project` alone, of `MIN_SONGS` unit vectors `(N, D)` or more."""
    return _umap(_reduced(unit_vectors, seed), seed)


def _reduced(unit_vectors: np.ndarray, seed: int) -> np.ndarray:
    """In float64; of many songs and dimensions their first principal components."""
    x = unit_vectors.astype(np.float64)
    is_large = len(x) >= MIN_SONGS and min(x.shape) > _PCA_DIMS
    return PCA(_PCA_DIMS, random_state=seed).fit_transform(x) if is_large else x


def _umap(x: np.ndarray, seed: int) -> np.ndarray:
    import umap  # compiles for seconds

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of a small library's disconnected graph
        model = umap.UMAP(n_neighbors=min(15, len(x) - 1), random_state=seed, n_jobs=1)
        return np.asarray(model.fit_transform(x))


def picture(points: np.ndarray, table: pd.DataFrame, title: str) -> bytes:
    """A PNG of `points (N, 2)` three times: coloured by rating, genre and artist."""
    figure = Figure(figsize=(15, 5.4), layout="constrained")
    figure.suptitle(title)
    rating, genre, artist = figure.subplots(1, 3)
    size = float(np.clip(4000 / len(points), 3, 40))
    for axes, name in ((rating, "rating"), (genre, "genre"), (artist, "artist")):
        axes.set(xticks=[], yticks=[], title=name)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[:].set_color("#dddddd")
    rated = table["rating"].notna().to_numpy()
    rating.scatter(points[~rated, 0], points[~rated, 1], s=size, color=OTHER, linewidths=0)
    (x, y), values = points[rated].T, table["rating"][rated]
    shown = rating.scatter(x, y, s=size, c=values, cmap="viridis", vmin=0, vmax=1, linewidths=0)
    scale = rating.inset_axes((0.2, -0.08, 0.6, 0.03))
    figure.colorbar(shown, cax=scale, orientation="horizontal", label="rating (grey: unrated)")
    _by_category(genre, points, table["genres"], size)
    _by_category(artist, points, table["artists"], size)
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from", UserWarning)  # a script that no font here has
        figure.savefig(buffer, format="png", dpi=110)
    return buffer.getvalue()


def _by_category(axes: Axes, points: np.ndarray, labels: Iterable[Sequence[str]], size: float) -> None:
    names, index = categories(labels)
    for i, name in reversed([*enumerate(names), (-1, "others, or unknown")]):  # the commonest in front
        if (index == i).any():
            # The leading space: a label that begins with an underscore would be left out.
            label = f" {name}" if len(name) <= 22 else f" {name[:21]}…"
            x, y = points[index == i].T
            axes.scatter(x, y, s=size, color=(*PALETTE, OTHER)[i], linewidths=0, label=label)
    legend = axes.legend(
        reverse=True, markerscale=6 / size**0.5, loc="upper center", bbox_to_anchor=(0.5, -0.02), ncols=3,
        fontsize=8, frameon=False, columnspacing=1, handletextpad=0,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)  # "A$AP" is no formula


def page_data(table: pd.DataFrame, x: np.ndarray, flat: dict[str, np.ndarray]) -> dict[str, Any]:
    """The data of the interactive page, as plain lists: songs, positions in 0..1, and each song's nearest.

    x: the songs' unit vectors `(N, D)`.
    """
    near, cosine = nearest_others(x, np.arange(len(table)), NEAREST)
    coloured = {name: categories(labels) for name, labels in kinds(table).items()}
    return {
        "title": [title or path for title, path in zip(table["title"], table["path"], strict=True)],
        "artist": [", ".join(names) for names in table["artists"]],
        "genre": [", ".join(names) for names in table["genres"]],
        "rating": [None if rating != rating else round(rating, 3) for rating in table["rating"]],
        "maps": {name: _in_unit_square(points) for name, points in flat.items()},
        "near": [row[row >= 0].tolist() for row in near],
        "cosine": [row[np.isfinite(row)].round(3).tolist() for row in cosine.astype(float)],
        "colour_by": commonest_kind(table),
        "classes": {name: {"names": names, "of": index.tolist()} for name, (names, index) in coloured.items()},
        "palette": PALETTE,
        "other": OTHER,
        "viridis": [matplotlib.colors.to_hex(matplotlib.colormaps["viridis"](step / 20)) for step in range(21)],
    }


def _in_unit_square(points: np.ndarray) -> list[list[float]]:
    points = points.astype(float)  # centred, and scaled by one factor for both axes
    low, high = points.min(axis=0), points.max(axis=0)
    scale = max(float((high - low).max()), 1e-9)
    return ((points - (low + high) / 2) / scale + 0.5).round(4).tolist()
