"""Real music in two halves, or whole sets of it, and what is trained on one part embedding another."""

import hashlib
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from simsiam_dali.common.errors import UserError
from simsiam_dali.data.shards import ShardSet, open_shards

ROOT = Path(__file__).resolve().parents[2]
HALVES = ("a", "b")
"""The two libraries that encoders learn from; each is asked about songs that are not in its own."""
SEGMENT_SECONDS = 20
"""How songs are cut where a job does not say otherwise."""
LEAST_SECONDS = 10
"""Below lie the games' sound effects."""
PACKING = ("--val-fraction", "0", "--codec", "wav")
"""WAV, since a core that trains has better to do than decode FLAC."""


def python(words: Sequence[object], log: Path | None = None, threads: int | None = None) -> None:
    """Run a command of the project, its output to `log` or this terminal. Raises UserError when it fails."""
    environment = dict(os.environ) | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    command = [sys.executable, *map(str, words)]
    if log is None:
        done = subprocess.run(command, cwd=ROOT, env=environment)
    else:
        with log.open("ab") as out:
            done = subprocess.run(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    if done.returncode:
        raise UserError(
            f"{' '.join(command[1:4])} failed with status {done.returncode}" + (f": see {log}" if log else "")
        )


@dataclass(frozen=True)
class Set:
    """Soundtracks: what fetches them into {folder}, and the shortest song that counts, s."""

    command: tuple[str, ...]
    least_seconds: int = LEAST_SECONDS


_FETCH = ("bash", "benchmarks/real_music/fetch.sh", "{folder}")
CHOOSE, REPORT, HELD_OUT = Set(_FETCH), Set((*_FETCH, "--report")), Set((*_FETCH, "--held-out"), 30)
FOURTH = Set((sys.executable, "benchmarks/real_music/fetch_listed.py", "fourth", "{folder}"), 30)
FIFTH = Set((sys.executable, "benchmarks/real_music/fetch_listed.py", "fifth", "{folder}"), 30)
"""Not one of `SETS`: no encoder learns from it."""
SETS = {"choose": CHOOSE, "report": REPORT, "held-out": HELD_OUT, "fourth": FOURTH}
ASKED_WHOLE = ("report", "held-out")
"""Of the sets, those that encoders of all others are asked about: nothing about these recipes was chosen on them."""


def fetch(of: Set, music: Path) -> None:
    """Fetch what is not there yet of a set. Raises UserError where not all of it can be had."""
    if subprocess.run([word.format(folder=music) for word in of.command], cwd=ROOT).returncode:
        raise UserError(f"not all of the music could be fetched into {music} (see above)")


@dataclass(frozen=True)
class Shards:
    """folder: of the shards that are learned from. asked: half learned from -> the shards that are embedded then."""

    folder: Path
    asked: Mapping[str, Path]

    def learned(self, half: str, segment_seconds: int = SEGMENT_SECONDS) -> Path:
        """What a half has in segments of this length, s."""
        return self.folder / (half if segment_seconds == SEGMENT_SECONDS else f"{half}-{segment_seconds}s")


def halves_of(folder: Path) -> Shards:
    """A set cut in two: who learns from one half is asked about the other."""
    return Shards(folder, {half: folder / other(half) for half in HALVES})


def sets_of(folder: Path) -> Shards:
    """Whole sets: who learns from all but one is asked about that one."""
    return Shards(folder, {half: folder / name for half, name in zip(HALVES, ASKED_WHOLE, strict=True)})


def fifth_of(folder: Path) -> Shards:
    """The fifth set: who learns from whole sets, as in `sets_of`, is asked about it, whichever they are."""
    return Shards(folder, dict.fromkeys(HALVES, folder / "fifth"))


def prepare(folder: Path, music: Path, of: Set = CHOOSE, lengths: Collection[int] = (SEGMENT_SECONDS,)) -> Shards:
    """Fetch a set into `music` and pack both halves below `folder`, whatever of it is not there yet.

    lengths: of segments, s; each has a pair of halves.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fetch(of, music)
    everything = folder / "all"
    if not (everything / "manifest.json").exists():
        pack(music, everything, SEGMENT_SECONDS, of.least_seconds)
    half_of = split(open_shards(everything).songs["path"])
    shards = halves_of(folder)
    for half in HALVES:
        songs = [(music, path) for path, own in half_of.items() if own == half]
        pack_linked(songs, shards, half, lengths, of.least_seconds)
    return shards


def prepare_sets(folder: Path, music: Path, lengths: Collection[int] = (SEGMENT_SECONDS,)) -> Shards:
    """Fetch all sets into `music`, and pack those that are asked about, and for each of them all others together."""
    shards = sets_of(folder)
    for name, of in SETS.items():
        fetch(of, music / name)
    for half, name in zip(HALVES, ASKED_WHOLE, strict=True):
        if not (shards.asked[half] / "manifest.json").exists():
            pack(music / name, shards.asked[half], SEGMENT_SECONDS, SETS[name].least_seconds)
        others = [music / one for one in SETS if one != name]
        songs = [(one, str(path.relative_to(one))) for one in others for path in one.rglob("*") if path.is_file()]
        pack_linked(songs, shards, half, lengths, LEAST_SECONDS)
    return shards


def prepare_fifth(folder: Path, sets: Shards, music: Path, lengths: Collection[int] = (SEGMENT_SECONDS,)) -> Shards:
    """Fetch the fifth set into `music`, and pack it. sets: the whole sets, with segments of these lengths, s."""
    shards = fifth_of(folder)
    fetch(FIFTH, music / "fifth")
    asked = shards.asked[HALVES[0]]
    if not (asked / "manifest.json").exists():
        pack(music / "fifth", asked, SEGMENT_SECONDS, FIFTH.least_seconds)
    folder.mkdir(parents=True, exist_ok=True)
    for half, seconds in itertools.product(HALVES, lengths):
        if not shards.learned(half, seconds).is_symlink():
            shards.learned(half, seconds).symlink_to(sets.learned(half, seconds), target_is_directory=True)
    return shards


def pack_linked(
    songs: Iterable[tuple[Path, str]], shards: Shards, half: str, lengths: Collection[int], least_seconds: int
) -> None:
    """Pack songs, each a folder and its path below it, for a half to learn from, where they are not packed yet."""
    music = shards.folder / f"{half}-songs"
    missing = [seconds for seconds in lengths if not (shards.learned(half, seconds) / "manifest.json").exists()]
    if missing:
        shutil.rmtree(music, ignore_errors=True)
        for folder, path in songs:
            (music / path).parent.mkdir(parents=True, exist_ok=True)
            link = os.link if same_disk(folder, shards.folder) else shutil.copy
            link(folder / path, music / path)
    for seconds in missing:
        pack(music, shards.learned(half, seconds), seconds, least_seconds)


def pack(music: Path, shards: Path, segment_seconds: int, least_seconds: int) -> None:
    """Pack all songs of a folder, to train on."""
    lengths = ["--segment-seconds", segment_seconds, "--min-seconds", least_seconds]
    python(["tools/make_shards.py", music, "--out", shards, *lengths, *PACKING])


def same_disk(one: Path, other: Path) -> bool:
    """Whether a hard link can be made between the two."""
    return one.stat().st_dev == other.stat().st_dev


def provenance(shards: ShardSet, encoder_type: str, embedding: str) -> dict[str, str]:
    """What a table says of itself whose encoder is none of the project's runs."""
    return {
        "features": "checkpoint",
        "rows": "songs",
        "encoder_type": encoder_type,
        "embedding": embedding,
        "checkpoint": "",
        "checkpoint_sha256": "",
        "music": shards.manifest.music,
        "shards": shards.fingerprint,
        "view_seconds": f"{shards.segment_seconds:g}",
        "mlflow_run": "",
        "tracking_uri": "",
    }


def soundtrack(path: str) -> str:
    """The package that a song of this path came with."""
    return path.partition("/")[0]


def split(paths: Iterable[str]) -> dict[str, str]:
    """Each song's half: every second song of a soundtrack, in the order of a hash, so that no choice is ours."""
    half: dict[str, str] = {}
    counts: dict[str, int] = {}
    for path in sorted(paths, key=lambda p: hashlib.sha256(p.encode()).hexdigest()):
        place = counts[soundtrack(path)] = counts.get(soundtrack(path), -1) + 1
        half[path] = HALVES[place % 2]
    return half


@dataclass(frozen=True)
class Job:
    """A training on one half, and the tables it makes of the other.

    kind: an encoder type, or lightly. settings: dotted key to value, over the config file. tables: the row of the
    result that a table is for, to its options of `simsiam_dali.embed`; lightly makes one table. segment_seconds: of the
    shards it learns from.
    """

    name: str
    kind: str
    trained_on: str
    seed: int
    settings: dict[str, object]
    tables: dict[str, tuple[str, ...]]
    segment_seconds: int = SEGMENT_SECONDS

    def table(self, folder: Path, row: str) -> Path:
        """Where a table lies."""
        return folder / "tables" / f"{slug(row)}-{self.trained_on}-{self.seed}.parquet"

    def missing(self, folder: Path) -> dict[str, tuple[str, ...]]:
        """Of its tables, those that are not there yet."""
        return {row: options for row, options in self.tables.items() if not self.table(folder, row).exists()}


def slug(name: str) -> str:
    """A row's name as a file's."""
    return "".join(c if c.isalnum() or c in ".-" else "-" for c in name)


def other(half: str) -> str:
    """The half that is not learned from."""
    return HALVES[1 - HALVES.index(half)]


def run(job: Job, shards: Shards, folder: Path, config: Path, device: torch.device, threads: int | None) -> None:
    """Train and embed what is not there yet. folder: where the results go."""
    wanted = job.missing(folder)
    name = f"{slug(job.name)}-{job.trained_on}-{job.seed}"
    log = folder / "logs" / f"{name}.log"
    for directory in ("logs", "tables", "runs"):
        (folder / directory).mkdir(parents=True, exist_ok=True)
    sets = [word for key, value in job.settings.items() for word in ("--set", f"{key}={value}")]
    learned_from = shards.learned(job.trained_on, job.segment_seconds)
    to_embed = shards.asked[job.trained_on]  # all rows are asked about the same audio
    source = ["--config", config, "--shards", learned_from, "--seed", job.seed]
    if job.kind == "lightly":
        (row,) = wanted
        words = ["--embed", to_embed, "--out", job.table(folder, row), *sets]
        python(["benchmarks/real_music/peer.py", *source, *words], log, threads)
        return
    training = folder / "runs" / name
    if (training / "checkpoint.pt").exists():
        python(["-m", "simsiam_dali.train", "--resume", training], log, threads)
    else:
        words = ["--encoder-type", job.kind, "--run-name", name, "--set", f"train.runs_dir={folder / 'runs'}", *sets]
        python(["-m", "simsiam_dali.train", *source, *words], log, threads)
    for row, options in wanted.items():
        words = ["--checkpoint", training, "--shards", to_embed, "--device", device.type]
        if device.type == "cuda":
            words[-1] = "gpu"
        python(["-m", "simsiam_dali.embed", *words, "--out", job.table(folder, row), *options], log, threads)


def run_all(
    jobs: Sequence[Job], shards: Shards, folder: Path, config: Path, device: torch.device, side_by_side: int
) -> int:
    """`run` each job that lacks a table, several at once: on a CPU a training on each core does more than one on all.

    Returns how many there were.
    """
    jobs = [job for job in jobs if job.missing(folder)]
    threads = max(1, len(os.sched_getaffinity(0)) // side_by_side) if device.type == "cpu" else None
    with ThreadPoolExecutor(side_by_side) as pool, tqdm(total=len(jobs), unit="training") as bar:
        futures = [pool.submit(run, job, shards, folder, config, device, threads) for job in jobs]
        try:
            for future in futures:
                future.result()
                bar.update()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return len(jobs)
