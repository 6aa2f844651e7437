"""Recommendations on planted tables: the right songs, in playlists that hold whatever a tag or a path holds."""

import csv
import os
import sys
import unicodedata
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import planted, song_table
from rich.cells import cell_len
from sklearn.linear_model import BayesianRidge

from simsiam_dali import recommend
from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.table import Embeddings, read_embeddings, write_embeddings
from simsiam_dali.evaluation.knn import nearest_others, unit
from simsiam_dali.recommendation.choose import nearest_cosine
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import CSV_COLUMNS, truncate
from simsiam_dali.recommendation.rating_model import NOISE, RatingModel

NS = "{http://xspf.org/ns/0/}"
HOSTILE = '<script>alert(1)</script> ]]> & "q"\n#EXTINF:9,x\r\x1b[2J\x07\x00\u2028\u202e\ufffe 日本'


def library_file(folder: Path, table: pd.DataFrame, vectors: np.ndarray, files: bool = True) -> Path:
    """`table` as an embedding table below `folder`, and its songs as empty files in `folder/music`."""
    music = folder.resolve() / "music"
    for name in table["path"] if files else []:
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        (music / name).touch()
    out = folder / "embeddings.parquet"
    write_embeddings(out, Embeddings(table, vectors.astype(np.float32), {"music": str(music), "rows": "songs"}))
    return out


def chosen(folder: Path, *options: object) -> list[dict[str, str]]:
    """The rows of the CSV that the command writes for these options."""
    out = folder / "chosen.csv"
    command("--embeddings", folder / "embeddings.parquet", "--csv", out, *options)
    with out.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def numbers(rows: list[dict[str, str]]) -> list[int]:
    """The songs of `song_table` by their number."""
    return [int(Path(row["path"]).stem) for row in rows]


def command(*options: object) -> None:
    recommend.run(recommend.build_parser().parse_args(list(map(str, options))))


@pytest.fixture
def clusters(tmp_path: Path) -> tuple[Path, pd.DataFrame, np.ndarray]:
    """60 songs in 6 tight clusters, one an artist."""
    table = song_table(60)
    classes = np.arange(60) % 6
    library_file(tmp_path, table, planted(classes))
    return tmp_path, table, classes


def test_like_finds_the_cluster_and_not_the_song_itself(clusters: tuple[Path, pd.DataFrame, np.ndarray]) -> None:
    folder, _, classes = clusters
    found = chosen(folder, "--like", "Title 8", "--count", 9)
    assert set(numbers(found)) == set(np.flatnonzero(classes == 2)) - {8}
    similarity = [float(row["similarity"]) for row in found]
    assert similarity == sorted(similarity, reverse=True)
    assert similarity[-1] > 0.6
    # Of two songs in two clusters, both clusters: a song is near when it is near to one of them.
    both = numbers(chosen(folder, "--like", "title 8", "TITLE 9", "--count", 18))
    assert set(both) == set(np.flatnonzero((classes == 2) | (classes == 3))) - {8, 9}


def test_like_agrees_with_the_knn_probe(clusters: tuple[Path, pd.DataFrame, np.ndarray]) -> None:
    folder, table, _ = clusters
    songs = read_embeddings(folder / "embeddings.parquet")
    near, cosine = nearest_others(songs.unit(), np.arange(len(table)), 12)
    found = chosen(folder, "--like", "Title 8", "--count", 12)
    assert numbers(found) == near[8].tolist()
    np.testing.assert_allclose([float(row["similarity"]) for row in found], cosine[8], atol=1e-4)


