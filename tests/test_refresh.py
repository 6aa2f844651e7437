"""The refresh command: only what is new is embedded, all else is kept bit for bit, and a kill leaves old or new."""

import argparse
import dataclasses
import os
import random
import shlex
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import mutagen
import numpy as np
import pytest
import torch
from helpers import fork_server
from helpers.full_disk import fill, small_disk
from helpers.kills import KILL_AT
from helpers.small_music import write_song

from simsiam_dali import embed, recommend, refresh, train
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.embedding import refresh as embedding_refresh
from simsiam_dali.embedding.records import FileRecord, read_records, records_path
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.table import Embeddings, read_embeddings, read_provenance, write_embeddings
from simsiam_dali.embedding.write import is_up_to_date
from simsiam_dali.packing.find import SongFile

HOUR_AGO = time.time() - 3600
SONGS = ("a/one.flac", "a/two.mp3", "b/three.flac", "b/four.ogg", "c/five.flac", "six.flac")


def settle(*paths: Path, time_s: float = HOUR_AGO) -> None:
    """As if written an hour ago, so that no file looks as if it were still being written."""
    for path in paths:
        os.utime(path, (time_s, time_s))


def run(home: Path, *options: object) -> None:
    refresh.run(parsed(home, *options))


def parsed(home: Path, *options: object) -> argparse.Namespace:
    words = [home / "music", "--out", home / "e.parquet", "--playlists", home / "playlists", "--device", "cpu"]
    return refresh.build_parser().parse_args([str(word) for word in (*words, *options)])


def content(home: Path) -> dict[str, tuple[bytes, int]]:
    """Bytes and modification time of every file but the music and the lock."""
    files = [p for p in home.rglob("*") if p.is_file() and home / "music" not in p.parents and p.suffix != ".lock"]
    return {str(p.relative_to(home)): (p.read_bytes(), p.stat().st_mtime_ns) for p in files}


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, small_runs: dict[str, Path]) -> Path:
    """`music/` of six songs, and `e.parquet` made of it by `embed --music`."""
    home = tmp_path_factory.mktemp("template")
    for seed, name in enumerate(SONGS):
        path = write_song(home / "music" / name, seed, 5.0 + seed / 4, title=Path(name).stem, artist=f"Artist {seed}")
        settle(path)
    words = ["--checkpoint", small_runs["simsiam"], "--music", home / "music", "--out", home / "e.parquet"]
    embed.run(embed.build_parser().parse_args([str(word) for word in (*words, "--device", "cpu")]))
    return home


@pytest.fixture
def home(tmp_path: Path, template: Path) -> Path:
    """A copy of the template that knows no other place."""
    home = Path(shutil.copytree(template, tmp_path / "home"))
    songs = read_embeddings(home / "e.parquet")
    moved = {**songs.provenance, "music": str(home / "music")}
    write_embeddings(home / "e.parquet", dataclasses.replace(songs, provenance=moved))
    return home


def embed_whole(home: Path, run_dir: Path) -> None:
    """Write `whole.parquet`, of all songs, by the embed command."""
    words = ["--checkpoint", run_dir, "--music", home / "music", "--out", home / "whole.parquet", "--device", "cpu"]
    embed.run(embed.build_parser().parse_args([str(word) for word in words]))


def vectors(songs: Embeddings) -> dict[str, bytes]:
    return {path: vector.tobytes() for path, vector in zip(songs.table["path"], songs.vectors, strict=True)}


def change(music: Path) -> None:
    """Something of every kind."""
    write_song(music / "new.flac", 20, 5, title="new")
    write_song(music / "b/three.flac", 21, 5, title="three, recorded again")
    (music / "a/one.flac").rename(music / "moved.flac")
    tags = mutagen.File(music / "a/two.mp3", easy=True)
    tags["title"] = "two, another title"
    tags.save()
    (music / "b/four.ogg").unlink()
    shutil.copy(music / "c/five.flac", music / "c/five again.flac")
    (music / "broken.mp3").write_bytes(b"no music at all")
    settle(*(p for p in music.rglob("*") if p.is_file() and p.stat().st_mtime > HOUR_AGO + 60), time_s=HOUR_AGO + 60)


