"""One trial, trained in a process of its own: a crash, a kill for want of memory or a leak ends it and not the search.

The few seconds that a process takes to start are little beside a trial. The pipe between the two carries each epoch's
record one way and, the other way, whether to go on; what the training prints goes to the trial's log.txt.
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
from simsiam_dali.common.errors import UserError
from simsiam_dali.config.schema import Config
from simsiam_dali.training.loop import train
from simsiam_dali.training.run import StopTraining

CHILD = "from simsiam_dali.search import trial; trial.child()"
LOG = "log.txt"
POLL_SECONDS = 0.2
"""How often the waiting search looks whether it was asked to stop."""


@dataclass(frozen=True)
class Job:
    """What a trial trains."""

    config: Config
    run_dir: Path
    tags: dict[str, str]  # of its MLflow run
    lock: int  # descriptor of the trial's lock, which both processes hold


@dataclass(frozen=True)
class Ending:
    """How a trial ended, and why where that needs saying."""

    state: Literal["complete", "pruned", "failed", "interrupted"]
    reason: str = ""


def run(job: Job, on_epoch: Callable[[dict[str, Any]], Ending | None], asked_to_stop: Callable[[], bool]) -> Ending:
    """Train, and say how that ended. The trial's checkpoint is not kept: what wins is trained again, for longer.

    on_epoch: gets each epoch's record; an Ending that it returns is the trial's.
    """
    ours, theirs = Pipe()
    job.run_dir.mkdir(parents=True, exist_ok=True)
    with (job.run_dir / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", CHILD, str(theirs.fileno())],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that the search is gone
            stdout=log,
            stderr=log,
            pass_fds=[theirs.fileno(), job.lock],
            start_new_session=True,  # Ctrl-C is for the search, which passes it on
        )
    theirs.close()
    asked = False
    ending: Ending | None = None
    try:
        ours.send(job)
        while ending is None:
            if asked_to_stop() and not asked:
                process.terminate()
                asked = True
            if not ours.poll(POLL_SECONDS):
                continue
            message = ours.recv()
            if isinstance(message, Ending):
                ending = message
            else:
                ours.send(on_epoch(message))
    except (EOFError, ConnectionError):  # it died without a word
        ending = _died(process.wait(), asked)
    finally:
        ours.close()
        assert process.stdin is not None
        process.stdin.close()
        process.wait()
        drop_checkpoint(job.run_dir)
    return ending


def drop_checkpoint(run_dir: Path) -> None:
    """Remove what `run` does not keep."""
    for path in run_dir.glob("checkpoint.*"):
        path.unlink()


def _died(status: int, asked: bool) -> Ending:
    if asked:
        return Ending("interrupted", "interrupted")
    if status >= 0:
        return Ending("failed", f"the training process ended with status {status}; see {LOG}")
    name = signal.Signals(-status).name
    hint = " (the system does that when memory runs out)" if name == "SIGKILL" else ""
    return Ending("failed", f"the training process was ended by {name}{hint}; see {LOG}")


def _train(job: Job, search: Connection) -> Ending:
    """The other side: train, asking the search after each epoch."""
    ending: Ending | None = None

    def on_epoch(record: dict[str, Any]) -> None:
        nonlocal ending
        try:
            search.send(record)
            ending = search.recv()
        except (EOFError, ConnectionError):
            ending = Ending("interrupted", "the search is gone")
        if ending:
            raise StopTraining(f"{ending.state}: {ending.reason}")

    try:
        with process_group(job.config.train.device) as w:
            stopped_by = train(job.config, w, None, job.run_dir, on_epoch, job.tags)
        return Ending("interrupted", "interrupted") if stopped_by else Ending("complete")
    except StopTraining:
        assert ending is not None
        return ending
    except UserError as e:
        return Ending("failed", str(e))
    except torch.OutOfMemoryError:
        traceback.print_exc()
        return Ending("failed", f"out of memory with batches of {job.config.encoder.batch_size}")
    except Exception as e:  # whatever it is, the search goes on with the next trial
        traceback.print_exc()
        return Ending("failed", f"{type(e).__name__}: {' '.join(str(e).split())[:200]}; see {LOG}")


def _end_with_the_search() -> None:
    """Wait until nobody holds the other end of stdin, then stop as by SIGTERM."""
    sys.stdin.buffer.read()
    signal.raise_signal(signal.SIGTERM)


def child() -> None:
    """The child process, whose first argument is the descriptor of its end of the pipe."""
    threading.Thread(target=_end_with_the_search, daemon=True).start()
    search = Connection(int(sys.argv[1]))
    ending = _train(search.recv(), search)
    with contextlib.suppress(ConnectionError):  # the search is gone, and the next one knows by the trial's lock
        search.send(ending)
