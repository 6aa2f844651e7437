"""What tags and ratings files say, in every form that players write."""

import math
import sqlite3
import urllib.parse
from pathlib import Path

import mutagen
import pytest
from mutagen.id3 import POPM, TALB, TCON, TDRC, TIT2, TPE1, TXXX
from mutagen.mp4 import MP4FreeForm
from small_music import sound, write_audio

from simsiam_dali.errors import UserError
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.packing.tags import LONGEST, Tags, merged, popm_rating, read_tags, vorbis_rating


def tagged(path: Path, *frames: object, **comments: object) -> Path:
    """A short song with ID3 frames, or with comments as its format stores them."""
    write_audio(path, sound(1, 0.5))
    file = mutagen.File(path)
    if file.tags is None:
        file.add_tags()
    for frame in frames:
        file.tags.add(frame)
    for name, value in comments.items():
        file.tags[name] = value
    file.save()
    return path


@pytest.mark.parametrize("suffix", [".mp3", ".wav"])
def test_id3(tmp_path: Path, suffix: str) -> None:
    path = tagged(
        tmp_path / f"a{suffix}",
        TIT2(text=["Song"]),
        TPE1(text=["One", "Two"]),
        TALB(text=["First", "Second"]),
        TDRC(text=["2003-04-05"]),
        TCON(text=["(17)", "Dub"]),
        POPM(email="player", rating=196, count=3),
    )
    assert read_tags(path) == Tags("Song", ("One", "Two"), ("First", "Second"), "", 2003, ("Rock", "Dub"), 0.8)


@pytest.mark.parametrize("suffix", [".ogg", ".flac"])
def test_vorbis_comments(tmp_path: Path, suffix: str) -> None:
    path = tagged(
        tmp_path / f"a{suffix}",
        TITLE=["Song"],
        ARTIST=["One", "Two"],
        ALBUM=["First", "Second"],
        ALBUMARTIST=["Various"],
        DATE=["2003"],
        ORIGINALDATE=["1971-01-01"],
        GENRE=["Rock", "Dub"],
        FMPS_RATING=["0.7"],
        RATING=["1"],
    )
    assert read_tags(path) == Tags("Song", ("One", "Two"), ("First", "Second"), "Various", 1971, ("Rock", "Dub"), 0.7)


def test_mp4(tmp_path: Path) -> None:
    comments = {
        "\xa9nam": ["Song"],
        "\xa9ART": ["One"],
        "\xa9alb": ["First"],
        "aART": ["Various"],
        "\xa9day": ["1999"],
        "\xa9gen": ["Rock"],
        "----:com.apple.iTunes:FMPS_Rating": [MP4FreeForm(b"0.9")],
    }
    path = tagged(tmp_path / "a.m4a", **comments)
    assert read_tags(path) == Tags("Song", ("One",), ("First",), "Various", 1999, ("Rock",), 0.9)


def test_mp4_rate(tmp_path: Path) -> None:
    assert read_tags(tagged(tmp_path / "a.m4a", rate=["60"])).rating == 0.6


def test_fmps_wins_over_popm(tmp_path: Path) -> None:
    frames = [POPM(email="a", rating=255), TXXX(desc="FMPS_Rating", text=["0.3"])]
    assert read_tags(tagged(tmp_path / "a.mp3", *frames)).rating == 0.3


def test_a_zero_popm_does_not_hide_another(tmp_path: Path) -> None:
    frames = [POPM(email="a", rating=0), POPM(email="b", rating=128)]
    assert read_tags(tagged(tmp_path / "a.mp3", *frames)).rating == 0.6


def test_unknown_values_are_unknown(tmp_path: Path) -> None:
    unknown = {"title": ["(None)"], "artist": ["<Unknown>"], "album": [" "], "date": ["0000"], "genre": [""]}
    assert read_tags(tagged(tmp_path / "a.ogg", **unknown)) == Tags()
    assert read_tags(tagged(tmp_path / "b.ogg")) == Tags()
    assert read_tags(tagged(tmp_path / "c.ogg", artist=["<Unknown>", "Known"])).artists == ("Known",)


def test_odd_values_are_made_fit_for_a_table(tmp_path: Path) -> None:
    titles = [f"Title {n}" for n in range(11)]
    assert read_tags(tagged(tmp_path / "a.ogg", title=titles)).title == " / ".join(titles)
    assert read_tags(tagged(tmp_path / "b.ogg", title=["same"] * 11)).title == "same"
    tags = read_tags(tagged(tmp_path / "c.ogg", title=["a\x1b[31m\nb\tc"], album=["x" * 9999]))
    assert tags.title == "a [31m b c"
    assert len(tags.albums[0]) == LONGEST


def test_broken_tags_are_none_and_told(tmp_path: Path) -> None:
    path = tagged(tmp_path / "a.flac", title=["t"])
    path.write_bytes(path.read_bytes()[:50])
    tags = read_tags(path)
    assert tags.title == ""
    assert "cannot be read" in tags.note


