"""The embed command: every song once, the same by hand, killed and continued to the same bytes, refused in a line."""

import argparse
import dataclasses
import json
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import fork_server
from helpers.running import forked_stages, mark_damaged
from helpers.small_music import write_song

from simsiam_dali import embed
from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import replace_settings
from simsiam_dali.config.schema import Config
from simsiam_dali.data.shards import open_shards
from simsiam_dali.embedding import write
from simsiam_dali.embedding.features import CHECKPOINT, create_features
from simsiam_dali.embedding.run import TrainedRun, read_run
from simsiam_dali.embedding.table import Embeddings, read_embeddings, read_provenance
from simsiam_dali.evaluation.within_song import WithinSong
from simsiam_dali.models.encoder import song_embeddings
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training.data import create_loader, log_mel_settings, with_statistics

KINDS = ("simsiam", "simple")
STAGES_WIDTH = 4 * (16 + 8 * (1 + 1 + 2 + 4))  # mel bins, and the channels of the stem and of three stages


def run(run_dir: Path, out: Path, *options: object) -> Embeddings:
    """Embed in this process; the table."""
    embed.run(parsed(run_dir, out, *options))
    return read_embeddings(out)


def parsed(run_dir: Path, out: Path, *options: object) -> argparse.Namespace:
    words = ["--checkpoint", run_dir, "--out", out, "--device", "cpu", *options]
    return embed.build_parser().parse_args([str(word) for word in words])


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory, small_runs: dict[str, Path]) -> dict[str, Path]:
    """Each encoder type's table of `small_shards`, and the baselines beside simsiam's."""
    folder = tmp_path_factory.mktemp("embedded")
    for kind in KINDS:
        run(small_runs[kind], folder / f"{kind}.parquet", *(["--baselines"] if kind == "simsiam" else []))
    return {path.stem: path for path in sorted(folder.rglob("*.parquet"))}


def by_hand(run_dir: Path, shards_dir: Path, song: int) -> torch.Tensor:
    """One song's embedding: its segments one by one through the encoder, whole, then the mean of the unit vectors."""
    one = read_run(str(run_dir))
    settings = {"data__view_seconds": 3.0, "encoder__simsiam__augmentation__spec_augment": False}
    one = dataclasses.replace(one, config=replace_settings(one.config, **settings))
    shards, kind = open_shards(shards_dir), encoder_type(one.config)
    log_mel = with_statistics(log_mel_settings(one.config), **one.statistics)
    encoder, here, units = one.encoder(), World(0, 1, torch.device("cpu")), []
    for split in ("train", "val"):
        for batch in create_loader(one.config, shards, log_mel, here, split, kind.embeds):
            for data, segment in zip(batch.inputs[0], batch.segment.tolist(), strict=True):
                if shards.segments["song"][segment] == song:
                    with torch.no_grad():
                        units.append(torch.nn.functional.normalize(encoder.embed(data[None])[0], dim=0))
    return torch.stack(units).mean(dim=0)


@pytest.mark.parametrize("kind", KINDS)
def test_every_song_once_with_its_own_embedding(
    tables: dict[str, Path], small_shards: Path, small_runs: dict[str, Path], kind: str
) -> None:
    table, shards = read_embeddings(tables[kind]), open_shards(small_shards)
    assert table.table["song"].tolist() == list(range(len(shards.songs)))
    assert table.table["path"].tolist() == shards.songs["path"].tolist()
    assert set(table.table["split"]) == {"train", "val"}
    assert table.vectors.shape == (len(shards.songs), STAGES_WIDTH if kind == "simsiam" else 24)
    for song in (0, 7, 15):
        np.testing.assert_allclose(table.vectors[song], by_hand(small_runs[kind], small_shards, song), atol=1e-5)
    # Rows are told apart: no other song's embedding is as near as that.
    apart = np.abs(table.vectors[:, None] - table.vectors[None]).max(axis=2)
    assert apart[~np.eye(len(apart), dtype=bool)].min() > 1e-3


def test_provenance_tells_where_the_vectors_come_from(
    tables: dict[str, Path], small_shards: Path, small_runs: dict[str, Path]
) -> None:
    shards = open_shards(small_shards)
    provenance = read_provenance(tables["simsiam"])
    assert provenance == {
        "features": "checkpoint",
        "rows": "songs",
        "encoder_type": "simsiam",
        "embedding": "stages",
        "checkpoint": str(small_runs["simsiam"] / "checkpoint.pt"),
        "checkpoint_sha256": read_run(str(small_runs["simsiam"])).sha256,
        "music": shards.manifest.music,
        "shards": shards.fingerprint,
        "view_seconds": "3",
        "table_version": "3",
        "precision": "float32",
        "mlflow_run": "",
        "tracking_uri": provenance["tracking_uri"],
    }
    assert read_provenance(tables["simple"])["encoder_type"] == "simple"


