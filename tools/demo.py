"""From no music at all to a playlist: python tools/demo.py [DIR] [--seed N]

Writes a small library by synthesis (tools/make_demo_music.py), packs it, trains an encoder on it without labels, embeds
all songs, evaluates the embeddings and asks for the songs nearest to one: each is a command that works the same on your
own music. What the commands print goes to DIR/log.txt. Run again, it keeps the library and trains anew.
"""

import argparse
import os
import resource
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from simsiam_dali.common.errors import UserError, one_line_errors

ROOT = Path(__file__).resolve().parent.parent
PACKING = ("--segment-seconds", "10", "--val-fraction", "0.15", "--sample-rate", "8000", "--codec", "wav")
NEIGHBOURS = 5
# One thread for torch: beside the loader's two, a second would wait for the first more than it helps in layers this
# narrow; and the order of a sum, so the result, does not depend on the number of cores.
ENVIRONMENT = {"PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": "1"}
SENTENCE = "the nearest song "
SHOWN = 100  # characters of the line that a command printed last


@dataclass(frozen=True)
class Stage:
    """One command, what it does in a few words, and what it took: seconds, and CPU seconds of all its processes."""

    does: str
    command: str
    printed: str
    seconds: float
    cpu_seconds: float


@dataclass(frozen=True)
class Done:
    """All stages, and where things are."""

    stages: list[Stage]
    run: Path
    playlist: Path

    @property
    def sentence(self) -> str:
        """Of how many songs the nearest is by the same artist, as the evaluation said it."""
        (line,) = {line for line in self.stages[-2].printed.splitlines() if line.startswith(SENTENCE)}
        return line

    @property
    def neighbours(self) -> str:
        """The table of the songs nearest to one."""
        return self.stages[-1].printed.partition("\nwrote ")[0].rstrip()


class Show:
    """Runs commands, shows where they are, and keeps what they print in `log`."""

    def __init__(self, log: Path, number: int) -> None:
        self._log, self._number, self._done = log, number, list[Stage]()

    def run(self, does: str, *words: object) -> None:
        """Run `python WORDS`. Raises UserError, with the last lines that it printed, when that fails."""
        command = shlex.join(["python", *map(str, words)])
        head = f"{len(self._done) + 1}/{self._number}  {does}"
        live = sys.stdout.isatty()
        print(head, end=" ", flush=True)
        printed: list[str] = []
        begun, cpu = time.perf_counter(), _cpu_seconds()
        with self._log.open("a") as log:
            log.write(f"\n$ {command}\n")
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                cwd=ROOT,
                env=os.environ | ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
            )
            assert process.stdout is not None
            for line in process.stdout:  # progress bars end their lines too: text mode takes \r for \n
                if "%|" in line:
                    continue
                log.write(line)
                printed.append(line)
                if live and line.strip():
                    print(f"\r\033[K{head}  {line.strip()[:SHOWN]}", end="", flush=True)
        if process.wait():
            raise UserError(f"{command} failed:\n{''.join(printed[-10:])}\nall that was printed is in {self._log}")
        seconds = time.perf_counter() - begun
        print(f"\r\033[K{head}  {seconds:.0f} s" if live else f" {seconds:.0f} s", flush=True)
        self._done.append(Stage(does, command, "".join(printed), seconds, _cpu_seconds() - cpu))

    @property
    def stages(self) -> list[Stage]:
        """What has been run."""
        return self._done


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(folder: Path, seed: int) -> Done:
    """All stages in `folder`; `seed` is the library's and the training's. Raises UserError when one fails."""
    folder.mkdir(parents=True, exist_ok=True)
    music, shards = folder / "music", folder / "shards"
    made = folder / "runs" / time.strftime("%Y%m%d-%H%M%S")
    table, playlist = made / "embeddings.parquet", made / "playlist.m3u8"
    show = Show(folder / "log.txt", number=6)
    show.run("write 192 songs by 48 artists", "tools/make_demo_music.py", music, "--seed", seed)
    show.run("pack them into shards", "tools/make_shards.py", music, "--out", shards, *PACKING)
    show.run(
        "train an encoder, without labels", "-m", "simsiam_dali.train", "--config", "configs/demo.yaml",
        "--encoder-type", "simsiam", "--shards", shards, "--seed", seed, "--run-name", made.name,
        "--set", f"train.runs_dir={made.parent}", "--set", f"mlflow.tracking_uri=sqlite:///{folder}/mlflow.db",
    )  # fmt: skip
    show.run("embed the songs", "-m", "simsiam_dali.embed", "--checkpoint", made, "--out", table, "--baselines")
    show.run(
        "evaluate the embeddings", "-m", "simsiam_dali.evaluate", "--embeddings", table, "--out", made / "evaluation",
        "--resamples", 200,
    )  # fmt: skip
    song = min(path for path in music.rglob("01 - *") if "Various Artists" not in path.parts)
    show.run(
        "ask for the songs nearest to one", "-m", "simsiam_dali.recommend", "--embeddings", table, "--like", song,
        "--count", NEIGHBOURS, "--m3u8", playlist,
    )  # fmt: skip
    return Done(show.stages, made, playlist)


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path("demo"), metavar="DIR",
                        help="where everything goes (default: %(default)s)")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, metavar="N",
                        help="random seed of the library and of the training (default: %(default)s)")  # fmt: skip
    args = parser.parse_args()
    try:
        done = run(args.folder.resolve(), args.seed)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    evaluation = done.run / "evaluation"
    print(f"\n{done.sentence}\n\n{done.neighbours}\n")
    print(f"report    {_shown(evaluation / 'report.html')}")
    print(f"map       {_shown(evaluation / 'map.html')}")
    print(f"playlist  {_shown(done.playlist)}")
    print(f"log       {_shown(args.folder.resolve() / 'log.txt')}")
    python, table = _shown(Path(sys.executable)), _shown(done.run / "embeddings.parquet")
    print(f"listen    {python} -m simsiam_dali.serve {shlex.quote(str(table))}")


def _shown(path: Path) -> Path:
    """As the user would type it."""
    here = Path.cwd()
    return path.relative_to(here) if path.is_relative_to(here) else path


if __name__ == "__main__":
    main()