def test_everything_that_can_change(
    home: Path, small_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_embeddings(home / "e.parquet")
    change(home / "music")
    write_song(home / "music/fresh.flac", 22, 5)
    run(home)
    said, songs = capsys.readouterr().out, read_embeddings(home / "e.parquet")
    for line in (
        "waiting   fresh.flac: modified just now",
        "new       new.flac",
        "changed   b/three.flac",
        "retagged  a/two.mp3",
        "moved     a/one.flac -> moved.flac",
        "duplicate c/five again.flac: the same audio as c/five.flac",
        "gone      b/four.ogg",
        "refused   broken.mp3: does not open as audio",
        "6 songs (1 new, 1 changed, 1 retagged, 1 moved, 1 gone)",
    ):
        assert line in said
    old, new = vectors(before), vectors(songs)
    for now, then in {"a/two.mp3": "a/two.mp3", "moved.flac": "a/one.flac", "six.flac": "six.flac"}.items():
        assert new[now] == old[then]
    assert before.within is not None
    assert songs.within is not None
    assert before.within.freedom < songs.within.freedom  # pooled with that of the two songs that were embedded

    # The same as embedding the whole folder.
    (home / "music/fresh.flac").unlink()
    embed_whole(home, small_runs["simsiam"])
    made = read_embeddings(home / "whole.parquet")
    for column in made.table:
        assert songs.table[column].astype(str).tolist() == made.table[column].astype(str).tolist(), column
    cosine = (songs.vectors * made.vectors).sum(1) / np.prod(
        [np.linalg.norm(t.vectors, axis=1) for t in (songs, made)], 0
    )
    assert cosine.min() > 0.999999
    assert not list(home.glob(".e.parquet.packed"))


def test_songs_behind_a_link_that_leads_nowhere_now_are_kept(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Their disk may not be mounted."""
    elsewhere, link = tmp_path / "disk", home / "music/more"
    for seed in (30, 31):
        settle(write_song(elsewhere / f"{seed}.flac", seed, 5))
    link.symlink_to(elsewhere)
    run(home)
    before = vectors(read_embeddings(home / "e.parquet"))
    assert {"more/30.flac", "more/31.flac"} <= before.keys()
    elsewhere.rename(tmp_path / "not mounted")
    capsys.readouterr()
    run(home)
    assert vectors(read_embeddings(home / "e.parquet")) == before
    assert "more: cannot be read: No such file or directory" in capsys.readouterr().out


def test_a_changed_song_that_cannot_be_read_now_keeps_its_vector(
    home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = home / "music/six.flac"
    write_song(changed, 40, 5)
    settle(changed, time_s=HOUR_AGO + 60)
    before, decode = vectors(read_embeddings(home / "e.parquet")), embedding_refresh.decode

    def fails(files: list[SongFile], *_: object) -> embedding_refresh.Decoded:
        return embedding_refresh.Decoded(None, {file.name: failed(file) for file in files})

    def failed(file: SongFile) -> FileRecord:
        return FileRecord(file.name, file.bytes, file.mtime_ns, "", "the disk did not answer", retry=True)

    monkeypatch.setattr(embedding_refresh, "decode", fails)
    run(home)
    assert vectors(read_embeddings(home / "e.parquet")) == before
    assert "refused   six.flac: the disk did not answer" in capsys.readouterr().out
    monkeypatch.setattr(embedding_refresh, "decode", decode)
    run(home)
    after = vectors(read_embeddings(home / "e.parquet"))
    assert {path for path, vector in after.items() if vector != before[path]} == {"six.flac"}


def test_a_song_that_is_overwritten_by_something_else_is_gone(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "music/six.flac").write_bytes(b"<html>a failed download")
    settle(home / "music/six.flac", time_s=HOUR_AGO + 60)
    run(home)
    assert "refused   six.flac: holds no audio that decodes" in capsys.readouterr().out
    assert "six.flac" not in vectors(read_embeddings(home / "e.parquet"))


@pytest.mark.parametrize("again", [False, True])
def test_nothing_changed_nothing_is_written(home: Path, again: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if again:  # after a refresh that found a file to refuse
        change(home / "music")
        run(home)
        (home / "music/broken.mp3").unlink()
        run(home)
    before = content(home)
    monkeypatch.setattr("simsiam_dali.embedding.refresh.decode", None)
    run(home)
    assert content(home) == before


def test_a_table_without_records_takes_those_of_its_shards(
    tmp_path: Path, small_shards: Path, small_runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, music = tmp_path / "e.parquet", small_shards.parent / "music"
    words = ["--checkpoint", small_runs["simsiam"], "--out", out, "--device", "cpu"]
    embed.run(embed.build_parser().parse_args([str(word) for word in words]))
    before, records = out.read_bytes(), records_path(out).read_bytes()
    records_path(out).unlink()
    monkeypatch.setattr("simsiam_dali.embedding.refresh.decode", None)
    refresh.run(refresh.build_parser().parse_args([str(word) for word in (music, "--out", out, "--device", "cpu")]))
    assert (out.read_bytes(), records_path(out).read_bytes()) == (before, records)


@pytest.mark.parametrize(("kind", "options"), [("simsiam", []), ("simple", ["--replace"])])
def test_a_table_that_is_not_there_or_may_be_replaced_is_made(
    home: Path, small_runs: dict[str, Path], kind: str, options: list[str]
) -> None:
    if not options:
        (home / "e.parquet").unlink()
    run(home, "--checkpoint", small_runs[kind], *options)
    embed_whole(home, small_runs[kind])
    made, whole = read_embeddings(home / "e.parquet"), read_embeddings(home / "whole.parquet")
    assert vectors(made) == vectors(whole)
    assert made.provenance.keys() == whole.provenance.keys()
    np.testing.assert_allclose(made.unit() @ made.unit().T, whole.unit() @ whole.unit().T, atol=1e-3)


@pytest.mark.parametrize(
    ("before", "after"),
    [("float32", "float32"), ("bfloat16", "bfloat16, float32"), ("bfloat16, float32", "bfloat16, float32"), ("", None)],
)
def test_a_refreshed_table_says_its_precision(home: Path, before: str, after: str | None) -> None:
    """Which `embed --precision` compares; a table from before it was written stays without."""
    table = home / "e.parquet"
    songs = read_embeddings(table)
    provenance = {**songs.provenance, "precision": before} if before else songs.provenance.copy()
    if not before:
        del provenance["precision"]
    write_embeddings(table, dataclasses.replace(songs, provenance=provenance))
    settle(write_song(home / "music/new.flac", 20, 5))
    run(home)
    made = read_provenance(table)
    assert made.get("precision") == after
    assert is_up_to_date(table, made, replace=False)
    assert is_up_to_date(table, made | {"precision": "float32"}, replace=True) == (after in (None, "float32"))
    (home / "music/new.flac").unlink()  # and where nothing is embedded
    run(home)
    assert read_provenance(table).get("precision") == after


def test_new_songs_are_embedded_in_the_precision_of_the_table(home: Path, small_runs: dict[str, Path]) -> None:
    songs, trained = read_embeddings(home / "e.parquet"), read_run(str(small_runs["simsiam"]))
    for precision, device, taken in (
        ("float32", "cpu", "fp32"),
        ("float32", "cuda", "fp32"),
        ("float16", "cuda", "fp16"),
        ("bfloat16", "cuda", "bf16"),
        ("bfloat16", "cpu", "auto"),
        ("bfloat16, float32", "cuda", "auto"),
    ):
        table = dataclasses.replace(songs, provenance=songs.provenance | {"precision": precision})
        run_as = embedding_refresh.in_precision_of(table, trained, torch.device(device))
        assert run_as.config.train.precision == taken


def lose(names: tuple[str, ...]) -> Callable[[Path], object]:
    def unlink(home: Path) -> None:
        for name in names:
            (home / "music" / name).unlink()

    return unlink


def unknown_files(home: Path) -> None:
    records_path(home / "e.parquet").unlink()


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (lambda home: shutil.rmtree(home / "music"), [], "no such folder of music"),
        (lose(SONGS), [], "no audio file in this folder"),
        (lose(SONGS[:4]), [], "holds only 2 of the 6 songs of the table"),
        (lambda home: [lose(SONGS)(home), write_song(home / "music/x.flac", 9)], [], "holds none of the 6 songs"),
        (lambda _: None, ["--checkpoint", "simple"], "was made by another checkpoint"),
        (unknown_files, [], "holds other songs than"),
        (lambda home: (home / "e.parquet").write_bytes(b"no table"), [], "is damaged or holds no embeddings"),
    ],
)
def test_refused_and_nothing_is_changed(
    home: Path, small_runs: dict[str, Path], damage: Callable[[Path], object], options: list[str], words: str
) -> None:
    damage(home)
    before = content(home)
    with pytest.raises(UserError, match=words):
        run(home, *(small_runs.get(option, option) for option in options))
    assert content(home) == before


@pytest.mark.parametrize("other", [{"rows": "segments"}, {"features": "mfcc"}, {"table_version": "1"}])
def test_a_table_of_something_else_is_refused(home: Path, other: dict[str, str]) -> None:
    songs = read_embeddings(home / "e.parquet")
    made_by = songs.provenance | other
    write_embeddings(home / "e.parquet", dataclasses.replace(songs, provenance=made_by))
    with pytest.raises(UserError, match=r"embed again with python -m simsiam_dali\.embed"):
        run(home)


def test_replace_drops_what_is_gone(home: Path) -> None:
    lose(SONGS[:5])(home)
    run(home, "--replace")
    assert read_embeddings(home / "e.parquet").table["path"].tolist() == ["six.flac"]


def test_what_cannot_be_read_now_is_kept(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = vectors(read_embeddings(home / "e.parquet"))
    (home / "music/six.flac").unlink()
    (home / "music/six.flac").symlink_to("on a disk that is away.wav")
    lose(SONGS[:1])(home)
    run(home)
    del before["a/one.flac"]
    assert vectors(read_embeddings(home / "e.parquet")) == before
    assert "unread    six.flac" in capsys.readouterr().out


def test_ratings_override_tags_and_stay(home: Path) -> None:
    ratings = home / "ratings.csv"
    ratings.write_text("path,rating\nsix.flac,1.0\na/two.mp3,0.6\n")
    before = read_embeddings(home / "e.parquet")
    run(home, "--ratings", ratings)
    change(home / "music")  # the tags of a/two.mp3, in which there is no rating
    run(home)
    songs = read_embeddings(home / "e.parquet")
    rated = dict(zip(songs.table["path"], songs.table["rating"], strict=True))
    assert (rated["six.flac"], rated["a/two.mp3"]) == (1.0, 0.6)
    assert vectors(songs)["six.flac"] == vectors(before)["six.flac"]


def test_a_rating_of_any_file_of_a_song_counts_its_row_s_first(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy(home / "music/c/five.flac", home / "music/z five.flac")
    settle(home / "music/z five.flac")
    ratings = home / "ratings.csv"
    ratings.write_text("path,rating\nz five.flac,0.4\nsix.flac,1.0\n")
    run(home, "--ratings", ratings)
    assert "2 of 6 songs matched in the file of ratings" in capsys.readouterr().out
    table = read_embeddings(home / "e.parquet").table
    assert "z five.flac" not in set(table["path"])
    rated = dict(zip(table["path"], table["rating"], strict=True))
    assert (rated["c/five.flac"], rated["six.flac"]) == (0.4, 1.0)
    ratings.write_text("path,rating\nz five.flac,0.4\nc/five.flac,0.8\nsix.flac,1.0\n")
    run(home, "--ratings", ratings)
    table = read_embeddings(home / "e.parquet").table
    assert table["rating"][table["path"] == "c/five.flac"].tolist() == [0.8]


def test_an_empty_rating_removes_that_of_the_table_and_of_the_tags(home: Path) -> None:
    ratings = home / "ratings.csv"
    ratings.write_text("path,rating\nsix.flac,1.0\na/one.flac,0.6\n")
    run(home, "--ratings", ratings)
    tags = mutagen.File(home / "music/c/five.flac")
    tags["FMPS_RATING"] = "0.4"
    tags.save()
    settle(home / "music/c/five.flac", time_s=HOUR_AGO + 60)
    ratings.write_text("path,rating\nsix.flac,\nc/five.flac,\n")
    run(home, "--ratings", ratings)
    table = read_embeddings(home / "e.parquet").table
    rated = dict(zip(table["path"], table["rating"], strict=True))
    assert {path: rating for path, rating in rated.items() if rating == rating} == {"a/one.flac": 0.6}


def test_a_dry_run_writes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(home / "music")
    before = content(home)
    run(home, "--dry-run")
    assert content(home) == before
    said = capsys.readouterr().out
    for line in ("new       new.flac", "changed   b/three.flac", "moved     a/one.flac", "gone      b/four.ogg"):
        assert line in said


def save(home: Path, name: str, *request: object) -> None:
    words = ["--embeddings", home / "e.parquet", "--playlists", home / "playlists", "--save", name, *request]
    recommend.run(recommend.build_parser().parse_args([str(word) for word in words]))


def test_saved_playlists_follow(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, song in {"moves": "a/one.flac", "goes": "b/four.ogg"}.items():
        save(home, name, "--like", home / "music" / song, "--count", 9)
    before = content(home)
    change(home / "music")
    capsys.readouterr()
    run(home)
    said, after = capsys.readouterr().out, content(home)
    assert "playlist  moves: 2 songs added, 2 removed" in said  # new.flac, b/four.ogg, and c/five as "c/five again"
    assert "goes: b/four.ogg is not in the library any more" in said
    assert "moved.flac" in after["playlists/moves.json"][0].decode()
    assert "../music/new.flac" in after["playlists/moves.m3u8"][0].decode().splitlines()
    for suffix in ("json", "m3u8", "xspf"):
        assert after[f"playlists/goes.{suffix}"] == before[f"playlists/goes.{suffix}"]
    run(home)
    assert content(home) == after


def test_a_duplicate_names_the_song_that_stands_for_it(
    home: Path, small_runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """By its path and by its own tags, in the table of `embed` as in that of a refresh."""
    (home / "music/copies").mkdir()
    copy = Path(shutil.copy(home / "music/c/five.flac", home / "music/copies/V.flac"))
    tags = mutagen.File(copy)
    tags["title"], tags["artist"] = "Fifth", "Somebody"
    tags.save()
    settle(copy)
    run(home)
    embed_whole(home, small_runs["simsiam"])
    one = "copies/V.flac has the same audio as c/five.flac, which stands for both"
    for table in (home / "e.parquet", home / "whole.parquet"):
        for option, text, note in (
            ("--like", copy, one),
            ("--radio", "Fifth", one),
            ("--like", "somebody - fifth", one),
            ("--like", copy.parent, one),
            ("--like", "five", ""),
        ):
            capsys.readouterr()
            recommend.run(recommend.build_parser().parse_args(["--embeddings", str(table), option, str(text)]))
            title, *lines = capsys.readouterr().out.splitlines()
            if note:
                assert title == note
                title = lines[0]
            assert title.endswith((": like Artist 4 - five", ": radio from Artist 4 - five"))
    copy.unlink()
    records_path(home / "whole.parquet").unlink()
    with pytest.raises(UserError, match=r"Fifth: no song of that name"):
        recommend.run(recommend.build_parser().parse_args(["--embeddings", str(table), "--like", "Fifth"]))


def test_a_playlist_keeps_a_song_that_another_file_of_the_same_audio_stands_for(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save(home, "kept", "--like", "five", "--count", 3)
    settle(Path(shutil.copy(home / "music/c/five.flac", home / "music/a/five.flac")))
    settle(write_song(home / "music/new.flac", 20, 5))
    capsys.readouterr()
    run(home)
    assert "c/five.flac" not in vectors(read_embeddings(home / "e.parquet"))
    said = capsys.readouterr().out
    assert "duplicate a/five.flac: the same audio as c/five.flac" in said
    assert "not in the library any more" not in said


def test_a_playlist_of_another_table_is_left_alone_until_that_is_gone(
    home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = home / "other.parquet"
    shutil.copy(home / "e.parquet", other)
    save(home, "mine", "--like", home / "music/a/one.flac", "--count", 9)
    save(home, "theirs", "--like", home / "music/a/two.mp3", "--count", 9, "--embeddings", other)
    before = content(home)
    change(home / "music")
    capsys.readouterr()
    run(home, "--dry-run")
    assert "; 1 saved playlists would be made again" in capsys.readouterr().out
    run(home)
    assert f"kept      theirs: a playlist of {other}" in capsys.readouterr().out
    after = content(home)
    assert after["playlists/mine.m3u8"] != before["playlists/mine.m3u8"]
    for suffix in ("json", "m3u8", "xspf"):
        assert after[f"playlists/theirs.{suffix}"] == before[f"playlists/theirs.{suffix}"]
    other.unlink()
    (home / "playlists/theirs.m3u8").unlink()
    run(home)
    assert "kept" not in capsys.readouterr().out
    assert (home / "playlists/theirs.m3u8").exists()


def test_a_playlist_that_is_newer_than_the_table_is_left_alone_and_one_that_is_missing_is_made(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(home, "near", "--like", home / "music/a/one.flac")
    playlist = home / "playlists/near.m3u8"
    before = playlist.read_bytes()
    playlist.unlink()
    run(home)
    assert playlist.read_bytes() == before
    settle(*(home / "playlists").iterdir(), time_s=HOUR_AGO - 60)  # older than the table
    run(home)
    monkeypatch.setattr("simsiam_dali.refresh.remake_all", None)
    run(home)


@pytest.mark.parametrize(("split", "new"), [([""] * 3, 0), (["train", "", "val"], 1), (["train"] * 3, 0)])
def test_a_table_that_does_not_know_the_training_s_songs_calls_none_of_them_new(
    home: Path, small_runs: dict[str, Path], split: list[str], new: int
) -> None:
    songs = read_embeddings(home / "e.parquet")
    songs = dataclasses.replace(songs, table=songs.table[:3].assign(split=split))
    run_of_table, records = read_run(str(small_runs["simsiam"])), read_records(records_path(home / "e.parquet"))
    assert records is not None
    assert embedding_refresh.never_trained_on(songs, records, run_of_table, None) == new


@pytest.mark.parametrize("new", [1, 2])
def test_training_again_is_advised_above_a_fifth(
    home: Path,
    new: int,
    small_runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(refresh, "never_trained_on", lambda *_: new)
    ratings = home / "my ratings.csv"
    ratings.write_text("path,rating\nsix.flac,1.0\n")
    run(home, "--ratings", ratings)
    printed = capsys.readouterr().out
    assert ("python -m simsiam_dali.train" in printed) == (new == 2)
    assert (f"--ratings '{ratings}'" in printed) == (new == 2)
    if new == 2:  # with the settings of the run that made the table, which has a name of its own
        (line,) = (line for line in printed.splitlines() if "simsiam_dali.train" in line)
        words = shlex.split(line)
        args = train.build_parser().parse_args(words[words.index("simsiam_dali.train") + 1 :])
        assert args.config == Path(small_runs["simsiam"]) / "config.yaml"
        config, run_dir = train.new_run(args)
        assert config.encoder == load_config(args.config).encoder
        assert not run_dir.exists()


def test_a_full_disk_of_the_playlists_changes_nothing(home: Path) -> None:
    """They are on another file system than the table, too."""
    with small_disk(home / "playlists", "64k") as folder:
        save(home, "near", "--like", home / "music/a/two.mp3", "--count", 9)
        lose(SONGS[:1])(home)
        filler = fill(folder)
        before = content(home)
        with pytest.raises(UserError, match=r"cannot write .*/playlists/near\.m3u8 \(No space left"):
            run(home)
        assert content(home) == before
        filler.unlink()
        run(home)
        assert "one.flac" not in (folder / "near.m3u8").read_text()
    assert len(read_embeddings(home / "e.parquet").table) == 5


KILLED = """
{kill}
import functools, sys
from simsiam_dali import refresh
from simsiam_dali.packing import pack_song, temporary
here = lambda function, jobs, workers: ((job, function(job)) for job in jobs)  # decoding, too, may be killed
temporary.pack = functools.partial(temporary.pack, executor=here)
refresh.main()
"""


def test_killed_at_any_moment_table_and_playlists_are_the_old_ones_or_the_new(home: Path) -> None:
    """Ten kills, each before a write, rename or removal: one of each commit's moves, the others drawn at random."""
    save(home, "near", "--like", home / "music/a/two.mp3", "--count", 9)
    old = files_of(home)
    lose(SONGS[:1])(home)
    settle(write_song(home / "music/new.flac", 20, 5, title="new"))
    log = home / "music/.calls"

    def refreshed(number: int) -> int:
        """Refresh in a process that is killed before its file-system call of this number; its return code."""
        code = KILLED.format(kill=KILL_AT.format(number=number, log=str(log)))
        words = [home / "music", "--out", home / "e.parquet", "--playlists", home / "playlists", "--device", "cpu"]
        return fork_server.run([sys.executable, "-c", code, *map(str, words)], home).returncode

    assert refreshed(-1) == 0
    calls, new = log.read_text().splitlines(), files_of(home)
    assert set(new) == set(old)
    assert all(new[name] != old[name] for name in ("e.parquet", ".e.parquet.files", "playlists/near.m3u8"))
    moves = [
        number
        for number, call in enumerate(calls)
        if call.startswith("os.rename") and call.split()[1].endswith(".staged")
    ]
    assert len(moves) == 5  # the journal, the table, its records, the two playlists
    points = [*moves, *random.Random(0).sample(sorted(set(range(len(calls))) - set(moves)), 5)]
    for number in points:
        for path in home.rglob("*"):
            if path.is_file() and home / "music" not in path.parents:
                path.unlink()
        for name, text in old.items():
            (home / name).write_bytes(text)
        assert refreshed(number) == -9, calls[number]
        read_embeddings(home / "e.parquet")  # any command that reads the table finishes what was committed
        assert files_of(home) == (new if number > moves[0] else old), calls[number]
        run(home)  # and the same command continues
        assert files_of(home) == new
        assert not list(home.rglob("*.staged*"))


def files_of(home: Path) -> dict[str, bytes]:
    """The table, its records, and the playlists."""
    paths = home / "e.parquet", records_path(home / "e.parquet"), *sorted((home / "playlists").glob("[!.]*"))
    return {str(path.relative_to(home)): path.read_bytes() for path in paths}