def test_one_of_each_recording_and_so_many_of_an_artist(tmp_path: Path) -> None:
    table = song_table(60)
    for column in ("title", "duration"):  # song 14 is song 8 once more, and song 26 is song 20
        table.loc[[14, 26], column] = table.loc[[8, 20], column].to_numpy()
    library_file(tmp_path, table, planted(np.arange(60) % 6))
    found = numbers(chosen(tmp_path, "--like", "Title 8", "--count", 7))
    assert not {8, 14} & set(found)
    assert len({20, 26} & set(found)) == 1
    assert set(found) <= set(range(2, 60, 6))
    varied = chosen(tmp_path, "--like", "Title 8", "--count", 12, "--max-per-artist", 2)
    assert pd.Series([row["artist"] for row in varied]).value_counts().tolist() == [2] * 6
    by_album = chosen(tmp_path, "--like", "Title 8", "--count", 60, "--max-per-album", 1)
    assert len({(row["artist"], row["album"]) for row in by_album}) == len(by_album) == 18
    others = chosen(tmp_path, "--like", "Title 8", "--count", 60, "--exclude-same-artist")
    assert {row["artist"] for row in others} == {f"Artist {i}" for i in (0, 1, 3, 4, 5)}
    albums = chosen(tmp_path, "--like", "Title 8", "--count", 60, "--exclude-same-album")
    assert ("Artist 2", "Album 1") not in {(row["artist"], row["album"]) for row in albums}
    assert "Artist 2" in {row["artist"] for row in albums}
    assert min(numbers(chosen(tmp_path, "--like", "Title 8", "--min-seconds", 410))) == 30


def test_songs_are_found_by_path_folder_and_name(
    clusters: tuple[Path, pd.DataFrame, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, table, _ = clusters
    library = Library(table, folder.resolve() / "music")
    (folder / "link").symlink_to(folder / "music")
    inside = folder / "music/artist 2"
    monkeypatch.chdir(inside)
    row = [8]
    for text in (
        "title 8",
        "  ARTIST 2 -  Title 8",
        "artist 2/album 1/8.flac",  # from the music folder
        "album 1/8.flac",  # from here
        str(folder / "music/artist 2/album 1/8.flac"),
        str(folder / "link/artist 2/album 1/8.flac"),
        str(folder / "music/../music/artist 2/album 1/8.flac"),
    ):
        assert library.find(text) == row, text
    album = [i for i, path in enumerate(table["path"]) if path.startswith("artist 2/album 1/")]
    assert library.find("artist 2/album 1/") == library.find("album 1") == album
    assert library.find("title 57") == library.find("e 57") == [57]  # a part that one song has


def test_a_file_of_the_same_audio_means_the_song_that_has_a_row(
    clusters: tuple[Path, pd.DataFrame, np.ndarray],
) -> None:
    folder, table, _ = clusters
    path = table["path"].tolist()
    same = {
        "best/Opener.mp3": path[8],
        "best/Closer.mp3": path[9],
        "artist 2/x.mp3": path[8],
        "best/Open end.mp3": path[8],
    }
    library = Library(table, folder.resolve() / "music", same)
    assert library.find("best/Opener.mp3") == library.find("opener") == library.find("Open") == [8]
    assert library.find("best") == [8, 9]
    assert [library.locate(text) for text in ("best/Opener.mp3", "closer", "best")] == [path[8], path[9], "best"]
    assert library.note("closer") == f"best/Closer.mp3 has the same audio as {path[9]}, which stands for both"
    assert library.note("best").startswith("3 files in best have the same audio as files elsewhere")
    assert library.note("artist 2") == library.note("title 8") == library.note(path[8]) == ""  # the song itself
    with pytest.raises(UserError, match=r'fits 2 songs: .*\(best/Opener.mp3\)", .*\(best/Closer.mp3\)"; give one'):
        Library(table, folder / "music", dict(list(same.items())[:2])).find("er")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("title 5", "fits 3 songs"),
        ("artist 2 - title", 'fits 10 songs: "Artist 2 - Title 2 (artist 2/album 0/2.flac)", "Artist 2 - Title 5 ('),
        ("tittle 57", 'no song of that name; the closest are "Artist 3 - Title 57"'),
        ("zzzzzzzz", "no song of that name; give its path"),
        ("\x00", "no song of that name"),
        (" ", "no song of that name"),
        ("x" * 5000, "no song of that name"),
        ("\x1b[2J\n", "no song of that name"),
    ],
)  # fmt: skip
def test_a_song_that_is_none_or_several(clusters: tuple[Path, pd.DataFrame, np.ndarray], text: str, told: str) -> None:
    folder, table, _ = clusters
    table.loc[8, "title"] = table.loc[9, "title"] = "Title 5"
    with pytest.raises(UserError) as refused:
        Library(table, folder / "music").find(text)
    assert told in str(refused.value)
    assert str(refused.value).isprintable()


