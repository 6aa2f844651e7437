"""What the tests share: the `gpu` marker skips itself without CUDA, and one small packed library."""

from pathlib import Path

import pytest
import torch
from running import run_tool


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


SMALL_PACKING = ("--segment-seconds", 3, "--min-seconds", 2, "--val-fraction", 0.25)
