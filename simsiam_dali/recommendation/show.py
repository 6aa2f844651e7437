"""Show chosen songs: a table for the terminal, and entries for playlists."""

import os
from pathlib import Path

from rich.cells import cell_len, chop_cells

from simsiam_dali.common.errors import printable
from simsiam_dali.common.table import table_lines
from simsiam_dali.recommendation.choose import Choice
from simsiam_dali.recommendation.library import Library
from simsiam_dali.recommendation.playlists import Entry


def terminal_table(library: Library, choice: Choice) -> list[str]:
    """The choice as a table for a terminal; paths are relative to the music folder."""
    head = ("", "similarity" if "similarity" in choice.scores else "rating", "artist - title", "album", "path")
    rows = [
        (
            str(i + 1),
            choice.score_text(i),
            truncate(library.name(row), 50),
            truncate(library.album[row], 30),
            printable(library.path[row]),
        )
        for i, row in enumerate(choice.rows)
    ]
    return table_lines(head, rows)


def truncate(text: str, columns: int) -> str:
    """`text` without control characters, cut where it is wider than `columns` on a terminal."""
    text = printable(text)
    return text if cell_len(text) <= columns else f"{chop_cells(text, columns - 1)[0]}…"


def playlist_entries(library: Library, choice: Choice, relative_to: Path | None) -> list[Entry]:
    """The choice for playlists, with absolute paths or paths relative to a folder."""
    name = next(iter(choice.scores)).replace("_", " ")
    entries = []
    for i, row in enumerate(choice.rows):
        file = library.file(row)
        entries.append(
            Entry(
                path=os.path.relpath(file, relative_to.resolve()) if relative_to else str(file),
                artist=library.artist[row],
                title=library.title[row],
                album=library.album[row],
                seconds=float(library.table["duration"].iloc[row]),
                scores={name: float(values[i]) for name, values in choice.scores.items()},
                note=f"{name} {choice.score_text(i)}",
            )
        )
    return entries