def test_a_file_that_is_not_embedded(clusters: tuple[Path, pd.DataFrame, np.ndarray]) -> None:
    folder, table, _ = clusters
    (folder / "new.mp3").touch()
    with pytest.raises(UserError, match="not among the 60 songs embedded"):
        Library(table, folder / "music").find(str(folder / "new.mp3"))


def test_many_candidates_are_cut(clusters: tuple[Path, pd.DataFrame, np.ndarray]) -> None:
    folder, table, _ = clusters
    with pytest.raises(UserError, match=r"fits 60 songs: .* and 50 more"):
        Library(table, folder / "music").find("title")


def rating_table(n: int = 400, dim: int = 24, noise: float = 0.05) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    """A table of which a third is rated, by a plane through its vectors; the vectors; what all ratings would be."""
    rng = np.random.default_rng(0)
    table = song_table(n)
    vectors = rng.standard_normal((n, dim))
    true = 0.5 + unit(vectors) @ rng.normal(0, 0.15, dim)
    table["rating"] = np.where(np.arange(n) % 3 == 0, (true + rng.normal(0, noise, n)).clip(0, 1), np.nan)
    return table, vectors, true


def test_top_ranks_by_planted_ratings(tmp_path: Path) -> None:
    table, vectors, true = rating_table()
    library_file(tmp_path, table, vectors)
    found = chosen(tmp_path, "--top", "--count", 400)
    rows = numbers(found)
    assert set(rows) == set(np.flatnonzero(table["rating"].isna()))
    assert np.corrcoef(true[rows], np.arange(len(rows)))[0, 1] < -0.95
    predicted = np.array([float(row["predicted_rating"]) for row in found])
    assert (np.diff(predicted) <= 0).all()
    assert predicted.min() >= 0
    assert predicted.max() <= 1
    # The stated deviations are those seen: the errors in units of them have a deviation of 1.
    std = np.array([float(row["std"]) for row in found])
    error = true[rows] + np.random.default_rng(1).normal(0, 0.05, len(rows)) - predicted
    assert 0.8 < np.std(error / std) < 1.25


def test_another_file_of_a_rated_song_is_not_unrated(tmp_path: Path) -> None:
    table, vectors, _ = rating_table(60)
    for column in ("title", "artists", "duration"):
        value: Any = table.at[0, column]
        table.at[1, column] = value
    library_file(tmp_path, table, vectors)
    assert 1 not in numbers(chosen(tmp_path, "--top", "--count", 60))


def test_explore_asks_for_songs_far_from_the_rated_ones_and_not_twice_alike(tmp_path: Path) -> None:
    table = song_table(120)
    classes = np.arange(120) % 6
    vectors = planted(classes, width=24)
    table["rating"] = np.where(np.isin(classes, (0, 1, 2)) & (np.arange(120) < 60), 0.1 + 0.3 * classes, np.nan)
    library_file(tmp_path, table, vectors)
    found = chosen(tmp_path, "--explore", "--count", 3)
    assert sorted(classes[numbers(found)]) == [3, 4, 5]  # none of a known cluster, and one of each unknown one
    # Without the posterior the three most uncertain are of fewer clusters: the test would not see a plain sort else.
    rated = np.isfinite(table["rating"].to_numpy())
    x = unit(vectors)
    std = RatingModel(x[rated], table["rating"].to_numpy()[rated]).predict(x)[1]
    assert len(set(classes[np.argsort(-std)[:3]])) < 3
    assert std[np.isin(classes, (3, 4, 5))].min() > std[np.isin(classes, (0, 1, 2))].max()


