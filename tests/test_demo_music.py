"""The demo library: the same each time, whole or absent, readable by others; its labels can be heard."""

import signal
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import av
import mutagen
import numpy as np
import pytest
from scipy.stats import spearmanr

from simsiam_dali.common.errors import UserError

sys.path.insert(0, str(Path(__file__).parents[1] / "tools"))
import make_demo_music as demo
from demo_synth import LEVEL_RMS, RENDER_RATE, compose, draw_styles, record

SONGS, SEED, SECONDS = 32, 5, (5.0, 7.0)
EXTENSIONS = {".flac", ".ogg", ".mp3", ".wav"}
STARS_OF_POPM = {1: 1, 64: 2, 128: 3, 196: 4, 255: 5}


def decode(path: Path) -> tuple[np.ndarray, int]:
    """Decode with FFmpeg, not with the library that encoded: (channels, samples), and the rate in Hz."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        resampler = av.AudioResampler(format="fltp")
        frames = [part.to_ndarray() for frame in container.decode(audio=0) for part in resampler.resample(frame)]
    return np.concatenate(frames, axis=1), rate


def read_tags(path: Path) -> dict[str, str]:
    """Return title, artist, album, genre, date, and rating (0..1 as text, absent if unrated)."""
    file = mutagen.File(path)
    if path.suffix in (".flac", ".ogg"):
        tags = {key: file[key][0] for key in ("title", "artist", "album", "genre", "date")}
        if "fmps_rating" in file:
            tags["rating"] = file["fmps_rating"][0]
        elif "rating" in file:
            tags["rating"] = str(float(file["rating"][0]) / 100)
    else:
        frames = {"title": "TIT2", "artist": "TPE1", "album": "TALB", "genre": "TCON", "date": "TDRC"}
        tags = {key: str(file.tags[frame]) for key, frame in frames.items()}
        for popm in file.tags.getall("POPM"):
            tags["rating"] = str(STARS_OF_POPM[popm.rating] / 5)
    return tags


def songs_in(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in EXTENSIONS)


def own_songs(folder: Path) -> list[Path]:
    return [path for path in songs_in(folder) if "Various Artists" not in path.parts]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "music"
    assert demo.make_library(folder, SONGS, SEED, SECONDS, workers=1)
    return folder


def test_same_seed_same_bytes_whatever_the_workers(tmp_path: Path) -> None:
    first, second, other = tmp_path / "first", tmp_path / "second", tmp_path / "other"
    demo.make_library(first, 8, 0, (2, 3), workers=1)
    demo.make_library(second, 8, 0, (2, 3), workers=2)
    demo.make_library(other, 8, 1, (2, 3), workers=1)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in files)
    a, b = own_songs(first)[0], own_songs(other)[0]
    assert read_tags(a) != read_tags(b)
    assert not np.array_equal(decode(a)[0], decode(b)[0])


def test_every_file_decodes_at_one_loudness_without_clipping(library: Path) -> None:
    for path in songs_in(library):
        audio, rate = decode(path)
        assert np.isfinite(audio).all()
        assert SECONDS[0] - 0.1 < audio.shape[1] / rate < SECONDS[1] + 0.1
        assert np.abs(audio).max() < 1
        level = 20 * np.log10(np.sqrt(np.mean(audio.mean(axis=0) ** 2)))
        assert abs(level - 20 * np.log10(LEVEL_RMS)) < 2, path  # dB; a lossy codec drops what is highest


def test_format_rate_and_channels_do_not_reveal_the_artist(library: Path) -> None:
    formats, rates, channels = defaultdict(set), defaultdict(set), defaultdict(list)
    for path in own_songs(library):
        audio, rate = decode(path)
        artist = read_tags(path)["artist"]
        formats[artist].add(path.suffix)
        rates[artist].add(rate)
        channels[artist].append(len(audio))
    assert len(formats) == SONGS // 4
    assert all(found == EXTENSIONS for found in formats.values())
    assert all(found == set(demo.RATES) for found in rates.values())
    assert all(sorted(found) == [1, 2, 2, 2] for found in channels.values())


def test_neither_length_nor_storage_reveals_the_artist() -> None:
    """As the demo has it: of how many songs is the one nearest in length, or stored the same way, by the artist?"""
    plan = demo.plan_library(192, 0, (18.0, 32.0))
    assert {len([s for s in plan if s.artist == song.artist]) for song in plan} == {4}
    seconds = np.array([song.seconds for song in plan])
    apart = np.abs(seconds[:, None] - seconds) + np.diag(np.full(len(plan), np.inf))
    nearest = apart == apart.min(axis=1, keepdims=True)
    same = np.array([[a.artist == b.artist for a in plan] for b in plan])
    assert (same & nearest).sum() / nearest.sum() < 0.08  # a guess: 3 of 191
    stored = [(song.extension, song.rate, song.channels) for song in plan]
    alike = np.array([[a == b for a in stored] for b in stored]) & ~np.eye(len(plan), dtype=bool)
    assert (same & alike).sum() == 0


def test_songs_of_an_artist_are_recorded_differently() -> None:
    """One song in two rooms, on two tapes: hiss stands 5 to 50 dB below the music, and the room rings on after it."""
    rng = np.random.default_rng(0)
    mix, _ = compose(draw_styles(1, rng)[0], 4.0, rng)
    mix[:, RENDER_RATE:] = 0  # a second of music, then the room and the tape alone
    hiss, rings = [], []
    for seed in range(20):
        recorded = record(mix, np.random.default_rng(seed))
        assert np.array_equal(recorded, record(mix, np.random.default_rng(seed)))
        tape = recorded[:, -RENDER_RATE:].std()
        hiss.append(20 * np.log10(tape / mix.std()))
        rings.append(recorded[:, RENDER_RATE : RENDER_RATE + RENDER_RATE // 10].std() / tape)
    assert -50.5 < min(hiss) < -38
    assert -16 < max(hiss) < -4.5
    assert max(rings) > 5 * min(rings)


def test_tags_follow_the_folders_and_genres_are_shared(library: Path) -> None:
    albums, artists_of_genre, rated = defaultdict(set), defaultdict(set), []
    for path in own_songs(library):
        tags = read_tags(path)
        assert path.relative_to(library).parts[:2] == (tags["artist"], tags["album"])
        assert path.stem[5:] == tags["title"]
        assert 1972 <= int(tags["date"][:4]) <= 2024
        albums[tags["artist"]].add(tags["album"])
        artists_of_genre[tags["genre"]].add(tags["artist"])
        rated.append("rating" in tags)
    assert all(len(found) == 2 for found in albums.values())
    assert len(artists_of_genre) == 5
    assert sum(len(found) > 1 for found in artists_of_genre.values()) >= 3
    assert 0.6 < np.mean(rated) < 0.95
    assert any(not path.as_posix().isascii() for path in own_songs(library))


def test_ratings_are_written_in_each_way(library: Path) -> None:
    kinds = set()
    for path in own_songs(library):
        tags = mutagen.File(path).tags
        kinds |= {(path.suffix, key.split(":")[0].upper()) for key in tags.keys()}  # noqa: SIM118 (Vorbis tags are a list)
    assert kinds >= {(".flac", "FMPS_RATING"), (".ogg", "FMPS_RATING"), (".mp3", "POPM"), (".wav", "POPM")}
    assert {kind for _, kind in kinds} >= {"RATING"}


def test_compilation_repeats_songs_under_another_album(library: Path) -> None:
    copies = [path for path in songs_in(library) if "Various Artists" in path.parts]
    assert len(copies) == SONGS // 16
    originals = {(read_tags(path)["artist"], read_tags(path)["title"]): path for path in own_songs(library)}
    for copy in copies:
        original = originals[read_tags(copy)["artist"], read_tags(copy)["title"]]
        assert np.array_equal(decode(copy)[0], decode(original)[0])
        changed = {key for key, value in read_tags(copy).items() if read_tags(original).get(key) != value}
        assert changed == {"album"}


def test_beside_the_songs_lie_a_cover_a_cue_sheet_and_a_playlist(library: Path) -> None:
    with av.open(str(next(library.rglob("cover.png")))) as image:
        assert next(image.decode(video=0)).width == 32
    cue = next(library.rglob("*.cue"))
    assert (cue.parent / cue.read_text(encoding="utf-8").split('"')[3]).is_file()
    listed = (library / "Favourites.m3u8").read_text(encoding="utf-8").splitlines()[1:]
    assert listed
    assert all((library / line).is_file() for line in listed)


def heard_brightness_and_pace(path: Path) -> tuple[float, float]:
    """Return the spectral centroid below 8 kHz in octaves, and how many onsets a second stand out."""
    audio, rate = decode(path)
    hop = rate // 100
    frames = np.lib.stride_tricks.sliding_window_view(audio.mean(axis=0), 4 * hop)[::hop]
    spectrum = np.abs(np.fft.rfft(frames * np.hanning(4 * hop)))[:, : 8000 // 25]  # bins of 25 Hz
    centroid = (spectrum * np.arange(spectrum.shape[1])).sum() * 25 / spectrum.sum()
    rise = np.maximum(np.diff(np.log(spectrum + 0.03), axis=0), 0).sum(axis=1)
    peak = (rise[1:-1] > rise[:-2]) & (rise[1:-1] > rise[2:]) & (rise[1:-1] > rise.mean() + rise.std())
    return float(np.log2(centroid)), float(peak.mean() * 100)


def test_the_owner_likes_bright_and_fast_music(library: Path) -> None:
    rated = {path: read_tags(path)["rating"] for path in own_songs(library) if "rating" in read_tags(path)}
    ratings = np.array([float(rating) for rating in rated.values()])
    assert ratings.min() >= 0.2
    assert ratings.max() <= 1
    brightness, pace = np.array([heard_brightness_and_pace(path) for path in rated]).T
    heard = brightness / brightness.std() + pace / pace.std()
    assert spearmanr(heard, ratings).statistic > 0.6


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    folder = tmp_path / "music"
    folder.mkdir()
    assert demo.make_library(folder, 2, 0, (1, 1), workers=1)  # an empty folder will do
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert not demo.make_library(folder, 2, 0, (1, 1), workers=1)  # the same library is there already
    for songs, seed, seconds in ((3, 0, (1, 1)), (2, 1, (1, 1)), (2, 0, (1, 2))):
        with pytest.raises(UserError, match="not an empty folder"):
            demo.make_library(folder, songs, seed, seconds, workers=1)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    songs_in(folder)[0].unlink()  # no longer complete
    with pytest.raises(UserError, match="not an empty folder"):
        demo.make_library(folder, 2, 0, (1, 1), workers=1)


@pytest.mark.parametrize(
    ("failure", "seen"), [(KeyboardInterrupt(), KeyboardInterrupt), (OSError("No space left"), UserError)]
)
def test_stopped_or_failed_run_leaves_nothing(
    failure: BaseException, seen: type[BaseException], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_song = demo.write_song
    written: list[demo.Song] = []

    def fail_at_third(root: Path, song: demo.Song) -> float | None:
        if len(written) == 2:
            raise failure
        written.append(song)
        return write_song(root, song)

    monkeypatch.setattr(demo, "write_song", fail_at_third)
    with pytest.raises(seen):
        demo.make_library(tmp_path / "music", 4, 0, (1, 1), workers=1)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_killed_run_leaves_no_half_library(tmp_path: Path) -> None:
    command: list[str | Path] = [sys.executable, demo.__file__, tmp_path / "music", "--songs", "400", "--workers", "1"]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as process:
        while not songs_in(tmp_path):
            assert process.poll() is None
        process.send_signal(signal.SIGKILL)
    assert not (tmp_path / "music").exists()
    assert demo.make_library(tmp_path / "music", 2, 0, (1, 1), workers=1)  # what is left is not in the way


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--songs", "0"], "--songs"),
        (["--songs", "99999"], "at most"),
        (["--seconds", "9", "3"], "--seconds 9 3"),
        (["--seed", "-1"], "--seed"),
    ],
)
def test_mistakes_are_reported_in_one_line(
    arguments: list[str], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(sys, "argv", ["make_demo_music.py", str(tmp_path / "music"), *arguments])
    with pytest.raises(SystemExit) as stop:
        demo.main()
    assert stop.value.code == 1
    errors = capsys.readouterr().err
    assert errors.startswith("error: ")
    assert errors.count("\n") == 1
    assert says in errors
    assert list(tmp_path.iterdir()) == []
