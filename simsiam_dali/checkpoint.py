"""What makes a resumed run identical: everything that decides the next step, in one file, written atomically.

The next loss depends on the weights, the optimizer's momentum, the gradient scaler, the random state, and each rank's
place in the data graph. The learning rate is a function of the step and needs no state.
"""

import os
import pickle
from pathlib import Path
from typing import Any, TypedDict

import torch

from simsiam_dali.errors import UserError

FORMAT_VERSION = 2
FILE_NAME = "checkpoint.pt"


class Checkpoint(TypedDict):
    """Plain tensors, numbers and strings only, so that it loads with `weights_only=True`."""

    format_version: int
    config: dict[str, Any]  # the resolved tree, JSON types
    epoch: int  # whole epochs done
    step: int  # optimizer steps done since the start
    learner: dict[str, Any]  # encoder, optimizer, scaler
    rng: list[dict[str, Any]]  # per rank
    loaders: list[dict[str, Any]]  # per rank
    log_mel: dict[str, float]  # mean and std of the data set, dB
    shards: str  # fingerprint of the shard set
    packing: dict[str, Any]  # how it was packed, so that other songs can be cut the same way
    mlflow_run: str | None
    seconds: float  # of training so far


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write beside `path`, flush to the disk, then rename: `path` is the old file or the new one, never half of one."""
    part = path.with_suffix(".part")
    try:
        with part.open("wb") as f:
            torch.save(checkpoint, f)
            f.flush()
            os.fsync(f.fileno())
        part.replace(path)
    except (OSError, RuntimeError) as e:  # torch reports a full disk as a RuntimeError
        part.unlink(missing_ok=True)
        kept = "the one before is kept" if path.exists() else "there is none yet"
        raise UserError(f"cannot write the checkpoint {path} ({' '.join(str(e).split())[:200]}); {kept}") from e


def load(path: Path) -> Checkpoint:
    """Read a checkpoint onto the CPU. Raises UserError for what is missing, damaged or of another format."""
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(f"no checkpoint {path}") from None
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise UserError(f"checkpoint {path} is damaged or no checkpoint ({' '.join(str(e).split())[:120]})") from e
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        raise UserError(f"{path} is no checkpoint of this version (format {FORMAT_VERSION})")
    return checkpoint  # type: ignore[return-value]


def find(run: str, runs_dir: Path, option: str = "--resume") -> Path:
    """The checkpoint that `--resume RUN` means: a file, a run's folder, a run's name, or "" for the newest run.

    option: the word for `run` in what UserError says.
    """
    if not run:
        found = sorted(runs_dir.glob(f"*/{FILE_NAME}"), key=lambda p: p.stat().st_mtime)
        if not found:
            raise UserError(f"{option}: no run with a checkpoint in {runs_dir}/")
        return found[-1]
    for path in (Path(run), Path(run) / FILE_NAME, runs_dir / run / FILE_NAME):
        if path.is_file():
            return path
    raise UserError(f"{option} {run}: neither a checkpoint, nor a run's folder, nor a run in {runs_dir}/")


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's generators on the CPU and on `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Put back what `rng_state` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
