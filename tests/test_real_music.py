"""The experiment on real music: halves without overlap, scores that can be checked by hand, a peer that is one."""

import dataclasses
import itertools
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from helpers import fork_server
from helpers.running import ROOT
from scipy.stats import norm

sys.path.insert(0, str(ROOT / "benchmarks" / "real_music"))
import equal_time
import equal_time_scores
import figure
import halves
import map as song_map
import peer
import retrieval
import run
import score
import shipped
import tables

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.config.schema import Config
from simsiam_dali.embedding.table import Embeddings, read_song_embeddings, write_embeddings
from simsiam_dali.evaluation.knn import l2_normalised, unit
from simsiam_dali.models.losses import simsiam_loss
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.models.simsiam import SimSiam
from simsiam_dali.training.data import log_mel_settings

TINY = {
    "data.view_seconds": 1.0,
    "data.threads": 1,
    "data.stats_segments": 8,
    "encoder.batch_size": 8,
    "encoder.epochs": 2,
    "encoder.simsiam.backbone_width": 8,
    "encoder.simsiam.projection_dim": 16,
    "encoder.simsiam.predictor_hidden_dim": 8,
    "encoder.simsiam.augmentation.frequency_mask_param": 4,
    "encoder.simsiam.augmentation.time_mask_param": 4,
}
CPU_FILE = ROOT / "configs" / "real_music_cpu.yaml"


