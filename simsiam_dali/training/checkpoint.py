"""Exact resume: everything that determines the next step, in one file, written atomically.

The next loss depends on the weights, the optimizer's momentum, the gradient scaler, the random state, and each rank's
position in the data graph. The learning rate is a function of the step and needs no state.
"""

import hashlib
import io
import os
import pickle
import shutil
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from simsiam_dali.common.errors import UserError
from simsiam_dali.common.files import atomic_write

FORMAT_VERSION = 4
FILE_NAME = "checkpoint.pt"
PREVIOUS_NAME = "checkpoint.previous.pt"
"""The checkpoint before it, for when the newest cannot be read."""

_MARK = b"\nsha256 "
_SUM_BYTES = len(_MARK) + 64
_BLOCK = 1 << 20  # bytes read at once


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
    packing: dict[str, Any]  # how it was packed, so that other songs can be packed the same way
    mlflow_run: str | None
    seconds: float  # of training so far
    device: NotRequired[str]  # cpu or cuda, where it was saved; missing in older checkpoints
    outputs: NotRequired[list[torch.Tensor]]  # the main rank's latest, for the collapse gauges; missing in older ones
    identity: NotRequired[str]  # SHA-256 of the file, by which tables know it; the first file's after `move_shards`


def save(checkpoint: Checkpoint, path: Path) -> None:
    """Write the file atomically, with its checksum: `path` is the old file or the new one, never half of one.

    The old one stays as `checkpoint.previous.pt`, unless it is damaged. Raises UserError for a disk that is full or
    fails; nothing is lost then.
    """
    content = io.BytesIO()
    torch.save(checkpoint, content)
    content.write(_MARK + hashlib.sha256(content.getbuffer()).hexdigest().encode())
    try:
        with atomic_write(path) as part:
            part.write_bytes(content.getbuffer())
            if is_intact(path):  # or a damaged one would replace a good one
                _keep(path, path.with_name(PREVIOUS_NAME))
    except OSError as e:
        kept = "the checkpoint before it is kept" if path.exists() else "there is none before it"
        raise UserError(f"cannot write the checkpoint {path} ({e.strerror}); {kept}") from e


def move_shards(checkpoint: Checkpoint, shards: Path | str, path: Path) -> None:
    """Write a loaded checkpoint again, its shards at another place; its tables stay valid. Raises as `save`."""
    data = checkpoint["config"]["data"] | {"shards": str(shards)}
    save({**checkpoint, "config": checkpoint["config"] | {"data": data}}, path)


def _keep(path: Path, previous: Path) -> None:
    """Make `previous` the file that `path` is now. At every moment one of them exists."""
    previous.unlink(missing_ok=True)
    try:
        previous.hardlink_to(path)
    except OSError:  # a disk without hard links, such as exFAT
        shutil.copyfile(path, previous)


def is_intact(path: Path) -> bool:
    """Whether `path` is a whole checkpoint: its last bytes are the SHA-256 of all bytes before."""
    return _sha256_if_intact(path) is not None


def _sha256_if_intact(path: Path) -> str | None:
    """SHA-256 of the whole file, None unless it is intact."""
    try:
        with path.open("rb") as f:
            left = f.seek(0, os.SEEK_END) - _SUM_BYTES
            f.seek(0)
            digest = hashlib.sha256()
            while left > 0 and (block := f.read(min(left, _BLOCK))):
                digest.update(block)
                left -= len(block)
            if (end := f.read()) != _MARK + digest.hexdigest().encode():
                return None
            digest.update(end)
            return digest.hexdigest()
    except OSError:
        return None


def load(path: Path, option: str = "--resume") -> Checkpoint:
    """Read a checkpoint onto the CPU, with its `identity`; nothing in it is executed.

    Raises UserError for a file that is missing, damaged or of another format, and names the checkpoint before it where
    that one is intact. option: the option that the message suggests. torch loads a file with a flipped byte without an
    error, so the hash is compared first.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint {path}")
    if (sha256 := _sha256_if_intact(path)) is None:
        changed = f"its content is not what was written, or it is from before format {FORMAT_VERSION}"
        raise _refusal(f"checkpoint {path} is damaged or not a checkpoint: {changed}", path, option)
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as e:
        raise _refusal(f"{path} is not a checkpoint ({' '.join(str(e).split())[:120]})", path, option) from e
    if not isinstance(checkpoint, dict) or checkpoint.get("format_version") != FORMAT_VERSION:
        raise _refusal(f"{path} is not a checkpoint of this version (format {FORMAT_VERSION})", path, option)
    if missing := Checkpoint.__required_keys__ - checkpoint.keys():
        raise _refusal(f"{path} is not a checkpoint: it lacks {', '.join(sorted(missing))}", path, option)
    checkpoint.setdefault("identity", sha256)
    return checkpoint  # type: ignore[return-value]


def _refusal(why: str, path: Path, option: str) -> UserError:
    previous = path.with_name(PREVIOUS_NAME)
    if path.name != FILE_NAME or not is_intact(previous):
        return UserError(why)
    return UserError(f"{why}; the checkpoint before it is intact: {option} {previous}")


def find(run: str, runs_dir: Path, option: str = "--resume") -> Path:
    """The checkpoint that `--resume RUN` means: a file, a run's folder, a run's name, or "" for the newest run.

    option: the option that the message names.
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


def check_device(checkpoint: Checkpoint, device: torch.device, run_dir: Path) -> None:
    """Raise UserError for a run saved on the other kind of device: its data graph has other operators."""
    saved = checkpoint.get("device", device.type)
    if saved != device.type:
        wanted = {"cpu": "cpu", "cuda": "gpu"}[saved]
        raise UserError(
            f"{run_dir} was saved on {saved} and cannot continue on {device.type}, where the data graph has other"
            f" operators: resume with --device {wanted}, or start a new run"
        )


def rng_state(device: torch.device) -> dict[str, Any]:
    """The state of torch's generators on the CPU and on `device`."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"cpu": torch.get_rng_state(), "cuda": cuda}


def set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    """Restore what `rng_state` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"], device)
