"""The A/B test as a user runs it: both encoder types trained, embedded and evaluated on rated songs, then compared."""

import re
import sys
from pathlib import Path

import pytest
from helpers.running import ROOT, command, run, run_tool

TYPES = ("simsiam", "simple")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run of each type, evaluated, and what was printed of each in NAME.txt."""
    folder = tmp_path_factory.mktemp("ab")
    shards = folder / "shards"
    run_tool("make_demo_music.py", folder / "music", "--songs", 80, "--seconds", 3, 4)
    lengths = ("--segment-seconds", 3, "--min-seconds", 2, "--val-fraction", 0.5)
    run_tool("make_shards.py", folder / "music", "--out", shards, *lengths)
    small = {"encoder__epochs": 1, "encoder__embedding_dim": 24, "encoder__simple__base_channels": 4}
    for kind in TYPES:
        made = folder / "runs" / kind
        table, modules = str(made / "embeddings.parquet"), [sys.executable, "-m"]
        embed = ["simsiam_dali.embed", "--checkpoint", str(made), "--out", table, "--baselines"]
        evaluate = ["simsiam_dali.evaluate", "--embeddings", table, "--out", str(made / "evaluation"), "--no-maps"]
        for words in (
            command(folder, shards, "--encoder-type", kind, "--run-name", kind, **small),
            [*modules, *embed],
            [*modules, *evaluate],
        ):
            done = run(words, folder)
            assert done.returncode == 0, done.stderr[-2000:]
        (folder / f"{kind}.txt").write_text(done.stdout)
    return folder


def test_both_types_are_compared_by_ratings_of_the_same_songs(home: Path) -> None:
    done = run([sys.executable, "-m", "simsiam_dali.compare"], home)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    (at,) = [i for i, line in enumerate(lines) if line[:1] == ["classifier/val_mse"]]
    for column, kind in enumerate(TYPES, start=1):
        printed = (home / f"{kind}.txt").read_text()
        (row,) = [line.split() for line in printed.splitlines() if line.startswith("classifier/val_mse ")]
        assert float(lines[at][column]) == pytest.approx(float(row[2]), abs=6e-4)
    assert [line[0] for line in lines[at + 1 : at + 4]] == ["chance", "untrained", "songs"]
    songs = lines[at + 3][2:]
    assert songs[0] == songs[1]
    assert int(songs[0]) >= 20
    assert "best by classifier/val_mse, lower is better" in done.stdout
    assert "missing" not in done.stdout


def test_the_documented_query_of_mlflow_gives_the_same(home: Path) -> None:
    page = (ROOT / "docs/commands.md").read_text()
    (code,) = [block for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "search_runs" in block]
    done = run([sys.executable, "-c", code], home)
    assert done.returncode == 0, done.stderr[-2000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert list(found) == list(TYPES)
    for kind, value in found.items():
        assert f" {float(value):.3f} " in (home / f"{kind}.txt").read_text()
