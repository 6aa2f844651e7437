"""A saved playlist is made again from its request, gives the same bytes for the same table, and loses nothing."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import song_table
from test_recommend import command, library_file
from test_recommend_path import on_sphere

from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.recommendation.choose import Request
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.remake_all import remake_all
from simsiam_dali.recommendation.saved import read_saved, remake, save

REQUESTS = {
    "like": Request(like=("Title 3", "artist 2/album 1"), unlike=["Title 7"], year=(1990, 2010), max_per_artist=2),
    "path": Request(path=["Artist 1 - Title 9", "Title 40"], count=6),
    "radio": Request(radio="Title 3", seed=5, count=12, genre="genre 0"),
    "top": Request(top=True, count=8),
    "explore": Request(count=8),
    "songs": Request(songs=["Title 5", "Title 3", "Title 5"]),
}


@pytest.fixture
def library(tmp_path: Path) -> tuple[Library, np.ndarray]:
    """80 songs by 8 artists, at any place, and their unit vectors."""
    file = library_file(tmp_path, song_table(80, artists=8), on_sphere(80))
    songs = read_song_embeddings(file)
    return Library(songs.table, Path(songs.provenance["music"])), songs.unit()


@pytest.mark.parametrize("mode", REQUESTS)
def test_it_is_read_and_made_again_with_the_same_bytes(
    library: tuple[Library, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: str
) -> None:
    folder = tmp_path / "music/lists"
    written = save(folder, "my list", REQUESTS[mode], *library)
    assert [file.name for file in written.files] == ["my list.json", "my list.m3u8", "my list.xspf"]
    before = {file.name: file.read_text() for file in written.files}
    (saved,) = read_saved(folder)
    assert (saved.name, saved.json()) == ("my list", before.pop("my list.json"))
    monkeypatch.chdir(tmp_path / "music/artist 0")  # where a relative path could mean something else
    assert remake(*library, saved) == before
    save(folder, "my list", REQUESTS[mode], *library)  # the same request again is no other playlist
    paths = before["my list.m3u8"].splitlines()[4::2]
    assert paths
    assert all(path.startswith("../artist ") and (folder / path).is_file() for path in paths)


def test_a_newer_table_gives_a_newer_playlist_and_titles_do_not_matter(
    library: tuple[Library, np.ndarray], tmp_path: Path
) -> None:
    songs, vectors = library
    save(tmp_path / "lists", "near", Request(like=["Title 3"], count=5), songs, vectors)
    (saved,) = read_saved(tmp_path / "lists")
    new = song_table(1).assign(path="new/1.flac", title="New", artists=pd.Series([["New"]]), duration=1.0)
    table = pd.concat([songs.table.assign(title="Title 3"), new], ignore_index=True)
    text = remake(Library(table, songs.music), np.concatenate([vectors, vectors[3:4]]), saved)["near.m3u8"]
    assert text.splitlines()[4] == "../music/new/1.flac"


@pytest.mark.parametrize("mode", ["like", "path", "radio", "songs"])
def test_a_song_that_is_gone_is_an_error_that_names_the_playlist(
    library: tuple[Library, np.ndarray], tmp_path: Path, mode: str
) -> None:
    songs, vectors = library
    save(tmp_path / "lists", "mine", REQUESTS[mode], songs, vectors)
    (saved,) = read_saved(tmp_path / "lists")
    left = songs.table.index[~songs.table["title"].isin(["Title 3", "Title 9"])]
    smaller = Library(songs.table.loc[left].reset_index(drop=True), songs.music)
    with pytest.raises(UserError, match=r"playlist mine: artist \d/album \d/\d.flac is not in the library any more"):
        remake(smaller, vectors[left], saved)


def test_where_one_song_is_gone_the_record_follows_those_that_moved_and_the_playlist_stays(
    library: tuple[Library, np.ndarray], tmp_path: Path
) -> None:
    songs, vectors = library
    queue = [f"Title {n}" for n in range(6)]
    save(tmp_path / "lists", "queue", Request(songs=queue), songs, vectors)
    new = songs.table.assign(path="new/" + songs.table["path"])
    moved = dict(zip(songs.table["path"], new["path"], strict=True))
    left = new.index[new["title"] != "Title 3"]
    smaller, kept = Library(new.loc[left].reset_index(drop=True), songs.music), vectors[left]
    (made,) = remake_all(read_saved(tmp_path / "lists"), smaller, kept, moved)
    assert "3.flac is not in the library any more" in made.problem
    assert [file.name for file in made.files] == ["queue.json"]
    (tmp_path / "lists/queue.json").write_bytes(made.files[tmp_path / "lists/queue.json"])
    (saved,) = read_saved(tmp_path / "lists")
    paths = dict(zip(songs.table["title"], songs.table["path"], strict=True))
    assert saved.request.songs == [moved[paths[title]] for title in queue]
    (again,) = remake_all([saved], Library(new, songs.music), vectors, {})  # the song is back
    assert not again.problem


def test_other_files_and_other_playlists_are_kept(library: tuple[Library, np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "lists"
    save(folder, "mine", REQUESTS["songs"], *library)
    before = {file: file.read_bytes() for file in folder.iterdir()}
    with pytest.raises(UserError, match="remembers another playlist"):
        save(folder, "mine", REQUESTS["path"], *library)
    with pytest.raises(UserError, match="none of the 80 songs"):
        save(folder, "mine", Request(like=["Title 3"], min_seconds=1e6), *library, replace=True)
    assert {file: file.read_bytes() for file in folder.iterdir()} == before
    save(folder, "mine", REQUESTS["path"], *library, replace=True)
    for suffix in ("json", "m3u8", "xspf"):
        other = folder / f"other.{suffix}"
        other.write_text("{}")
        with pytest.raises(UserError, match="was not written by this command"):
            save(folder, "other", REQUESTS["songs"], *library)
        assert other.read_text() == "{}"
        assert [saved.name for saved in read_saved(folder)] == ["mine"]
        other.unlink()
    assert len(list(folder.iterdir())) == 3  # and no temporary file


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "line\nbreak", "x" * 201, " "])
def test_a_name_that_is_no_file_name(library: tuple[Library, np.ndarray], tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match="--save"):
        save(tmp_path / "lists", name, REQUESTS["songs"], *library)
    assert not (tmp_path / "lists").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda document: document.pop("request"),
        lambda document: document.update(version=99),
        lambda document: document["request"].update(count="many"),
        lambda document: document.update(paths=3),
    ],
)
def test_a_damaged_request_is_named(
    library: tuple[Library, np.ndarray], tmp_path: Path, change: Callable[[dict[str, Any]], object]
) -> None:
    save(tmp_path, "mine", REQUESTS["songs"], *library)
    document = json.loads((tmp_path / "mine.json").read_text())
    change(document)
    (tmp_path / "mine.json").write_text(json.dumps(document))
    with pytest.raises(UserError, match=r"mine\.json (is damaged|has version 99)"):
        read_saved(tmp_path)


@pytest.mark.parametrize("failing", range(3))
def test_a_failed_write_leaves_the_request_or_the_old_playlist(
    library: tuple[Library, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int
) -> None:
    save(tmp_path, "mine", REQUESTS["path"], *library)
    (old,) = read_saved(tmp_path)
    moves, replace = iter(range(10)), Path.replace

    def fail(self: Path, target: Path) -> Path:
        if next(moves) == failing:
            raise OSError(28, os.strerror(28))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, "mine", REQUESTS["songs"], *library, replace=True)
    (saved,) = read_saved(tmp_path)
    assert (saved == old) == (failing == 0)  # the request is moved in place first
    for name in remake(*library, saved):
        assert (tmp_path / name).is_file()
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("options", "first"),
    [
        ([], "music/artist 3/album 1/11.flac"),
        (["--path-prefix", "/mnt/music/"], "/mnt/music/artist 3/album 1/11.flac"),
        (["--path-prefix", ""], "artist 3/album 1/11.flac"),
        (["--relative-to", "music/artist 3"], "album 1/11.flac"),
    ],
)
def test_paths_are_as_the_player_sees_them(
    library: tuple[Library, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], first: str
) -> None:
    monkeypatch.chdir(tmp_path)
    base = ["--embeddings", "embeddings.parquet", "--radio", "Title 11", "--count", 4]
    command(*base, "--save", "mine", "--playlists", ".", *options)
    lines = (tmp_path / "mine.m3u8").read_text().splitlines()
    assert (lines[2], lines[4], len(lines[4::2])) == ("#PLAYLIST:mine", first, 4)
    (saved,) = read_saved(tmp_path)
    assert remake(*library, dataclasses.replace(saved, folder=tmp_path))["mine.m3u8"].splitlines() == lines
    if options:
        command(*base, "--m3u8", "other.m3u8", *options)
        assert (tmp_path / "other.m3u8").read_text().splitlines()[3:] == lines[3:]


def test_the_command_refuses_two_ways_to_write_paths(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("--top", "--relative-to", tmp_path, "--path-prefix", "/mnt")
    assert "not allowed with" in capsys.readouterr().err
