"""The suite for a GPU host, as far as it can be tried without one: what it runs, keeps and says; its tests load."""

import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers.running import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu_step
import killed_run
import throughput

SUITE = ROOT / "benchmarks" / "gpu_suite.sh"

STAND_IN = """#!/bin/sh
# A Python with CUDA or without, whose every command prints what it was given, and of which one may fail.
if [ "$1" = -c ]; then [ "${CUDA_THERE:-}" ]; exit $?; fi
echo "given $*"
echo "finds $PYTHONPATH"
case "$*" in
*pytest*) echo "tests/test_a.py::test_b[c] SKIPPED (needs a CUDA device)  [ 50%]" ;;
*gpu_step.py*) echo "skipped, no CUDA device: peak memory" ;;
esac
case "$*" in *"${FAILING:-nothing}"*) exit 3 ;; esac
"""


def gpu_tests() -> list[str]:
    found = re.search(r"GPU_TESTS=\(([^)]*)\)", SUITE.read_text())
    assert found
    return found[1].split()


def run(folder: Path, **environment: str) -> tuple[int, str]:
    """(status, output) of the suite with a Python that does nothing."""
    python = folder / "python"
    python.write_text(STAND_IN)
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
    names = said.split("skipped, no CUDA device:\n")[1].split()
    assert names == [
        "a/tests:tests/test_a.py::test_b[c]",
        "c/step:peak-memory",
        *(f"d/{name}" for name in ("baseline-gpu", "compile", "fp32", "contiguous", "recompute", "cpu-graph")),
    ]
    assert "not begun" not in said
    assert [path.name for path in sorted((tmp_path / "out").iterdir())] == [f"{part}.tar.gz" for part in "abcd"]
    assert {"step.log", "train.log", "loader.log"} <= kept(tmp_path, "c")


def given(said: str, script: str) -> list[list[str]]:
    """The arguments of each command that ran `script`."""
    return [line.split()[2:] for line in said.splitlines() if line.startswith(f"given benchmarks/{script} ")]


def test_with_cuda_every_step_runs_by_options_that_its_script_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU is there for half an hour only: what argparse or the config would refuse is found before."""
    status, said = run(tmp_path, CUDA_THERE="1", BUDGET="3000", CUDA_VISIBLE_DEVICES="")
    assert status == 0, said
    assert "given -m pytest" in said
    monkeypatch.setattr(throughput, "choose_device", lambda wanted: torch.device("cpu" if wanted == "cpu" else "cuda"))
    shards = SimpleNamespace(root=tmp_path, segment_seconds=60.0, count=lambda _: 4096)
    monkeypatch.setattr(throughput.Bench, "choose_shards", lambda _: shards)
    measured = [throughput.Bench(throughput.build_parser().parse_args(words)) for words in given(said, "throughput.py")]
    assert len(measured) == 16
    for bench in measured:
        if bench.device.type == "cuda":  # at the CPU's batch the launches of a GPU's kernels would cap the rate
            assert bench.loader_config.encoder.batch_size == (bench.args.batch_size or 128)
        assert bench.kinds()
    (killed,), (step,) = given(said, "killed_run.py"), given(said, "gpu_step.py")
    assert killed_run.build_parser().parse_args(killed).shards is None
    assert gpu_step.build_parser().parse_args(step).batch_sizes[-1] == 192


def test_the_pythonpath_of_the_host_is_kept(tmp_path: Path) -> None:
    _, said = run(tmp_path, ONLY="b", PYTHONPATH="/carried/site:/more")
    assert f"finds {ROOT}:/carried/site:/more\n" in said


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


def test_steps_without_time_left_are_named(tmp_path: Path) -> None:
    status, said = run(tmp_path, BUDGET="20", ONLY="a b")
    assert status == 3
    assert said.endswith("not begun, no time left (name them in ONLY): a/tests b/run\n")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_word_that_names_nothing_is_refused_before_anything_runs(tmp_path: Path) -> None:
    status, said = run(tmp_path, ONLY="a codecs")
    assert (status, said) == (2, "")
    assert not (tmp_path / "out").exists()
