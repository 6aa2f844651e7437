"""How well do tables of embeddings find soundtracks? python benchmarks/real_music/score.py NAME=TABLE[,TABLE...] ...

Each NAME is an encoder or a baseline; its tables are of its seeds, all of the same songs, in folders by soundtrack. A
song is looked for among all others: 5-NN and mAP@10 as in run.py, and the differences from the first name, paired by
seed (a name with one table has it for all) with 95% intervals over seeds and soundtracks.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import equal_time_scores
import numpy as np
import run

from simsiam_dali.common.errors import UserError, one_line_errors
from simsiam_dali.embedding.table import read_song_embeddings

KINDS = {"5-NN": "knn", "mAP@10": "map"}


def named(text: str) -> tuple[str, list[Path]]:
    """A name and its tables, from NAME=TABLE,TABLE."""
    name, found, files = text.partition("=")
    if not (name and found and files):
        raise UserError(f"{text!r} is not NAME=TABLE[,TABLE...]")
    return name, [Path(file) for file in files.split(",")]


def table_lines(tables: Mapping[str, Sequence[Path]]) -> Iterator[str]:
    """The Markdown table. Raises UserError where tables are of other songs, or numbers of seeds differ."""
    found = {name: [run.of_each_song(path) for path in paths] for name, paths in tables.items()}
    songs = {name: [read_song_embeddings(path).table["path"].tolist() for path in own] for name, own in tables.items()}
    first, asked = next(iter(found.values())), next(iter(songs.values()))[0]
    soundtracks = first[0]["soundtrack/of"]
    for name, own in found.items():
        if any(each != asked for each in songs[name]):
            raise UserError(f"{name} is of other songs")
        if len(own) not in (1, len(first)):
            raise UserError(f"{name} has {len(own)} tables, and the first name has {len(first)}")
    yield "| | seeds | " + " | | ".join(KINDS) + " | |"
    yield "|---" * (2 + 2 * len(KINDS)) + "|"
    for name, own in found.items():
        cells = [str(len(own))]
        for kind in KINDS.values():
            each, base = (np.stack([scores[f"soundtrack/{kind}"] for scores in row]) for row in (own, first))
            cells.append(f"{each.mean():.3f}")
            cells.append("" if own is first else equal_time_scores.shown(each - base, soundtracks))
        yield f"| {name} | {' | '.join(cells)} |"
    yield ""
    yield f"{len(soundtracks)} songs of {len(np.unique(soundtracks))} soundtracks."


@one_line_errors
def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tables", nargs="+", metavar="NAME=TABLE", help="a name and the tables of its seeds")
    args = parser.parse_args()
    tables = dict(map(named, args.tables))
    if len(tables) < len(args.tables):
        raise UserError("a name is given twice: give its tables together, NAME=TABLE,TABLE")
    print("\n".join(table_lines(tables)))


if __name__ == "__main__":
    main()
