"""`data.threads: auto`: how many threads the data graph gets, by a short measurement."""

import itertools
import os
import statistics
import time

from simsiam_dali.common.distributed import World
from simsiam_dali.config.schema import Config
from simsiam_dali.data.graph import LogMel
from simsiam_dali.data.loader import release_memory
from simsiam_dali.data.shards import ShardSet
from simsiam_dali.models.registry import encoder_type
from simsiam_dali.training import factory

BATCHES = 8
"""Batches timed for each number of threads; the first, which builds the graph and fills the queue, is left out."""


def with_threads(config: Config, shards: ShardSet, log_mel: LogMel, world: World) -> Config:
    """The config with `data.threads: auto` made a number, and `data.prefetch` with it, by a short measurement.

    Takes the fewest threads whose training loader comes within 5% of the fastest, doubling up to this process's share
    of the cores; and as many batches ahead as the slowest of the timed batches takes median ones, from 2 to 4, so that
    an uneven loader does not stall the model. The result changes the speed, never the batches.
    """
    if config.data.threads != "auto":
        return config
    cores = max(1, len(os.sched_getaffinity(0)) // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
    mode = encoder_type(config).batches
    tried: dict[int, list[float]] = {}  # threads -> seconds of each batch
    for threads in sorted({min(2**n, cores) for n in range(cores.bit_length() + 1)}):
        trial = _with_data(config, threads=threads)
        loader = factory.create_loader(trial, shards, log_mel, world, "train", mode, shuffled=True)
        stamps = [time.perf_counter() for _ in itertools.islice(loader.endless(), BATCHES + 1)]
        tried[threads] = [b - a for a, b in itertools.pairwise(stamps)]
        del loader
        release_memory()  # or each number of threads is tried beside the graphs of those before
    fastest = min(map(sum, tried.values()))
    threads = min(n for n, seconds in tried.items() if sum(seconds) <= 1.05 * fastest)
    ahead = round(max(tried[threads]) / statistics.median(tried[threads]))
    return _with_data(config, threads=threads, prefetch=min(4, max(2, ahead)))


def _with_data(config: Config, **values: int) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})