def test_merging_keeps_the_first_and_all_albums() -> None:
    first = Tags(title="a", albums=("x",), rating=math.nan)
    other = Tags(title="b", albums=("y", "x"), year=1990, rating=0.4, artists=("c",))
    assert merged(first, other) == Tags("a", ("c",), ("x", "y"), "", 1990, (), 0.4)


@pytest.mark.parametrize(
    ("value", "rating"), [(1, 0.2), (64, 0.4), (128, 0.6), (196, 0.8), (255, 1), (54, 0.2), (242, 0.8)]
)
def test_popm_stars(value: int, rating: float) -> None:
    assert popm_rating(value) == rating


@pytest.mark.parametrize(("value", "rating"), [(0.5, 0.5), (1, 0.2), (5, 1), (80, 0.8), (100, 1), (255, 1)])
def test_vorbis_rating_scales(value: float, rating: float) -> None:
    assert vorbis_rating(value) == rating


@pytest.mark.parametrize("value", [0, -1, 256])
def test_no_rating(value: float) -> None:
    assert math.isnan(vorbis_rating(value))
    assert math.isnan(popm_rating(value))


def csv_file(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "ratings.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_csv_by_path(tmp_path: Path) -> None:
    text = f'Path,Rating\n"a, b.mp3",4\n{tmp_path}/c.mp3,5\nd.mp3,\n'
    ratings = RatingsFile.read(csv_file(tmp_path, text), tmp_path)
    assert ratings.lookup(tmp_path / "a, b.mp3", "", ()) == 0.8
    assert ratings.lookup(tmp_path / "c.mp3", "", ()) == 1.0
    assert ratings.lookup(tmp_path / "d.mp3", "", ()) is None
    assert len(ratings) == 2


def test_csv_by_title_and_artist(tmp_path: Path) -> None:
    text = "title;artist;rating\nSong;Émile;0.5\nTwice;A;0.1\nTwice;A;0.9\n"
    ratings = RatingsFile.read(csv_file(tmp_path, text), tmp_path)
    assert ratings.lookup(tmp_path / "any.mp3", "song", ("E\u0301mile",)) == 0.5
    assert ratings.lookup(tmp_path / "any.mp3", "Song", ("Other",)) is None
    assert ratings.lookup(tmp_path / "any.mp3", "Twice", ("A",)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "header"),
        ("path,stars\na.mp3,3\n", "header"),
        ("title,rating\na,3\n", "header"),
        ("path,rating\na.mp3,good\n", "line 2: rating 'good'"),
        ("path,rating\na.mp3,1\nb.mp3,99\n", "line 3: rating 99"),
    ],
)
def test_csv_that_is_none(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        RatingsFile.read(csv_file(tmp_path, text), tmp_path)


def library(path: Path, column: str, songs: list[tuple[Path, str, str, float]]) -> Path:
    """A player's database with the columns that matter."""
    with sqlite3.connect(path) as database:
        database.execute(f"CREATE TABLE songs (title TEXT, artist TEXT, {column} BLOB, rating REAL)")
        for song, title, artist, rating in songs:
            url = b"file://" + urllib.parse.quote_from_bytes(bytes(song)).encode()
            database.execute("INSERT INTO songs VALUES (?, ?, ?, ?)", (title, artist, url, rating))
    database.close()
    return path


@pytest.mark.parametrize("column", ["filename", "url"])  # Clementine's and Strawberry's
def test_players_databases(tmp_path: Path, column: str) -> None:
    here, moved = tmp_path / "it's 50% & 日本.mp3", Path("/old/place/b.ogg")
    songs = [(here, "", "", 0.6), (moved, "B", "Two", 0.2), (tmp_path / "c.mp3", "C", "Three", -1)]
    source = library(tmp_path / "my ratings?.db", column, songs)
    before = source.read_bytes()
    source.chmod(0o444)

    ratings = RatingsFile.read(source, tmp_path)

    assert ratings.lookup(here, "", ()) == 0.6
    assert ratings.lookup(tmp_path / "b.ogg", "B", ("Two",)) == 0.2  # found by its name, for it has moved
    assert ratings.lookup(tmp_path / "other.ogg", "B", ("Two",)) is None
    assert ratings.lookup(tmp_path / "c.mp3", "C", ("Three",)) is None
    assert source.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [source.name]


def test_a_file_that_is_no_ratings_file(tmp_path: Path) -> None:
    other = tmp_path / "other.db"
    with sqlite3.connect(other) as database:
        database.execute("CREATE TABLE t (a)")
    database.close()
    broken = tmp_path / "broken.db"
    broken.write_bytes(other.read_bytes()[:100])
    image = tmp_path / "image.png"
    image.write_bytes(b"\x89PNG\r\n\xff\xfe")
    for path, says in (
        (other, "not Clementine's or Strawberry's"),
        (broken, "cannot be read"),
        (image, "neither a CSV"),
        (tmp_path / "missing.csv", "No such file"),
    ):
        with pytest.raises(UserError, match=says) as caught:
            RatingsFile.read(path, tmp_path)
        assert "\n" not in str(caught.value)
