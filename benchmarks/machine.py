"""What the numbers were measured on, and how much memory is in use."""

import importlib.metadata
import os
import platform
import re
import subprocess
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "torch",
    "torchvision",
    "torchaudio",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "webdataset",
    "soundfile",
)
_ROOT = Path(__file__).resolve().parent.parent


def environment(device: torch.device) -> dict[str, Any]:
    """Machine, versions, date and commit. No host name, no path."""
    gpu = torch.cuda.get_device_properties(device) if device.type == "cuda" else None
    return {
        "cpu": cpu_model(),
        "cores": cores(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "gpu": gpu and gpu.name,
        "gpu_memory_gb": gpu and round(gpu.total_memory / 1e9, 1),
        "cuda": torch.version.cuda if gpu else None,
        "python": platform.python_version(),
        "kernel": platform.release(),
        "versions": versions(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": commit(),
    }


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_model() -> str:
    """As the kernel names it."""
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1].strip() if found else platform.machine()


def versions() -> dict[str, str]:
    """Of the installed packages that the numbers depend on."""
    installed = {}
    for name in PACKAGES:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return installed


def commit() -> str | None:
    """The short commit, with + when files differ from it; None outside a checkout."""
    if not (_ROOT / ".git").exists():  # installed, maybe inside somebody else's checkout
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "simsiam_dali", "benchmarks/*.py")
        return git("rev-parse", "--short", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _family() -> list[int]:
    """This process and its children: a DataLoader's workers."""
    children = [
        int(pid) for task in Path("/proc/self/task").iterdir() for pid in (task / "children").read_text().split()
    ]
    return [os.getpid(), *children]


def _status_bytes(field: str) -> int:
    total = 0
    for pid in _family():
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:  # it has ended meanwhile
            continue
        if found := re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE):
            total += int(found[1]) * 1024
    return total


def host_bytes() -> int:
    """Resident memory of this process and its workers; pages they share count in each."""
    return _status_bytes("VmRSS")


def host_peak_bytes() -> int:
    """Their highest resident memory so far, one by one."""
    return _status_bytes("VmHWM")


def gpu_bytes_in_use(device: torch.device) -> int:
    """GPU memory in use on the whole device, by anyone; 0 for the CPU."""
    if device.type != "cuda":
        return 0
    free, total = torch.cuda.mem_get_info(device)
    return total - free