def write_table(path: Path, songs: list[tuple[str, list[str]]], vectors: np.ndarray) -> Path:
    """Songs as (path, artists) with their vectors, as `simsiam_dali.embed` writes them."""
    n = len(songs)
    frame = pd.DataFrame(
        {
            "path": [name for name, _ in songs],
            "title": [""] * n,
            "artists": [artists for _, artists in songs],
            "albums": [[]] * n,
            "album_artist": [""] * n,
            "year": pd.array([None] * n, dtype="Int64"),
            "genres": [[]] * n,
            "rating": [float("nan")] * n,
            "duration": [60.0] * n,
            "split": ["train"] * n,
        }
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_embeddings(
        path, Embeddings.of_songs(frame, np.arange(n), vectors, {"rows": "songs", "features": "checkpoint"})
    )
    return path


def test_halves_share_no_song_and_cut_every_soundtrack_in_two() -> None:
    paths = [f"{package}/{i}.ogg" for package, n in (("one", 40), ("two", 7), ("three", 2)) for i in range(n)]
    halved = halves.split(paths)
    assert sorted(halved) == sorted(paths)
    count = Counter((halves.soundtrack(path), half) for path, half in halved.items())
    assert (count["one", "a"], count["one", "b"]) == (20, 20)
    assert abs(count["two", "a"] - count["two", "b"]) == 1
    assert (count["three", "a"], count["three", "b"]) == (1, 1)
    assert halves.split(reversed(paths)) == halved


def test_an_encoder_of_whole_sets_is_asked_about_the_set_that_it_did_not_learn_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    music, packed = tmp_path / "music", {}
    for name in halves.SETS:
        for song in range(2):
            file = music / name / f"game of {name}" / f"{song}.ogg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.touch()

    def pack(folder: Path, shards: Path, segment_seconds: int, least_seconds: int) -> None:
        songs = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        packed[shards.name] = songs, segment_seconds, least_seconds
        shards.mkdir(parents=True)
        (shards / "manifest.json").touch()

    monkeypatch.setattr(halves, "SETS", {name: halves.Set(("true",), 30) for name in halves.SETS})
    monkeypatch.setattr(halves, "pack", pack)
    shards = halves.prepare_sets(tmp_path / "work", music, [20, 60])
    for half, asked in zip(halves.HALVES, ("report", "held-out"), strict=True):
        of_asked = {f"game of {asked}/{song}.ogg" for song in range(2)}
        of_others = {f"game of {name}/{song}.ogg" for name in halves.SETS if name != asked for song in range(2)}
        assert packed[shards.asked[half].name] == (of_asked, 20, 30)
        for seconds in (20, 60):
            assert packed[shards.learned(half, seconds).name] == (of_others, seconds, 10)
    packed.clear()
    halves.prepare_sets(tmp_path / "work", music, [20, 60])
    assert not packed  # all of it is there

    # The fifth set: nobody learns from it, and the encoders of both are asked about it.
    (music / "fifth").mkdir()
    (music / "fifth" / "song.ogg").touch()
    monkeypatch.setattr(halves, "FIFTH", halves.Set(("true",), 30))
    for _ in range(2):
        fifth = halves.prepare_fifth(tmp_path / "fifth", shards, music, [20, 60])
    assert packed == {"fifth": ({"song.ogg"}, 20, 30)}
    assert set(fifth.asked.values()) == {tmp_path / "fifth" / "fifth"}
    for half, seconds in itertools.product(halves.HALVES, (20, 60)):
        assert fifth.learned(half, seconds).resolve() == shards.learned(half, seconds).resolve()


def test_scores_by_hand(tmp_path: Path) -> None:
    # Two soundtracks of three songs on two sides, one song of `red` among the `blue`, a soundtrack with one song only.
    songs = [(f"red/{i}", ["A"]) for i in range(3)] + [(f"blue/{i}", []) for i in range(3)]
    songs += [("red/stray", ["B"]), ("lonely/0", ["A"])]
    angle = np.array([0.0, 0.1, 0.2, 3.0, 3.1, 3.2, 3.3, 1.5])
    vectors = np.stack([np.cos(angle), np.sin(angle)], 1)
    found = run.of_each_song(write_table(tmp_path / "t.parquet", songs, vectors), retrieval.by_cosine, vectors)
    # `lonely` has nobody to be found with. The five nearest of a blue song are blue, blue, stray, and two others.
    assert found["soundtrack/knn"].tolist() == [1, 1, 1, 1, 1, 1, 0]
    # From the first red song on come two red ones, `lonely`, and the stray one, which is nearest round the other way.
    assert found["soundtrack/map"][0] == pytest.approx((1 + 1 + 3 / 4) / 3)
    # Artists: A's four songs; B has one only, and songs without an artist are not there at all.
    assert len(found["artist/knn"]) == 4


def test_a_random_embedding_scores_no_better_than_chance(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    songs = [(f"{package}/{i}", [f"artist {i}"]) for package in range(10) for i in range(20)]
    found = run.of_each_song(write_table(tmp_path / "t.parquet", songs, rng.standard_normal((200, 16))))
    assert found["soundtrack/knn"].mean() < 0.2
    assert found["soundtrack/map"].mean() < 0.1


def test_the_mean_is_over_seeds_within_a_half_and_a_row_needs_both(tmp_path: Path) -> None:
    def table(row: str, half: str, seed: int, good: bool) -> None:
        job = halves.Job(row, "simsiam", half, seed, {}, {row: ()})
        songs = [(f"{package}/{i}", ["A"]) for package in ("p", "q") for i in range(4)]
        angle = np.repeat([0.0, 1.5], 4) if good else np.tile([0.0, 1.5], 4)
        write_table(job.table(tmp_path, row), songs, np.stack([np.cos(angle), np.sin(angle)], 1))

    for seed, half, good in ((0, "a", True), (0, "b", True), (1, "a", False), (1, "b", True)):
        table(run.OURS, half, seed, good)
    table(run.PEER, "a", 0, False)
    found = run.by_row(list(run.plan(3)), tmp_path)
    assert list(found) == [run.OURS]
    assert list(found[run.OURS]) == [0, 1]  # the third seed was not trained
    bad = found[run.OURS][1]["a"]["soundtrack/map"].mean()
    doc = run.document(found, [run.PEER], torch.device("cpu"))
    score = doc["rows"][run.OURS]["soundtrack/map"]
    assert score["seeds"] == pytest.approx({"0": 1.0, "1": (1 + bad) / 2})
    assert score["value"] == pytest.approx((3 + bad) / 4)
    assert score["low"] < score["value"] < score["high"]
    assert "1.000" in next(line for line in run.table_lines(doc) if line.startswith(f"| {run.OURS}"))


def test_a_difference_is_paired() -> None:
    songs = {"a": np.array([1.0, 0.0, 1.0, 0.0] * 20), "b": np.array([0.5] * 40)}

    def row(more: float) -> run.Scores:
        of = {f"{target}/of": np.array(["one", "two"] * 40) for target in run.TARGETS}
        return {
            0: {
                half: dict.fromkeys(NAMES, x + more) | {k: v[: len(x)] for k, v in of.items()}
                for half, x in songs.items()
            }
        }

    doc = run.document({"one": row(0.25), "two": row(0.0)}, ["two"], torch.device("cpu"))
    gap = doc["rows"]["one"]["artist/knn"]["against"]["two"]
    assert gap == pytest.approx({"difference": 0.25, "low": 0.25, "high": 0.25})  # songs vary, their differences do not


NAMES = [f"{target}/{kind}" for target in run.TARGETS for kind in ("knn", "map")]


def test_the_map_is_drawn_from_the_tables_of_one_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    songs = [(f"{package}/{i}", ["A"]) for package in ("wesnoth-1.16-music", "another") for i in range(8)]
    songs.append(("lonely/0", ["A"]))
    angle = np.append(np.repeat([0.0, 1.5], 8), 3.0) + np.linspace(0, 0.1, 17)
    good = np.stack([np.cos(angle), np.sin(angle)], 1)
    noise = np.random.default_rng(0).standard_normal((17, 2))
    job = next(run.plan(1))
    for row in job.tables:
        write_table(job.table(tmp_path, row), songs, good if row == run.STAGES else noise)
    # UMAP, which project() computes too, compiles for long; the evaluation's tests have the real ones.
    monkeypatch.setattr(song_map.maps, "project", lambda vectors, **_: {"t-SNE": vectors})
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg"]
    for picture in pictures:
        monkeypatch.setattr(sys, "argv", ["map.py", "--work", str(tmp_path), "--out", str(picture)])
        song_map.main()
    assert "17 songs never heard" in capsys.readouterr().out
    text = pictures[0].read_text()
    assert "for 16 of 16 that are not alone" in text  # nobody can name the soundtrack of `lonely`
    assert text == pictures[1].read_text()


def test_the_map_has_a_style_and_a_name_for_each_package() -> None:
    fetched = (ROOT / "benchmarks/real_music/fetch.sh").read_text().partition("packages=(")[2].partition(")")[0].split()
    assert sorted(fetched) == sorted(song_map.GAMES)
    assert len(fetched) == len(dict(song_map.STYLES)) == len({marker for _, marker in song_map.STYLES})


def test_the_pages_of_experiments_hold_the_newest_results() -> None:
    pages = [page.read_text() for page in tables.PAGES]
    assert tables.with_tables(pages) == pages
    with pytest.raises(UserError, match="stand on 0 pages"):
        tables.with_tables(pages[1:])
    with pytest.raises(UserError, match="stand on 2 pages"):
        tables.with_tables([*pages, pages[0]])


def test_the_config_of_the_winner_is_what_was_compared() -> None:
    """All that shapes what is learned; how long, on what device and how it is recorded may differ."""
    own = equal_time.CANDIDATES[equal_time_scores.FOLDERS_LAST]
    settings = [f"{key}={value}" for key, value in own.settings.items()]
    compared = load_config(CPU_FILE, assignments=settings).model_dump()
    joint = load_config(ROOT / "configs" / "joint.yaml")
    assert joint.encoder.encoder_type == own.kind
    found = joint.model_dump()
    for section in ("joint", "contrastive", "simsiam"):
        assert found["encoder"][section] == compared["encoder"][section]
    for key in ("view_seconds", "view_crops", "views", "sample_rate"):
        assert found["data"][key] == compared["data"][key]
    assert found["encoder"]["batch_size"] == compared["encoder"]["batch_size"]


def row_of(scores: np.ndarray) -> dict[str, equal_time_scores.Scores]:
    """`(seeds, songs)` as the document has them; the songs of half b come from the training on a."""
    songs = dict(zip(halves.HALVES, np.array_split(np.arange(scores.shape[1]), 2), strict=True))
    return {
        str(seed): {half: dict.fromkeys(equal_time_scores.METRICS, own[songs[half]].tolist()) for half in halves.HALVES}
        for seed, own in enumerate(scores)
    }


def test_epochs_are_as_many_as_the_recipe_s_time_allows() -> None:
    cost = {equal_time_scores.BASE: 1.0, "slow": 2.0, "fast": 0.5, "endless": 500.0}
    expected = {equal_time_scores.BASE: 80, "slow": 40, "fast": 160, "endless": 1}
    assert equal_time_scores.epochs_of(cost, 80) == expected


def test_the_interval_covers_another_draw_of_seeds_and_soundtracks() -> None:
    """True mean 0, an effect of each seed, soundtrack and song: some 95 of 100 intervals hold it, by 5 seeds fewer.

    A bootstrap over songs, each by itself, holds it much more rarely.
    """
    rng, of = np.random.default_rng(0), np.repeat(np.arange(17), 6)
    drawn = [
        0.05 * rng.standard_normal((5, 1))
        + 0.2 * rng.standard_normal((1, 17))[:, of]
        + rng.standard_normal((5, 102)) / 9
        for _ in range(200)
    ]
    held, held_by_songs = (
        np.mean([low <= 0 <= high for low, high in (equal_time_scores.interval(each, groups) for each in drawn)])
        for groups in (of, np.arange(len(of)))
    )
    assert 0.85 <= held <= 1.0
    assert held_by_songs < held - 0.1
    assert equal_time_scores.interval(np.full((5, 102), 0.25), of) == pytest.approx((0.25, 0.25))


def test_differences_are_paired_and_a_candidate_below_the_recipe_is_given_up() -> None:
    rng = np.random.default_rng(0)
    base = rng.random((3, 40))
    found = equal_time_scores.difference(row_of(base + 0.1), row_of(base), "soundtrack/map")
    assert found == pytest.approx(np.full((3, 40), 0.1))
    one_seed_more = equal_time_scores.difference(row_of(rng.random((4, 40))), row_of(base), "soundtrack/map")
    assert one_seed_more is not None
    assert one_seed_more.shape == (3, 40)  # of the seeds that both have
    rows = {"above": base + 0.1, "below": base - 0.1, "of one seed": base[:1] - 0.1, equal_time_scores.BASE: base}
    soundtracks = dict(zip(halves.HALVES, np.split(np.repeat(np.arange(8), 5), 2), strict=True))
    doc = {"scores": {name: row_of(scores) for name, scores in rows.items()}, "soundtracks": soundtracks}
    assert not equal_time_scores.is_given_up(doc, "above")
    assert equal_time_scores.is_given_up(doc, "below")
    assert not equal_time_scores.is_given_up(doc, "of one seed")  # which decides nothing
    assert not equal_time_scores.is_given_up(doc, "not trained")
    half = {seed: {"a": own["a"]} for seed, own in row_of(base).items()}
    assert equal_time_scores.difference(half, row_of(base), "soundtrack/map") is None


def test_a_baseline_that_draws_nothing_is_the_same_for_every_seed() -> None:
    rng = np.random.default_rng(0)
    row, drawn, fixed = rng.random((3, 40)), rng.random((3, 40)), rng.random((1, 40))
    doc = {
        "scores": {equal_time_scores.BASE: row_of(row)},
        "baselines": {"untrained": row_of(drawn), "MFCC": row_of(fixed)},
        "soundtracks": {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES},
    }
    for other, scores in (("untrained", drawn), ("MFCC", fixed)):
        line = equal_time_scores.gap_line(doc, equal_time_scores.BASE, other)
        assert line is not None
        assert line.startswith(f"- the recipe, minus {other}: 5-NN {(row - scores).mean():+.3f} [")
    assert equal_time_scores.gap_line(doc, "no such row", "MFCC") is None


def test_a_song_that_both_encoders_of_a_seed_embed_counts_once() -> None:
    other = {"soundtracks": {half: [f"{half}{n}" for n in range(4)] for half in halves.HALVES}}
    same = {"soundtracks": {half: ["one", "one", "two", "two"] for half in halves.HALVES}}
    chosen = np.array([True, True, False, True] * 2)
    assert (equal_time_scores.songs_asked(other, chosen), equal_time_scores.songs_asked(same, chosen)) == (6, 3)


def test_what_is_shipped_stands_beside_the_recipe() -> None:
    rng = np.random.default_rng(0)
    base, untrained, own = rng.random((3, 40)), rng.random((3, 40)), rng.random((3, 20))
    soundtracks = {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES}
    recipe = {
        "scores": {equal_time_scores.STAGES: row_of(base)},
        "baselines": {equal_time_scores.UNTRAINED_STAGES: row_of(untrained)},
        "soundtracks": soundtracks,
    }
    doc = {
        "scores": {row: dict.fromkeys(equal_time_scores.METRICS, own[i].tolist()) for i, row in enumerate("abc")},
        "soundtracks": soundtracks["a"],
        "minutes": 1.7,
        "environment": {"gpu": None, "cpu": "a CPU", "cores": 2, "date": "today", "commit": "abc"},
    }
    lines = list(shipped.page_lines(doc, recipe))
    assert lines[2].startswith(f"| the recipe, embedded by stages | 3 | {base[:, :20].mean():.3f} |  | ")
    assert lines[4].startswith(f"| a | 1 | {own[0].mean():.3f} | {(own[0] - base[:, :20]).mean():+.3f} [")
    assert lines[8].startswith(f"- a, minus the same untrained: 5-NN {(own[0] - own[2]).mean():+.3f} [")
    assert lines[-1] == "20 songs of 4 soundtracks; a training of 2 minutes; a CPU, 2 cores; today, commit abc."
    with pytest.raises(UserError, match="other songs"):
        list(shipped.page_lines(doc | {"soundtracks": soundtracks["b"]}, recipe))


def test_a_longer_training_stands_beside_the_shorter_one() -> None:
    rng = np.random.default_rng(0)
    short, long = rng.random((3, 40)), rng.random((1, 40))
    soundtracks = {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES}

    def document(epochs: int, scores: np.ndarray) -> dict[str, Any]:
        rows = (equal_time_scores.BASE, equal_time_scores.STAGES)
        environment = {"cpu": "a CPU", "cores": 2, "date": "today", "commit": "abc"}
        scored = {"epochs": dict.fromkeys(rows, epochs), "scores": dict.fromkeys(rows, row_of(scores))}
        return scored | {"soundtracks": soundtracks, "environment": environment}

    before = document(25, short)
    lines = list(equal_time_scores.longer_lines(document(80, long), before))
    assert lines[2].startswith(f"| the recipe, embedded by stages | 25 | 3 | {short.mean():.3f} |  | ")
    assert lines[3].startswith(
        f"| the recipe, embedded by stages | 80 | 1 | {long.mean():.3f} | {(long - short).mean():+.3f} ["
    )
    assert lines[-1] == "40 songs of 8 soundtracks; a CPU, 2 cores; today, commit abc."
    others = {half: own[::-1] for half, own in soundtracks.items()}
    with pytest.raises(UserError, match="other songs"):
        list(equal_time_scores.longer_lines(document(80, long) | {"soundtracks": others}, before))


def test_shipped_configs_are_trained_as_they_are() -> None:
    """But for what they leave of themselves; each of the tables by another output."""
    job = shipped.training(ROOT / "configs" / "cpu.yaml")
    assert set(job.settings) == {"mlflow.enabled", "train.closing_score"}
    assert len(set(job.tables.values())) == len(job.tables) == 3


def test_rows_of_one_training_are_made_by_one_job() -> None:
    base, stages = equal_time_scores.BASE, equal_time_scores.STAGES
    jobs = [job for row in (base, "contrastive", stages) for job in equal_time.trainings(row, 5, 0)]
    one, two, *others = equal_time.merged(jobs)
    settings = {"encoder.epochs": 5, "encoder.simsiam.embedding": "backbone"}
    tables: dict[str, tuple[str, ...]] = {base: ("--embedding", "backbone"), stages: ("--embedding", "stages")}
    assert one == halves.Job(base, "simsiam", "a", 0, settings, tables)
    assert (two.trained_on, two.tables) == ("b", one.tables)
    assert [(job.name, job.trained_on) for job in others] == [("contrastive", "a"), ("contrastive", "b")]


@pytest.mark.parametrize("row", [row for row, own in equal_time.CANDIDATES.items() if own.trained_as])
def test_a_row_of_another_one_s_encoders_would_train_the_same(row: str) -> None:
    own, other = (equal_time.trainings(name, 5, 0)[0] for name in (row, equal_time.CANDIDATES[row].trained_as))
    assert own == dataclasses.replace(other, tables=own.tables)


@pytest.mark.parametrize("row", equal_time.CANDIDATES)
def test_each_candidate_changes_the_recipe(row: str) -> None:
    def trained(name: str) -> tuple[Config, str, int, tuple[str, ...]]:
        job = equal_time.trainings(name, 5, 0)[0]
        config = load_config(CPU_FILE, assignments=[f"{key}={value}" for key, value in job.settings.items()])
        return config, job.kind, job.segment_seconds, job.tables[name]

    assert (trained(row) == trained(equal_time_scores.BASE)) == (row == equal_time_scores.BASE)


def test_what_is_chosen_and_what_is_reported_share_no_soundtrack() -> None:
    script = (ROOT / "benchmarks/real_music/fetch.sh").read_text()
    chosen, reported, held_out = (
        script.partition(f"\n{name}=(")[2].partition(")")[0].split() for name in ("packages", "report", "held_out")
    )
    assert len(chosen) == 11
    assert len(reported) == 17
    assert not {*chosen} & {*reported}
    assert not {*chosen, *reported} & {*held_out}


def test_the_peer_begins_as_simsiam_does_and_has_its_loss() -> None:
    config = load_config(CPU_FILE, command_line={**TINY, "encoder.simsiam.projection_layers": 3})
    torch.manual_seed(0)
    ours = encoder_type(config).create()
    assert isinstance(ours, SimSiam)
    torch.manual_seed(0)
    theirs = peer.Peer(config)
    own = ours.state_dict()
    for name, value in theirs.backbone.state_dict().items():
        assert torch.equal(value, own[f"backbone.{name}"]), name
    assert sum(p.numel() for p in theirs.parameters()) == sum(p.numel() for p in ours.parameters())
    # With its heads' weights in ours, both say the same of a batch.
    pairs = [(theirs.projector, ours.projector), (theirs.predictor, ours.predictor)]
    for source, target in pairs:
        for a, b in zip(source.parameters(), target.parameters(), strict=True):
            b.data.copy_(a)
    view1, view2 = torch.randn(2, 8, config.encoder.simsiam.n_mels, 32)
    p1, p2, z1, z2 = ours(view1, view2)
    (z0_, p0_), (z1_, p1_) = theirs(view1), theirs(view2)
    criterion = peer.NegativeCosineSimilarity()
    assert float(simsiam_loss((p1, p2), (z1, z2))) == pytest.approx(
        float(0.5 * (criterion(z0_, p1_) + criterion(z1_, p0_))), abs=1e-5
    )


def test_the_peer_trains_on_one_half_and_embeds_the_other(small_shards: Path, tmp_path: Path) -> None:
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    out = tmp_path / "peer.parquet"
    words = ["--config", CPU_FILE, "--shards", small_shards, "--embed", small_shards, "--out", out, *sets]
    done = fork_server.run([sys.executable, ROOT / "benchmarks/real_music/peer.py", *map(str, words)], tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    table = read_song_embeddings(out)
    assert table.provenance["encoder_type"] == "lightly"
    assert table.vectors.shape == (
        16,
        2 * 8 * 8,
    )  # mean and maximum of the last of the stages, 8 times as wide as the first
    assert len(np.unique(table.vectors.round(6), axis=0)) == 16


def test_the_peer_takes_as_many_steps_as_training(small_shards: Path) -> None:
    config = load_config(CPU_FILE, command_line={**TINY, "encoder.epochs": 1})
    shards = peer.open_shards(small_shards)
    world = World(0, 1, torch.device("cpu"))
    before = peer.Peer(config).backbone.bn1.num_batches_tracked
    trained = peer.train(config, shards, log_mel_settings(config), world)
    steps = shards.count("train") // config.encoder.batch_size
    after = trained.backbone.bn1.num_batches_tracked
    assert before is not None
    assert after is not None
    assert after - before == 2 * steps  # two views a step


def test_whitening_and_mutual_proximity_by_hand() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 6)) @ rng.standard_normal((6, 6))
    white = retrieval.whitened(x, 0)
    assert np.cov(white.T, bias=True) == pytest.approx(np.eye(6), abs=1e-6)
    barely = retrieval.cosines(l2_normalised(retrieval.whitened(x, 1e9)))
    rotated = retrieval.cosines(unit(x, whiten=False))
    assert barely == pytest.approx(rotated, abs=1e-5)

    # A hub near to all: to each other song it is nearest, until its distances to the others count as well.
    spread = np.array([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0], [0.9, 0.1, 0], [0.6, 0.6, 0.6]])
    similarity = retrieval.cosines(l2_normalised(spread))
    near, cosine = retrieval.find_by(similarity, 0.5 * similarity, 1)
    assert near[1:3, 0].tolist() == [4, 4]
    assert cosine[1:3, 0] == pytest.approx(0.5 * similarity[[1, 2], [4, 4]])
    proximity = retrieval.mutual_proximity(similarity)
    assert proximity == pytest.approx(proximity.T)
    others = np.delete(similarity[0], 0)
    z = (similarity[0, 3] - others.mean()) / others.std()
    back = np.delete(similarity[3], 3)
    z_back = (similarity[0, 3] - back.mean()) / back.std()
    assert proximity[0, 3] == pytest.approx(norm.cdf(z) * norm.cdf(z_back))


