"""Songs as the server sends them: files as they are, other formats as a WAV, and any part of both."""

import io
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile as sf
from helpers.served import Client, write_library
from helpers.small_music import sound, write_audio

from simsiam_dali.serving.audio import HEADER, byte_range

RATE = 22050
SECONDS = 3.0
ENCODERS = {"alac.m4a": ("alac", "s16p"), "wma": ("wmav2", "fltp"), "tta": ("tta", "s16")}


def write_encoded(path: Path, codec: str, sample_format: str, pcm: np.ndarray) -> None:
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=RATE, layout="mono")
        assert isinstance(stream, av.AudioStream)
        stream.bit_rate = 64_000
        resampler = av.AudioResampler(sample_format, "mono", RATE, stream.codec_context.frame_size or 4096)
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm.T), "fltp", "mono")
        frame.sample_rate, frame.time_base, frame.pts = RATE, Fraction(1, RATE), 0
        for part in (*resampler.resample(frame), *resampler.resample(None), None):
            container.mux(stream.encode(part))


@pytest.fixture(scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    """Songs 0 to 4 of formats that browsers play, then AIFF and others that they do not."""
    folder = tmp_path_factory.mktemp("audio")
    table = write_library(folder, songs=5 + 1 + len(ENCODERS), seconds=SECONDS)
    client = Client(table)
    music, paths = folder / "music", client.library.table["path"]
    for i, name in enumerate(("aiff", *ENCODERS), 5):
        (music / paths[i]).unlink()
        path = (music / paths[i]).with_suffix(f".{name}")
        client.library.table.loc[i, "path"] = path.relative_to(music).as_posix()
        if name == "aiff":
            with path.open("wb") as file:
                sf.write(file, sound(i, SECONDS), RATE, "PCM_16", format="AIFF")
        else:
            write_encoded(path, *ENCODERS[name], sound(i, SECONDS))
    yield client
    client.close()


OTHERS = range(5, 6 + len(ENCODERS))


@pytest.mark.parametrize(("song", "media_type"), list(enumerate(["flac", "mpeg", "ogg", "wav", "mp4"])))
def test_what_browsers_play_is_sent_as_it_is_and_in_parts(client: Client, song: int, media_type: str) -> None:
    whole = client.get(f"/audio/{song}")
    assert whole.header("content-type") == f"audio/{media_type}"
    assert whole.body == (client.library.music / client.library.table["path"][song]).read_bytes()
    part = client.get(f"/audio/{song}", range="bytes=100-199")
    assert (part.status, part.body) == (206, whole.body[100:200])
    assert part.header("content-range") == f"bytes 100-199/{len(whole.body)}"


@pytest.mark.parametrize("song", OTHERS)
def test_other_formats_are_decoded_to_a_wav_of_the_same_sound(client: Client, song: int) -> None:
    answer = client.get(f"/audio/{song}")
    assert (answer.status, answer.header("content-type")) == (200, "audio/wav")
    assert int(answer.header("content-length")) == len(answer.body)
    heard, rate = sf.read(io.BytesIO(answer.body))
    assert (rate, heard.ndim) == (RATE, 1)
    assert len(heard) == pytest.approx(SECONDS * RATE, abs=4096)
    expected = sound(song, SECONDS)[:, 0]
    part = expected[24000:28000]
    at = np.argmax(np.correlate(heard[20000:32000], part)) + 20000  # an encoder may delay the sound
    assert abs(at - 24000) <= 2048
    assert np.linalg.norm(heard[at : at + 4000] - part) < 0.05 * np.linalg.norm(part)


@pytest.mark.parametrize("song", OTHERS)
@pytest.mark.parametrize("wanted", ["bytes=0-99", "bytes=40-60", "bytes=65536-90001", "bytes=60002-"])
def test_a_part_of_a_decoded_song_is_that_part_of_the_whole(client: Client, song: int, wanted: str) -> None:
    """Exactly, but for WMA, whose packets have inexact times: up to 0.1 s away."""
    whole = client.get(f"/audio/{song}").body
    part = client.get(f"/audio/{song}", range=wanted)
    asked = byte_range(wanted, len(whole))
    assert asked is not None
    start, end = asked
    assert part.status == 206
    assert part.header("content-range") == f"bytes {start}-{end - 1}/{len(whole)}"
    assert len(part.body) == end - start
    if client.library.table["path"][song].endswith("wma") and start >= HEADER:
        piece = np.frombuffer(part.body[1000:5000], "<i2").astype(float)
        near = np.frombuffer(whole[start + 1000 - 2 * RATE // 5 : start + 5000 + 2 * RATE // 5], "<i2").astype(float)
        lag = np.argmax(np.correlate(near, piece)) - RATE // 5
        assert abs(lag) <= RATE / 10
    else:
        assert part.body == whole[start:end]


@pytest.mark.parametrize("song", [0, 4])
def test_a_browser_that_does_not_play_a_file_gets_a_wav(client: Client, song: int) -> None:
    answer = client.get(f"/audio/{song}", query="wav=1")
    heard, rate = sf.read(io.BytesIO(answer.body))
    assert rate == RATE
    assert len(heard) == pytest.approx(SECONDS * RATE, abs=4096)


def test_a_part_beyond_the_end_is_refused_with_the_length(client: Client) -> None:
    size = len(client.get("/audio/5").body)
    answer = client.get("/audio/5", range=f"bytes={size}-")
    assert (answer.status, answer.header("content-range")) == (416, f"bytes */{size}")


def test_head_tells_the_length_without_a_body(client: Client) -> None:
    for song in (0, 5):
        answer = client.request("HEAD", f"/audio/{song}")
        assert answer.status == 200
        assert int(answer.header("content-length")) > 1000


def test_a_damaged_or_missing_song_is_refused_in_one_line(tmp_path: Path) -> None:
    client = Client(write_library(tmp_path, songs=3, seconds=0.5))
    files = [client.library.music / path for path in client.library.table["path"]]
    files[0].write_bytes(b"nothing that is audio" * 50)
    files[1].unlink()
    files[2].write_bytes(b"")
    for song, reason in ((0, "cannot be played"), (1, "missing"), (2, "cannot be played")):
        answer = client.get(f"/audio/{song}")
        assert answer.status == 404
        assert reason in answer.json()["error"]
    client.close()


def test_a_song_that_ends_early_is_filled_with_silence(tmp_path: Path) -> None:
    """An AIFF whose header promises more than its file has: as many bytes come as were announced."""
    client = Client(write_library(tmp_path, songs=1))
    path = client.library.music / "artist 0/album 0/0.aiff"
    client.library.table.loc[0, "path"] = "artist 0/album 0/0.aiff"
    whole = io.BytesIO()
    sf.write(whole, sound(0, 2.0), RATE, "PCM_16", format="AIFF")
    path.write_bytes(whole.getvalue()[:50_000])
    answer = client.get("/audio/0")
    assert int(answer.header("content-length")) == len(answer.body)
    heard = np.frombuffer(answer.body[HEADER:], "<i2")
    assert heard[:40_000].any()
    client.close()


def test_stereo_stays_stereo_and_high_rates_are_lowered(tmp_path: Path) -> None:
    client = Client(write_library(tmp_path, songs=1))
    path = client.library.music / client.library.table["path"][0]
    write_audio(path, sound(0, 1.0, 96000, 2), 96000)
    heard, rate = sf.read(io.BytesIO(client.get("/audio/0", query="wav=1").body))
    assert (rate, len(heard)) == (48000, 48000)
    assert np.abs(heard[:, 0] - heard[:, 1]).max() > 0.01
    client.close()


@pytest.mark.parametrize(
    ("header", "part"),
    [("", None), ("bytes=-", None), ("bytes=0-0", (0, 1)), ("bytes=5-", (5, 10)), ("bytes=-3", (7, 10)),
     ("bytes=-30", (0, 10)), ("bytes=3-99", (3, 10)), ("bytes=4-3", None), ("items=0-1", None),
     ("bytes=0-1,4-5", None), ("bytes=-0", (10, 10)), ("bytes=10-", (10, 10))],
)  # fmt: skip
def test_ranges(header: str, part: tuple[int, int] | None) -> None:
    assert byte_range(header, 10) == part
