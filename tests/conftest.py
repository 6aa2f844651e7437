"""What the tests share: the `gpu` marker skips itself without CUDA; a small library, runs on it, an MLflow server."""

import multiprocessing
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from helpers.running import run_tool, train

torch.set_num_threads(1)  # the tests share the cores among themselves, and sums are the same in every process
os.environ["OMP_NUM_THREADS"] = "1"
# The processes that packing and the benchmarks' stages start here.
multiprocessing.set_forkserver_preload(["helpers.preloaded"])


LONGEST_FIRST = ("hpo", "commands", "quarantine", "train", "install", "ranks", "loader", "compare", "encoders", "s3")
"""Files by CPU time: with two workers that take file by file, only short ones are left for the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    files = {f"test_{name}.py": place for place, name in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: files.get(item.path.name, len(files)))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def small_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """16 songs of 6 to 8 s, packed by the real tools: 3 s segments, about 24 to train and 8 to validate."""
    folder = tmp_path_factory.mktemp("library")
    run_tool("make_demo_music.py", folder / "music", "--songs", 16, "--seconds", 6, 8)
    run_tool("make_shards.py", folder / "music", "--out", folder / "shards", *SMALL_PACKING)
    return folder / "shards"


@pytest.fixture(scope="session")
def mlflow_uri(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A real MLflow server on loopback; it knows only what tests log to it."""
    from helpers.logged_runs import mlflow_server  # here, for hosts without MLflow

    with mlflow_server(tmp_path_factory.mktemp("server")) as uri:
        yield uri


@pytest.fixture(scope="session")
def small_runs(tmp_path_factory: pytest.TempPathFactory, small_shards: Path) -> dict[str, Path]:
    """A run's folder for each encoder type: tiny ones, trained for one epoch on `small_shards`."""
    tiny = {"encoder__embedding_dim": 24, "encoder__simple__base_channels": 4, "encoder__epochs": 1}
    return {
        kind: train(tmp_path_factory.mktemp(kind), small_shards, encoder__encoder_type=kind, **tiny)
        for kind in ("simsiam", "simple")
    }


SMALL_PACKING = ("--segment-seconds", 3, "--min-seconds", 2, "--val-fraction", 0.25)
