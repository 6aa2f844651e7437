"""The suite for a GPU host, as far as it can be tried without one: which tests it runs, and on which host they load."""

import re
import subprocess
import sys

from running import ROOT

SUITE = (ROOT / "benchmarks" / "gpu_suite.sh").read_text()


def gpu_tests() -> list[str]:
    found = re.search(r"GPU_TESTS=\(([^)]*)\)", SUITE)
    assert found
    return found[1].split()


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
