"""One trial, trained in a process of its own, so that a crash, the out-of-memory killer or a leak ends only the trial.

A pipe connects the two processes: the training sends each epoch's record, the search answers whether to stop. What the
training prints is in the trial's log.txt.
"""

import contextlib
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Literal

import torch

from simsiam_dali.common.distributed import process_group
from simsiam_dali.common.errors import UserError, one_line
from simsiam_dali.config.schema import Config
from simsiam_dali.training.loop import train
from simsiam_dali.training.run import StopTraining

CHILD = "from simsiam_dali.search import trial; trial.child()"
LOG = "log.txt"
POLL_SECONDS = 0.2
"""How often the waiting search checks for a stop request."""


@dataclass(frozen=True)
class Job:
    """The training of one trial."""

    config: Config
    run_dir: Path
    tags: dict[str, str]  # of its MLflow run
    lock: int  # descriptor of the trial's lock, which both processes hold


@dataclass(frozen=True)
class TrialResult:
    """How a trial ended, and why where it is not complete."""

    state: Literal["complete", "pruned", "failed", "interrupted"]
    reason: str = ""


def run(
    job: Job, on_epoch: Callable[[dict[str, Any]], TrialResult | None], stop_requested: Callable[[], bool]
) -> TrialResult:
    """Train in a new process and return the result. The checkpoint is removed: the best settings are trained again.

    on_epoch: called with each epoch's record; a result that it returns ends the trial.
    """
    ours, theirs = Pipe()
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with (job.run_dir / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, str(theirs.fileno())],
            stdin=subprocess.PIPE,  # never written to: end of file tells the child that the search has exited
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno(), job.lock],
            start_new_session=True,  # Ctrl-C reaches the search only, which terminates the child
        )
    theirs.close()
    terminated = False
    result: TrialResult | None = None
    try:
        ours.send(job)
        while result is None:
            if stop_requested() and not terminated:
                process.terminate()
                terminated = True
            if not ours.poll(POLL_SECONDS):
                continue
            message = ours.recv()
            if isinstance(message, TrialResult):
                result = message
            else:
                ours.send(on_epoch(message))
    except (EOFError, ConnectionError):  # the child exited without a result
        result = _result_of_exit(process.wait(), terminated)
    finally:
        ours.close()
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        remove_checkpoint(job.run_dir)
    return result


def remove_checkpoint(run_dir: Path) -> None:
    """Remove the checkpoint of a trial, and the temporary file of one whose write was interrupted."""
    for path in run_dir.glob("*checkpoint.*"):
        path.unlink()


def _result_of_exit(status: int, terminated: bool) -> TrialResult:
    if terminated:
        return TrialResult("interrupted", "interrupted")
    if status >= 0:
        return TrialResult("failed", f"the training process exited with status {status}; see {LOG}")
    name = signal.Signals(-status).name
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return TrialResult("failed", f"the training process was killed by {name}{hint}; see {LOG}")


def _train(job: Job, search: Connection) -> TrialResult:
    """Train, in the child; after each epoch the search decides whether to continue."""
    result: TrialResult | None = None

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal result
        try:
            search.send(record)
            result = search.recv()
        except (EOFError, ConnectionError):
            result = TrialResult("interrupted", "the search process exited")
        if result:
            raise StopTraining(f"{result.state}: {result.reason}")

    try:
        with process_group(job.config.train.device) as world:
            stopped_by = train(job.config, world, None, job.run_dir, on_epoch, job.tags)
        return TrialResult("interrupted", "interrupted") if stopped_by else TrialResult("complete")
    except StopTraining:
        assert result is not None
        return result
    except UserError as e:
        return TrialResult("failed", str(e))
    except torch.OutOfMemoryError:
        traceback.print_exc()
        return TrialResult("failed", f"out of memory with batches of {job.config.encoder.batch_size}")
    except Exception as e:  # the search continues with the next trial, whatever it is
        traceback.print_exc()
        return TrialResult("failed", f"{type(e).__name__}: {one_line(e)}; see {LOG}")


def _terminate_with_the_search() -> None:
    """Wait until the search process has exited, which closes stdin, then stop as on SIGTERM."""
    sys.stdin.buffer.read()
    signal.raise_signal(signal.SIGTERM)


def child() -> None:
    """Entry point of the child process, whose argument is the descriptor of its end of the pipe."""
    threading.Thread(target=_terminate_with_the_search, daemon=True).start()
    search = Connection(int(sys.argv[1]))
    result = _train(search.recv(), search)
    with contextlib.suppress(ConnectionError):  # the search has exited; the next one finds the trial's lock free
        search.send(result)
