"""An exported encoder: the same embedding as through the shards, in torch without DALI, and in onnxruntime."""

import dataclasses
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import safetensors
import torch
from helpers.running import run_tool
from helpers.signals import noise, reference_log_mel, song
from helpers.small_music import repeat_headers, write_audio, write_song

import simsiam_dali
from simsiam_dali import embed
from simsiam_dali import export as command
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.data.graph import LogMel
from simsiam_dali.embedding import export, song_encoder
from simsiam_dali.embedding.run import read_run
from simsiam_dali.embedding.song_encoder import CONFIG, SongEncoder
from simsiam_dali.embedding.table import read_embeddings
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.packing.ffmpeg import FFmpegAudio
from simsiam_dali.packing.song_audio import NotDecodable

KINDS = ("simsiam", "simple")
SOURCES = {
    "stereo.mp3": (44100, 2),
    "stereo.flac": (44100, 2),
    "stereo.ogg": (44100, 2),
    "low.mp3": (16000, 1),
    "low.flac": (16000, 1),
    "low.ogg": (16000, 1),
}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory, small_runs: dict[str, Path]) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exported")
    for kind in KINDS:
        export.export(SongEncoder(read_run(str(small_runs[kind]))), folder / kind, replace=False)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def songs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Songs of 7.7 s in several formats: two segments of 3 s and a third that overlaps; stereo has unlike channels."""
    folder = tmp_path_factory.mktemp("songs")
    for seed, (name, (rate, channels)) in enumerate(SOURCES.items()):
        write_audio(folder / name, np.stack([song(7.7, seed + 20 * i, rate) for i in range(channels)], axis=1), rate)
    return folder


def through_the_shards(songs: Path, run_dir: Path, folder: Path, *packing: object) -> dict[str, np.ndarray]:
    run_tool("make_shards.py", songs, "--out", folder / "shards", "--segment-seconds", 3, "--val-fraction", 0, *packing)
    words = ["--checkpoint", run_dir, "--shards", folder / "shards", "--out", folder / "e.parquet", "--device", "cpu"]
    embed.run(embed.build_parser().parse_args([str(word) for word in words]))
    table = read_embeddings(folder / "e.parquet")
    return dict(zip(table.table["path"], table.vectors, strict=True))


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Cosine distance."""
    return float(1 - a @ b / np.linalg.norm(a) / np.linalg.norm(b))


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_embeds_as_through_the_shards(
    songs: Path, small_runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    table = through_the_shards(songs, small_runs[kind], tmp_path)
    encoder = simsiam_dali.load_encoder(small_runs[kind])
    own = {name: encoder.embed_file(songs / name) for name in SOURCES}
    assert table.keys() == own.keys()
    for name in SOURCES:
        assert own[name].shape == (encoder.embedding_dim,)
        # Same decoder, same cuts, same 16 bits: what is left is rounding.
        np.testing.assert_allclose(own[name], table[name], atol=1e-4 * np.abs(table[name]).max())
        assert distance(own[name], table[name]) <= 1e-6
    others = [distance(own[a], table[b]) for a in SOURCES for b in SOURCES if a != b]
    assert min(others) > 1e-5  # songs differ by more than that


@pytest.mark.parametrize("rate", ["native", 22050])
@pytest.mark.parametrize("kind", KINDS)
def test_also_where_the_graph_converts_the_rate(
    songs: Path, small_runs: dict[str, Path], tmp_path: Path, kind: str, rate: str | int
) -> None:
    """Shards at each song's own rate, or at another: DALI's resampler in the graph, FFmpeg's in `embed_file`."""
    table = through_the_shards(songs, small_runs[kind], tmp_path, "--sample-rate", rate)
    encoder = simsiam_dali.load_encoder(small_runs[kind])
    for name in SOURCES:
        assert distance(encoder.embed_file(songs / name), table[name]) <= 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_an_exported_folder_gives_the_same_without_dali_or_shards(
    exported: dict[str, Path], songs: Path, small_runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    here = simsiam_dali.load_encoder(small_runs[kind]).embed_file(songs / "stereo.mp3")
    program = (
        "import sys; sys.modules['nvidia'] = None\n"
        "import numpy, simsiam_dali\n"
        f"encoder = simsiam_dali.load_encoder({str(exported[kind])!r})\n"
        f"numpy.save('v.npy', encoder.embed_file({str(songs / 'stereo.mp3')!r}))\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True)
    np.testing.assert_allclose(np.load(tmp_path / "v.npy"), here, atol=1e-6)


def test_importing_the_package_stays_light() -> None:
    program = "import sys, simsiam_dali; assert 'torch' not in sys.modules; simsiam_dali.load_encoder"
    subprocess.run([sys.executable, "-c", program], check=True)
    with pytest.raises(AttributeError, match="no attribute 'load_decoder'"):
        _ = simsiam_dali.load_decoder


def test_the_front_end_in_torch_is_the_reference(small_runs: dict[str, Path]) -> None:
    of = read_run(str(small_runs["simsiam"]))
    wave = noise(3.0)
    expected = reference_log_mel(wave, LogMel(n_mels=16))
    own = song_encoder.LogMel(of)(torch.from_numpy(wave)[None])[0].numpy()
    # 1e-4 of the power is 4.3e-4 dB
    np.testing.assert_allclose(own * of.statistics["std"] + of.statistics["mean"], expected, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wave_embeds_as_its_file(songs: Path, small_runs: dict[str, Path], tmp_path: Path, kind: str) -> None:
    import soundfile

    encoder = simsiam_dali.load_encoder(small_runs[kind])
    wave, rate = soundfile.read(songs / "stereo.flac", dtype="float32")
    assert distance(encoder.embed_wave(wave.T, rate), encoder.embed_file(songs / "stereo.flac")) <= 1e-6
    low, rate = soundfile.read(songs / "low.flac", dtype="float32")
    np.testing.assert_allclose(encoder.embed_wave(torch.from_numpy(low), rate), encoder.embed_file(songs / "low.flac"))
    with pytest.raises(UserError, match="finite"):
        encoder.embed_wave(np.full(50_000, np.nan), 16000)
    with pytest.raises(UserError, match=r"\(channels, samples\), not \(\d+, 2\): transpose it"):
        encoder.embed_wave(wave, rate)
    with pytest.raises(UserError, match="is silent"):
        encoder.embed_wave(np.zeros(50_000), 16000)
    learned = torch.from_numpy(low).requires_grad_()
    np.testing.assert_array_equal(encoder.embed_wave(learned, rate), encoder.embed_wave(low, rate))
    for integers in ((low * 32767).astype(np.int16), torch.ones(50_000, dtype=torch.int16)):
        with pytest.raises(UserError, match="must be of floats, full scale = 1, not int16: divide int16 by 32768"):
            encoder.embed_wave(integers, rate)
    for wrong in (0, -1, 44100.5, math.nan):
        with pytest.raises(UserError, match=f"rate is {wrong:g}, but must be a whole number"):
            encoder.embed_wave(low, wrong)
    for wrong in (0, -1, math.nan):
        with pytest.raises(UserError, match=f"view_seconds is {wrong:g}, but must be more than 0"):
            simsiam_dali.load_encoder(small_runs[kind], view_seconds=wrong)
    broken = tmp_path / "broken.mp3"
    broken.write_bytes(b"no music at all")
    with pytest.raises(UserError, match=r"broken\.mp3: does not open as audio"):
        encoder.embed_file(broken)
    with pytest.raises(UserError, match="cannot be read"):
        encoder.embed_file(tmp_path / "none.mp3")


def test_a_file_that_ffmpeg_refuses_embeds_too(small_runs: dict[str, Path], tmp_path: Path) -> None:
    encoder = simsiam_dali.load_encoder(small_runs["simsiam"])
    path = write_song(tmp_path / "a.ogg", 1, 8.0)
    expected = encoder.embed_file(path)
    with pytest.raises(NotDecodable):
        list(FFmpegAudio(repeat_headers(path)).blocks())
    assert distance(encoder.embed_file(path), expected) <= 1e-6


def test_a_long_song_in_several_batches_and_a_short_one_repeated(small_runs: dict[str, Path]) -> None:
    encoder = simsiam_dali.load_encoder(small_runs["simsiam"])
    wave = song(3 * (song_encoder.SEGMENTS_AT_ONCE + 2), 1)
    parts = [encoder.embed_wave(part, 16000) for part in np.split(wave, song_encoder.SEGMENTS_AT_ONCE + 2)]
    np.testing.assert_allclose(encoder.embed_wave(wave, 16000), np.mean(parts, axis=0), atol=1e-5)
    short = wave[:16000]
    np.testing.assert_allclose(encoder.embed_wave(short, 16000), encoder.embed_wave(np.tile(short, 3), 16000))


def test_the_middle_of_each_segment(songs: Path, small_runs: dict[str, Path], tmp_path: Path) -> None:
    table = tmp_path / "e.parquet"
    words = ["--checkpoint", small_runs["simsiam"], "--music", songs, "--view-seconds", 1, "--out", table]
    embed.run(embed.build_parser().parse_args([str(word) for word in [*words, "--device", "cpu"]]))
    encoder = simsiam_dali.load_encoder(small_runs["simsiam"], view_seconds=1)
    read = read_embeddings(table)
    for name, vector in zip(read.table["path"], read.vectors, strict=True):
        assert distance(encoder.embed_file(songs / name), vector) <= 1e-6
    with pytest.raises(UserError, match="segments are 3 s long"):
        simsiam_dali.load_encoder(small_runs["simsiam"], view_seconds=4)
    with pytest.raises(UserError, match=r"at least 0\.86 s"):
        simsiam_dali.load_encoder(small_runs["simple"], view_seconds=0.5)


def test_songs_are_cut_as_those_of_the_training_also_without_their_shards(small_runs: dict[str, Path]) -> None:
    run = read_run(str(small_runs["simsiam"]))
    run = dataclasses.replace(run, config=replace_settings(run.config, data__shards="gone"))
    assert SongEncoder(run).segment_seconds == 3


@pytest.mark.parametrize("kind", [*KINDS, "projection", "stages", "windows"])
def test_onnxruntime_agrees_with_torch_for_any_batch_and_length(
    exported: dict[str, Path], small_runs: dict[str, Path], tmp_path: Path, kind: str
) -> None:
    folder = exported.get(kind, tmp_path / kind)
    embedding = kind if kind in ("projection", "stages") else None
    run = read_run(str(small_runs["simple" if kind == "simple" else "simsiam"]), embedding=embedding)
    if kind == "windows":
        windows = replace_settings(run.config, encoder__simsiam__embedding_seconds=0.5)
        run = dataclasses.replace(run, config=windows)
    if kind not in exported:
        export.export(SongEncoder(run), folder, replace=False)
    onnx.checker.check_model(folder / export.ONNX, full_check=True)
    session = onnxruntime.InferenceSession(folder / export.ONNX, providers=["CPUExecutionProvider"])
    (name,) = (i.name for i in session.get_inputs())
    assert name == json.loads((folder / CONFIG).read_text())["input"]
    songs = SongEncoder(run)
    for batch, seconds in ((1, 1.0), (5, 3.0), (2, 9.7)):
        x = export.example_input(songs, batch, round(16000 * seconds))
        (theirs,) = session.run(None, {name: x.numpy()})
        with torch.no_grad():
            ours = songs.encoder.embed(x).numpy()
        assert theirs.shape == (batch, songs.embedding_dim)
        assert np.abs(theirs - ours).max() <= 1e-4 * np.abs(ours).max()


@pytest.mark.parametrize("kind", KINDS)
def test_safetensors_hold_every_weight_and_the_config_no_path(
    exported: dict[str, Path], small_runs: dict[str, Path], kind: str
) -> None:
    run = read_run(str(small_runs[kind]))
    with safetensors.safe_open(exported[kind] / song_encoder.WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(run.weights)
        assert all(torch.equal(file.get_tensor(name), weight) for name, weight in run.weights.items())
    text = (exported[kind] / CONFIG).read_text()
    content = json.loads(text)
    assert content["encoder_type"] == kind
    assert content["embedding_dim"] == run.encoder().embedding_dim
    assert content["segment_seconds"] == 3
    assert content["checkpoint_sha256"] == run.sha256
    assert "/" not in text
    assert export.describe(simsiam_dali.load_encoder(exported[kind])) == content


def test_an_encoder_that_learned_from_short_views_too_is_exported_without_their_predictor(
    small_runs: dict[str, Path], tmp_path: Path
) -> None:
    plain = read_run(str(small_runs["simsiam"]))
    config = replace_settings(plain.config, data__short_views=1, data__short_view_seconds=1)
    torch.manual_seed(0)
    encoder = encoder_type(config).create(pretrained=False)
    run = dataclasses.replace(plain, config=config, weights=encoder.state_dict())
    export.export(SongEncoder(run), tmp_path / "out", replace=False)
    wave = song(4.0, 1, 16000)
    ours, read = (
        each.embed_wave(wave, 16000) for each in (SongEncoder(run), simsiam_dali.load_encoder(tmp_path / "out"))
    )
    np.testing.assert_array_equal(read, ours)


def test_nothing_else_is_written_over(exported: dict[str, Path], small_runs: dict[str, Path], tmp_path: Path) -> None:
    songs = SongEncoder(read_run(str(small_runs["simple"])))
    with pytest.raises(UserError, match="--replace"):
        export.export(songs, exported["simple"], replace=False)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="not an exported encoder"):
        export.export(songs, tmp_path, replace=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    export.export(songs, tmp_path / "e", replace=False)
    (tmp_path / "e" / song_encoder.WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(UserError, match="export again"):
        simsiam_dali.load_encoder(tmp_path / "e")
    export.export(songs, tmp_path / "e", replace=True)
    assert simsiam_dali.load_encoder(tmp_path / "e").embedding_dim == 24
    assert sorted(path.name for path in tmp_path.iterdir()) == ["e", "notes.txt"]


def test_an_onnx_file_that_computes_something_else_is_not_written(
    small_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    songs = SongEncoder(read_run(str(small_runs["simple"])))

    class Wrong(onnxruntime.InferenceSession):
        def run(self, *arguments: Any) -> list[Any]:
            return [1.001 * super().run(*arguments)[0]]

    monkeypatch.setattr(onnxruntime, "InferenceSession", Wrong)
    with pytest.raises(UserError, match="onnxruntime's values"):
        export.export(songs, tmp_path / "e", replace=False)
    assert not list(tmp_path.iterdir())


def test_the_command(
    small_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", str(small_runs["simple"]), "--out", "e"])
    command.main()
    assert "segments of 3 s" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["export", "--checkpoint", "nowhere"])
    with pytest.raises(SystemExit, match="1"):
        command.main()
    assert capsys.readouterr().err.startswith("error: --checkpoint nowhere")
