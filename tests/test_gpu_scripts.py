"""The scripts that measure the training on a GPU host, on a CPU: what they say, and what they refuse."""

import json
import sys
from pathlib import Path

import pytest
from helpers import fork_server
from helpers.running import ROOT, TINY

sys.path.insert(0, str(ROOT / "benchmarks"))
import killed_run

from simsiam_dali.common.errors import UserError


def test_a_step_s_sizes_are_measured_one_by_one_and_what_needs_cuda_is_named(
    small_shards: Path, tmp_path: Path
) -> None:
    sets = [word for key, value in TINY.items() for word in ("--set", f"{key}={value}")]
    script, out = ROOT / "benchmarks/gpu_step.py", tmp_path / "r.json"
    command: list[str | Path] = [sys.executable, script, "--shards", small_shards, "--json", out]
    done = fork_server.run([*command, "--steps", "1", "--batch-sizes", "2", "4", *sets])
    assert done.returncode == 0, done.stderr[-2000:]
    doc = json.loads((tmp_path / "r.json").read_text())
    assert doc["skipped"] == ["waits", "peak memory"]
    assert doc["waits"] is None
    small, large = doc["sizes"]
    assert (small["batch_size"], large["batch_size"]) == (2, 4)
    assert small["parameter_bytes"] == large["parameter_bytes"]
    assert large["kept_bytes"] == pytest.approx(2 * small["kept_bytes"], abs=2)
    assert all(each["samples_per_s"] > 0 and each["peak_bytes"] is None for each in doc["sizes"])


def journal(folder: Path, steps: list[int]) -> None:
    lines = [{"step": step, "loss": 0.1} for step in steps] + [{"step": max(steps), "epoch": 1}]
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + '{"step": 9, "lo')


@pytest.mark.parametrize(
    ("steps", "said", "refused"),
    [
        ([1, 2, 3, 4], "run r, continuing after step 2", None),
        ([1, 2, 4], "run r, continuing after step 2", "each once"),
        ([1, 2, 2, 3, 4], "run r, continuing after step 2", "each once"),
        ([1, 2, 3, 4], "run r", "did not continue after step 2"),
        ([1, 2, 3, 4], "run r, continuing after step 22", "did not continue after step 2"),
    ],
)
def test_a_resumed_run_that_lost_or_repeated_steps_is_refused(
    tmp_path: Path, steps: list[int], said: str, refused: str | None
) -> None:
    journal(tmp_path, steps)
    if refused is None:
        killed_run.checked(tmp_path, 4, 2, said)
        return
    with pytest.raises(UserError, match=refused):
        killed_run.checked(tmp_path, 4, 2, said)
