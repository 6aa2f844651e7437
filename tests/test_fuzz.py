"""Whatever stands in a file of ours or a user's: it is read, or refused in one line; never a crash, never a hang.

Each test runs 100 inputs in `make test` and 10,000 in `make faults`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mutagen
import numpy as np
import pytest
import yaml
from helpers.small_music import repeat_headers, sound, write_audio
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from simsiam_dali.common.errors import UserError, printable
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import setting_fields
from simsiam_dali.data.commit import MANIFEST
from simsiam_dali.data.format import index_text, read_index, read_manifest
from simsiam_dali.packing.decode import decode
from simsiam_dali.packing.song_audio import BadSong
from simsiam_dali.packing.tags import MAX_CHARACTERS, MAX_VALUES, Tags, clean, read_tags
from simsiam_dali.training import journal

RUNS = [100, pytest.param(10_000, marks=pytest.mark.faults)]


def fuzzed(runs: int, test: Callable[..., None], **strategies: st.SearchStrategy[Any]) -> None:
    """Run `test` on so many drawn inputs, the same ones each time; one that takes 10 s is a hang."""
    health = [HealthCheck.too_slow, HealthCheck.data_too_large]
    limits = settings(max_examples=runs, deadline=10_000, derandomize=True, database=None, suppress_health_check=health)
    limits(given(**strategies)(test))()


def read_or_refused(read: Callable[[], Any]) -> Any:
    """What was read; None where it was refused, in one line."""
    try:
        return read()
    except UserError as e:
        said = printable(str(e))
    assert said
    said.encode()
    return None


def changed(contents: list[bytes]) -> st.SearchStrategy[bytes]:
    """One of `contents` after some of its bytes were replaced, cut out, doubled or put elsewhere; or any bytes."""

    @st.composite
    def damaged(draw: st.DrawFn) -> bytes:
        content = bytearray(draw(st.sampled_from(contents)))
        for _ in range(draw(st.integers(1, 6))):
            at = draw(st.integers(0, len(content)))
            # The head is where the structure is.
            at = at % 200 if draw(st.booleans()) else at
            to = at + draw(st.integers(0, 40))
            piece = draw(st.binary(max_size=8) | st.just(bytes(content[at:to]) * 2) | st.just(b"\xff\xff\xff\xff"))
            content[at : to if draw(st.booleans()) else at + len(piece)] = piece
        return bytes(content)

    return damaged() | st.binary(max_size=300)


KEYS = [key for key, _ in setting_fields()]
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)


@pytest.mark.parametrize("runs", RUNS)
def test_config_files(tmp_path: Path, runs: int) -> None:
    """Settings of any value under known and unknown names, as YAML; and YAML that was damaged, or never was any."""
    path = tmp_path / "c.yaml"
    whole = load_config().to_yaml().encode()
    parts = [whole[:600], whole[whole.index(b"train:") : whole.index(b"hpo:")]]

    def tree(settings: dict[str, Any]) -> bytes:
        made: dict[str, Any] = {}
        for key, value in settings.items():
            node = made
            *sections, leaf = key.split(".")
            for section in sections:
                node = node.setdefault(section, {}) if isinstance(node.get(section, {}), dict) else {}
            node[leaf] = value
        return yaml.safe_dump(made, allow_unicode=True).encode("utf-8", "surrogatepass")

    names = st.sampled_from(KEYS) | st.sampled_from(sorted({k.split(".")[0] for k in KEYS})) | st.text(max_size=12)
    trees = st.dictionaries(names, json_values, max_size=4).map(tree)

    def test(content: bytes) -> None:
        path.write_bytes(content)
        found = read_or_refused(lambda: load_config(path))
        if found is not None:
            assert load_config(base=found.model_dump(mode="json")) == found

    fuzzed(runs, test, content=trees | changed(parts) | st.text(max_size=60).map(str.encode))


@pytest.mark.parametrize(
    "text",
    [
        *("data: 2001-13-01", "data: !!bool maybe", "data: " + "1" * 5000, "[" * 20000, "!!timestamp x", "="),
        *("!!python/object/apply:os.system [true]", "a: &a [*a]", "data: {shards: !!binary x}", "data: .nan"),
        *("{[]: 1}", "\ud800"),
        "data: {sample_rate: [" + "x, " * 100_000 + "]}",
        "encoder: {simsiam: {augmentation: {noise_snr_range: [.nan, .inf]}}}",
        "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 60)) + "data: *a59",
    ],
    ids=lambda text: text[:20].encode("ascii", "replace").decode(),
)
def test_config_files_that_are_known_to_hurt(tmp_path: Path, text: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(UserError) as e:
        load_config(path)
    assert len(str(e.value)) < 1000
    with pytest.raises(UserError):
        load_config(assignments=[f"data={text}"])


@pytest.mark.parametrize("runs", RUNS)
def test_assignments_and_environment(runs: int) -> None:
    names = st.sampled_from(KEYS) | st.text(max_size=12)
    texts = st.text(max_size=20) | json_values.map(lambda value: json.dumps(value))

    def test(name: str, text: str, given: Any) -> None:
        read_or_refused(lambda: load_config(assignments=[f"{name}={text}"]))
        read_or_refused(lambda: load_config(assignments=[text]))
        read_or_refused(lambda: load_config(environment={"ENCODER_TYPE": text, "MLFLOW_TRACKING_URI": name}))
        read_or_refused(lambda: load_config(command_line={name: given}))

    fuzzed(runs, test, name=names, text=texts, given=json_values)


def is_fit_for_a_table(tags: Tags) -> None:
    texts = [tags.title, tags.album_artist, *tags.artists, *tags.albums, *tags.genres]
    assert all(len(text) <= MAX_CHARACTERS for text in texts)
    assert max(len(tags.artists), len(tags.albums), len(tags.genres)) <= MAX_VALUES
    for text in texts:
        text.encode()  # no lone surrogate
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or 0x202A <= ord(c) <= 0x202E for c in text)
        assert not any(0x2066 <= ord(c) <= 0x2069 for c in text)
    assert tags.year is None or 1500 <= tags.year < 2100
    assert np.isnan(tags.rating) or 0 <= tags.rating <= 1


@pytest.mark.parametrize("runs", RUNS)
def test_tags_of_damaged_files(tmp_path: Path, runs: int) -> None:
    """Real files of each format with tags, damaged."""
    contents = []
    for suffix in (".mp3", ".flac", ".ogg", ".m4a", ".wav"):
        path = write_audio(tmp_path / f"a{suffix}", sound(1, 0.1))
        file = mutagen.File(path, easy=suffix != ".wav")
        if file.tags is None:
            file.add_tags()
        if suffix == ".wav":
            file.tags.add(mutagen.id3.TIT2(text=["Song"]))
        else:
            file.update({"title": ["Song"], "artist": ["One", "Two"], "album": "First", "date": "1999-01-01"})
        file.save()
        contents.append(path.read_bytes()[:6000])
    path = tmp_path / "fuzzed"

    def test(content: bytes) -> None:
        path.write_bytes(content)
        is_fit_for_a_table(read_tags(path))

    fuzzed(runs, test, content=changed(contents))


@pytest.mark.parametrize("runs", RUNS)
def test_songs_that_are_damaged(tmp_path: Path, runs: int) -> None:
    contents = []
    for suffix in (".mp3", ".flac", ".ogg", ".m4a", ".wav"):
        contents.append(write_audio(tmp_path / f"a{suffix}", sound(1, 0.5)).read_bytes())
    contents.append(repeat_headers(tmp_path / "a.ogg").read_bytes())
    path = tmp_path / "fuzzed.ogg"

    def test(content: bytes) -> None:
        path.write_bytes(content)
        try:
            audio, samples = decode(path, 16000, lambda song: sum(map(len, song.blocks())))
        except BadSong as e:
            said = e.reason
        else:
            said = audio.note
            assert samples == pytest.approx(audio.seconds * 16000, abs=20)
        assert "\n" not in said

    fuzzed(runs, test, content=changed(contents))


@pytest.mark.parametrize("runs", RUNS)
def test_tag_values(runs: int) -> None:
    """Any texts, lone surrogates and control characters among them."""
    character = st.characters(exclude_categories=()) | st.sampled_from("\0\x1b\u202e\u2066\ud800\u2028\x9b\r\n")

    def test(values: list[str]) -> None:
        kept = clean(values)
        is_fit_for_a_table(Tags(artists=kept))
        assert clean(kept) == kept

    fuzzed(runs, test, values=st.lists(st.text(character, max_size=400), max_size=8))


@pytest.mark.parametrize("runs", RUNS)
def test_indexes(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "a.idx"
    members = [{e: (512 + 1024 * n, 300 + n, f"{n:09d}.{e}") for e in ("flac", "row", "json")} for n in range(3)]
    whole = index_text(members).encode()
    path.write_bytes(whole)
    assert read_index(path) == members

    def test(content: bytes) -> None:
        path.write_bytes(content)
        for sample in read_or_refused(lambda: read_index(path)) or []:
            assert all(offset >= 0 and size >= 0 for offset, size, _ in sample.values())

    lines = st.lists(st.text("flacrow 0123456789.-_\n\tv²", max_size=40), max_size=5)
    fuzzed(runs, test, content=changed([whole]) | lines.map(lambda ls: "\n".join(["v1.2 3", *ls]).encode()))


@pytest.mark.parametrize("runs", RUNS)
def test_manifests(tmp_path: Path, small_shards: Path, runs: int) -> None:
    whole = (small_shards / MANIFEST).read_bytes()
    tree = json.loads(whole)

    @st.composite
    def edited(draw: st.DrawFn) -> bytes:
        """The real one with values anywhere replaced by any others."""
        made = json.loads(whole)
        for _ in range(draw(st.integers(1, 3))):
            node: Any = made
            while True:
                key = draw(st.sampled_from(sorted(node)) | st.text(max_size=5))
                inner = node.get(key)
                if not isinstance(inner, dict) or not inner or draw(st.booleans()):
                    node[key] = draw(json_values)
                    break
                node = inner
        return json.dumps(made).encode()

    def test(content: bytes) -> None:
        (tmp_path / MANIFEST).write_bytes(content)
        found = read_or_refused(lambda: read_manifest(tmp_path))
        if found is not None:
            assert all(isinstance(f.bytes, int) and isinstance(f.sha256, str) for f in found.files.values())
            assert all(Path(name).name == name for name in found.files)
            assert {"codec", "sample_rate", "segment_seconds"} <= found.settings.keys()

    assert tree["files"]
    fuzzed(runs, test, content=edited() | changed([whole]) | json_values.map(lambda v: json.dumps(v).encode()))


@pytest.mark.parametrize("runs", RUNS)
def test_journals(tmp_path: Path, runs: int) -> None:
    path = tmp_path / "metrics.jsonl"
    records = [{"step": 0, "epoch": 0}, {"step": 1, "loss": 0.5}, {"step": 2, "loss": None}, {"step": 2, "epoch": 1}]
    whole = "".join(json.dumps(record) + "\n" for record in records).encode()

    def test(content: bytes, step: int) -> None:
        path.write_bytes(content)
        read_or_refused(lambda: journal.Journal(path, writes=False).resume(step))

    anything = st.lists(json_values.map(json.dumps), max_size=4).map(lambda ls: "\n".join([*ls, ""]).encode())
    fuzzed(runs, test, content=changed([whole]) | anything, step=st.integers(0, 3))
