"""Which duplicates `recommend --duplicates` finds: python benchmarks/duplicates.py --music DIR --checkpoint RUN

Of `--songs` songs below --music, drawn by a hash of their path, four copies are made: MP3 of 64 and of 192 kbit/s, Opus
of 96, and FLAC without the first 2 s and 6 dB quieter. All songs of 10 s and more and all copies are embedded, and the
pairs that the command finds are compared with those that are known: two files of one original.
"""

import argparse
import contextlib
import hashlib
import itertools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import av
import machine
import numpy as np
import torch

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.embedding.table import read_song_embeddings
from simsiam_dali.evaluation.knn import unit
from simsiam_dali.packing.find import AUDIO, find_songs
from simsiam_dali.recommendation import duplicates
from simsiam_dali.recommendation.fingerprint import Match
from simsiam_dali.recommendation.library import Library

ORIGINAL, TRIMMED = "original", "trimmed"
LOSSY = {"mp3-64": (".mp3", "libmp3lame", 64), "mp3-192": (".mp3", "libmp3lame", 192), "opus": (".opus", "libopus", 96)}
"""Folder of the copies -> suffix, encoder, kbit/s."""
FASTEST = {"libmp3lame": "9", "libopus": "0", "flac": "0"}
"""Compression levels: the worst that the encoders do of a bit rate."""
RATE = 48000  # Hz, of all copies: Opus has no 44100
TRIM_S, GAIN = 2, 0.5
LEAST_S, LONGEST_S = 10.0, 180.0
"""Below lie the games' sound effects; copies are made of songs that are not longer, which takes less time."""


def seconds(path: Path) -> float:
    """Length that the file states, 0 for one that FFmpeg does not open, which no copies can be made of."""
    try:
        with av.open(str(path)) as file:
            return (file.duration or 0) / av.time_base
    except av.error.FFmpegError:
        return 0.0


def blocks(path: Path) -> Iterator[np.ndarray]:
    """Stereo float32 `(2, samples)` at `RATE`; packets that do not decode are skipped, as by the packer."""
    resampler = av.AudioResampler(format="fltp", layout="stereo", rate=RATE)
    with av.open(str(path)) as file:
        for packet in file.demux(audio=0):
            with contextlib.suppress(av.error.FFmpegError):
                for frame in packet.decode():
                    yield from (part.to_ndarray() for part in resampler.resample(frame))
        yield from (part.to_ndarray() for part in resampler.resample(None))


