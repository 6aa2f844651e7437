"""The suite for a GPU host, as far as it can be tried without one: what it runs, keeps and says; its tests load."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
from helpers.running import ROOT

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"

NO_CUDA = """#!/bin/sh
# A Python without CUDA, whose every command prints what it was given, and of which one may fail.
if [ "$1" = -c ]; then exit 1; fi
echo "given $*"
case "$*" in *"${FAILING:-nothing}"*) exit 3 ;; esac
"""


def gpu_tests() -> list[str]:
    found = re.search(r"GPU_TESTS=\(([^)]*)\)", SUITE.read_text())
    assert found
    return found[1].split()


def run(folder: Path, **environment: str) -> tuple[int, str]:
    """(status, output) of the suite with a Python that does nothing."""
    python = folder / "python"
    python.write_text(NO_CUDA)
    python.chmod(0o755)
    env = {**os.environ, "PYTHON": str(python), "OUT": str(folder / "out"), **environment}
    done = subprocess.run(["bash", SUITE], env=env, capture_output=True, text=True, timeout=300)
    assert "line " not in done.stderr, done.stderr  # an error of the shell's own
    return done.returncode, done.stdout


def kept(folder: Path, part: str) -> set[str]:
    with tarfile.open(folder / "out" / f"{part}.tar.gz") as tar:
        return set(tar.getnames())


def test_it_names_every_file_with_gpu_tests() -> None:
    files = (path for path in (ROOT / "tests").glob("test_*.py") if "@pytest.mark" + ".gpu" in path.read_text())
    assert sorted(gpu_tests()) == sorted(f"tests/{path.name}" for path in files)


def test_they_load_on_a_host_without_mlflow() -> None:
    code = (
        "import sys; sys.modules['mlflow'] = None; import pytest; "
        f"sys.exit(pytest.main(['-q', '-m', 'gpu', '--collect-only', *{gpu_tests()}]))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
    assert "test_batches_lie_on_the_device" in done.stdout


def test_all_parts_run_and_what_needs_cuda_is_named(tmp_path: Path) -> None:
    status, said = run(tmp_path)
    assert status == 0, said
    (skipped,) = re.findall("^skipped, no CUDA device: (.*)$", said, re.MULTILINE)
    assert skipped.split() == [
        f"d/{name}" for name in ("baseline-gpu", "compile", "fp32", "contiguous", "recompute", "cpu-graph")
    ]
    assert "not begun" not in said
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [f"{part}.tar.gz" for part in "abcd"]
    assert {"step.log", "train.log", "loader.log"} <= kept(tmp_path, "c")


def test_parts_and_single_steps_are_chosen_by_name(tmp_path: Path) -> None:
    status, said = run(tmp_path, ONLY="b codec", SHARDS="/music packed")
    assert status == 0
    assert re.findall("^== (./.*): done", said, re.MULTILINE) == ["b/run", "d/codec"]
    assert "--shards /music packed" in said
    assert kept(tmp_path, "b") == {"run.log"}


@pytest.mark.parametrize(("failing", "part"), [("killed_run.py", "b/run"), ("--sweep batch", "c/sweep-batch")])
def test_a_step_that_fails_is_named_and_stops_no_other(tmp_path: Path, failing: str, part: str) -> None:
    status, said = run(tmp_path, FAILING=failing)
    assert status == 1
    assert f"failed: {part}\n" in said
    assert f"== {part}: FAILED with status 3" in said
    assert "== d/codec: done" in said


def test_what_there_is_no_time_for_is_named(tmp_path: Path) -> None:
    status, said = run(tmp_path, BUDGET="20", ONLY="a b")
    assert status == 0
    assert said.endswith("not begun, no time left (name them in ONLY): a/tests b/run\n")
    assert list((tmp_path / "out").iterdir()) == []
