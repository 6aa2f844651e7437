"""Ratings given on the page, as packing reads them from the CSV."""

import csv
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import song_table
from helpers.served import Client, write_library

from simsiam_dali.common.errors import UserError
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.recommendation.choose import Request
from simsiam_dali.recommendation.saved import save
from simsiam_dali.serving.ratings import Ratings


@pytest.fixture
def table() -> pd.DataFrame:
    return song_table(10)  # songs 0 and 5 are unrated


@pytest.fixture
def music(tmp_path: Path) -> Path:
    return tmp_path / "music"


def packed(source: Path, table: pd.DataFrame, music: Path) -> list[float | None]:
    """What `make_shards --ratings` takes for each song of the table."""
    ratings = RatingsFile.read(source, music)
    rows = zip(table["path"], table["title"], table["artists"], strict=True)
    return [ratings.lookup(music / path, title, artists) for path, title, artists in rows]


def test_a_rating_is_kept_read_by_packing_and_there_at_the_next_start(
    tmp_path: Path, table: pd.DataFrame, music: Path
) -> None:
    source = tmp_path / "new folder" / "ratings.csv"
    ratings = Ratings(source, table, music)
    assert not source.exists()
    for row, stars in ((0, 5), (5, 0), (1, 1), (0, 4)):  # the last one replaces the first
        assert ratings.rate(row, stars / 5) == pytest.approx(stars / 5)
    expected: list[float | None] = [None] * 10
    expected[0], expected[1], expected[5] = 0.8, 0.2, 0.0
    assert packed(source, table, music) == expected
    again = Ratings(source, table, music).values
    np.testing.assert_array_equal(again[[0, 1, 5]], [0.8, 0.2, 0.0])
    np.testing.assert_array_equal(again[[2, 3, 4]], table["rating"].iloc[[2, 3, 4]])  # those of the tags


def test_ratings_of_no_more_than_one_star_are_not_read_as_five(
    tmp_path: Path, table: pd.DataFrame, music: Path
) -> None:
    source = tmp_path / "ratings.csv"
    Ratings(source, table, music).rate(0, 1 / 5)
    assert packed(source, table, music)[0] == pytest.approx(0.2)


def test_a_removed_rating_is_unrated_here_for_packing_and_at_the_next_start(
    tmp_path: Path, table: pd.DataFrame, music: Path
) -> None:
    """Whether it was given here, or is that of the tag, which packing or a refresh wrote into the table."""
    source = tmp_path / "ratings.csv"
    ratings = Ratings(source, table, music)
    ratings.rate(0, 1.0)
    for row in (0, 1):
        assert math.isnan(ratings.rate(row, None))
    unrated = pytest.approx(math.nan, nan_ok=True)
    assert packed(source, table, music) == [unrated] * 2 + [None] * 8
    again = Ratings(source, table, music)
    np.testing.assert_array_equal(again.values, [math.nan, math.nan, *table["rating"][2:]])
    assert again.rate(1, 0.4) == 0.4


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("path,rating\nartist 2/album 0/2.flac,4.5\nelsewhere/x.mp3,3\n", {2: 0.9}),
        ("\ufeffRating;Title;Artist;Mood\n4;Title 2;Artist 2;calm\n2;Title 8;Artist 2;\n", {2: 0.8, 8: 0.4}),
        ('rating,path,note\n0.5,./artist 2/album 0/../album 0/2.flac,"two\nlines, quoted ""so"""\n', {2: 0.5}),
        ("path,rating\nartist 2/album 0/2.flac,5\nartist 2/album 0/2.flac,\n", {2: 1.0}),
    ],
)
def test_ratings_that_were_there_stay(
    tmp_path: Path, table: pd.DataFrame, music: Path, text: str, kept: dict[int, float]
) -> None:
    """Of any scale, delimiter, order and way to name songs, with columns and songs that are not known here."""
    source = tmp_path / "ratings.csv"
    source.write_text(text, encoding="utf-8")
    before = packed(source, table, music)
    assert {row: rating for row, rating in enumerate(before) if rating is not None} == kept
    ratings = Ratings(source, table, music)
    assert all(ratings.values[row] == rating for row, rating in kept.items())
    ratings.rate(0, 0.6)
    assert packed(source, table, music) == [0.6, *before[1:]]
    after = source.read_text(encoding="utf-8")
    for word in ("elsewhere/x.mp3", "calm", "Mood", 'two\nlines, quoted ""so"""'):
        assert (word in after) == (word in text)
    ratings.rate(2, 0.2)
    assert packed(source, table, music) == [0.6, before[1], 0.2, *before[3:]]


def test_a_row_of_the_same_song_is_changed_and_not_repeated(tmp_path: Path, table: pd.DataFrame, music: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text(f"path,rating\n{music}/artist 0/album 0/0.flac,0.4\n")
    ratings = Ratings(source, table, music)
    for rating in (0.6, 0.8):
        ratings.rate(0, rating)
    assert len(source.read_text().splitlines()) == 2


def test_a_song_whose_file_name_is_not_utf8_is_known_by_its_title(
    tmp_path: Path, table: pd.DataFrame, music: Path
) -> None:
    file = Path(os.fsdecode(os.fsencode(music / "artist 0") + b"/\xe9.flac"))
    file.parent.mkdir(parents=True)
    file.touch()
    table.loc[0, "path"] = "artist 0/\\xe9.flac"
    source = tmp_path / "ratings.csv"
    for rating in (0.4, 0.8):
        assert Ratings(source, table, music).rate(0, rating) == rating
    assert RatingsFile.read(source, music).lookup(file, "Title 0", ["Artist 0"]) == 0.8
    assert len(source.read_text().splitlines()) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"SQLite format 3\0" + bytes(100), "only read"),
        (b"\xff\xfe\0", "UTF-8"),
        (b"title\nx\n", "header"),
        (b"path,rating\na,7\n", "not in 0..1"),
        (b"title\n", "header"),
    ],
)
def test_a_file_that_is_no_such_csv_is_refused_and_left_alone(
    tmp_path: Path, table: pd.DataFrame, music: Path, content: bytes, reason: str
) -> None:
    source = tmp_path / "ratings.csv"
    source.write_bytes(content)
    with pytest.raises(UserError, match=reason):
        Ratings(source, table, music)
    assert source.read_bytes() == content


