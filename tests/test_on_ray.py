"""The packer on a Ray cluster of this host: the same bytes as from its own processes, also when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers.small_music import command, environment, make_shards, write_song
from helpers.tasks import work

from simsiam_dali.common.errors import UserError
from simsiam_dali.packing import ray_pool
from simsiam_dali.packing.process_pool import Died

OPTIONS = ("--segment-seconds", "3", "--min-seconds", "2", "--workers", "2", "--codec", "ogg")


def content(out: Path) -> dict[str, Any]:
    """The bytes of every file of a set; of the manifest what does not tell the time or the place."""
    files: dict[str, Any] = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    manifest = json.loads(files["manifest.json"])
    for file in manifest["files"].values():
        del file["mtime_ns"]
    return files | {"manifest.json": manifest}


@pytest.fixture(scope="module")
def music(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Songs, one twice and one that is none."""
    folder = tmp_path_factory.mktemp("music")
    for seed in range(12):
        write_song(folder / f"{seed}.flac", seed, artist=f"artist {seed % 3}")
    write_song(folder / "again.flac", 0)
    (folder / "broken.flac").write_bytes(b"fLaC" + bytes(100))
    return folder


@pytest.fixture(scope="module")
def expected(music: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The set as this host's processes pack it."""
    out = tmp_path_factory.mktemp("expected")
    assert make_shards(music, "--out", out, *OPTIONS).returncode == 0
    return content(out)


def test_a_cluster_packs_the_same_bytes(music: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    done = make_shards(music, "--out", tmp_path, "--executor", "ray", *OPTIONS)
    assert done.returncode == 0, done.stderr[-2000:]
    assert content(tmp_path) == expected


def test_without_ray_one_line_names_the_extra_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"^--executor ray needs Ray: pip install '\.\[ray\]' in a checkout$"):
        list(ray_pool.run_all(work, [1], 1))


@pytest.mark.faults
def test_results_exceptions_and_deaths(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ray")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # Ray's workers have to find test_workers
    assert sorted(ray_pool.run_all(work, [0, 5, 1, 7, 4], 2), key=lambda answer: answer[0]) == [
        *((0, 0), (1, 1), (4, 16), (5, Died(None)), (7, Died(None)))
    ]
    with pytest.raises(OSError, match="No space left") as caught:
        list(ray_pool.run_all(work, [1, 3, 2], 2))
    assert caught.value.errno == 28


def ray_workers(driver: int) -> list[int]:
    """Processes that decode for the packer `driver`."""
    parents, names = {}, {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "stat").read_text().rpartition(") ")[2].split()
            parents[int(folder.name)], names[int(folder.name)] = int(words[1]), (folder / "cmdline").read_text()
        except OSError:  # it has ended meanwhile
            continue

    def ours(pid: int) -> bool:
        return pid == driver or (pid in parents and ours(parents[pid]))

    return [pid for pid, name in names.items() if name.startswith("ray::do_job") and ours(pid)]


@pytest.mark.faults
def test_a_killed_worker_costs_nothing(music: Path, expected: dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("ray")
    words = command(music, "--out", tmp_path, "--executor", "ray", *OPTIONS)
    with subprocess.Popen(
        words, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as packer:
        deadline = time.monotonic() + 120
        while not (workers := ray_workers(packer.pid)):
            assert packer.poll() is None, packer.communicate()[1][-2000:]
            assert time.monotonic() < deadline
        os.kill(workers[0], signal.SIGKILL)
        _, err = packer.communicate(timeout=300)
    assert packer.returncode == 0, err[-2000:]
    assert content(tmp_path) == expected
