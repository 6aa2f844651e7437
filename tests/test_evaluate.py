"""The evaluation as a command: what it reads and refuses, what it writes, and what MLflow gets."""

import json
import math
import re
from pathlib import Path

import mlflow
import numpy as np
import pandas as pd
import pytest
from helpers.evaluation_tables import planted, song_table

from simsiam_dali import evaluate
from simsiam_dali.common.errors import UserError
from simsiam_dali.embedding.table import Embeddings, read_embeddings, write_embeddings
from simsiam_dali.evaluation import maps, report
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.evaluation.plan import Evaluation, Options

PROVENANCE = {"encoder_type": "simsiam", "shards": "fingerprint", "checkpoint": "runs/<b>bold</b>/checkpoint.pt"}


def store(path: Path, table: pd.DataFrame, vectors: np.ndarray, **provenance: str) -> Path:
    write_embeddings(path, Embeddings(table, vectors, PROVENANCE | provenance))
    return path


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """40 songs whose vectors tell the artist, and where the command is run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    store(tmp_path / "embeddings.parquet", song_table(40), planted(np.arange(40) % 6, noise=0.5))
    return tmp_path


def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The command in this process; returns what it printed, on an error its line."""
    quick = ("--resamples", 20)
    monkeypatch.setattr("sys.argv", ["evaluate", *map(str, (*quick, *arguments))])
    try:
        evaluate.main()
    except SystemExit:
        error = capsys.readouterr().err
        return error[error.index("error:") :]
    return capsys.readouterr().out


def head(page: str) -> str:
    """The figures at the top of a report, and what it says of all reports."""
    return page[page.index("What <code>compare") : page.index("encoder that learned from tags or ratings.</p>")]


