"""The packer's tasks on a Ray cluster: `pack --executor ray`.

The same function decodes, and leaves its files where the packer reads them: every node has to see the music folder and
--out under the same paths (a network file system), and have the same version of this package.
"""

import itertools
from collections.abc import Callable, Generator, Iterable
from typing import Any, TypeVar

from simsiam_dali.common.errors import UserError
from simsiam_dali.packing.process_pool import Died

T = TypeVar("T")
R = TypeVar("R")


def cores() -> int:
    """Cores of the cluster. Raises UserError as `run_all` does."""
    return int(_ray().cluster_resources().get("CPU", 1))


def run_all(function: Callable[[T], R], tasks: Iterable[T], workers: int) -> Generator[tuple[T, R | Died], None, None]:
    """As `process_pool.run_all`, with at most `workers` tasks submitted at a time.

    The cluster is the one that RAY_ADDRESS names, or one that runs on this host, or else one of this host's cores that
    ends with the packing. Raises UserError without Ray, or if the cluster does not answer.
    """
    ray, waiting = _ray(), iter(tasks)
    remote = ray.remote(max_retries=1)(function)  # a node may go away, but a song that ends two processes is refused
    running: dict[Any, T] = {}
    try:
        while True:
            for task in itertools.islice(waiting, workers - len(running)):
                running[remote.remote(task)] = task
            if not running:
                return
            (done,), _ = ray.wait(list(running), num_returns=1)
            task = running.pop(done)
            try:
                result: R | Died = ray.get(done)
            except ray.exceptions.RayTaskError as e:
                raise e.cause from None  # as it was raised, with its errno
            except (ray.exceptions.WorkerCrashedError, ray.exceptions.NodeDiedError, ray.exceptions.OutOfMemoryError):
                result = Died(None)
            yield task, result
    finally:
        ray.shutdown()


def _ray() -> Any:
    """The library, connected to its cluster."""
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray needs Ray: pip install '.[ray]' in a checkout") from None
    if not ray.is_initialized():
        try:
            ray.init(logging_level="ERROR", log_to_driver=False)
        except Exception as e:  # Ray raises plain ones here, too
            raise UserError(f"no Ray cluster answers or starts ({' '.join(str(e).split())[:200]})") from e
    return ray