def test_the_differences_are_drawn_the_same_from_the_same_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    doc: dict[str, Any] = {
        "scores": {equal_time_scores.BASE: row_of(rng.random((3, 40))), "another": row_of(rng.random((2, 40)))},
        "baselines": {"untrained": row_of(rng.random((3, 40))), "MFCC": row_of(rng.random((1, 40)))},
        "soundtracks": {half: [f"{half}{n % 4}" for n in range(20)] for half in halves.HALVES},
    }
    drawn = [tmp_path / name for name in ("one.svg", "two.svg")]
    for file in drawn:
        figure.draw(doc, "scores.json", file)
    assert drawn[0].read_bytes() == drawn[1].read_bytes()
    assert "scores.json" in drawn[0].read_text()
    doc["scores"]["another"] = row_of(rng.random((2, 40)))
    figure.draw(doc, "scores.json", drawn[1])
    assert drawn[0].read_bytes() != drawn[1].read_bytes()


def test_scores_that_would_not_compare_are_refused(tmp_path: Path) -> None:
    file, (rule, other) = tmp_path / "scores.json", run.SEARCHES
    file.write_text(json.dumps(equal_time.document(file, 80, rule)))
    assert equal_time.document(file, 80, rule)["base_epochs"] == 80
    with pytest.raises(UserError, match="is of 80 epochs"):
        equal_time.document(file, 56, rule)
    with pytest.raises(UserError, match=f"is scored by '{rule}'"):
        equal_time.document(file, 80, other)


