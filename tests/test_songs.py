"""Finding, decoding, cutting and encoding songs."""

import errno
import io
import itertools
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import mutagen
import numpy as np
import pytest
import soundfile as sf
from helpers.running import ROOT
from helpers.small_music import repeat_headers, sound, write_audio, write_song
from packaging.requirements import Requirement

from simsiam_dali.packing import decode as decoding
from simsiam_dali.packing.ffmpeg import FFmpegAudio
from simsiam_dali.packing.find import find_songs
from simsiam_dali.packing.segments import cut_segments, encode, to_int16
from simsiam_dali.packing.song_audio import BLOCK, BadSong, NoAudio, NotDecodable, SongAudio, resample


def decode(path: Path, rate: int | None = None) -> tuple[np.ndarray, SongAudio]:
    audio, pcm = decoding.decode(path, rate, lambda song: np.concatenate(list(song.blocks())))
    return pcm, audio


def rms_db(pcm: np.ndarray) -> float:
    return float(20 * np.log10(np.sqrt(np.mean(np.square(pcm, dtype=np.float64))) + 1e-12))


@pytest.mark.parametrize("rate_in", [44100, 48000, 96000])
def test_resampling_to_16_khz_keeps_the_passband_and_drops_aliases(rate_in: int) -> None:
    def level_after(frequency: float) -> float:
        tone = np.sin(2 * np.pi * frequency * np.arange(rate_in) / rate_in).astype(np.float32)
        pcm = np.concatenate([*resample(np.split(tone, 5), rate_in, 16000)])
        assert len(pcm) == 16000
        return rms_db(pcm[4000:12000]) - rms_db(tone)

    for frequency in (100, 1000, 4000, 7000, 7500):
        assert abs(level_after(frequency)) < 0.1
    for frequency in (8100, 8500, 9000, 12000, 20000):  # would fold to below 8 kHz
        assert level_after(frequency) < -80


@pytest.mark.parametrize(
    ("name", "subtype", "step"),
    [
        ("a.wav", "PCM_U8", 2**-7),
        ("a.wav", "PCM_16", 2**-15),
        ("a.wav", "PCM_24", 2**-22),
        ("a.flac", "PCM_24", 2**-22),
        ("a.wav", "PCM_32", 2**-22),
        ("a.wav", "FLOAT", 2**-22),
        ("a.wav", "DOUBLE", 2**-22),
    ],
)
def test_every_sample_format_decodes_to_the_mean_of_its_channels(
    tmp_path: Path, name: str, subtype: str, step: float
) -> None:
    pcm = sound(1, 1.0, 44100, 6)
    pcm *= np.linspace(0.5, 1.5, 6, dtype=np.float32)  # so that a channel left out is seen
    decoded, audio = decode(write_audio(tmp_path / name, pcm, 44100, subtype))
    assert (audio.channels, audio.source_rate, audio.sample_rate) == (6, 44100, 44100)
    assert np.abs(decoded - pcm.mean(axis=1)).max() < step
    assert audio.note == ""


@pytest.mark.parametrize("suffix", [".mp3", ".ogg", ".m4a", ".flac"])
def test_compressed_songs_decode_whole(tmp_path: Path, suffix: str) -> None:
    pcm = sound(2, 5.0)
    decoded, audio = decode(write_audio(tmp_path / f"a{suffix}", pcm), 16000)
    assert audio.seconds == pytest.approx(5.0, abs=0.15)  # AAC and MP3 pad to whole frames
    assert len(decoded) == pytest.approx(audio.seconds * 16000, abs=1)
    assert rms_db(decoded) == pytest.approx(rms_db(pcm), abs=0.5)
    assert audio.note == ""


def test_the_audio_hash_is_of_the_audio_alone(tmp_path: Path) -> None:
    pcm = to_int16(sound(3, 2.0))
    _, wav = decode(write_audio(tmp_path / "a.wav", pcm), 16000)
    write_audio(tmp_path / "a.flac", pcm)
    tags = mutagen.File(tmp_path / "a.flac")
    tags["title"] = "one"
    tags.save()
    _, flac = decode(tmp_path / "a.flac")
    _, other = decode(write_audio(tmp_path / "b.wav", to_int16(sound(4, 2.0))))
    assert flac.audio_hash == wav.audio_hash != other.audio_hash


def chained(tmp_path: Path, suffix: str) -> Path:
    """2 s in stereo at 44.1 kHz, then 3 s in mono at 22.05 kHz, in one file, as streams are recorded."""
    first = write_audio(tmp_path / f"1{suffix}", sound(1, 2.0, 44100, 2), 44100)
    second = write_audio(tmp_path / f"2{suffix}", sound(2, 3.0, 22050, 1), 22050)
    path = tmp_path / f"chained{suffix}"
    path.write_bytes(first.read_bytes() + second.read_bytes())
    return path