def test_segments_have_their_start_and_make_up_their_song(
    tables: dict[str, Path], small_shards: Path, small_runs: dict[str, Path], tmp_path: Path
) -> None:
    each, shards = run(small_runs["simsiam"], tmp_path / "e.parquet", "--per-segment"), open_shards(small_shards)
    assert each.table["segment"].tolist() == list(range(len(shards.segments)))
    for name in ("song", "start", "split"):
        assert each.table[name].tolist() == shards.segments[name].tolist()
    _, means = song_embeddings(torch.tensor(each.vectors), torch.tensor(each.table["song"]))
    songs = read_embeddings(tables["simsiam"])
    np.testing.assert_array_equal(means, songs.vectors)
    segments = torch.nn.functional.normalize(torch.tensor(each.vectors), dim=1).numpy()
    within = WithinSong.of_segments(segments, each.table["song"].to_numpy())
    assert each.within is None
    assert songs.within is not None
    assert within is not None
    np.testing.assert_array_equal(songs.within.axes, within.axes)


def test_a_song_with_a_damaged_segment_is_the_mean_of_its_others(
    small_shards: Path, small_runs: dict[str, Path], tmp_path: Path
) -> None:
    shards = open_shards(Path(shutil.copytree(small_shards, tmp_path / "shards")))
    mark_damaged(shards, 5)
    one, here = read_run(str(small_runs["simsiam"])), World(0, 1, torch.device("cpu"))
    one = dataclasses.replace(one, config=write.embedding_config(one.config, 3.0, data__max_bad_fraction=0.2))
    log_mel = with_statistics(log_mel_settings(one.config), **one.statistics)
    views = write.CleanViews(one.config, shards, log_mel, here)
    features = create_features(CHECKPOINT, one, log_mel, here.device)
    tables = {}
    for rows in ("segments", "songs"):
        provenance = write.table_provenance(CHECKPOINT, rows, one, "", shards.fingerprint)
        assert "without 1 segments" in write.write_table(features, views, provenance, tmp_path / rows)
        tables[rows] = read_embeddings(tmp_path / rows)
    each = tables["segments"]
    assert each.table["segment"].tolist() == [row for row in range(len(shards.segments)) if row != 5]
    songs, means = song_embeddings(torch.tensor(each.vectors), torch.tensor(each.table["song"]))
    assert tables["songs"].table["song"].tolist() == songs.tolist()
    np.testing.assert_array_equal(tables["songs"].vectors, means)


def test_a_run_embeds_by_its_pooled_last_map_too(small_runs: dict[str, Path], tmp_path: Path) -> None:
    backbone = run(small_runs["simsiam"], tmp_path / "b.parquet", "--embedding", "backbone")
    assert backbone.vectors.shape[1] == 8 * 8
    assert backbone.provenance["embedding"] == "backbone"


def test_projection_and_the_middle_of_each_segment(small_runs: dict[str, Path], tmp_path: Path) -> None:
    projection = run(small_runs["simsiam"], tmp_path / "p.parquet", "--embedding", "projection")
    assert projection.vectors.shape[1] == 32
    assert projection.provenance["embedding"] == "projection"
    middle = run(small_runs["simsiam"], tmp_path / "m.parquet", "--view-seconds", 0.5)
    assert middle.provenance["view_seconds"] == "0.5"


