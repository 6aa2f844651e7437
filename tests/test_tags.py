"""What tags and ratings files say, in every form that players write."""

import math
import sqlite3
import urllib.parse
from pathlib import Path

import mutagen
import numpy as np
import pytest
from helpers.small_music import make_shards, sound, write_audio, write_song
from mutagen.id3 import POPM, TALB, TCON, TDRC, TIT2, TPE1, TXXX
from mutagen.mp4 import MP4FreeForm

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import open_shards
from simsiam_dali.packing.ratings import RatingsFile
from simsiam_dali.packing.tags import MAX_CHARACTERS, MAX_VALUES, Tags, merged, popm_rating, read_tags, vorbis_rating
from simsiam_dali.recommendation.choose import Choice
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import FORMATS, playlist_entries, terminal_table


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
    # As text: an unknown rating is NaN, which from Python 3.13 on makes a dataclass unlike itself.
    assert repr(read_tags(tagged(tmp_path / "a.ogg", **unknown))) == repr(Tags())
    assert repr(read_tags(tagged(tmp_path / "b.ogg"))) == repr(Tags())
    assert read_tags(tagged(tmp_path / "c.ogg", artist=["<Unknown>", "Known"])).artists == ("Known",)


def test_odd_values_are_made_fit_for_a_table(tmp_path: Path) -> None:
    titles = [f"Title {n}" for n in range(11)]
    assert read_tags(tagged(tmp_path / "a.ogg", title=titles)).title == " / ".join(titles)
    assert read_tags(tagged(tmp_path / "b.ogg", title=["same"] * 11)).title == "same"
    tags = read_tags(tagged(tmp_path / "c.ogg", title=["a\x1b[31m\nb\tc"], album=["x" * 9999]))
    assert tags.title == "a [31m b c"
    assert len(tags.albums[0]) == MAX_CHARACTERS


def test_broken_tags_are_empty_and_reported(tmp_path: Path) -> None:
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
    assert ratings.lookup(tmp_path / "e.mp3", "", ()) is None
    assert len(ratings) == 3


def test_an_empty_rating_in_a_csv_is_unrated_and_not_unknown(tmp_path: Path) -> None:
    text = "path,title,artist,rating\na.mp3,A,One,\nb.mp3,B,Two,\nb.mp3,B,Two,0.4\n,C,Three,\n"
    ratings = RatingsFile.read(csv_file(tmp_path, text), tmp_path)
    found = [ratings.lookup(tmp_path / name, title, [artist]) for name, title, artist in (
        ("a.mp3", "A", "One"), ("b.mp3", "B", "Two"), ("c.mp3", "C", "Three"), ("other/a.mp3", "A", "One"),
    )]  # fmt: skip
    assert found == [pytest.approx(math.nan, nan_ok=True), 0.4, pytest.approx(math.nan, nan_ok=True), None]


@pytest.mark.parametrize("text", ["", " \n\n", "\ufeff", "path,rating\n", "title;artist;rating"])
def test_a_csv_without_rows_or_without_text_has_no_ratings(tmp_path: Path, text: str) -> None:
    ratings = RatingsFile.read(csv_file(tmp_path, text), tmp_path)
    assert len(ratings) == 0
    assert ratings.lookup(tmp_path / "a.mp3", "A", ("One",)) is None


def test_a_path_in_a_csv_may_have_spaces_around_it(tmp_path: Path) -> None:
    """They are of the file's name, or put beside the delimiter by hand."""
    ratings = RatingsFile.read(csv_file(tmp_path, "rating,path\n0.2, a.mp3\n0.4,b.mp3 \n0.6,b.mp3\n"), tmp_path)
    found = [ratings.lookup(tmp_path / name, "", ()) for name in (" a.mp3", "a.mp3", "b.mp3 ", "b.mp3")]
    assert found == [0.2, 0.2, 0.4, 0.6]


def test_csv_by_title_and_artist(tmp_path: Path) -> None:
    text = "title;artist;rating\nSong;Émile;0.5\nTwice;A;0.1\nTwice;A;0.9\n"
    ratings = RatingsFile.read(csv_file(tmp_path, text), tmp_path)
    assert ratings.lookup(tmp_path / "any.mp3", "song", ("E\u0301mile",)) == 0.5
    assert ratings.lookup(tmp_path / "any.mp3", "Song", ("Other",)) is None
    assert ratings.lookup(tmp_path / "any.mp3", "Twice", ("A",)) is None