def test_a_stream_that_changes_its_rate_keeps_its_length(tmp_path: Path) -> None:
    decoded, audio = decode(chained(tmp_path, ".mp3"), 16000)
    assert audio.seconds == pytest.approx(5.0, abs=0.2)
    assert len(decoded) == pytest.approx(audio.seconds * 16000, abs=2)
    assert (audio.source_rate, audio.channels) == (44100, 2)


def test_where_ffmpeg_cannot_continue_the_song_is_kept_so_far_and_reported(tmp_path: Path) -> None:
    decoded, audio = decode(chained(tmp_path, ".ogg"), 16000)
    assert len(decoded) == 32000
    assert "cannot be read beyond 2.0 s" in audio.note


def test_libsndfile_decodes_what_ffmpeg_refuses(tmp_path: Path) -> None:
    intact = write_audio(tmp_path / "intact.ogg", sound(1, 8.0, 44100, 2), 44100)
    twice = repeat_headers(write_audio(tmp_path / "twice.ogg", sound(1, 8.0, 44100, 2), 44100))
    with pytest.raises(NotDecodable, match="Invalid data"):
        list(FFmpegAudio(twice).blocks())
    expected, by_ffmpeg = decode(intact, 16000)
    found, by_libsndfile = decode(twice, 16000)
    assert np.abs(found - expected).max() < 1e-6
    assert by_ffmpeg.note == ""
    assert by_libsndfile.note.startswith("decoded by libsndfile: with FFmpeg it does not open as audio (Invalid data")
    for name in ("sample_rate", "source_rate", "channels", "declared", "seconds"):
        assert getattr(by_libsndfile, name) == getattr(by_ffmpeg, name)


