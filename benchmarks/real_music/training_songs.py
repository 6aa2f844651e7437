"""How many songs, and which, should an encoder learn from? python benchmarks/real_music/training_songs.py --json FILE

The recipe of `equal_time.py --part unheard`, for as many steps, learns from fewer of the same songs, drawn at random;
and from the songs that are scored, without their tags, as an owner's encoder learns from the owner's library. Songs are
embedded by stages; that result, in the repository, is the row of all songs.

FILE holds the scores of every song after every training: the same command continues where it was stopped.
"""

import argparse
import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import equal_time
import halves
import numpy as np
import run
from equal_time_scores import METRICS, STAGES, UNTRAINED_STAGES, by_seed, difference, newest, of_songs, shown

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.data.shards import open_shards

SIZES = (50, 150)
"""Songs that are learned from, of all that there are."""
SCORED = "the songs that are scored"
ROWS: dict[str, int] = {**{f"{size} songs": size for size in SIZES}, SCORED: 0}
"""What a row is called, and how many songs are drawn for it."""


@dataclass(frozen=True)
class Library:
    """sets: whole sets of soundtracks. folder: of what this benchmark makes."""

    sets: halves.Shards
    folder: Path

    def learned(self, row: str, seed: int) -> halves.Shards:
        """What a row's encoders learn from, packed where it is not there yet: other songs for each seed."""
        shards = halves.Shards(self.folder / f"{halves.slug(row)}-{seed}", self.sets.asked)
        shards.folder.mkdir(parents=True, exist_ok=True)
        for half in halves.HALVES:
            if row != SCORED:
                music = self.sets.folder / f"{half}-songs"
                songs = drawn(open_shards(self.sets.learned(half)).songs["path"], ROWS[row], seed)
                linked = [(music, song) for song in songs]
                halves.pack_linked(linked, shards, half, [halves.SEGMENT_SECONDS], halves.LEAST_SECONDS)
            elif not shards.learned(half).is_symlink():
                shards.learned(half).symlink_to(self.sets.asked[half], target_is_directory=True)
        return shards

    def epochs(self, shards: halves.Shards, half: str, epochs: int) -> int:
        """As many steps as `epochs` of all songs are."""
        every, own = (len(open_shards(of.learned(half)).segments) for of in (self.sets, shards))
        return round(epochs * every / own)


def drawn(songs: Any, size: int, seed: int) -> list[str]:
    """Songs by a hash of their names and the seed, so that no choice is ours; a larger draw has all of a smaller."""
    return sorted(songs, key=lambda song: hashlib.sha256(f"{seed}/{song}".encode()).hexdigest())[:size]


def training(row: str, half: str, seed: int, epochs: int) -> halves.Job:
    """A row's training, and its table."""
    return halves.Job(row, "simsiam", half, seed, {"encoder.epochs": epochs}, {row: ("--embedding", "stages")})


def songs_of(shards: halves.Shards, half: str) -> int:
    """How many songs a half learns from."""
    return len(open_shards(shards.learned(half)).songs)


def add_scores(doc: dict[str, Any], job: halves.Job, found: Mapping[str, np.ndarray], songs: int) -> None:
    """Put a training's scores into the document. songs: how many it learned from."""
    own = doc["scores"].setdefault(job.name, {}).setdefault(str(job.seed), {})
    own[job.trained_on] = {metric: found[metric].round(4).tolist() for metric in METRICS}
    doc["songs"].setdefault(job.name, {})[job.trained_on] = songs
    doc["soundtracks"][job.trained_on] = found["soundtrack/of"].tolist()


def page_lines(doc: Mapping[str, Any], recipe: Mapping[str, Any]) -> Iterator[str]:
    """The table of what has been trained. recipe: the document of `equal_time.py --part unheard`."""
    soundtracks, env = of_songs(doc, "soundtracks"), doc["environment"]
    if doc["soundtracks"] != recipe["soundtracks"]:
        raise UserError("the two results are of other songs: measure both again")
    every, untrained = recipe["scores"][STAGES], recipe["baselines"][UNTRAINED_STAGES]
    everything = "all other songs"
    rows = {**doc["scores"], everything: every}
    if SCORED in rows:  # last, since its songs are no more of the same ones
        rows[SCORED] = rows.pop(SCORED)
    songs = doc["songs"] | {everything: doc["all"]}
    yield "| learns from | songs | seeds | 5-NN | minus untrained | mAP@10 | minus untrained |"
    yield "|---|---|---|---|---|---|---|"
    for row, own in {"nothing (untrained)": untrained, **rows}.items():
        counts = dict.fromkeys(songs[row].values()) if row in songs else {}
        cells = [" and ".join(map(str, counts)), str(len(by_seed(own, METRICS[0])))]
        for metric in METRICS:
            gap = None if own is untrained else difference(own, untrained, metric)
            cells.append(f"{np.mean([*by_seed(own, metric).values()]):.3f}")
            cells.append("" if gap is None else shown(gap, soundtracks))
        yield f"| {row} | {' | '.join(cells)} |"
    yield ""
    for row, other in ((everything, f"{SIZES[0]} songs"), (SCORED, everything)):
        if not {row, other} <= rows.keys():  # not trained yet
            continue
        gaps = [difference(rows[row], rows[other], metric) for metric in METRICS]
        cells = [shown(gap, soundtracks) for gap in gaps if gap is not None]
        yield f"- {row}, minus {other}: 5-NN {cells[0]}, mAP@10 {cells[1]}"
    yield ""
    where = env["gpu"] or f"{env['cpu']}, {env['cores']} cores"
    scored = f"{len(soundtracks)} songs of {len(set(soundtracks))} soundtracks"
    yield f"{scored}; {where}; {env['date']}, commit {env['commit']}."


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    run.add_common(parser)
    parser.add_argument("--seeds", type=int, default=3, metavar="N", help="trainings of each row (default: 3)")
    args = parser.parse_args()
    if not args.json:
        raise UserError("--json FILE is needed: the scores of finished trainings are kept there")
    device, config, side_by_side = run.common(args)
    recipe = json.loads(newest("within-songs-unheard").read_text())
    work = args.work.resolve()
    sets = halves.prepare_sets(work / equal_time.UNHEARD, (args.music or work / equal_time.UNHEARD / "music").resolve())
    library = Library(sets, work / "training-songs")
    doc: dict[str, Any] = {"all": {}, "songs": {}, "scores": {}, "soundtracks": {}}
    if args.json.exists():
        doc = json.loads(args.json.read_text())
    doc["all"] = {half: songs_of(sets, half) for half in halves.HALVES}
    for seed in range(args.seeds):
        for row in ROWS:
            shards = library.learned(row, seed)
            jobs = [training(row, h, seed, library.epochs(shards, h, recipe["base_epochs"])) for h in halves.HALVES]
            halves.run_all(jobs, shards, library.folder, config, device, side_by_side)
            for job in jobs:
                found = equal_time.scored(job.table(library.folder, row), recipe["search"])
                add_scores(doc, job, found, songs_of(shards, job.trained_on))
            doc["environment"] = equal_time.machine.environment(device)
            equal_time.write(doc, args.json)
    print("\n".join(page_lines(doc, recipe)))


if __name__ == "__main__":
    main()