@pytest.mark.parametrize(
    ("text", "says"),
    [
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


@pytest.mark.parametrize("linked", [False, True])
def test_a_rating_is_of_no_other_song_of_its_name_while_its_own_is_there(tmp_path: Path, linked: bool) -> None:
    """Every album of an artist may have its own "01 Intro.mp3"."""
    music, kept = tmp_path / "music", tmp_path / "kept"
    rated, other = (folder / "album" / "01 Intro.mp3" for folder in (music, music / "b"))
    if linked:
        kept.mkdir()
        music.symlink_to(kept)
    for size, song in enumerate((rated, other), 1):
        song.parent.mkdir(parents=True)
        song.write_bytes(bytes(size))
    source = library(
        tmp_path / "my.db", "url", [((kept if linked else music) / "album/01 Intro.mp3", "Intro", "A", 1.0)]
    )

    ratings = RatingsFile.read(source, music)
    assert ratings.lookup(rated, "Intro", ("A",)) == 1.0
    assert ratings.lookup(other, "Intro", ("A",)) is None
    other.write_bytes(rated.read_bytes())
    assert ratings.lookup(other, "Intro", ("A",)) == 1.0  # a copy of it
    other.write_bytes(b"another song")
    rated.unlink()
    assert ratings.lookup(other, "Intro", ("A",)) == 1.0  # the one that the file has may have moved there


def test_a_file_whose_name_is_written_with_other_accents_is_there(tmp_path: Path) -> None:
    """As a Mac writes them, and the database of a player on Linux does not."""
    for size, name in enumerate(("a/E\u0301tude.mp3", "b/E\u0301tude.mp3"), 1):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(bytes(size))
    source = library(tmp_path / "my.db", "url", [(tmp_path / "a/\u00c9tude.mp3", "Étude", "A", 1.0)])
    ratings = RatingsFile.read(source, tmp_path)
    found = [ratings.lookup(tmp_path / name, "Étude", ("A",)) for name in ("a/E\u0301tude.mp3", "b/E\u0301tude.mp3")]
    assert found == [1.0, None]


def test_a_row_with_more_columns_than_the_header_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "ratings.csv"
    source.write_text("path,rating\na.mp3,1,,\nb.mp3,2,5\n")
    with pytest.raises(UserError, match=r"line 3: more columns than the header; a fraction is written 0\.5"):
        RatingsFile.read(source, tmp_path)
    source.write_text("path,rating\na.mp3,1,, \n")
    assert RatingsFile.read(source, tmp_path).lookup(tmp_path / "a.mp3", "", []) == 1.0


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


def test_hostile_tags_and_names_break_neither_a_table_nor_a_terminal(tmp_path: Path) -> None:
    """From the file to songs.parquet, to a recommendation on the terminal, and into each playlist's format."""
    hostile = "\x1b]0;owned\x07\x1b[2Jred\0\r\nline\u202egnp\u2066\x9b31m\u2028"
    music = tmp_path / "music"
    music.mkdir()
    artists = ["\x1b" * 1_000_000 + "hidden", *map(str, range(5000))]
    write_song(music / "huge.flac", 1, 0.5, title="x" * 10_000_000, artist=artists)
    odd = write_song(music / "odd.flac", 2, 0.5, title=hostile, artist=hostile, album=hostile, genre=[hostile, "Dub"])
    odd = odd.rename(music / "odd\x1b[31m\n.flac")
    broken = music / "broken\x1b[2J.flac"
    broken.write_bytes(b"fLaC")
    done = make_shards(music, "--out", tmp_path / "shards", "--segment-seconds", "0.5", "--min-seconds", "0.1")
    assert done.returncode == 0, done.stderr[-2000:]
    assert "broken" in done.stdout
    assert all(c.isprintable() or c == "\n" for c in done.stdout)

    songs = open_shards(tmp_path / "shards").songs
    assert sorted(songs["path"]) == ["huge.flac", odd.name]  # a name stays what it is, or the song would not open
    table = songs.set_index("path")
    assert table.loc[odd.name, "title"] == "]0;owned [2Jred / line gnp 31m"  # a zero divides values
    assert table.loc["huge.flac", "title"] == "x" * (MAX_CHARACTERS - 1) + "…"
    assert len(table["artists"]["huge.flac"]) == MAX_VALUES
    assert (tmp_path / "shards/songs.parquet").stat().st_size < 100_000

    library = Library(songs, music)
    choice = Choice([0, 1], {"similarity": np.array([0.5, 0.25])}, f"like {hostile}")
    shown = terminal_table(library, choice)
    assert len(shown) == 3
    assert all(line.isprintable() for line in shown)
    made = playlist_entries(library, choice, None)
    assert sorted(entry.path for entry in made) == sorted(map(str, (music / "huge.flac", odd)))
    for name, write in FORMATS.items():
        text, _ = write(made, choice.title)
        assert "\x1b" not in text or name == "csv"  # a CSV quotes the path as it is
        text.encode()


def test_tags_that_take_too_long_are_empty_and_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A list of short texts, which mutagen takes apart in quadratic time."""
    path = tagged(tmp_path / "a.mp3", TPE1(encoding=0, text=["a"] * 200_000))
    monkeypatch.setattr("simsiam_dali.packing.tags.PARSE_SECONDS", 0.05)
    tags = read_tags(path)
    assert tags.note == "tags cannot be read (TookTooLong)"
    assert tags.artists == ()
