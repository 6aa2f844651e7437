"""Self-supervised embeddings of a music library: WebDataset shards, a DALI data graph, SimSiam training."""

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from simsiam_dali.embedding.song_encoder import load_encoder

__all__ = ["__version__", "load_encoder"]

__version__ = "0.1.0"

# On a CPU, DALI's threads and torch's share the cores. torch's OpenMP threads spin while they wait for each other, and
# a spinning thread keeps the one it waits for off its core: a ResNet-18 step on two busy cores took 5 times as much
# CPU time. This is read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


def __getattr__(name: str) -> Any:
    if name == "load_encoder":  # imported when it is asked for: it takes torch along
        from simsiam_dali.embedding.song_encoder import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
