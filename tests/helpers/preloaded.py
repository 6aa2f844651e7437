"""What the servers that fork for the tests import before: see fork_server.py, and conftest.py for multiprocessing's."""

import contextlib
import importlib
from pathlib import Path

from simsiam_dali.config.schema import AugmentationConfig
from simsiam_dali.data.graph import Epoch, GraphConfig, LogMel, Source
from simsiam_dali.data.pipeline import PipelineSettings, define

MODULES = (
    "torch", "nvidia.dali.fn", "mlflow", "optuna", "umap", "matplotlib.pyplot", "tqdm", "simsiam_dali.pack",
    "simsiam_dali.train", "simsiam_dali.embed", "simsiam_dali.evaluate", "simsiam_dali.recommend",
    "simsiam_dali.compare", "simsiam_dali.hpo",
)  # fmt: skip
"""Not onnxruntime, which starts a thread."""

for name in MODULES:
    with contextlib.suppress(ImportError):  # some hosts have no MLflow
        importlib.import_module(name)

# DALI translates the functions that define a graph once a process, in 2 to 4 s. Nothing is built here.
for mode in ("views", "clean", "raw"):
    source = Source((Path("a.tar"),), (Path("a.idx"),), "flac", False, 3.0, shuffle_buffer=4)
    graph = GraphConfig(source, LogMel(), mode, 1.5, AugmentationConfig(), "independent", Epoch(1, 2))
    define(graph, PipelineSettings(batch_size=2, threads=1, prefetch=1, seed=0, gpu=None))