@pytest.mark.parametrize("width", [5, 40])
def test_the_rating_model_is_bayesian_ridge_of_all_dimensions(width: int) -> None:
    """Of vectors narrower and wider than the rated songs are many."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((60, width)), whiten=False)
    y, mean = rng.random(15), x[:15].mean(axis=0)
    whole = BayesianRidge(alpha_1=1.0, alpha_2=NOISE**2).fit(x[:15] - mean, y)
    for found, expected in zip(
        RatingModel(x[:15], y).predict(x), whole.predict(x - mean, return_std=True), strict=True
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-4)


def test_a_pick_counts_as_a_rated_song() -> None:
    """The variance that explore goes by is what fitting with that song would leave, for the same prior and noise."""
    rng = np.random.default_rng(0)
    x = unit(rng.standard_normal((40, 6)))
    model = RatingModel(x[:15], rng.random(15))
    picked = model.explore(x[15:], 5, lambda _: True)
    mean = x[:15].mean(axis=0)
    covariance = model._times_covariance(np.eye(6))
    for row in picked:
        here = x[15:] - mean
        assert (here @ covariance * here).sum(axis=1).argmax() == row
        covariance = np.linalg.inv(np.linalg.inv(covariance) + np.outer(here[row], here[row]) / model.noise**2)
    assert model.explore(x[15:], 5, lambda row: row in picked[2:])[:1] != picked[:1]


@pytest.mark.parametrize("option", ["--top", "--explore"])
def test_too_few_ratings(tmp_path: Path, option: str) -> None:
    table, vectors, _ = rating_table(60)
    table.loc[12:, "rating"] = np.nan
    library_file(tmp_path, table, vectors)
    with pytest.raises(UserError, match=r"4 of 60 songs have a rating.*10.*simsiam_dali.pack"):
        chosen(tmp_path, option)
    table["rating"] = np.where(np.arange(60) < 20, 0.5, np.nan)
    library_file(tmp_path, table, vectors)
    with pytest.raises(UserError, match="same rating"):
        chosen(tmp_path, option)
    table["rating"] = np.arange(60) / 60
    library_file(tmp_path, table, vectors)
    with pytest.raises(UserError, match="none of the 60 songs is left"):
        chosen(tmp_path, option)
    with pytest.raises(UserError, match="go with --like"):
        chosen(tmp_path, option, "--exclude-same-artist")


def test_many_seeds_are_all_compared() -> None:
    both = unit(np.random.default_rng(0).standard_normal((4000, 16)))
    seeds, x = both[:1500], both[1500:]  # more than one block of queries
    np.testing.assert_allclose(nearest_cosine(seeds, x), (x @ seeds.T).max(axis=1), atol=1e-6)


def hostile(folder: Path) -> tuple[Path, pd.DataFrame]:
    """A library whose songs 1 to 5, one cluster with song 0, have tags and paths that try to break out."""
    table: Any = song_table(12, artists=12)  # pandas-stubs has no lists in cells
    table.at[1, "title"], table.at[1, "artists"], table.at[1, "albums"] = HOSTILE, [HOSTILE], [HOSTILE]
    table.at[2, "path"] = "a b/100% #1 ?ü&<日本>.mp3"
    table.at[3, "path"] = "#hash.mp3"
    table.at[3, "duration"] = np.nan
    table.at[4, "path"] = "line\nbreak.mp3"
    table.at[5, "path"] = "byte\\xff.mp3"
    table.at[5, "title"], table.at[5, "artists"], table.at[5, "album_artist"] = "", [], ""
    library_file(folder, table, planted(np.arange(12) // 6))
    music = folder.resolve() / "music"
    os.rename(os.fsencode(music / "byte\\xff.mp3"), os.fsencode(music) + b"/byte\xff.mp3")  # noqa: PTH104 - bytes
    return folder, table


def test_xspf_holds_any_tag_and_path(tmp_path: Path) -> None:
    folder, table = hostile(tmp_path)
    options = ("--embeddings", folder / "embeddings.parquet", "--like", "Title 0", "--count", 5)
    command(*options, "--xspf", folder / "out.xspf")
    root = ET.parse(folder / "out.xspf").getroot()
    assert (root.tag, root.get("version")) == (f"{NS}playlist", "1")
    assert [child.tag.removeprefix(NS) for child in root] == ["title", "creator", "trackList"]
    order = ["location", "title", "creator", "annotation", "album", "duration"]  # as the specification lists them
    tracks = list(root[2])
    assert len(tracks) == 5
    files = {}
    for track in tracks:
        names = [child.tag.removeprefix(NS) for child in track]
        assert names == [name for name in order if name in names]
        assert all(child.text for child in track)
        uri = track.findtext(f"{NS}location")
        assert uri is not None
        assert uri.isascii()
        assert uri.startswith("file:///")
        parts = urlsplit(uri)
        assert (parts.netloc, parts.query, parts.fragment) == ("", "", "")
        path = unquote_to_bytes(parts.path)
        assert Path(os.fsdecode(path)).exists()
        files[os.path.relpath(path, os.fsencode((folder / "music").resolve()))] = track
    own = {os.fsencode(name) for name in table["path"][1:5]} | {b"byte\xff.mp3"}
    assert set(files) == own
    song = files[os.fsencode(table["path"][1])]
    title = song.findtext(f"{NS}title")
    assert title is not None
    assert title.startswith('<script>alert(1)</script> ]]> & "q" #EXTINF:9,x  [2J')
    assert not any(unicodedata.category(c) == "Cc" for c in title)
    assert song.findtext(f"{NS}duration") == str(round(table["duration"][1] * 1000))
    assert files[b"#hash.mp3"].find(f"{NS}duration") is None
    assert files[b"byte\xff.mp3"].findtext(f"{NS}title") == "byte\\xff"

    command(*options, "--xspf", folder / "lists/out.xspf", "--relative-to", folder / "lists")
    for location in ET.parse(folder / "lists/out.xspf").getroot().iter(f"{NS}location"):
        assert location.text is not None
        assert location.text.startswith("../music/")
        assert (folder / "lists" / os.fsdecode(unquote_to_bytes(location.text))).exists()


def test_m3u8_has_two_lines_a_song(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, table = hostile(tmp_path)
    options = ("--embeddings", folder / "embeddings.parquet", "--like", "Title 0", "--count", 5)
    command(*options, "--m3u8", folder / "out.m3u8", "--relative-to", folder / "music")
    lines = (folder / "out.m3u8").read_bytes().decode("utf-8").splitlines()
    assert lines[0] == "#EXTM3U"
    songs = dict(zip(lines[4::2], lines[3::2], strict=True))
    assert set(songs) == {table["path"][1], table["path"][2], "./#hash.mp3"}
    assert songs["./#hash.mp3"] == "#EXTINF:-1,Artist 3 - Title 3"
    assert songs[table["path"][2]] == f"#EXTINF:{round(table['duration'][2])},Artist 2 - Title 2"
    assert all(line.startswith("#EXTINF:") for line in songs.values())
    warned = capsys.readouterr().err
    assert "left out" in warned
    assert "'line\\nbreak.mp3'" in warned
    assert "byte" in warned
    command(*options, "--m3u8", folder / "absolute.m3u8")
    paths = (folder / "absolute.m3u8").read_text(encoding="utf-8").splitlines()[4::2]
    assert all(Path(path).is_absolute() and Path(path).is_file() for path in paths)


def test_the_terminal_gets_no_control_characters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, _ = hostile(tmp_path)
    command("--embeddings", folder / "embeddings.parquet", "--like", "Title 0", "--count", 5)
    lines = capsys.readouterr().out.splitlines()
    assert all(line.isprintable() for line in lines)
    assert lines[0] == "5 of 12 songs: like Artist 0 - Title 0"
    assert len(lines) == 2 + 1 + 5
    column = lines[2].index("album")
    where = [cell_len(line[: line.index("Album")]) for line in lines[3:] if "Album" in line]
    assert where == [column] * 4


def test_wide_letters_are_cut_by_columns() -> None:
    assert truncate("日本語の歌", 10) == "日本語の歌"
    assert truncate("日本語の歌だ", 10) == "日本語の…"
    assert cell_len("e\u0301") == 1


def test_csv_round_trips(tmp_path: Path) -> None:
    folder, table = hostile(tmp_path)
    found = chosen(folder, "--like", "Title 0", "--count", 5)
    assert tuple(found[0]) == CSV_COLUMNS
    paths = {row["path"] for row in found}
    assert paths == {str(folder.resolve() / "music" / name) for name in table["path"][1:5]}
    assert all(row["title"].isprintable() or "\u202e" in row["title"] for row in found)


def test_missing_songs_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    library_file(tmp_path, song_table(30), planted(np.arange(30) % 6), files=False)
    chosen(tmp_path, "--like", "Title 0", "--count", 12)
    warned = capsys.readouterr().err
    assert "warning: files that are missing" in warned
    assert "and 2 more" in warned
    (tmp_path / "moved").mkdir()
    moved = chosen(tmp_path, "--like", "Title 0", "--count", 1, "--music", tmp_path / "moved")
    assert moved[0]["path"].startswith(str((tmp_path / "moved").resolve()))


def test_other_files_are_not_written_over(clusters: tuple[Path, pd.DataFrame, np.ndarray]) -> None:
    folder, _, _ = clusters
    base = ("--embeddings", folder / "embeddings.parquet", "--like", "Title 0")
    for name in ("xspf", "m3u8", "csv"):
        mine = folder / f"mine.{name}"
        mine.write_text("of the user's")
        with pytest.raises(UserError, match="--replace"):
            command(*base, f"--{name}", mine)
        assert mine.read_text() == "of the user's"
        command(*base, f"--{name}", mine, "--replace")
        first = mine.read_bytes()
        command(*base, f"--{name}", mine, "--count", 3)  # one of ours
        assert mine.read_bytes() != first
        with pytest.raises(UserError, match="choose another file"):
            command(*base, f"--{name}", folder)
        (folder / "closed").write_text("a file where a folder would have to be")
        with pytest.raises(UserError, match=r"closed.*choose another file"):
            command(*base, f"--{name}", folder / "closed/list")
        with pytest.raises(UserError, match="cannot write"):
            command(*base, f"--{name}", folder / ("x" * 250))  # too long with what the temporary file's name adds
    with pytest.raises(UserError, match="one file"):
        command(*base, "--csv", folder / "a", "--m3u8", folder / "a")
    assert sorted(p.name for p in folder.iterdir() if p.name.startswith(".")) == []


def test_tables_that_are_refused(tmp_path: Path) -> None:
    table, vectors = song_table(12), planted(np.arange(12) % 6)

    def refused(why: str, table: pd.DataFrame, vectors: np.ndarray, *options: Any) -> None:
        path = library_file(tmp_path, table, vectors, files=False)
        with pytest.raises(UserError, match=why):
            command("--embeddings", path, "--like", "Title 0", *options)

    refused("without --per-segment", table.assign(song=np.arange(12) // 2), vectors)
    refused("not finite", table, np.where(np.arange(12)[:, None] == 3, np.nan, vectors))
    refused("none of the 12 songs is left", table, vectors, "--min-seconds", 1e6)
    with pytest.raises(UserError, match="no embeddings"):
        command("--embeddings", tmp_path / "none.parquet", "--top")


def test_the_command_line(
    clusters: tuple[Path, pd.DataFrame, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, _, _ = clusters
    monkeypatch.setattr(
        sys, "argv", ["recommend", "--embeddings", str(folder / "embeddings.parquet"), "--like", "no such"]
    )
    with pytest.raises(SystemExit) as stopped:
        recommend.main()
    assert stopped.value.code == 1
    assert capsys.readouterr().err.startswith("error: --like no such: no song of that name")
    monkeypatch.setattr(sys, "argv", ["recommend", "--top", "--explore"])
    with pytest.raises(SystemExit):
        recommend.main()