def encode(path: Path, pcm: np.ndarray, codec: str, kbit_s: int | None = None) -> None:
    """Write stereo float32 `(2, samples)` at `RATE`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}")
    with av.open(str(part), "w", format=path.suffix[1:]) as file:
        stream = file.add_stream(codec, rate=RATE, layout="stereo", options={"compression_level": FASTEST[codec]})
        assert isinstance(stream, av.AudioStream)
        if kbit_s:
            stream.bit_rate = kbit_s * 1000
        for start in range(0, pcm.shape[1], RATE):
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(pcm[:, start : start + RATE]), "fltp", "stereo")
            frame.sample_rate, frame.pts = RATE, start
            file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    part.replace(path)


def make_copies(song: Path, name: str, folder: Path) -> None:
    """The four copies of a song, whichever are not there yet."""
    wanted = {folder / kind / f"{name}{how[0]}": how[1:] for kind, how in LOSSY.items()}
    trimmed = folder / TRIMMED / f"{name}.flac"
    if all(path.exists() for path in (*wanted, trimmed)):
        return
    pcm = np.concatenate(list(blocks(song)), axis=1)
    for path, (codec, kbit_s) in wanted.items():
        encode(path, pcm, codec, kbit_s)
    encode(trimmed, GAIN * pcm[:, TRIM_S * RATE :], "flac")


def prepare(music: Path, folder: Path, songs: int) -> None:
    """Link the songs of `music` into `folder`, and make the copies of some."""
    audio = [file for file in find_songs(music)[0] if file.path.suffix.lower() in AUDIO and not file.problem]
    lengths = {file: length for file in audio if (length := seconds(file.path)) >= LEAST_S}
    short = [file for file, length in lengths.items() if length <= LONGEST_S]
    if len(short) < songs:
        raise UserError(f"--songs {songs}: {music} has {len(short)} songs of {LEAST_S:g} to {LONGEST_S:g} s")
    for file in lengths:
        link = folder / ORIGINAL / file.name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(file.path.resolve())
    drawn = sorted(short, key=lambda file: hashlib.sha256(file.name.encode()).digest())[:songs]
    with ProcessPoolExecutor(machine.cores()) as pool:
        jobs = [pool.submit(make_copies, file.path, file.name, folder) for file in drawn]
        for number, job in enumerate(jobs, 1):
            job.result()
            print(f"\rcopies of {number} of {len(jobs)} songs", end="", flush=True)
    print()


def original_of(path: str) -> str:
    """The song that a path of the library is a file of."""
    kind, _, name = path.partition("/")
    return name if kind == ORIGINAL else name.rpartition(".")[0]


def embed(library: Path, checkpoint: str, out: Path) -> None:
    """Embed all files of the library."""
    command = ["-m", "simsiam_dali.embed", "--checkpoint", checkpoint, "--music", library, "--out", out]
    if subprocess.run([sys.executable, *map(str, command)]).returncode:
        raise UserError("embedding failed (see above)")


def measure(table: Path) -> dict[str, Any]:
    """Compare the pairs that the command finds with the known ones."""
    songs = read_song_embeddings(table)
    library = Library(songs.table, Path(songs.provenance["music"]).resolve())
    x, rows = unit(songs.vectors, whiten=False), np.arange(len(library))
    began = time.monotonic()
    pairs = set(map(tuple, duplicates.candidate_pairs(x, library.table["duration"].to_numpy(float), rows).tolist()))
    searched = time.monotonic()
    found = duplicates.find_duplicates(library, x, rows, machine.cores())
    seconds = time.monotonic() - searched
    song = [original_of(path) for path in library.path]
    known = {(a, b) for a, b in itertools.combinations(rows.tolist(), 2) if song[a] == song[b]}
    grouped = [itertools.combinations(sorted(copy.row for copy in group), 2) for group in found.groups]
    told = set(itertools.chain.from_iterable(grouped))
    wrong = {pair: match for pair, match in found.matches.items() if pair not in known}
    right = {pair: match for pair, match in found.matches.items() if pair in known}
    cosines = np.array([x[a] @ x[b] for a, b in sorted(known)])
    return {
        "files": len(library),
        "known_pairs": len(known),
        "candidates": {"pairs": len(pairs), "recall": len(pairs & known) / len(known), "seconds": searched - began},
        "found_pairs": len(told),
        "precision": len(told & known) / max(len(told), 1),
        "recall": len(told & known) / len(known),
        "seconds": seconds,
        "not_decoded": len(found.unread),
        "cosine_of_known_pairs": {"min": float(cosines.min()), "p01": float(np.quantile(cosines, 0.01))},
        "known": extremes(right.values(), max),
        "others": extremes(wrong.values(), min),
        "wrongly_found": [[library.path[row] for row in pair] for pair in sorted(told - known)],
        "missed": [[library.path[row] for row in pair] for pair in sorted(known - told)],
        "closest_others": [
            {"paths": [library.path[row] for row in pair], "bit_errors": round(match.bit_errors, 3),
             "same": round(match.same, 3), "overlap": round(match.overlap, 3)}
            for pair, match in sorted(wrong.items(), key=lambda item: -item[1].same)[:20]
        ],
    }  # fmt: skip


def extremes(matches: Iterable[Match], worst: Callable[..., float]) -> dict[str, float]:
    """The worst bit error rate and share of blocks of the known pairs, or the best of other pairs; and the medians."""
    compared = list(matches)
    if not compared:
        return {"pairs": 0}
    best = min if worst is max else max
    errors, same = [match.bit_errors for match in compared], [match.same for match in compared]
    name = "worst" if worst is max else "closest"
    return {
        "pairs": len(compared),
        "bit_errors_median": float(np.median(errors)),
        f"bit_errors_{name}": worst(errors),
        "same_median": float(np.median(same)),
        f"same_{name}": best(same),
    }


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="duplicates.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--music", type=Path, required=True, metavar="DIR", help="songs, each once")
    add("--checkpoint", required=True, metavar="RUN", help="a run trained on real music")
    add("--songs", type=int, default=100, metavar="N", help="songs that are copied (default: %(default)s)")
    add("--scratch", type=Path, metavar="DIR", help="keeps copies and table, for another start (default: temporary)")
    add("--json", type=Path, metavar="F", help="write the results here")
    return parser


@one_line_errors
def main() -> None:
    """The command."""
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.scratch or Path(temporary)
        prepare(args.music, folder / "library", args.songs)
        embed(folder / "library", args.checkpoint, folder / "embeddings.parquet")
        result = {"environment": machine.environment(torch.device("cpu")), "songs": args.songs}
        result |= measure(folder / "embeddings.parquet")
    found, candidates = (result[name] for name in ("found_pairs", "candidates"))
    print(
        f"{found} pairs found of {result['known_pairs']} in {result['files']} files: precision"
        f" {result['precision']:.4f}, recall {result['recall']:.4f}; {candidates['pairs']} candidates with a recall of"
        f" {candidates['recall']:.4f}; {result['seconds']:.0f} s"
    )
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
