"""The covariance within songs is what it is by hand, and what varies there no longer decides which songs are near."""

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from helpers.evaluation_tables import song_table

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings, write_embeddings
from simsiam_dali.evaluation import within_song
from simsiam_dali.evaluation.knn import l2_normalised, unit
from simsiam_dali.evaluation.within_song import FLOOR, WithinSong

RNG = np.random.default_rng(3)
SONG = np.array([7] * 4 + [2] * 9 + [5] + [3] * 6 + [9] * 5)


def covariance(x: np.ndarray, song: np.ndarray) -> np.ndarray:
    """Pooled over songs, each around its own mean."""
    deviations = np.concatenate([x[song == one] - x[song == one].mean(axis=0) for one in np.unique(song)])
    return deviations.T @ deviations / (len(x) - len(np.unique(song)))


def of_segments(segments: np.ndarray, song: np.ndarray) -> WithinSong:
    """`WithinSong.of_segments` where some song has several."""
    within = WithinSong.of_segments(segments, song)
    assert within is not None
    return within


@pytest.mark.parametrize("axes", [6, 4, 1])
def test_it_is_the_pooled_covariance_and_what_is_left_out_is_kept_by_dimension(
    monkeypatch: pytest.MonkeyPatch, axes: int
) -> None:
    monkeypatch.setattr(within_song, "MAX_NUMBERS", axes * 6)
    x = RNG.standard_normal((len(SONG), 6)) @ RNG.standard_normal((6, 6)) * [1, 1e-4, 1, 50, 1, 1] + RNG.random(6)
    found = of_segments(x.astype(np.float32), SONG)
    assert found.axes.shape == (axes, 6)
    assert found.axes.dtype == found.rest.dtype == np.float32
    assert found.freedom == len(SONG) - 5
    expected = covariance(x, SONG)
    made = matrix(found)
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)))
    np.testing.assert_allclose(np.diag(made), np.diag(expected), rtol=1e-3)
    if axes == 6:
        np.testing.assert_allclose(made / scale, expected / scale, atol=1e-3)
        assert not found.rest.any()


def matrix(within: WithinSong) -> np.ndarray:
    """The covariance itself."""
    return within.axes.astype(float).T @ within.axes + np.diag(within.rest)


def test_of_few_segments_no_more_axes_are_kept_than_they_span() -> None:
    song = np.repeat(np.arange(4), 3)
    x = RNG.standard_normal((12, 40))
    found = of_segments(x, song)
    assert found.axes.shape == (8, 40)
    np.testing.assert_allclose(matrix(found), covariance(x, song), atol=1e-5)


@pytest.mark.parametrize(("dims", "kept"), [(6, 6), (40, 40), (40, 12)])
def test_pooled_it_is_that_of_all_segments(monkeypatch: pytest.MonkeyPatch, dims: int, kept: int) -> None:
    """6 or 40 dimensions: more segments than dimensions, and fewer."""
    monkeypatch.setattr(within_song, "MAX_NUMBERS", dims * kept)
    scale = RNG.uniform(0.01, 100, dims)
    x = RNG.standard_normal((len(SONG), dims)) @ RNG.standard_normal((dims, dims)) * scale
    first = np.isin(SONG, [7, 3])
    parts = [of_segments(x[rows], SONG[rows]) for rows in (first, ~first)]
    found = parts[0].pooled(parts[1], scale)
    assert found.freedom == len(SONG) - 5
    assert len(found.axes) == min(kept, found.freedom)
    made, expected = (own / np.outer(scale, scale) for own in (matrix(found), covariance(x, SONG)))
    if kept == dims:
        np.testing.assert_allclose(made, expected, atol=1e-3 * np.diag(expected).max())
    np.testing.assert_allclose(np.diag(made), np.diag(expected), rtol=1e-3)


def test_songs_of_one_segment_tell_nothing() -> None:
    assert WithinSong.of_segments(RNG.standard_normal((5, 3)), np.arange(5)) is None


