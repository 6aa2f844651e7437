"""The packer as a command: kills, full disks, second runs; test_hostile_songs.py has what it packs."""

import contextlib
import errno
import fcntl
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import mutagen
import numpy as np
import pytest
from helpers.groups import SECONDS, alive_in_group, until
from helpers.small_music import command, environment, make_shards, said, sound, write_audio, write_song

from simsiam_dali import pack as pack_command
from simsiam_dali.common.errors import UserError
from simsiam_dali.data.commit import lock_set
from simsiam_dali.data.format import read_index, verify
from simsiam_dali.data.shards import open_shards
from simsiam_dali.pack import build_parser, main
from simsiam_dali.packing import pack as packing
from simsiam_dali.packing.find import find_songs
from simsiam_dali.packing.pack_song import DecodeSettings, Packed, PackSettings, Refused
from simsiam_dali.packing.reuse import PackedBefore

SHORT = ("--segment-seconds", "4", "--workers", "2")


@pytest.fixture
def music(tmp_path: Path) -> Path:
    """Six songs on three albums."""
    for n in range(6):
        tags = {"title": f"Song {n}", "artist": "Somebody", "album": f"Album {n // 2}"}
        write_song(tmp_path / "music" / f"{n}.ogg", n, 6.0, **tags)
    return tmp_path / "music"


RunHere = Callable[..., tuple[object, str, str]]
Pack = Callable[..., str]


@pytest.fixture
def run_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[RunHere]:
    """The command without a process of its own, which would import everything anew: (status, stdout, stderr)."""
    before = signal.getsignal(signal.SIGTERM)

    def run(*arguments: str | Path) -> tuple[object, str, str]:
        monkeypatch.setattr(sys, "argv", ["make_shards.py", *map(str, arguments)])
        try:
            main()
            status: object = 0
        except SystemExit as e:
            status = e.code
        return status, *capsys.readouterr()

    yield run
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def pack(run_here: RunHere) -> Pack:
    """Pack a folder into the `shards` beside it, which must succeed: what it prints."""

    def run(music: Path, *arguments: str | Path) -> str:
        status, stdout, stderr = run_here(music, "--out", music.parent / "shards", *SHORT, *arguments)
        assert status == 0, stderr
        return stdout

    return run


def state(root: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in root.iterdir() if p.is_file() and p.name != ".lock"}


def audio_of(root: Path) -> dict[tuple[str, float], bytes]:
    """The encoded segments by song and start."""
    shards = open_shards(root)
    audio: dict[tuple[str, float], bytes] = {}
    for tar in map(Path, shards.tars("train") + shards.tars("val")):
        for members in read_index(tar.with_suffix(".idx")):
            offset, size, name = members["flac"]
            segment: Any = shards.segments.loc[int(name.partition(".")[0])]
            path: Any = shards.songs.loc[segment["song"], "path"]
            audio[path, segment["start"]] = tar.read_bytes()[offset : offset + size]
    return audio


def test_packing_again_decodes_only_what_is_new(music: Path, pack: Pack) -> None:
    shards = music.parent / "shards"
    shards.mkdir()
    (shards / ".gitignore").write_text("*\n")
    (shards / "mine.txt").write_text("keep")
    assert "decoded 6 songs" in pack(music)
    before, first = state(shards), open_shards(shards)

    again = pack(music)
    assert "decoded" not in again
    assert "nothing has changed" in again
    assert state(shards) == before

    for n in range(6, 12):
        write_song(music / f"new {n}.mp3", n, 6.0, album=f"Album {n // 2}")
    (music / "5.ogg").unlink()
    assert "decoded 6 songs" in pack(music)
    second = open_shards(shards)
    old, new = first.songs.set_index("path"), second.songs.set_index("path")
    stayed = [f"{n}.ogg" for n in range(5)]
    assert new.loc[stayed, "split"].equals(old.loc[stayed, "split"])
    assert "5.ogg" not in new.index
    assert second.fingerprint != first.fingerprint
    assert (shards / "mine.txt").read_text() == "keep"
    assert (shards / ".gitignore").read_text() == "*\n"

    # What was copied from shard to shard is what decoding anew gives.
    fresh = music.parent / "fresh"
    pack(music, "--out", fresh)
    assert audio_of(fresh) == audio_of(shards)


def test_a_changed_song_and_changed_settings_are_decoded_again(music: Path, pack: Pack) -> None:
    pack(music)
    write_song(music / "3.ogg", 33, 6.0)
    assert "decoded 1 songs" in pack(music)
    assert "decoded 6 songs" in pack(music, "--sample-rate", "8000")
    assert open_shards(music.parent / "shards").sample_rate == 8000


