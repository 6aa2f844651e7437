"""The shard format: readable by DALI and webdataset, replaced as a whole, its damage seen."""

import contextlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import webdataset as wds
from helpers.small_music import write_song
from nvidia.dali import fn, pipeline_def, types

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.commit import commit
from simsiam_dali.data.format import index_text, read_index, verify
from simsiam_dali.data.shards import open_shards
from simsiam_dali.packing.assign_split import assign_splits, group_key
from simsiam_dali.packing.pack import pack
from simsiam_dali.packing.pack_song import PackSettings
from simsiam_dali.packing.tags import Tags, clean
from simsiam_dali.packing.write import write_shard

SETTINGS = PackSettings(segment_seconds=2.0, segments_per_shard=5, val_fraction=0.3)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six songs of 5 s in 2 s segments: three each, the third one ending with the song."""
    root = tmp_path_factory.mktemp("packed")
    for n in range(6):
        tags = {"title": f"Song {n}", "artist": f"Artist {n // 2}", "album": f"Album {n // 2}"}
        write_song(root / "music" / f"{n}.ogg", n, 5.0, **tags)
    pack(root / "music", root / "shards", SETTINGS, workers=2)
    return root / "shards"


@pytest.fixture
def shards(packed: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return Path(shutil.copytree(packed, tmp_path / "shards"))


def test_tables_say_what_the_shards_hold(packed: Path) -> None:
    shards = open_shards(packed)
    assert (shards.codec, shards.sample_rate, shards.segment_seconds) == ("flac", 16000, 2.0)
    assert shards.count("train") + shards.count("val") == len(shards.segments) == 18
    assert shards.count("val") > 0
    assert shards.songs["artists"][0] == ["Artist 0"]
    assert [sorted(starts) for starts in shards.segments.groupby("song")["start"].apply(list)] == [[0, 2, 3]] * 6
    for split in ("train", "val"):
        assert [Path(tar).name for tar in shards.tars(split)] == [
            f"{split}-{n:06d}.tar" for n in range(-(-shards.count(split) // 5))
        ]
        assert [i.name for i in shards.indexes(split)] == [Path(t).stem + ".idx" for t in shards.tars(split)]
    assert shards.tars("test") == []
    by_song = shards.segments.groupby("song")["split"].unique()
    assert [list(splits) for splits in by_song] == [[split] for split in shards.songs["split"]]
    by_album = shards.songs.groupby(shards.songs["albums"].str[0])["split"].nunique()
    assert set(by_album) == {1}


def test_segments_of_a_song_are_spread(packed: Path) -> None:
    songs = open_shards(packed).segments.query("split == 'train'")["song"].tolist()
    assert songs != sorted(songs)


def test_the_index_is_dalis_own(packed: Path, tmp_path: Path) -> None:
    tool = Path(sys.executable).with_name("wds2idx")
    for tar in (packed / "train-000000.tar", packed / "val-000000.tar"):
        subprocess.run([tool, tar, tmp_path / "its.idx"], check=True, capture_output=True)
        assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "its.idx").read_bytes()


def test_dali_reads_audio_and_rows(packed: Path) -> None:
    shards = open_shards(packed)

    @pipeline_def(batch_size=3, num_threads=1, device_id=None)
    def graph() -> tuple[object, ...]:
        segments: Any = fn.readers.webdataset(  # two outputs, as `ext` names two
            paths=[str(tar) for tar in shards.tars("train")],
            index_paths=[str(index) for index in shards.indexes("train")],
            ext=[shards.codec, "row"],
            dtypes=[types.UINT8, types.INT64],
            missing_component_behavior="error",
        )
        audio, row = segments
        pcm, rate = fn.decoders.audio(audio, dtype=types.FLOAT, downmix=True)
        return pcm, rate, row

    pipeline = graph()
    pipeline.build()
    rows = []
    for _ in range(-(-shards.count("train") // 3)):
        pcm, rate, row = pipeline.run()
        assert [pcm.at(i).shape for i in range(3)] == [(32000,)] * 3
        assert [float(rate.at(i)) for i in range(3)] == [16000.0] * 3
        rows += [int(row.at(i)[0]) for i in range(3)]
    assert rows[: shards.count("train")] == shards.segments.index[shards.segments["split"] == "train"].tolist()


def test_webdataset_reads_them_plainly(packed: Path) -> None:
    shards = open_shards(packed)
    samples = list(wds.WebDataset([str(t) for t in shards.tars("train")], shardshuffle=False).decode())
    assert len(samples) == shards.count("train")
    for sample in samples:
        row = int.from_bytes(sample["row"], "little")
        segment = shards.segments.loc[row]
        song = shards.songs.loc[segment["song"]]
        assert sample["__key__"] == segment["key"] == f"{row:09d}"
        assert sample["json"] == {
            "title": song["title"],
            "artist": song["artists"][0],
            "albums": song["albums"],
            "year": None,
            "genres": [],
            "rating": None,
            "start": segment["start"],
            "seconds": 2.0,
            "path": song["path"],
        }
        pcm, rate = sf.read(io.BytesIO(sample["flac"]))
        assert (pcm.shape, rate) == ((32000,), 16000)
        assert np.abs(pcm).max() > 0.1


def test_a_shard_is_the_same_bytes_each_time(tmp_path: Path) -> None:
    samples = [(f"{n:09d}", {"flac": bytes([n]) * (n * 511), "row": b"12345678"}) for n in range(4)]
    sums = [write_shard(tmp_path / f"{name}.tar", samples)[f"{name}.tar"] for name in "ab"]
    assert sums[0].sha256 == sums[1].sha256
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    index = (tmp_path / "a.idx").read_text()
    assert index.splitlines()[:2] == ["v1.2 4", "flac 512 0 000000000.flac row 1024 8 000000000.row"]
    assert index_text(read_index(tmp_path / "a.idx")) == index


def flip(path: Path, keep_time: bool) -> None:
    content, before = bytearray(path.read_bytes()), path.stat()
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def edit_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


SPOILED: list[tuple[Callable[[Path], object], str]] = [
    (lambda root: shutil.rmtree(root), "no such folder"),
    (lambda root: (root / "manifest.json").unlink(), "no shards in"),
    (lambda root: (root / "manifest.json").write_text("{"), "damaged"),
    (lambda root: edit_manifest(root, files=3), "damaged"),
    (lambda root: edit_manifest(root, files={}), "damaged"),
    (lambda root: edit_manifest(root, format_version=99), "format version 99"),
    (lambda root: (root / "train-000000.idx").unlink(), r"train-000000.idx is missing \(the index"),
    (lambda root: (root / "train-000000.tar").unlink(), "train-000000.tar is missing"),
    (lambda root: os.truncate(root / "val-000000.tar", 512), "val-000000.tar has changed since packing"),
    (lambda root: flip(root / "train-000000.tar", keep_time=False), "has changed since packing"),
    (lambda root: flip(root / "songs.parquet", keep_time=True), "has changed since packing"),
    (lambda root: flip(root / "train-000000.idx", keep_time=True), "has changed since packing"),
]


@pytest.mark.parametrize(("spoil", "says"), SPOILED)
def test_a_spoiled_set_is_refused_in_one_line(shards: Path, spoil: Callable[[Path], object], says: str) -> None:
    spoil(shards)
    with pytest.raises(UserError, match=says) as caught:
        open_shards(shards)
    assert "\n" not in str(caught.value)
    assert "simsiam_dali.pack" in str(caught.value)


def test_an_untouched_copy_opens_and_verifies(shards: Path) -> None:
    os.utime(shards / "train-000000.tar")  # another time, the same content
    assert open_shards(shards).fingerprint == open_shards(shards).fingerprint
    assert verify(shards) == []


def test_verify_reads_everything(shards: Path) -> None:
    flip(shards / "train-000001.tar", keep_time=True)
    open_shards(shards)  # quick: size and time are as they were
    problems = verify(shards)
    assert len(problems) == 1
    assert "train-000001.tar" in problems[0]


def test_a_manifest_cannot_lead_out_of_its_folder(shards: Path) -> None:
    sums = json.loads((shards / "manifest.json").read_text())["files"]
    (shards.parent / "outside.tar").write_bytes(b"")
    edit_manifest(shards, files={**sums, "../outside.tar": {"bytes": 0, "sha256": "", "mtime_ns": 0}})
    for read in (open_shards, verify):
        with pytest.raises(UserError, match=r"manifest.json is damaged"):
            read(shards)


def test_the_fingerprint_follows_the_content(packed: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    pack(packed.parent / "music", other, SETTINGS, workers=2)
    assert open_shards(other).fingerprint == open_shards(packed).fingerprint
    write_song(packed.parent / "music" / "new.ogg", 77)
    pack(packed.parent / "music", other, SETTINGS, workers=2)
    (packed.parent / "music" / "new.ogg").unlink()
    assert open_shards(other).fingerprint != open_shards(packed).fingerprint


class Crash(BaseException):
    """The process ends here."""


def crash_after(steps: int, patch: pytest.MonkeyPatch) -> None:
    """Let so many renames and removals happen, then no more."""
    left = itertools.count(steps, -1)

    def counted(real: Callable[..., object]) -> Callable[..., object]:
        def step(path: Path, *args: object, **options: object) -> object:
            if next(left) == 0:
                raise Crash
            return real(path, *args, **options)

        return step

    for name in ("replace", "rename", "unlink", "rmdir"):
        patch.setattr(Path, name, counted(getattr(Path, name)))


def content(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir() if path.is_file() and path.name != ".lock"}


def test_a_replacement_cut_short_anywhere_leaves_one_whole_set(packed: Path, tmp_path: Path) -> None:
    """Crash before each rename and removal in turn; whoever opens the set next sees all of one set."""
    smaller = tmp_path / "smaller"
    for song in ("0.ogg", "1.ogg", "2.ogg"):
        (tmp_path / "music").mkdir(exist_ok=True)
        shutil.copy(packed.parent / "music" / song, tmp_path / "music")
    pack(tmp_path / "music", smaller, SETTINGS, workers=2)
    old, new = content(packed), content(smaller)
    assert len(new) < len(old)

    outcomes: list[bool] = []
    finished = False
    while not finished:
        out = Path(shutil.copytree(packed, tmp_path / f"out-{len(outcomes)}"))
        (out / "mine.txt").write_text("keep")
        staged = Path(shutil.copytree(smaller, out / ".packing" / "new", ignore=lambda *_: [".lock"]))
        with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Crash):
            crash_after(len(outcomes), patch)
            commit(out, staged)
            finished = True
        opened = open_shards(out)
        assert verify(out) == []
        found = content(out)
        assert found.pop("mine.txt") == b"keep"
        assert found in (old, new)
        assert len(opened.songs) == (3 if found == new else 6)
        outcomes.append(found == new)
    assert outcomes == [False] + [True] * (len(outcomes) - 1)  # the first rename decides
    assert len(outcomes) > len(old)


@pytest.mark.parametrize(
    ("tags", "name", "expected"),
    [
        (Tags(albums=("A", "B"), album_artist="X", artists=("Y",)), "f/1.mp3", ("album:x:a", "artist:y", "song:h")),
        (Tags(artists=("Y", "Z")), "f/1.mp3", ("artist:y", "artist:y", "song:h")),
        (Tags(), "f/1.mp3", ("folder:f", "folder:f", "song:h")),
        (Tags(), "1.mp3", ("path:1.mp3", "path:1.mp3", "song:h")),
    ],
)
def test_groups(tags: Tags, name: str, expected: tuple[str, ...]) -> None:
    assert tuple(group_key(by, tags, name, "h") for by in ("album", "artist", "song")) == expected


def test_an_album_is_one_group_however_unicode_writes_its_names() -> None:
    composed, separate = (unicodedata.normalize(form, "Café Noé") for form in ("NFC", "NFD"))
    assert composed != separate
    for by in ("album", "artist"):
        keys = {
            group_key(by, Tags(albums=(name,), album_artist=name, artists=(name,)), "f/1.mp3", "h")
            for name in (composed, separate, composed.upper(), f"{composed[:4]}\u00a0 {composed[5:]}")
        }
        assert len(keys) == 1


def test_names_in_ascii_and_composed_letters_keep_the_split_that_they_have() -> None:
    """The key is hashed: another key could draw another split when a library is packed anew."""
    rng, letters = np.random.default_rng(0), [*map(chr, range(32, 127)), *"éèüßñøÅЖя東京"]
    for _ in range(2000):
        (artist,), (album,) = (clean(["x" + "".join(rng.choice(letters, 12))]) for _ in range(2))
        tags = Tags(albums=(album,), album_artist=artist, artists=(artist,))
        assert group_key("album", tags, "f/1.mp3", "h") == f"album:{artist}:{album}".casefold()
        assert group_key("artist", tags, "f/1.mp3", "h") == f"artist:{artist}".casefold()


def test_no_album_of_a_packed_library_is_in_both_splits(small_shards: Path) -> None:
    songs = open_shards(small_shards).songs
    albums = songs.groupby([songs["album_artist"], songs["albums"].str[0]])["split"].agg(["nunique", "size"])
    assert albums["nunique"].max() == 1
    assert albums["size"].max() > 1


def test_splits_follow_the_fraction_and_the_groups() -> None:
    groups = [f"album {n // 10}" for n in range(20_000)]
    splits = assign_splits(groups, [None] * len(groups), 0.1, seed=3)
    assert 0.08 < splits.count("val") / len(splits) < 0.12
    assert len(set(zip(groups, splits, strict=True))) == 2000
    assert splits != assign_splits(groups, [None] * len(groups), 0.1, seed=4)


def test_new_songs_move_none() -> None:
    groups = [f"album {n}" for n in range(50)]
    few = assign_splits(groups[:3], [None] * 3, 0.01, seed=0)
    assert sorted(few) == ["train", "train", "val"]  # neither side is left empty
    many = assign_splits(groups, [*few, *[None] * 47], 0.01, seed=0)
    assert many[:3] == few
    assert assign_splits(["a", "a"], ["val", None], 0.01, seed=0) == ["val", "val"]


@pytest.mark.parametrize(
    ("groups", "val_fraction", "expected"),
    [(["a", "a"], 0.99, {"train"}), (["a", "b"], 0.0, {"train"}), (["a", "b"], 0.999, {"train", "val"})],
)
def test_small_sets(groups: list[str], val_fraction: float, expected: set[str]) -> None:
    assert set(assign_splits(groups, [None] * len(groups), val_fraction, seed=0)) == expected
