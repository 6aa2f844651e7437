"""The sets whose songs are listed, from a server and a package manager that are played by files."""

import hashlib
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from helpers.running import ROOT

sys.path.insert(0, str(ROOT / "benchmarks" / "real_music"))
import fetch_listed
from fetch_listed import Song


def song(file: str, source: str, path: str, content: bytes) -> Song:
    return Song(file, source, "c0ffee", path, hashlib.sha256(content).hexdigest())


def test_songs_come_by_their_address_and_another_file_is_named_and_not_kept(tmp_path: Path) -> None:
    served = tmp_path / "served" / "some" / "game" / "c0ffee" / "music"
    served.mkdir(parents=True)
    (served / "one #1.ogg").write_bytes(b"one")
    (served / "two.ogg").write_bytes(b"changed since")
    songs = [
        song("game/one__1.ogg", "some/game", "music/one #1.ogg", b"one"),
        song("game/two.ogg", "some/game", "music/two.ogg", b"two"),
        song("game/three.ogg", "some/game", "music/three.ogg", b"three"),
    ]
    missing = fetch_listed.fetch(songs, tmp_path / "out", (tmp_path / "served").as_uri())
    assert [line.partition(":")[0] for line in missing] == ["game/two.ogg", "game/three.ogg"]
    assert "another file" in missing[0]
    assert [path.name for path in (tmp_path / "out").rglob("*") if path.is_file()] == ["one__1.ogg"]
    # What is there is not asked for again.
    (served / "one #1.ogg").unlink()
    assert len(fetch_listed.fetch(songs, tmp_path / "out", (tmp_path / "served").as_uri())) == 2


def test_files_of_a_package_are_found_by_their_sum_also_in_its_archives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tmp_path / "tree" / "usr" / "share"
    tree.mkdir(parents=True)
    (tree / "plain.ogg").write_bytes(b"plain")
    with zipfile.ZipFile(tree / "data.love", "w") as archive:
        archive.writestr("sfx/packed.ogg", b"packed")
    tools = tmp_path / "bin"
    tools.mkdir()
    apt_get = 'echo "$3" >> ASKED; [ "$3" = good ] && touch good.deb || { echo E: none >&2; exit 100; }'
    dpkg_deb = f'cp -r {tmp_path / "tree"} "$3"'
    for name, line in (("apt-get", apt_get.replace("ASKED", str(tmp_path / "asked"))), ("dpkg-deb", dpkg_deb)):
        (tools / name).write_text(f"#!/bin/sh\n{line}\n")
        (tools / name).chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", str(tools), prepend=":")
    songs = [song(f"game/{name}.ogg", "debian:good", f"old/{name}.ogg", name.encode()) for name in ("plain", "packed")]
    songs += [song(f"other/{name}.ogg", "debian:bad", name, name.encode()) for name in ("x", "y")]
    missing = fetch_listed.fetch(songs, tmp_path / "out")
    assert (tmp_path / "out/game/packed.ogg").read_bytes() == b"packed"
    assert (tmp_path / "out/game/plain.ogg").read_bytes() == b"plain"
    assert missing == ["other/x.ogg: E: none", "other/y.ogg: E: none"]
    assert (tmp_path / "asked").read_text().split() == ["good", "bad"]  # a package once, whatever its songs


def test_the_lists_are_of_songs_of_other_soundtracks() -> None:
    fourth, fifth = map(fetch_listed.listed, fetch_listed.SETS)
    songs = [*fourth, *fifth]
    assert len({each.sha256 for each in songs}) == len({each.file for each in songs}) == len(songs)
    assert all(re.fullmatch("[0-9a-f]{64}", each.sha256) and not Path(each.file).is_absolute() for each in songs)
    used = (Path(fetch_listed.__file__).parent / "fetch.sh").read_text()
    packages = {each.source.removeprefix("debian:") for each in songs if each.source.startswith("debian:")}
    assert packages
    assert not packages & set(re.findall(r"[a-z0-9.+-]+", used))
    assert not {each.source for each in fourth} & {each.source for each in fifth}


def test_what_is_missing_ends_the_command_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(fetch_listed, "fetch", lambda *_: ["game/x.ogg: gone"])
    monkeypatch.setattr(sys, "argv", ["fetch_listed.py", "fourth", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        fetch_listed.main()
    assert ended.value.code == 1
    assert "game/x.ogg: gone" in capsys.readouterr().err


def test_the_command_has_a_help() -> None:
    done = subprocess.run([sys.executable, fetch_listed.__file__, "--help"], capture_output=True, text=True)
    assert "makes DIR/GAME/SONG" in done.stdout