def test_a_changed_tag_reaches_the_tables_and_no_split_moves(music: Path, pack: Pack) -> None:
    pack(music)
    before = open_shards(music.parent / "shards").songs
    file = mutagen.File(music / "2.ogg")
    file["title"], file["album"], file["FMPS_RATING"] = "Renamed", "Another", "0.9"
    file.save()
    pack(music)
    after = open_shards(music.parent / "shards").songs
    tags: Any = after.loc[2, ["title", "albums", "rating"]]
    assert tags.tolist() == ["Renamed", ["Another"], 0.9]
    assert after["split"].equals(before["split"])


def test_ratings_from_a_file_win(music: Path, pack: Pack, tmp_path: Path) -> None:
    (tmp_path / "ratings.csv").write_text("path,rating\n0.ogg,5\n1.ogg,2.5\nelsewhere.ogg,1\n")
    assert "2 of 6 songs matched" in pack(music, "--ratings", tmp_path / "ratings.csv")
    assert open_shards(tmp_path / "shards").songs["rating"][:2].tolist() == [1.0, 0.5]
    said = pack(music)
    assert "written" in said
    assert "2 songs were rated before and are not now: give --ratings again" in said
    assert open_shards(tmp_path / "shards").songs["rating"].isna().all()
    assert "were rated" not in pack(music)


@pytest.mark.parametrize("codec", ["wav", "ogg"])
def test_native_rate_and_other_codecs(music: Path, pack: Pack, codec: str) -> None:
    write_audio(music / "8.wav", sound(8, 6.0, 8000), 8000)
    pack(music, "--sample-rate", "native", "--codec", codec, "--verify")
    shards = open_shards(music.parent / "shards")
    assert (shards.codec, shards.sample_rate) == (codec, None)
    assert set(shards.segments["sample_rate"]) == {8000, 22050}


def test_a_short_song_is_repeated_and_its_length_kept(music: Path, pack: Pack) -> None:
    pack(music, "--segment-seconds", "10")
    segments = open_shards(music.parent / "shards").segments
    assert segments["seconds"].tolist() == pytest.approx([6.0] * 6)
    assert segments["start"].tolist() == [0.0] * 6