def test_libsndfile_is_not_used_where_it_decodes_no_more(tmp_path: Path) -> None:
    """A lost page: soundfile on its own repeats audio there, so that the length comes out right."""
    path = write_audio(tmp_path / "a.ogg", sound(1, 8.0, 44100, 2), 44100)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + bytes(8192) + content[len(content) // 2 + 8192 :])
    by_ffmpeg, by_libsndfile = FFmpegAudio(path), decoding.LibsndfileAudio(path)
    for each in (by_ffmpeg, by_libsndfile):
        assert max(map(len, each.blocks())) < 2 * BLOCK
    assert by_ffmpeg.seconds == pytest.approx(by_libsndfile.seconds, abs=0.05)
    assert by_ffmpeg.seconds < 7.7
    _, audio = decode(path)
    assert isinstance(audio, FFmpegAudio)
    assert audio.note == by_ffmpeg.note == f"truncated: {audio.seconds:.1f} of 8.0 s"


def test_the_longer_of_two_decodings_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_audio(tmp_path / "a.flac", sound(1, 8.0))
    expected, _ = decode(path)
    whole = FFmpegAudio._decoded
    monkeypatch.setattr(FFmpegAudio, "_decoded", lambda self: itertools.islice(whole(self), 1))
    found, audio = decode(path)
    assert np.abs(found - expected).max() < 1e-6
    assert audio.note == f"decoded by libsndfile: FFmpeg gives only {BLOCK / 22050:.1f} s of it"


def test_mpeg_audio_is_left_to_ffmpeg(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_audio(tmp_path / "a.mp3", sound(1, 8.0))
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(NotDecodable, match="MPEG"):
        list(decoding.LibsndfileAudio(path).blocks())
    _, audio = decode(path)
    assert audio.note.startswith("truncated")
    assert capfd.readouterr().err == ""  # mpg123 would warn there


def test_a_disk_that_fails_is_not_the_end_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FailingDisk(io.FileIO):
        def readinto(self, buffer: Any) -> int | None:
            if self.tell() > 20_000:
                raise OSError(errno.EIO, "Input/output error")
            return super().readinto(buffer)

    path = repeat_headers(write_audio(tmp_path / "a.ogg", sound(1, 8.0, 44100, 2), 44100))
    monkeypatch.setattr(decoding, "_File", type("File", (decoding._File, FailingDisk), {}))
    with pytest.raises(BadSong, match="cannot be read: Input/output error") as caught:
        decode(path)
    assert caught.value.transient


def test_samples_beyond_full_scale_are_reported(tmp_path: Path) -> None:
    _, audio = decode(write_audio(tmp_path / "a.wav", 20 * sound(1, 1.0), subtype="FLOAT"))
    assert audio.note.startswith("clipped")


def test_what_is_no_audio_is_distinguished_from_broken_audio(tmp_path: Path) -> None:
    for name in ("a.mp3", "a.data"):
        (tmp_path / name).write_text("this is no music\n" * 500)
    with pytest.raises(NoAudio):
        decode(tmp_path / "a.data")
    with pytest.raises(BadSong) as caught:
        decode(tmp_path / "a.mp3")
    assert not isinstance(caught.value, NoAudio)
    with pytest.raises(BadSong, match="No such file") as caught:
        decode(tmp_path / "missing.mp3")
    assert caught.value.transient


@pytest.mark.parametrize(
    ("samples", "expected"),  # of segments of 10 samples: (start, true length)
    [
        (0, []),
        (3, [(0, 3)]),
        (10, [(0, 10)]),
        (14, [(0, 10)]),
        (15, [(0, 10), (5, 10)]),
        (27, [(0, 10), (10, 10), (17, 10)]),
        (30, [(0, 10), (10, 10), (20, 10)]),
    ],
)
@pytest.mark.parametrize("block", [1, 7, 64])
def test_segments_cover_the_song(samples: int, expected: list[tuple[int, int]], block: int) -> None:
    song = np.arange(1, samples + 1, dtype=np.float32)
    blocks = [song[at : at + block] for at in range(0, samples, block)]
    segments = list(cut_segments(blocks, 10))
    assert [(s.start, s.samples) for s in segments] == expected
    for segment in segments:
        true = song[segment.start : segment.start + segment.samples]
        assert segment.pcm.tolist() == [true[i % len(true)] for i in range(10)]


def test_cutting_never_holds_the_whole_song() -> None:
    taken = 0

    def endless() -> Iterator[np.ndarray]:
        nonlocal taken
        while True:
            taken += 1
            yield np.ones(10, np.float32)

    assert len(list(itertools.islice(cut_segments(endless(), 100), 5))) == 5
    assert taken == 50


@pytest.mark.parametrize("codec", ["flac", "wav", "ogg"])
def test_encoding_is_repeatable_and_readable(tmp_path: Path, codec: str) -> None:
    pcm = sound(5, 8.0, 16000)[:, 0]
    content = encode(pcm, 16000, codec)
    assert content == encode(pcm, 16000, codec)
    path = tmp_path / f"a.{codec}"
    path.write_bytes(content)
    read, rate = sf.read(path, dtype="float32")  # libogg drops pages whose checksum is wrong
    assert (rate, read.shape) == (16000, pcm.shape)
    error = rms_db(read - pcm) - rms_db(pcm)
    assert error < (-15 if codec == "ogg" else -70)


def test_encoding_clips() -> None:
    pcm = np.array([-3, -1, 0, 1, 3], np.float32)
    content = encode(pcm, 16000, "wav")
    assert np.frombuffer(content[-10:], "<i2").tolist() == [-32767, -32767, 0, 32767, 32767]


def test_finding_ends_and_sorts_out_other_files(tmp_path: Path) -> None:
    music = tmp_path / "music"
    for name in ("b/2.MP3", "a/1.flac", "z.unknown", "cover.jpg", "list.m3u", ".hidden.mp3", ".trash/3.mp3"):
        (music / name).parent.mkdir(parents=True, exist_ok=True)
        (music / name).write_bytes(b"x")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.ogg").write_bytes(b"x")
    (music / "linked").symlink_to(tmp_path / "elsewhere")
    (music / "a" / "loop").symlink_to(music)
    (music / "0-alias-of-b").symlink_to(music / "b")
    (music / "self.mp3").symlink_to(music / "self.mp3")
    (music / "shards").mkdir()
    (music / "shards" / "5.wav").write_bytes(b"x")

    files, passed_over = find_songs(music, exclude=music / "shards")

    assert [f.name for f in files] == ["a/1.flac", "b/2.MP3", "linked/4.ogg", "self.mp3", "z.unknown"]
    assert [bool(f.problem) for f in files] == [False, False, False, True, False]
    assert passed_over == 3  # the cover, the playlist, the hidden file


def test_reading_tags_and_decoding_change_nothing(tmp_path: Path) -> None:
    path = write_song(tmp_path / "a.ogg", 1, title="t")
    before = path.read_bytes()
    decode(path)
    assert mutagen.File(path)["title"] == ["t"]
    assert path.read_bytes() == before


def test_the_pyav_that_may_be_installed_has_what_opens_a_song() -> None:
    """PyAV 19 has no `metadata_errors`, so that no song would open: it must not be taken without the lock either."""
    (line,) = (x for x in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
               if re.match(r"av\W", x))  # fmt: skip
    assert Requirement(line).specifier.contains(av.__version__)
    assert not Requirement(line).specifier.contains("19.0.0")
    assert Requirement(line).specifier.contains("18.1.0")


def test_a_rate_that_no_recording_has_is_refused(tmp_path: Path) -> None:
    """A damaged header: libswresample's filter from 50 MHz to 16 kHz does not fit in memory."""
    header = bytearray(write_audio(tmp_path / "a.wav", sound(1, 0.5)).read_bytes())
    header[24:28] = (50_353_698).to_bytes(4, "little")
    (tmp_path / "a.wav").write_bytes(header)
    with pytest.raises(BadSong, match="sample rate of 50353698 Hz"):
        decoding.decode(tmp_path / "a.wav", 16000, lambda song: list(song.blocks()))
