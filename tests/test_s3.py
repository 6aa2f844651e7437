"""Shards on S3, against a server on loopback: the same batches as from the disk, and the same care for damage."""

import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import running
from helpers.ports import free_port
from pyarrow import fs

from simsiam_dali.common.distributed import World
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.load import load_config
from simsiam_dali.data.loader import Loader
from simsiam_dali.data.shards import ShardSet, open_shards
from simsiam_dali.training.data import create_loader, log_mel_settings

ADDRESS = "s3://music/sets/one"
SETTINGS = {**running.TINY, "data.max_bad_fraction": 0.2}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """In a process of its own: DALI waits for the answer with Python's lock held."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                urllib.request.urlopen(f"{url}/moto-api/", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, "the server has ended"
                assert time.monotonic() < deadline, "the server does not answer"
                time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


@pytest.fixture
def bucket(server: str, small_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> fs.FileSystem:
    """The small set at `ADDRESS`, and an empty cache."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "me")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "any")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    system = fs.S3FileSystem(endpoint_override=server, allow_bucket_creation=True)
    system.create_dir("music")
    for path in small_shards.iterdir():
        if path.is_file():
            put(system, path.name, path.read_bytes())
    return system


def put(system: fs.FileSystem, name: str, content: bytes) -> None:
    with system.open_output_stream(f"{ADDRESS.removeprefix('s3://')}/{name}") as file:
        file.write(content)


def loader_of(shards: ShardSet) -> Loader:
    settings = load_config(command_line=SETTINGS)
    world = World(0, 1, torch.device("cpu"))
    log_mel = log_mel_settings(settings)
    return create_loader(settings, shards, log_mel, world, "train", "views", shuffled=True)


@pytest.mark.usefixtures("bucket")
def test_batches_and_states_are_those_of_the_same_shards_on_the_disk(small_shards: Path) -> None:
    remote, local = open_shards(ADDRESS), open_shards(small_shards)
    assert remote.fingerprint == local.fingerprint
    loader = loader_of(remote)
    expected = list(islice(loader_of(local).endless(), 8))
    got = list(islice(loader.endless(), 3))
    restored = loader_of(remote)
    restored.load_state_dict(loader.state_dict())
    got += islice(restored.endless(), 5)
    for a, b in zip(expected, got, strict=True):
        assert torch.equal(a.segment, b.segment)
        assert all(torch.equal(x, y) for x, y in zip(a.inputs, b.inputs, strict=True))
    assert not list(remote.root.glob("*.tar"))  # DALI reads them where they are


def test_a_sample_damaged_there_is_skipped_and_listed_in_the_cache(bucket: fs.FileSystem, small_shards: Path) -> None:
    name = "train-000000.tar"
    words = (small_shards / name).with_suffix(".idx").read_text().splitlines()[3].split()
    content = bytearray((small_shards / name).read_bytes())
    content[int(words[1]) : int(words[1]) + 800] = b"no music" * 100
    put(bucket, name, bytes(content))
    shards = open_shards(ADDRESS)
    loader = loader_of(shards)
    seen = {int(row) for batch in islice(loader.endless(), 2 * len(loader)) for row in batch.segment}
    assert 2 not in seen
    assert loader.quarantine.rows == {2}
    assert "000000002" in (shards.root / "quarantine.csv").read_text()
    assert open_shards(ADDRESS).root == shards.root


def test_refused_in_one_line(bucket: fs.FileSystem) -> None:
    with pytest.raises(UserError, match=r"^no shards at s3://music/sets: put what"):
        open_shards("s3://music/sets")
    with pytest.raises(UserError, match=r"^s3://nobody/x cannot be listed"):
        open_shards("s3://nobody/x")
    put(bucket, "train-000000.tar", b"short")
    with pytest.raises(UserError, match=r"train-000000.tar has 5 bytes, not \d+"):
        open_shards(ADDRESS)
    bucket.delete_file("music/sets/one/train-000000.tar")
    with pytest.raises(UserError, match=r"train-000000.tar is missing"):
        open_shards(ADDRESS)


@pytest.mark.faults
@pytest.mark.usefixtures("bucket")
def test_a_run_on_them_is_the_run_on_the_disk(small_shards: Path, tmp_path: Path) -> None:
    over = {"mlflow__enabled": "false", "encoder__epochs": 1}
    runs = []
    places: dict[str, Any] = {"disk": small_shards, "s3": ADDRESS}
    for name, place in places.items():
        done = running.run(running.command(tmp_path, place, "--run-name", name, **over), tmp_path)
        assert done.returncode == 0, done.stderr[-2000:]
        runs.append(running.losses(tmp_path / "runs" / name))
    assert runs[0] == runs[1]