def test_a_rotten_shard_is_not_copied(music: Path, pack: Pack, run_here: RunHere) -> None:
    pack(music)
    shards = music.parent / "shards"
    before = state(shards)
    tar = shards / "train-000000.tar"
    times = tar.stat()
    content = bytearray(tar.read_bytes())
    content[len(content) // 2] ^= 1
    tar.write_bytes(content)
    os.utime(tar, ns=(times.st_atime_ns, times.st_mtime_ns))
    (shards / "val-000000.tar").write_bytes(b"")
    status, _, err = run_here("--verify", "--out", shards)
    lines = err.splitlines()
    assert (status, len(lines)) == (1, 2)
    assert all(line.startswith("error: ") and "has changed since packing" in line for line in lines)
    (shards / "val-000000.tar").write_bytes(before["val-000000.tar"])
    assert "damaged" in pack(music, "--verify")
    assert tar.read_bytes() == before[tar.name]


def killed(process: subprocess.Popen[bytes], when: Callable[[], None], with_signal: int) -> int:
    """Signal the command alone; its workers must go by themselves."""
    when()
    process.send_signal(with_signal)
    code = process.wait(SECONDS)
    until(lambda: not alive_in_group(process.pid))
    return code


@contextlib.contextmanager
def running(*arguments: str | Path) -> Iterator[subprocess.Popen[bytes]]:
    """The command in a process group of its own, which ends with the test."""
    process = subprocess.Popen(
        command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(), start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Until the condition holds or the process has ended."""
    deadline = time.monotonic() + SECONDS
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0002)


def test_killed_at_any_moment_the_shards_stay_whole(music: Path, pack: Pack) -> None:
    """Ten kills: at random moments of a run, and around the moment when the new set takes the old one's place."""
    shards = music.parent / "shards"
    began = time.monotonic()
    assert make_shards(music, "--out", shards, *SHORT).returncode == 0
    whole_run = time.monotonic() - began
    random = np.random.default_rng(0)
    for round_ in range(10):
        write_song(music / f"new {round_}.mp3", 100 + round_, 6.0, album=f"Album {round_}")
        (music / f"{round_}.ogg").unlink(missing_ok=True)
        shutil.rmtree(shards / ".packing" / "new", ignore_errors=True)  # its return shows where the run is
        with running(music, "--out", shards, *SHORT) as process:

            def moment(round_: int = round_, process: subprocess.Popen[bytes] = process) -> None:
                if round_ % 2 == 0:
                    time.sleep(random.uniform(0, whole_run))
                elif round_ < 6:
                    wait_for((shards / ".packing" / "new").exists, process)
                    time.sleep(random.uniform(0, 0.03))
                else:
                    wait_for((shards / ".commit").exists, process)

            killed(process, moment, signal.SIGKILL)
        opened = open_shards(shards)
        assert verify(shards) == []
        assert opened.count("train") > 0
    pack(music, "--verify")
    assert not (shards / ".packing").exists()
    assert set(open_shards(shards).songs["path"]) == {p.name for p in music.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_prints_one_line_and_continues_later(music: Path, run_here: RunHere, number: int) -> None:
    write_audio(music / "z, long.wav", np.tile(sound(7, 10.0, 8000), (100, 1)), 8000)  # decoded last
    shards = music.parent / "shards"
    with running(music, "--out", shards, "--workers", "1") as process:
        decoded = lambda: len(list(shards.glob(".packing/songs/*.json")))  # noqa: E731
        killed(process, lambda: wait_for(lambda: decoded() >= 2, process), number)
        assert process.returncode == 130
        assert process.stderr is not None
        lines = said(process.stderr.read().decode())
    assert len(lines) == 1
    assert lines[0].startswith("stopped:")
    kept = decoded()
    assert 2 <= kept < 7
    assert f"decoded {7 - kept} songs" in run_here(music, "--out", shards)[1]


@pytest.mark.parametrize(("songs", "seconds", "while_writing"), [(1, 90.0, False), (12, 8.0, True)])
def test_a_full_disk_leaves_the_old_set_and_keeps_the_decoded_songs(
    music: Path, pack: Pack, songs: int, seconds: float, while_writing: bool
) -> None:
    """A limit on the size of a file stands for the disk: in a worker, for a long song, or in a shard."""
    pack(music)
    shards = music.parent / "shards"
    before = state(shards)
    for n in range(songs):
        write_song(music / f"more {n}.flac", 300 + n, seconds)

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_200_000, 1_200_000))

    result = make_shards(music, "--out", shards, *SHORT, preexec_fn=limit)
    assert result.returncode == 1
    assert ("writing" in result.stderr) == while_writing
    assert len(said(result.stderr)) == 1
    assert said(result.stderr)[0].startswith(f"error: no space left for {shards}")
    assert f"kept in {shards / '.packing'} " in result.stderr
    assert state(shards) == before
    assert len(list(shards.glob(".packing/songs/*.json"))) == (songs if while_writing else 0)
    assert not (shards / ".packing/new").exists()
    assert ("decoded" in pack(music)) == (not while_writing)


def test_what_is_left_of_a_failed_set_is_removed_under_the_lock(music: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shards, remove = music.parent / "shards", shutil.rmtree
    staged = shards / ".packing/new"
    staged.mkdir(parents=True)  # as of a run that was killed

    def full_disk(*_: object) -> Generator[Any, None, None]:
        raise OSError(errno.ENOSPC, "No space left on device")
        yield

    def checked(folder: Path, **options: Any) -> None:
        with pytest.raises(UserError, match="another pack"), lock_set(shards, wait=False):
            pass
        remove(folder, **options)

    monkeypatch.setattr("simsiam_dali.packing.pack.shutil.rmtree", checked)
    with pytest.raises(UserError, match="no space left"):
        packing.pack(music, shards, PackSettings(), 1, executor=full_disk)
    assert not staged.exists()


def test_a_file_that_did_not_open_is_tried_again(music: Path, pack: Pack) -> None:
    """The set may be from before libsndfile was tried. What was refused for what it holds is not decoded again."""
    (music / "text.mp3").write_text("no music at all\n" * 300)
    write_song(music / "one second.ogg", 1, 1.0)
    pack(music)
    shards = open_shards(music.parent / "shards")
    known = PackedBefore(shards, DecodeSettings(segment_seconds=shards.manifest.settings["segment_seconds"]), set())
    outcomes = {file.name: type(known.of(file)) for file in find_songs(music)[0]}
    assert outcomes.pop("text.mp3") is type(None)
    assert outcomes.pop("one second.ogg") is Refused
    assert set(outcomes.values()) == {Packed}


def test_many_refused_files_are_counted(music: Path, pack: Pack, tmp_path: Path) -> None:
    for n in range(packing.FILES_SHOWN + 3):
        (music / f"broken {n:02}.mp3").write_bytes(b"no music at all")
    lines = [line for line in pack(music).splitlines() if line.startswith("refused ")]
    assert len(lines) == packing.FILES_SHOWN + 1
    assert lines[-1] == f"refused  3 more; in {tmp_path / 'shards'}, refused.csv lists all"
    assert (tmp_path / "shards/refused.csv").read_text().count("\nbroken ") == packing.FILES_SHOWN + 3


def test_a_second_packer_is_refused(music: Path, run_here: RunHere) -> None:
    shards = music.parent / "shards"
    shards.mkdir()
    with (shards / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        result = run_here(music, "--out", shards, *SHORT)
    assert result == (1, "", f"error: another pack is writing to {shards}: wait until it ends\n")


def test_nothing_is_overwritten_unasked(music: Path, pack: Pack, run_here: RunHere, tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "songs.parquet").write_text("another's")
    status, _, stderr = run_here(music, "--out", shards, *SHORT)
    assert status == 1
    assert "songs.parquet was not written by pack" in stderr
    assert (shards / "songs.parquet").read_text() == "another's"
    pack(music, "--replace")

    other = write_song(tmp_path / "other" / "a.ogg", 50).parent
    status, _, stderr = run_here(other, "--out", shards, *SHORT)
    assert status == 1
    assert f"{shards} holds the shards of {music}" in stderr
    assert len(open_shards(shards).songs) == 6
    assert run_here(other, "--out", shards, *SHORT, "--replace")[0] == 0
    assert open_shards(shards).songs["path"].tolist() == ["a.ogg"]


def test_mistakes_get_one_line(tmp_path: Path, run_here: RunHere) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.mp3").write_text("text")
    (tmp_path / "file").write_text("text")
    good = write_song(tmp_path / "good" / "a.ogg", 1).parent
    out = ("--out", tmp_path / "shards")
    for arguments, says in (
        ((tmp_path / "missing", *out), "no such folder of music"),
        ((tmp_path / "file", *out), "is a file, name its folder"),
        ((tmp_path / "empty", *out), "no audio file in this folder"),
        ((tmp_path / "bad", *out), "none of its 1 files can be packed"),
        ((good, *out, "--ratings", tmp_path / "file"), "needs a header"),
        ((good, "--out", tmp_path / "file"), "cannot write shards"),
        ((good, "--out", good), "is the folder of music itself"),
        (("--verify", *out), "no shards in"),
        (("--verify", "--out", tmp_path / "nowhere"), "no such folder"),
    ):
        status, _, stderr = run_here(*arguments)
        assert status == 1
        assert len(said(stderr)) == 1
        assert says in said(stderr)[0].removeprefix("error: ")
    with pytest.raises(UserError, match="no shards in"):
        open_shards(tmp_path / "shards")


@pytest.mark.parametrize(
    "arguments",
    [["--val-fraction", "1"], ["--workers", "0"], ["--segment-seconds", "0"], ["--codec", "mp3"], ["--seed", "-1"]],
)
def test_impossible_options_are_refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["music", *arguments])
    assert caught.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_the_defaults_are_the_documented_ones() -> None:
    args = build_parser().parse_args(["music"])
    assert (args.out, args.sample_rate, args.segment_seconds, args.codec) == (Path("shards"), 16000, 60, "flac")
    assert (args.val_fraction, args.split_by, args.segments_per_shard) == (0.1, "album", 256)
    assert (args.seed, args.min_seconds, args.ratings, args.replace) == (0, 5, None, False)
    assert build_parser().parse_args(["music", "--sample-rate", "native"]).sample_rate is None
    for action in build_parser()._actions:
        assert action.help


@pytest.mark.parametrize("music", [["music"], []])
def test_stopped_while_it_verifies_it_does_not_say_that_nothing_was_packed(
    music: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(_: Path) -> list[str]:
        raise KeyboardInterrupt

    monkeypatch.setattr(pack_command, "pack", lambda *_, **__: None)
    monkeypatch.setattr(pack_command, "summarise", lambda *_: None)
    monkeypatch.setattr(pack_command, "verify", stopped)
    monkeypatch.setattr(sys, "argv", ["pack", *music, "--verify", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 130
    assert capsys.readouterr().err == f"stopped: {tmp_path} is not verified yet\n"