def test_segments_that_are_all_as_their_song_change_nothing() -> None:
    means = RNG.standard_normal((12, 5)).astype(np.float32)
    within = WithinSong.of_segments(np.repeat(means, 3, axis=0), np.repeat(np.arange(12), 3))
    np.testing.assert_allclose(unit(means, within), unit(means, whiten=False), atol=1e-5)
    collapsed = WithinSong.of_segments(np.ones((6, 4)), np.arange(6) // 2)
    assert not unit(np.ones((3, 4)), collapsed).any()


def test_of_very_many_segments_only_some_songs_are_taken_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(within_song, "MAX_SEGMENTS", 30)
    song = np.repeat(np.arange(30), 3)
    x = RNG.standard_normal((90, 4))
    taken = song % 3 == 0
    found = of_segments(x, song)
    np.testing.assert_allclose(found.axes.T @ found.axes, covariance(x[taken], song[taken]), atol=1e-5)
    assert WithinSong.of_segments(x, np.where(song % 2, np.arange(90) + 100, song)) is not None  # half are of one


@pytest.mark.parametrize("axes", [5, 3])
def test_vectors_are_multiplied_by_the_inverse_root_of_the_covariance_and_the_floor(
    monkeypatch: pytest.MonkeyPatch, axes: int
) -> None:
    monkeypatch.setattr(within_song, "MAX_NUMBERS", axes * 5)
    segments = RNG.standard_normal((len(SONG), 5)) @ RNG.standard_normal((5, 5))
    within = of_segments(segments, SONG)
    x, scale = RNG.standard_normal((8, 5)), RNG.uniform(0.5, 2, 5)
    found = within.normalised(x, scale)
    variance, turn = np.linalg.eigh((within.axes / scale).T.astype(float) @ (within.axes / scale))
    variance += FLOOR + (variance < 1e-6) * np.sum(within.rest / scale**2) / max(1, 5 - axes)
    expected = (x @ turn / np.sqrt(variance)) @ turn.T
    np.testing.assert_allclose(l2_normalised(found), l2_normalised(expected), atol=1e-4)


def test_what_is_left_out_counts_as_much_as_what_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Segments that spread equally in all directions: none of them counts more than another."""
    monkeypatch.setattr(within_song, "MAX_NUMBERS", 20 * 15)
    song = np.repeat(np.arange(3000), 4)
    within = of_segments(np.repeat(RNG.standard_normal((3000, 20)), 4, axis=0) + RNG.standard_normal((12000, 20)), song)
    weights = np.linalg.norm(within.normalised(np.eye(20), np.ones(20)), axis=1)
    assert weights.max() < 1.1 * weights.min()


def test_what_varies_within_songs_no_longer_decides_which_songs_are_near() -> None:
    """Thirty songs of ten groups: all dimensions vary as much from song to song, but most of them within songs too."""
    rng = np.random.default_rng(0)
    group = np.repeat(np.arange(10), 3)
    own = rng.standard_normal((10, 4))[group] + 0.2 * rng.standard_normal((30, 4))
    song = np.repeat(np.arange(30), 6)
    moods = 2.4 * rng.standard_normal((180, 40))  # their means have a deviation of about 1
    segments = np.column_stack([own[song] + 0.05 * rng.standard_normal((180, 4)), moods])
    means = segments.reshape(30, 6, -1).mean(axis=1)
    hits = {}
    for name, within in {"half-whitened": None, "within": WithinSong.of_segments(segments, song)}.items():
        x = unit(means, within)
        cosine = x @ x.T - 2 * np.eye(30)
        hits[name] = int((group[cosine.argmax(axis=1)] == group).sum())
    assert hits["within"] >= 25
    assert hits["half-whitened"] < 20


def test_a_table_keeps_it_and_is_searched_by_it(tmp_path: Path) -> None:
    song = np.repeat(np.arange(20), 3)
    segments = RNG.standard_normal((60, 8)).astype(np.float32)
    means = segments.reshape(20, 3, 8).mean(axis=1)
    within = of_segments(segments, song)
    for name, own in {"with": within, "without": None}.items():
        write_embeddings(tmp_path / name, Embeddings(song_table(20), means, {"rows": "songs"}, own))
    read = read_song_embeddings(tmp_path / "with")
    assert read.within is not None
    np.testing.assert_array_equal(read.within.axes, within.axes)
    np.testing.assert_array_equal(read.within.rest, within.rest)
    assert read.within.freedom == within.freedom
    np.testing.assert_array_equal(read.unit(), unit(means, within))
    older = read_song_embeddings(tmp_path / "without")
    assert older.within is None
    np.testing.assert_array_equal(older.unit(), unit(means))
    assert np.abs(older.unit()[:, :8] @ older.unit()[:, :8].T - read.unit() @ read.unit().T).max() > 0.1


def test_a_table_that_lost_it_is_refused(tmp_path: Path) -> None:
    """Other programs write the columns and the metadata of the schema again, and not this."""
    song = np.repeat(np.arange(20), 3)
    within = WithinSong.of_segments(RNG.standard_normal((60, 8)), song)
    file = tmp_path / "e.parquet"
    write_embeddings(file, Embeddings(song_table(20), RNG.standard_normal((20, 8)).astype(np.float32), {}, within))
    content = file.read_bytes()
    start = content.index(b"simsiam_dali.within_song") + 400  # within the numbers
    file.write_bytes(content[:start] + b"AAAAAAAA" + content[start + 8 :])
    with pytest.raises(UserError, match="is damaged"):
        read_song_embeddings(file)
    file.write_bytes(content)
    pq.write_table(pq.read_table(file), file)
    with pytest.raises(UserError, match="another program"):
        read_song_embeddings(file)
