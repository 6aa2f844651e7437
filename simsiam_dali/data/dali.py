"""DALI's names, imported here only: without DALI, importing this reports the extra that installs it."""

import sys

from simsiam_dali.common.errors import UserError

__all__ = ["DataNode", "OperatorConcurrency", "Pipeline", "backend", "fn", "math", "pipeline_def", "types"]

try:
    from nvidia.dali import Pipeline, backend, fn, math, pipeline_def, types
    from nvidia.dali.data_node import DataNode
    from nvidia.dali.pipeline import OperatorConcurrency
except ModuleNotFoundError as e:
    if e.name not in ("nvidia", "nvidia.dali"):
        raise
    missing = UserError("DALI is not installed: pip install '.[cuda13]' in a checkout; see docs/install.md")
    # With python -m simsiam_dali.train this is imported before the command's main, which prints errors in one line.
    started = getattr(sys.modules["__main__"], "__spec__", None)
    if started and started.name.startswith("simsiam_dali."):
        sys.exit(f"error: {missing}")
    raise missing from None