@pytest.mark.parametrize("content", [b"", b" \n", b"\xef\xbb\xbf", b"rating;path\n"])
def test_a_file_without_ratings_is_filled(tmp_path: Path, table: pd.DataFrame, music: Path, content: bytes) -> None:
    source = tmp_path / "ratings.csv"
    source.write_bytes(content)
    ratings = Ratings(source, table, music)
    np.testing.assert_array_equal(ratings.values, table["rating"])
    assert ratings.rate(0, 0.4) == 0.4
    assert packed(source, table, music) == [0.4] + [None] * 9


def test_columns_of_one_name_keep_their_values(tmp_path: Path, table: pd.DataFrame, music: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text("path,note,note,rating,Rating\nelsewhere/x.mp3,one,two,3,5\n")
    Ratings(source, table, music).rate(0, 0.4)
    header, other, own = source.read_text().splitlines()
    assert header == "path,note,note,rating,Rating,title,artist"
    assert other == "elsewhere/x.mp3,one,two,3,1,,"  # the last of the ratings is read
    assert own == "artist 0/album 0/0.flac,,,,0.4,Title 0,Artist 0"


@pytest.mark.parametrize("end", [b"\r\n", b"\n"])
@pytest.mark.parametrize("mark", [b"\xef\xbb\xbf", b""])
def test_line_ends_and_a_byte_order_mark_stay(
    tmp_path: Path, table: pd.DataFrame, music: Path, mark: bytes, end: bytes
) -> None:
    source = tmp_path / "ratings.csv"
    lines = [b"path,title,artist,rating", b'a.mp3,"two', b'lines",A,0.5', b""]
    source.write_bytes(mark + end.join(lines))
    ratings = Ratings(source, table, music)
    for rating in (0.4, 0.6):
        ratings.rate(0, rating)
    own = b"artist 0/album 0/0.flac,Title 0,Artist 0,0.6"
    assert source.read_bytes() == mark + end.join([*lines[:-1], own, b""])


def test_a_path_that_begins_or_ends_with_a_space_is_rated_in_one_row(
    tmp_path: Path, table: pd.DataFrame, music: Path
) -> None:
    table.loc[[0, 1, 2], "path"] = [" first.flac", "last.flac ", "last.flac"]
    source = tmp_path / "ratings.csv"
    ratings = Ratings(source, table, music)
    for row, rating in ((0, 0.2), (1, 0.4), (2, 0.6), (0, 0.8), (1, 1.0)):
        assert ratings.rate(row, rating) == rating
    assert len(source.read_text().splitlines()) == 4
    np.testing.assert_array_equal(Ratings(source, table, music).values[:3], [0.8, 1.0, 0.6])


def test_a_rating_parses_the_file_once(
    tmp_path: Path, table: pd.DataFrame, music: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "ratings.csv"
    ratings = Ratings(source, table, music)
    ratings.rate(0, 0.4)
    parsed, reader = [], csv.reader

    def noted(*args: Any, **options: Any) -> Any:
        parsed.append(args)
        return reader(*args, **options)

    monkeypatch.setattr(csv, "reader", noted)
    ratings.rate(1, 0.2)
    assert len(parsed) == 1


def test_a_saved_playlist_is_chosen_by_the_ratings_given_on_the_page(tmp_path: Path) -> None:
    client = Client(write_library(tmp_path, seconds=0.3))
    library = client.library.search().library
    liked = Request(like=[str(library.file(1))], min_rating=0.95, count=30)
    for name, request in (("liked", liked), ("top", Request(top=True, count=30))):
        save(tmp_path / "playlists", name, request, library, client.library._songs.unit())

    def opened(name: str) -> list[int]:
        return client.get(f"/api/playlists/{name}").json()["songs"]

    assert 5 not in opened("liked")  # it has no rating
    assert 5 in opened("top")  # the songs without one
    assert client.post("/api/ratings", {"song": 5, "rating": 1}).status == 200
    assert 5 in opened("liked")
    assert 5 not in opened("top")
    client.close()


@pytest.mark.parametrize("content", [b"path,rating\na,0.5,lost\n", b"\xff\xfe\0"])
def test_a_file_that_became_unreadable_is_left_alone(
    tmp_path: Path, table: pd.DataFrame, music: Path, content: bytes
) -> None:
    source = tmp_path / "ratings.csv"
    ratings = Ratings(source, table, music)
    ratings.rate(0, 0.4)
    source.write_bytes(content)
    with pytest.raises(UserError):
        ratings.rate(1, 0.2)
    assert source.read_bytes() == content
    assert [file.name for file in tmp_path.iterdir()] == ["ratings.csv"]


def test_a_failed_write_leaves_the_ratings_as_they_were(
    tmp_path: Path, table: pd.DataFrame, music: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = tmp_path / "ratings.csv"
    ratings = Ratings(source, table, music)
    ratings.rate(0, 0.4)
    before = source.read_bytes()

    def full(*_args: object, **_more: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        ratings.rate(1, 1.0)
    assert source.read_bytes() == before
    assert ratings.values[1] == table["rating"].iloc[1]
    assert [file.name for file in tmp_path.iterdir()] == ["ratings.csv"]