def test_killed_at_any_moment_it_continues_and_gives_the_same_bytes(
    tables: dict[str, Path], small_runs: dict[str, Path], tmp_path: Path
) -> None:
    """Killed twice, where it waits for that with its part done; each batch of four is a part.

    So that is inside the training split and near or behind its end.
    """
    out, parts = tmp_path / "e.parquet", tmp_path / ".e.parquet.partial"
    slow = (
        "import dataclasses, os, pathlib, time\n"
        "import simsiam_dali.embed as e, simsiam_dali.embedding.write as w; w.PART_SECONDS = 0\n"
        "make, parts = e.create_features, pathlib.Path(os.environ['PARTS'])\n"
        "def late(*a):\n"
        "    made = make(*a)\n"
        "    def compute(x):\n"
        "        while len(list(parts.glob('*.pt'))) >= int(os.environ['WANTED']): time.sleep(1)\n"
        "        return made.compute(x)\n"
        "    return dataclasses.replace(made, compute=compute)\n"
        "e.create_features = late; e.main()"
    )
    chosen = ("--checkpoint", small_runs["simsiam"], "--out", out, "--batch-size", "4")
    options = [sys.executable, "-c", slow, *map(str, chosen)]
    for wanted in (2, 6):
        child = fork_server.start([*options, "--device", "cpu"], env={"PARTS": str(parts), "WANTED": str(wanted)})
        while len(list(parts.glob("*.pt"))) < wanted:
            assert child.poll() is None
            time.sleep(0.01)
        child.send_signal(signal.SIGKILL)
        child.wait()
        assert not out.exists()
    kept = [path.stat().st_mtime_ns for path in sorted(parts.glob("*.pt"))]
    (parts / f"{len(kept) - 1:06d}.pt").write_bytes(b"cut short")  # as after a power failure
    done = {path: path.stat().st_mtime_ns for path in sorted(parts.glob("*.pt"))[:-1]}
    seen: list[dict[Path, int]] = []
    remove = shutil.rmtree

    def removed(folder: Path, **more: Any) -> None:
        seen.append(stamps(parts))
        remove(folder, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", removed)
        run(small_runs["simsiam"], out, "--batch-size", 4)
    assert done.items() <= seen[0].items()  # nothing was done twice
    assert not parts.exists()
    assert out.read_bytes() == tables["simsiam"].read_bytes()


def stamps(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.glob("*.pt")}


def test_parts_of_other_settings_are_not_mixed_in(
    small_runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "e.parquet"

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "write_embeddings", killed)
        with pytest.raises(KeyboardInterrupt):
            run(small_runs["simsiam"], out, "--view-seconds", 1)
    assert list((tmp_path / ".e.parquet.partial").glob("*.pt"))
    mixed = run(small_runs["simsiam"], out, "--view-seconds", 2)
    alone = run(small_runs["simsiam"], tmp_path / "alone.parquet", "--view-seconds", 2)
    np.testing.assert_array_equal(mixed.vectors, alone.vectors)


def test_an_output_is_kept_unless_it_may_be_replaced(
    small_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "e.parquet"
    first = run(small_runs["simsiam"], out)
    before = out.read_bytes()
    assert run(small_runs["simsiam"], out).provenance == first.provenance
    assert "is up to date" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"holds embeddings of other checkpoint.*--replace"):
        run(small_runs["simple"], out)
    with pytest.raises(UserError, match="other rows"):
        run(small_runs["simsiam"], out, "--per-segment")
    assert out.read_bytes() == before
    run(small_runs["simsiam"], out, "--precision", "fp32")  # which a CPU takes anyway
    with pytest.raises(UserError, match="holds embeddings of other precision"):
        run(small_runs["simsiam"], out, "--precision", "bf16")
    older = dataclasses.replace(first, provenance=first.provenance | {"table_version": "1"}, within=None)
    write.write_embeddings(out, older)
    with pytest.raises(UserError, match="other table version"):
        run(small_runs["simsiam"], out)
    assert run(small_runs["simsiam"], out, "--replace").within is not None
    assert run(small_runs["simple"], out, "--replace").provenance["encoder_type"] == "simple"
    out.write_text("my notes")
    with pytest.raises(UserError, match="is not a table of embeddings"):
        run(small_runs["simple"], out)
    assert out.read_text() == "my notes"


def test_baselines_are_of_the_same_songs(tables: dict[str, Path], small_shards: Path) -> None:
    songs = len(open_shards(small_shards).songs)
    # 16 mel bins have only 16 cepstral coefficients.
    widths = {"untrained": STAGES_WIDTH, "mfcc": 2 * 16, "log-mel": 2 * 16}
    for name, width in widths.items():
        baseline = read_embeddings(tables[name])
        assert tables[name].parent == tables["simsiam"].parent / "baselines"
        assert baseline.provenance["features"] == name
        assert baseline.vectors.shape == (songs, width)
        assert baseline.table["song"].tolist() == list(range(songs))
    trained_vectors = read_embeddings(tables["simsiam"]).vectors
    assert np.abs(read_embeddings(tables["untrained"]).vectors - trained_vectors).max() > 1e-3


def test_log_mel_and_mfcc_are_those_of_torchaudio(tables: dict[str, Path], small_shards: Path) -> None:
    """Against torchaudio on the packed segments themselves, decoded without DALI."""
    import io
    import tarfile

    import soundfile
    import torchaudio

    shards = open_shards(small_shards)
    options = {"n_fft": 2048, "hop_length": 512, "n_mels": 16}
    log_mel = torch.nn.Sequential(
        torchaudio.transforms.MelSpectrogram(16000, **options), torchaudio.transforms.AmplitudeToDB()
    )
    mfcc = torchaudio.transforms.MFCC(16000, n_mfcc=16, melkwargs=options)
    mfcc.amplitude_to_DB.top_db = None
    song = 3
    expected: dict[str, list[torch.Tensor]] = {"log-mel": [], "mfcc": []}
    for row in np.flatnonzero(shards.segments["song"] == song):
        with tarfile.open(shards.root / shards.segments["shard"][row]) as tar:
            file = tar.extractfile(f"{row:09d}.flac")
            assert file is not None
            wave, _ = soundfile.read(io.BytesIO(file.read()), dtype="float32")
        for name, transform in (("log-mel", log_mel), ("mfcc", mfcc)):
            x = transform(torch.from_numpy(wave))
            expected[name].append(torch.cat([x.mean(dim=1), x.std(dim=1, correction=0)]))
    for name, of_segments in expected.items():
        own = read_embeddings(tables[name]).vectors[song]
        np.testing.assert_allclose(own, torch.stack(of_segments).mean(dim=0), rtol=1e-4, atol=2e-2)  # dB


def test_the_untrained_baseline_is_epoch_0_of_the_run(
    tables: dict[str, Path], small_shards: Path, small_runs: dict[str, Path]
) -> None:
    one = read_run(str(small_runs["simsiam"]))
    torch.manual_seed(one.config.train.seed)
    fresh = encoder_type(one.config).create()
    assert any(not torch.equal(fresh.state_dict()[name], weight) for name, weight in one.weights.items())
    patched = pytest.MonkeyPatch()
    with patched.context() as patch:
        patch.setattr(TrainedRun, "encoder", lambda self: fresh.eval())  # noqa: ARG005
        expected = by_hand(small_runs["simsiam"], small_shards, 5)
    np.testing.assert_allclose(read_embeddings(tables["untrained"]).vectors[5], expected, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_songs_in_no_shard(
    small_runs: dict[str, Path],
    small_shards: Path,
    tables: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
) -> None:
    """A folder, a file of it again, and one elsewhere; what cannot be read is listed, and the rest goes on."""
    music = Path(open_shards(small_shards).manifest.music)
    known = read_embeddings(tables[kind])
    folder = tmp_path / "new"
    write_song(folder / "a/one.flac", 1, title="One")
    (folder / "broken.mp3").write_bytes(b"no music at all")
    packed = music / known.table["path"][4]
    out = folder / "e.parquet"  # among the songs
    table = run(small_runs[kind], out, "--music", folder, folder / "a/../a/one.flac", packed)
    said = capsys.readouterr().out
    assert "broken.mp3: does not open as audio" in said
    root = Path(table.provenance["music"])
    assert sorted(root / path for path in table.table["path"]) == sorted([folder / "a/one.flac", packed])
    assert set(table.table["split"]) == {""}
    (row,) = np.flatnonzero([root / path == packed for path in table.table["path"]])
    assert table.table["title"][row] == known.table["title"][4]
    np.testing.assert_allclose(table.vectors[row], known.vectors[4], atol=1e-6)  # the same song through the shards
    assert sorted(p.name for p in folder.iterdir()) == [".e.parquet.files", "a", "broken.mp3", "e.parquet"]
    run(small_runs[kind], out, "--music", folder, folder / "a/one.flac", packed)
    assert "is up to date" in capsys.readouterr().out


def test_songs_in_no_shard_take_ratings_from_a_file(
    small_runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    music, out, ratings = tmp_path / "music", tmp_path / "e.parquet", tmp_path / "ratings.csv"
    for seed, name in enumerate(("a/one.flac", "two.flac", "three.flac")):
        write_song(music / name, seed, title=Path(name).stem, fmps_rating="0.4")
    ratings.write_text("path,rating\na/one.flac,5\ntwo.flac,\nelsewhere.flac,3\n")
    table = run(small_runs["simsiam"], out, "--music", music, "--ratings", ratings).table
    assert f"2 of 3 songs matched in {ratings} (3 ratings)" in capsys.readouterr().out
    rated = dict(zip(table["path"], table["rating"].fillna(-1), strict=True))
    assert rated == {"a/one.flac": 1.0, "two.flac": -1, "three.flac": 0.4}
    run(small_runs["simsiam"], out, "--music", music, "--ratings", ratings)
    assert "is up to date" in capsys.readouterr().out
    ratings.write_text("path,rating\na/one.flac,4\ntwo.flac,\nelsewhere.flac,3\n")
    with pytest.raises(UserError, match="holds embeddings of other shards"):
        run(small_runs["simsiam"], out, "--music", music, "--ratings", ratings)
    table = run(small_runs["simsiam"], out, "--music", music, "--ratings", ratings, "--replace").table
    assert table["rating"][table["path"] == "a/one.flac"].tolist() == [0.8]


def test_where_no_song_decodes_nothing_is_left(small_runs: dict[str, Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp3"
    broken.write_bytes(b"no music at all")
    with pytest.raises(UserError, match=r"can be packed \(broken.mp3 does not open as audio"):
        run(small_runs["simsiam"], tmp_path / "e.parquet", "--music", broken)
    assert list(tmp_path.iterdir()) == [broken]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--checkpoint", "nowhere"], "--checkpoint nowhere: neither a checkpoint"),
        (["--checkpoint", __file__], "is damaged or not a checkpoint"),
        (["--shards", "nowhere"], "no shards at nowhere"),
        (["--music", "nowhere"], "nowhere: no such folder or file"),
        (["--view-seconds", "4"], "holds segments of 3 s"),
        (["--ratings", "r.csv"], "--ratings goes with --music"),
        (["--music", __file__, "--ratings", "r.csv"], "--ratings r.csv: No such file or directory"),
        (["--batch-size", "0"], "encoder.batch_size = 0 is refused"),
        (["--out", "songs.CSV"], "--out songs.CSV: the table is a Parquet file, name it songs.parquet"),
    ],
)
def test_refused_in_one_line(
    small_runs: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    words: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # this process keeps its own
    monkeypatch.setattr(sys, "argv", ["embed", "--checkpoint", str(small_runs["simsiam"]), *options])
    with pytest.raises(SystemExit, match="1"):
        embed.main()
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert words in said
    assert said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_simple_has_no_projection(small_runs: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder of type simple has one output"):
        run(small_runs["simple"], tmp_path / "e.parquet", "--embedding", "projection")


def test_a_batch_holds_no_more_audio_than_four_of_the_training() -> None:
    config = Config()
    assert config.encoder.batch_size == 128
    assert write.embedding_config(config, 60.0).encoder.batch_size == 128
    accumulated = replace_settings(config, train__micro_batch=16)  # more than 16 may not fit
    assert write.embedding_config(accumulated, 60.0).encoder.batch_size == 16
    short = replace_settings(config, data__view_seconds=5.0)
    assert write.embedding_config(short, 60.0).encoder.batch_size == 42
    assert write.embedding_config(short, 6000.0).encoder.batch_size == 2  # the least that a config may say


def test_the_benchmark_times_loader_model_and_both(small_shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.json"
    tiny = ("encoder.simsiam.n_mels=16", "train.channels_last=false")
    sets = [word for setting in tiny for word in ("--set", setting)]
    command: list[str | Path] = [*forked_stages("embed.py"), "--shards", small_shards, "--device", "cpu", *sets]
    windows: list[str | Path] = ["--seconds", "0.2", "--windows", "2", "--batch-size", "4", "--json", out]
    done = fork_server.run([*command, *windows])
    assert done.returncode == 0, done.stderr[-2000:]
    doc = json.loads(out.read_text())
    rate = {kind: stage["samples_per_s"] for kind, stage in doc["stages"].items()}
    assert rate.keys() == {"loader", "model", "embed"}
    assert all(stage["samples"] >= 2 * 4 for stage in doc["stages"].values())
    assert doc["ratios"]["embed_over_slower"] == pytest.approx(rate["embed"] / min(rate["loader"], rate["model"]))
    assert doc["ratios"]["embed_over_shared"] == pytest.approx(rate["embed"] * (1 / rate["loader"] + 1 / rate["model"]))
    assert "embed over the slower of loader and model" in done.stdout


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_on_the_gpu_the_same(small_runs: dict[str, Path], tables: dict[str, Path], tmp_path: Path, kind: str) -> None:
    table = run(small_runs[kind], tmp_path / "e.parquet", "--device", "gpu", "--precision", "fp32")
    own, other = (torch.nn.functional.normalize(torch.tensor(v), dim=1) for v in
                  (table.vectors, read_embeddings(tables[kind]).vectors))  # fmt: skip
    assert (1 - (own * other).sum(dim=1)).max() <= 1e-4
