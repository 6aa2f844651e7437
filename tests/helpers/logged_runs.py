"""Runs as training logs them, made through the MLflow client alone, and a real MLflow server."""

import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mlflow import MlflowClient

from helpers.ports import can_listen, free_port

START_SECONDS = 300.0
"""Time for a server to start; a busy two-core machine took 8."""


def log_run(
    client: MlflowClient,
    experiment: str,
    encoder_type: str | None,
    values: Mapping[str, float],
    untrained: Mapping[str, float] | None = None,
    status: str = "FINISHED",
    start: int = 0,
    params: Mapping[str, Any] | None = None,
    **tags: str,
) -> str:
    """Log a run with `untrained` at step 0 and `values` at step 20; returns its id. `start` orders runs in time (s)."""
    found = client.get_experiment_by_name(experiment)
    experiment_id = found.experiment_id if found else client.create_experiment(experiment)
    tags |= {} if encoder_type is None else {"encoder_type": encoder_type}
    run = client.create_run(experiment_id, start_time=1_700_000_000_000 + 1000 * start, tags=tags)
    for step, metrics in ((0, untrained or {}), (20, values)):
        for name, value in metrics.items():
            client.log_metric(run.info.run_id, name, value, step=step)
    for name, value in (params or {}).items():
        client.log_param(run.info.run_id, name, value)
    client.set_terminated(run.info.run_id, status) if status != "RUNNING" else None
    return run.info.run_id


@contextmanager
def mlflow_server(folder: Path, port: int | None = None) -> Iterator[str]:
    """The URI of a server on loopback whose database and artifacts are in `folder`."""
    port = port or free_port()
    uri = f"http://127.0.0.1:{port}"
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += [
        "--backend-store-uri",
        f"sqlite:///{folder}/server.db",
        "--artifacts-destination",
        f"{folder}/artifacts",
    ]
    off = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with (folder / "server.log").open("wb") as log:
        server = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            cwd=folder,
            env=os.environ | off,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not answers(uri):
            log_tail = (folder / "server.log").read_text(errors="replace")[-2000:]
            assert server.poll() is None, f"the server ended: {log_tail}"
            assert time.monotonic() < deadline, f"the server does not answer: {log_tail}"
            time.sleep(0.2)
        yield uri
    finally:
        os.killpg(server.pid, signal.SIGKILL)  # its workers too: they are of its session
        server.wait()
        deadline = time.monotonic() + START_SECONDS
        while not can_listen(port):  # a worker may end after its parent, and has the port until then
            assert time.monotonic() < deadline, f"a killed server keeps port {port}"
            time.sleep(0.05)


def answers(uri: str) -> bool:
    """Whether the server answers a health request."""
    try:
        with urllib.request.urlopen(f"{uri}/health", timeout=5) as reply:
            return bool(reply.status == 200)
    except (urllib.error.URLError, OSError):
        return False
