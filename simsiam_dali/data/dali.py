"""DALI's names, imported here only: without DALI, importing this reports the extra that installs it."""

import os
import sys
import tempfile

from simsiam_dali.common.errors import UserError

__all__ = [
    "DataNode",
    "OperatorConcurrency",
    "Pipeline",
    "backend",
    "build_on_cpu",
    "fn",
    "math",
    "pipeline_def",
    "types",
]

try:
    from nvidia.dali import Pipeline, backend, fn, math, pipeline_def, types
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import OperatorConcurrency
except ModuleNotFoundError as e:
    if e.name not in ("nvidia", "nvidia.dali"):
        raise
    missing = UserError("DALI is not installed: pip install 'simsiam-dali[cuda13]', or [cuda12]; see docs/install.md")
    # With python -m simsiam_dali.train this is imported before the command's main, which prints errors in one line.
    started = getattr(sys.modules["__main__"], "__spec__", None)
    if started and started.name.startswith("simsiam_dali."):
        sys.exit(f"error: {missing}")
    raise missing from None

NEW_THREAD_POOL = "DALI_USE_NEW_THREAD_POOL"
"""Read by DALI when the first pipeline of a process is built."""


def build_on_cpu(pipeline: Pipeline) -> None:
    """Build a pipeline without a GPU on DALI's new thread pool, where operators of two batches share the threads.

    With the old one (DALI 2.4's default) operators run one by one whatever `concurrency` is: a pitch shift drawn by a
    single sample of the batch keeps one core busy and the others idle. `DALI_USE_NEW_THREAD_POOL=0` keeps the old one.
    """
    os.environ.setdefault(NEW_THREAD_POOL, "1")
    if os.environ[NEW_THREAD_POOL] == "0":
        pipeline.build()
        return
    # DALI writes a notice for each pipeline directly to file descriptor 2; other output there is passed on.
    sys.stderr.flush()
    stderr = os.dup(2)
    with tempfile.TemporaryFile() as written:
        os.dup2(written.fileno(), 2)
        try:
            pipeline.build()
        finally:
            os.dup2(stderr, 2)
            os.close(stderr)
            written.seek(0)
            rest = written.read().replace(b"\n!!! Forced use of NewThreadPool !!!\n", b"")
            if rest:
                os.write(2, rest)
