"""Does anything leak? An hour of loading and an hour of training, side by side: python benchmarks/soak.py

Two processes run for --minutes on the demo library (made when it is not there): the data graph alone, and
`python -m simsiam_dali.train`. Every ten seconds their memory, open files and threads are read from /proc. Flat means:
the median of the last quarter is at most 5% above that of the second, and no open file or thread is added. Ends
with 1 when something is not flat, or when a process ends early.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import machine
import torch
from tqdm import tqdm

from simsiam_dali.common.distributed import World, choose_device
from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.config.load import load_config, replace_settings
from simsiam_dali.data.shards import open_shards
from simsiam_dali.training.data import create_loader, log_mel_settings

ROOT = Path(__file__).resolve().parent.parent
GROWTH = 1.05
"""How much more memory counts as flat: allocators keep what the largest batch so far took."""
PERIOD = 10.0  # s
LEAST = 8
"""Readings below which quarters would say nothing."""


@dataclass
class Watched:
    """A process and its readings: seconds since the start, resident bytes, open files, threads."""

    name: str
    process: subprocess.Popen[bytes]
    readings: list[tuple[float, int, int, int]] = field(default_factory=list)

    def read(self, since: float) -> None:
        """Add a reading. Raises UserError when the process has ended."""
        if (status := self.process.poll()) is not None:
            raise UserError(f"{self.name} ended early with status {status}")
        proc = Path("/proc") / str(self.process.pid)
        pages = int((proc / "statm").read_text().split()[1])
        files, threads = (len(list((proc / folder).iterdir())) for folder in ("fd", "task"))
        self.readings.append((time.monotonic() - since, pages * os.sysconf("SC_PAGE_SIZE"), files, threads))

    def summary(self) -> dict[str, Any]:
        """Medians of the second and the last quarter, and whether they are flat."""
        n = len(self.readings) // 4
        quarters = {"second": self.readings[n : 2 * n], "last": self.readings[-n:]}
        medians = {
            name: dict(
                zip(("rss", "files", "threads"), (int(statistics.median(column)) for column in columns), strict=True)
            )
            for name, quarter in quarters.items()
            for columns in [list(zip(*quarter, strict=True))[1:]]
        }
        second, last = medians["second"], medians["last"]
        flat = last["rss"] <= GROWTH * second["rss"] and all(last[k] <= second[k] for k in ("files", "threads"))
        return medians | {"flat": flat, "minutes": self.readings[-1][0] / 60, "readings": self.readings}


def load_for_ever(shards: Path, config_file: Path) -> None:
    """The loader alone, batch after batch, until killed; reports every tenth batch."""
    config = load_config(config_file, command_line={"data.shards": shards})
    config = replace_settings(config, data__threads=1)
    opened = open_shards(shards)
    world = World(0, 1, choose_device("auto"))
    loader = create_loader(config, opened, log_mel_settings(config), world, "train", "views", True)
    for n, _ in enumerate(loader.endless(), 1):
        if n % 10 == 0:
            print(n * config.encoder.batch_size, flush=True)


def start(name: str, words: list[object], folder: Path) -> Watched:
    """A command of the project, its output in folder/name.log."""
    with (folder / f"{name}.log").open("wb") as log:
        process = subprocess.Popen([sys.executable, *map(str, words)], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    return Watched(name, process)


def watch(watched: list[Watched], minutes: float) -> None:
    """Read all of them until the time is up."""
    begun = time.monotonic()
    with tqdm(total=round(minutes * 60), unit="s", disable=None) as bar:
        while (elapsed := time.monotonic() - begun) < minutes * 60:
            time.sleep(min(PERIOD, minutes * 60 / LEAST))
            for one in watched:
                one.read(begun)
            bar.update(round(time.monotonic() - begun) - round(elapsed))


def demo_shards(folder: Path) -> Path:
    """The demo library, packed."""
    if not (folder / "shards" / "manifest.json").exists():
        for words in (
            ["tools/make_demo_music.py", folder / "music"],
            ["tools/make_shards.py", folder / "music", "--out", folder / "shards", "--segment-seconds", 10],
        ):
            subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, check=True)
    return folder / "shards"


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, default=60, metavar="MIN", help="how long, in minutes (default: %(default)s)")
    add("--shards", type=Path, metavar="DIR", help="what to read (default: the demo library, made for it)")
    add(
        "--config", type=Path, default=ROOT / "configs/demo.yaml", metavar="FILE", help="settings (default: the demo's)"
    )
    add("--json", type=Path, metavar="FILE", help="write the result here")
    add("--only-load", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.only_load:
        load_for_ever(args.shards, args.config)
        return
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # the two processes end with this one
    with tempfile.TemporaryDirectory(prefix="soak-") as name:
        folder = Path(name)
        shards = (args.shards or demo_shards(folder)).resolve()
        tracking = f"sqlite:///{folder / 'mlflow.db'}"
        watched = [
            start("loading", [__file__, "--only-load", "--shards", shards, "--config", args.config.resolve()], folder),
            start("training", [
                "-m", "simsiam_dali.train", "--config", args.config.resolve(), "--shards", shards,
                "--epochs", 1_000_000, "--run-name", "soak",
                "--set", f"train.runs_dir={folder}", "--set", f"mlflow.tracking_uri={tracking}",
            ], folder),
        ]  # fmt: skip
        try:
            watch(watched, args.minutes)
            journal = folder / "soak" / "metrics.jsonl"
            records = journal.read_text().splitlines() if journal.exists() else []
            if not (records and (steps := json.loads(records[-1])["step"])):
                raise UserError(f"the training has made no step in {args.minutes:g} minutes: give more --minutes")
            samples = {
                "loading": int((folder / "loading.log").read_text().split()[-1]),
                "training": steps * load_config(args.config).encoder.batch_size,
            }
        except (UserError, OSError, IndexError):
            for one in watched:
                print(f"--- {one.name}\n{(folder / f'{one.name}.log').read_text()[-2000:]}", file=sys.stderr)
            raise
        finally:
            for one in watched:
                one.process.send_signal(signal.SIGINT if one.name == "training" else signal.SIGTERM)
            for one in watched:
                one.process.wait()
    if watched[1].process.returncode != 128 + signal.SIGINT:
        raise UserError(f"training did not stop as it should: status {watched[1].process.returncode}")
    results = {one.name: one.summary() | {"samples": samples[one.name]} for one in watched}
    doc = {"environment": machine.environment(torch.device("cpu")), "results": results}
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(doc, indent=1) + "\n")
    print(
        f"{'':10} {'minutes':>8} {'samples':>9} {'MB, 2nd quarter':>16} {'MB, last':>9} {'files':>12} {'threads':>12}"
    )
    for name, result in results.items():
        second, last = result["second"], result["last"]
        pairs = [f"{second[key]} to {last[key]}" for key in ("files", "threads")]
        megabytes = second["rss"] / 1e6, last["rss"] / 1e6
        print(f"{name:10} {result['minutes']:8.1f} {result['samples']:9} {megabytes[0]:16.0f} {megabytes[1]:9.0f}"
              f" {pairs[0]:>12} {pairs[1]:>12}  {'flat' if result['flat'] else 'NOT FLAT'}")  # fmt: skip
    if leaking := [name for name, result in results.items() if not result["flat"]]:
        raise UserError(f"not flat: {', '.join(leaking)}")


if __name__ == "__main__":
    main()