def test_tables_are_scored_beside_the_first(tmp_path: Path) -> None:
    rng, right = np.random.default_rng(0), np.repeat([[1.0], [-1.0]], 12, axis=0)
    songs = [(f"{package}/{i}", ["A"]) for package in ("one", "two") for i in range(12)]

    def tables(name: str, seeds: int, signal: float) -> str:
        files = [tmp_path / f"{name}-{seed}.parquet" for seed in range(seeds)]
        for file in files:
            write_table(file, songs, rng.standard_normal((24, 5)) + signal * right)
        return f"{name}={','.join(map(str, files))}"

    given = dict(map(score.named, [tables("chance", 2, 0), tables("good", 2, 9), tables("one seed", 1, 9)]))
    _, _, chance, good, one_seed, _, last = score.table_lines(given)
    assert chance.startswith("| chance | 2 | 0.")
    assert good.startswith("| good | 2 | 1.000 | +0.")
    assert one_seed.split("|")[2:4] == [" 1 ", " 1.000 "]
    assert last == "24 songs of 2 soundtracks."
    write_table(tmp_path / "other.parquet", songs[:20], rng.standard_normal((20, 5)))
    with pytest.raises(UserError, match="of other songs"):
        list(score.table_lines(given | {"other": [tmp_path / "other.parquet"]}))
    with pytest.raises(UserError, match="is not NAME=TABLE"):
        score.named("table.parquet")