def test_everything_is_written_and_nothing_written_over(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = run(monkeypatch, capsys, "--out", "new/evaluation")
    made = library / "new/evaluation"
    names = {"report.html", "map.html", "metrics.json", "umap.png", "t-sne.png"}
    assert {path.name for path in made.iterdir()} == names
    assert [path.name for path in (library / "new").iterdir()] == ["evaluation"]
    assert "artist  album     k-NN" in out
    for name in ("umap", "t-sne"):
        assert (made / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    page = (made / "report.html").read_text()
    assert "held back from the encoder" in page
    assert "The only baseline here is a guess" in page
    assert "&lt;b&gt;bold&lt;/b&gt;" in page
    assert "<b>bold</b>" not in page
    before = (made / "report.html").stat().st_mtime_ns
    refused = run(monkeypatch, capsys, "--out", "new/evaluation", "--no-maps")
    assert "new/evaluation holds an evaluation already: give --replace to write over it, or another --out" in refused
    assert (made / "report.html").stat().st_mtime_ns == before
    run(monkeypatch, capsys, "--out", "new/evaluation", "--no-maps", "--replace")
    assert (made / "report.html").stat().st_mtime_ns != before


def test_baselines_are_matched_by_song(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same vectors as a baseline, their rows in another order: the same figures."""
    songs = read_embeddings(library / "embeddings.parquet")
    order = np.random.default_rng(0).permutation(40)
    shuffled = songs.table.iloc[order].reset_index(drop=True)
    store(library / "baselines/same.parquet", shuffled, songs.vectors[order], features="same")
    store(library / "baselines/noise.parquet", shuffled, np.random.default_rng(1).standard_normal((40, 3)))
    run(monkeypatch, capsys, "--no-maps")
    figures = json.loads((library / "evaluation/metrics.json").read_text())["figures"]
    assert figures
    for figure in figures:
        assert figure["baselines"].keys() == {"same", "noise", "guess"}
        same = figure["baselines"]["same"]
        if figure["probe"] != "mlp":  # whose weights start in an order of the dimensions, which is the same
            assert same["value"] == pytest.approx(figure["value"], abs=1e-6)
        assert "better than every baseline" not in figure["verdict"]
    by_name = {figure["name"]: figure for figure in figures}
    assert by_name["eval/artist/knn_accuracy/album_split"]["verdict"] == "too few groups of songs to tell"  # 6 artists
    assert by_name["eval/genre/knn_accuracy/album_split"]["verdict"] == "no clear difference from same"
    assert by_name["eval/artist/knn_accuracy/album_split"]["value"] > 0.8
    assert by_name["eval/artist/knn_accuracy/album_split"]["baselines"]["noise"]["value"] < 0.5


def test_what_does_not_fit_is_refused_in_one_line(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = read_embeddings(library / "embeddings.parquet")
    others = store(library / "other.parquet", songs.table, songs.vectors, shards="another")
    assert "is of other shards" in run(monkeypatch, capsys, "--baseline", f"mfcc={others}")
    older = store(library / "older.parquet", songs.table, songs.vectors, table_version="1")
    assert "different versions" in run(monkeypatch, capsys, "--baseline", f"mfcc={older}")
    fewer = store(library / "fewer.parquet", songs.table[:30], songs.vectors[:30])
    assert "has 30 songs, not the 40" in run(monkeypatch, capsys, "--baseline", f"mfcc={fewer}")
    assert "expected NAME=FILE" in run(monkeypatch, capsys, "--baseline", str(fewer))
    for name in ("embedding", "guess"):
        assert "choose another name" in run(monkeypatch, capsys, "--baseline", f"{name}={fewer}")
    twice = store(library / "twice.parquet", songs.table.assign(song=0), songs.vectors)
    assert "row for each segment" in run(monkeypatch, capsys, "--embeddings", twice)
    broken = store(library / "broken.parquet", songs.table, songs.vectors * math.nan)
    assert "not finite" in run(monkeypatch, capsys, "--embeddings", broken)
    empty = store(library / "empty.parquet", songs.table[:0], songs.vectors[:0])
    assert "holds no songs" in run(monkeypatch, capsys, "--embeddings", empty)
    assert "no embeddings" in run(monkeypatch, capsys, "--embeddings", "none.parquet")
    assert "is a file" in run(monkeypatch, capsys, "--out", twice)
    assert not (library / "evaluation").exists()


def test_a_library_without_ratings_and_with_one_artist_gets_the_rest(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    table = song_table(40).assign(rating=math.nan, artists=pd.Series([["Only One"]] * 40), album_artist="Only One")
    store(library / "embeddings.parquet", table, planted(np.arange(40) % 3))
    out = run(monkeypatch, capsys, "--no-maps")
    said = "Not evaluated: 0 songs rated, at least 10 are needed."
    assert f"rating: {said}" in out
    assert "artist: Not evaluated: all 40 songs with an artist have the same one." in out
    page = (library / "evaluation/report.html").read_text()
    assert said in page
    figures = json.loads((library / "evaluation/metrics.json").read_text())["figures"]
    assert {figure["target"] for figure in figures} == {"album", "genre"}


@pytest.mark.parametrize("n", [1, 5])
def test_a_tiny_library_gets_a_report_and_a_map(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], n: int
) -> None:
    store(library / "embeddings.parquet", song_table(n), planted(np.arange(n)))
    out = run(monkeypatch, capsys)
    assert "genre: Not evaluated" in out
    assert (library / "evaluation/pca.png").exists()
    assert (library / "evaluation/map.html").exists()


def test_mlflow_gets_the_figures_where_the_run_is(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = f"sqlite:///{library}/runs.db"
    client = mlflow.MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("music", artifact_location=(library / "artifacts").as_uri())
    run_id = client.create_run(experiment, run_name="trained").info.run_id
    client.set_terminated(run_id, "FINISHED")
    ended = client.get_run(run_id).info.end_time
    songs = read_embeddings(library / "embeddings.parquet")
    store(library / "embeddings.parquet", songs.table, songs.vectors, mlflow_run=run_id, tracking_uri=uri)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:///elsewhere.db")
    assert "elsewhere.db has no run" in run(monkeypatch, capsys, "--no-maps")
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    out = run(monkeypatch, capsys, "--no-maps", "--replace")
    assert f"logged to run {run_id}" in out
    found = client.get_run(run_id)
    assert (found.info.status, found.info.end_time) == ("FINISHED", ended)
    written = json.loads((library / "evaluation/metrics.json").read_text())
    names = [f"classifier/val_{name}" for name in ("mse", "mae", "correlation")]
    assert set(written["classifier"]) == {f"{name}{part}" for name in names for part in ("", "_chance", "_songs")}
    by_name = {figure["name"]: figure["value"] for figure in written["figures"]}
    assert found.data.metrics["classifier/val_mse"] == pytest.approx(
        by_name["eval/rating/mlp_mse/album_split"], abs=1e-5
    )
    assert found.data.metrics.keys() == {*by_name, *written["classifier"]}
    kept = {Path(file.path).name for file in client.list_artifacts(run_id, "evaluation")}
    assert kept == {"report.html", "metrics.json"}


def test_an_encoder_that_knows_its_training_ratings_by_heart_is_judged_by_other_songs(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its vectors tell the ratings of training songs, and nothing about those of the others."""
    table, rng = song_table(240), np.random.default_rng(0)
    x = rng.standard_normal((240, 8))
    trained = ((table["split"] == "train") & table["rating"].notna()).to_numpy()
    x[trained] += 4 * (table["rating"].to_numpy()[trained, None] - 0.5)

    def evaluated(kind: str, table: pd.DataFrame) -> tuple[str, dict[str, float], str]:
        store(library / "embeddings.parquet", table, x[: len(table)], encoder_type=kind)
        out = run(monkeypatch, capsys, "--no-maps", "--replace")
        written = json.loads((library / "evaluation/metrics.json").read_text())
        return out, written["classifier"], (library / "evaluation/report.html").read_text()

    name = "classifier/val_correlation"
    out, plain, page = evaluated("simsiam", table)
    assert "only that judges" not in out
    compared = out.partition("what compare compares: ")[2]
    assert compared.startswith("ratings predicted by the MLP, split by album, of rated songs held back")
    (row,) = [line.split() for line in compared.splitlines() if line.startswith(name)]
    assert row[1:3] == ["64", f"{plain[name]:.3f}"]
    of_simsiam = head(page)
    out, unseen, page = evaluated("joint", table)
    assert unseen == plain  # so that runs of both types are compared on the same songs
    assert unseen[name] < 0.3
    assert "and only that judges an encoder that learned from tags or ratings" in out
    assert head(page) == of_simsiam  # so that the heads of two reports compare, too
    cards = re.findall(
        r'"lead">(.*?)</span>\s*<b>(.*?)</b>.*?, split by album,<br>(\d+) songs (.*?)</span>', of_simsiam
    )
    assert [card[0] for card in cards] == [
        "rating: MSE ↓, MLP", "rating: MAE ↓, MLP", "rating: correlation, MLP",
        "artist: accuracy, k-NN", "genre: accuracy, k-NN", "artist: mAP@10, retrieval",
    ]  # fmt: skip
    assert cards[2][1:] == (f"{plain[name]:.3f}", "64", "held back from the training")
    assert {card[3] for card in cards} == {"held back from the training"}
    few = table.assign(split=np.where(np.arange(240) % 20 == 1, "val", "train"))
    _, all_songs, page = evaluated("simsiam", few)
    assert all_songs[name] > 0.5
    assert head(page).count(" songs of the whole table</span>") == len(cards)
    assert "held back from the training</span>" not in page
    out, unseen, page = evaluated("joint", few)
    assert unseen == {}
    said = "fewer than 20 of these songs were held back from it: these figures do not judge it."
    assert f"{said} No classifier/* is logged: pack with a larger --val-fraction, and train again.\n" in out
    assert 'class="card"' not in page
    assert "Too few songs were held back from it to judge it" in page


def test_songs_that_were_all_held_back_judge_an_encoder_that_learned_from_tags(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = read_embeddings(library / "embeddings.parquet")
    table = songs.table.assign(split="val")
    store(library / "embeddings.parquet", table, songs.vectors, encoder_type="joint")
    assert "do not judge" not in run(monkeypatch, capsys, "--no-maps")
    assert "classifier/val_mse" in json.loads((library / "evaluation/metrics.json").read_text())["classifier"]


def test_without_a_run_nothing_is_logged_and_no_database_made(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "the embeddings name no run" in run(monkeypatch, capsys, "--no-maps")
    replace = ("--no-maps", "--replace")
    assert "has no run 123" in run(monkeypatch, capsys, *replace, "--run-id", "123")
    songs = read_embeddings(library / "embeddings.parquet")
    store(library / "embeddings.parquet", songs.table, songs.vectors, mlflow_run="123")
    assert "not logged to MLflow: sqlite:///mlflow.db has no run 123" in run(monkeypatch, capsys, *replace)
    assert "switched off" in run(monkeypatch, capsys, *replace, "--no-mlflow")
    assert "switched off" in run(monkeypatch, capsys, *replace, "--set", "mlflow.enabled=false")
    assert not (library / "mlflow.db").exists()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    assert "does not answer" in run(monkeypatch, capsys, *replace)


def test_a_server_that_goes_away_costs_no_figure(
    library: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The table is printed and the report is written before anything is logged."""

    def gone(*_: object) -> None:
        raise UserError("the MLflow server does not answer")

    monkeypatch.setattr(evaluate, "find_run", lambda *_: (gone, "logged"))
    monkeypatch.setattr("sys.argv", ["evaluate", "--resamples", "20", "--no-maps"])
    with pytest.raises(SystemExit) as ended:
        evaluate.main()
    printed = capsys.readouterr()
    assert ended.value.code == 1
    assert printed.err.endswith("error: the MLflow server does not answer\n")
    assert "artist" in printed.out
    assert "report  evaluation/report.html" in printed.out
    assert "MLflow  logged" not in printed.out
    assert (library / "evaluation/report.html").exists()


def test_the_map_holds_each_songs_nearest_as_recommend_finds_them() -> None:
    table, x = song_table(30), np.random.default_rng(0).standard_normal((30, 8)).astype(np.float32) + 1
    data = maps.page_data(table, unit(x), maps.project(unit(x[:9]), 0))
    cosine = unit(x) @ unit(x).T
    for song in range(30):
        others = sorted(set(range(30)) - {song}, key=lambda other: -cosine[song, other])
        assert data["near"][song] == others[: maps.NEAREST]
        assert data["cosine"][song] == pytest.approx(cosine[song, others[: maps.NEAREST]], abs=6e-4)


def test_the_ten_commonest_are_coloured() -> None:
    labels = [["a"]] * 3 + [[]] * 5 + [["b", "a"]] * 4 + [[f"other {i}"] for i in range(20)]
    names, place = maps.categories(labels)
    assert names[:2] == ["b", "a"]
    assert len(names) == len(maps.PALETTE)
    assert place[:3].tolist() == [1, 1, 1]
    assert place[3:8].tolist() == [-1] * 5
    assert place[8:12].tolist() == [0] * 4
    assert (place[12:] == -1).sum() == 12


def test_the_map_is_coloured_by_what_the_most_songs_have() -> None:
    table = song_table(60)
    assert maps.commonest_kind(table) == "genre"  # which all have; one in five is unrated
    table["rating"] = 0.5
    assert maps.commonest_kind(table) == "rating"
    table["rating"] = np.nan
    table["path"] = [f"song {i}.mp3" for i in range(60)]  # no folders
    table["artists"] = [[f"artist {i}"] for i in range(60)]  # ten of them have a colour
    table["genres"] = [["rock"]] * 60  # one colour for all
    table["year"] = pd.array([1970 + i % 40 for i in range(60)], dtype="Int64")
    assert maps.commonest_kind(table) == "decade"
    assert maps.kinds(table)["decade"][25] == ["1990s"]
    table["year"] = pd.array([None] * 60, dtype="Int64")
    assert maps.commonest_kind(table) == "artist"
    table["path"] = [f"{'ab'[i % 2]}/album/song {i}.mp3" for i in range(60)]
    assert maps.commonest_kind(table) == "folder"
    assert maps.kinds(table)["folder"][1] == ["b"]


def test_names_that_look_like_formulas_are_drawn() -> None:
    table = song_table(12)
    table["artists"] = [["A$AP $Rocky^{"], ["_under"], ["東京"], ["<b>"]] * 3
    assert maps.picture(np.random.default_rng(0).random((12, 2)), table, "map").startswith(b"\x89PNG")


def test_a_report_of_nothing() -> None:
    nothing = Evaluation([], {target: ["Not evaluated."] for target in ("rating", "artist", "album", "genre")})
    provenance = {"songs": 1, "held back": 1, "dimensions": 2, "compared": "half-whitened", "date": "today"}
    assert "Not evaluated." in report.page(nothing, provenance, Options(), {}, None)
    assert list(report.terminal_table(nothing)) == [f"{t}: Not evaluated." for t in nothing.notes]