def test_baselines_that_the_document_has_are_not_made_again(tmp_path: Path) -> None:
    """Where it goes on, on another machine, the encoders of finished seeds are not there."""
    rng = np.random.default_rng(0)
    songs = [(f"{package}/{i}", [f"artist {i % 3}"]) for package in ("one", "two") for i in range(12)]
    known: dict[str, dict[str, equal_time_scores.Scores]] = {name: {"0": {"a": {}, "b": {}}} for name in run.BASELINES}
    for job, name in ((job, name) for job in equal_time.trainings(equal_time_scores.BASE, 1, 1) for name in known):
        write_table(job.table(tmp_path / "equal-time", name), songs, rng.standard_normal((24, 5)))
    shards = halves.halves_of(tmp_path)
    doc = {"search": "half-whitened", "scores": {equal_time_scores.BASE: {"0": {}, "1": {}}}}
    assert equal_time.baselines(shards, doc | {"baselines": known}) == known  # no run is here
    assert equal_time.baselines(shards, doc) == {}
    for half in halves.HALVES:
        (tmp_path / "equal-time" / "runs" / f"{halves.slug(equal_time_scores.BASE)}-{half}-1").mkdir(parents=True)
    found = equal_time.baselines(shards, doc | {"baselines": known})
    assert {name: [*own] for name, own in found.items()} == {
        name: ["0", "1"] if "untrained" in options else ["0"] for name, options in run.BASELINES.items()
    }
    assert found["MFCC"] == known["MFCC"]
    assert len(found["untrained encoder"]["1"]["a"]["soundtrack/map"]) == len(songs)


def test_todays_rule_is_what_the_scores_are_of(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    songs = [(f"{package}/{i}", [f"artist {i % 3}"]) for package in ("one", "two") for i in range(12)]
    folder = tmp_path / "equal-time"
    for job in equal_time.trainings(equal_time_scores.BASE, 1, 0):
        for name in (job.name, "MFCC"):
            write_table(job.table(folder, name), songs, rng.standard_normal((24, 5)))
    row = retrieval.Row.open(equal_time_scores.BASE, halves.halves_of(tmp_path), 1)
    found = row.scores(retrieval.RULES[retrieval.TODAY])
    table = equal_time.trainings(equal_time_scores.BASE, 1, 0)[0].table(folder, equal_time_scores.BASE)
    assert found["0"]["a"]["soundtrack/map"] == run.of_each_song(table)["soundtrack/map"].tolist()
    one, two = (list(retrieval.table_lines(rows)) for rows in ([row], [row, row]))
    assert len(one) == 2 + len(retrieval.RULES)
    assert one == two  # of the same songs twice, a soundtrack has them all
    with pytest.raises(UserError, match="train first"):
        retrieval.Row.open(equal_time_scores.BASE, halves.halves_of(tmp_path), 2)
